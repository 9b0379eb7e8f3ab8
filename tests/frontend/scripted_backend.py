# SPDX-License-Identifier: MIT
"""A backend of a block device that does in xenstore what a test says, and nothing else: it maps no ring."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import paravirt
from paravirt.frontend.vbd import Disk
from paravirt.host import device as devices
from paravirt.protocol.vbd import VbdConfig, VbdOffer
from paravirt.protocol.xenbus import DevicePath, XenbusState
from paravirt.xenstore import xenbus

S = XenbusState
DEADLINE_S = 20.0
OFFER = VbdOffer(2048, 512).to_keys()


class ScriptedBackend:
    """The only backend of a host, whose own one is stopped, and the domain that opens the disk."""

    def __init__(self, host: paravirt.Host) -> None:
        host._backend.stop()
        self.store, self.domain = host.store, host.create_domain("guest")
        self.path = DevicePath("vbd", self.domain.domid, 51712)
        config, frontend = VbdConfig("null", "1M", "xvda").to_keys(), {"virtual-device": "51712"}
        self.store.transact(lambda transaction: devices._create(transaction, self.path, config, frontend, "disk xvda"))
        self._pool = ThreadPoolExecutor(2)

    def write(self, state: XenbusState, keys: dict[str, str] | None = None) -> None:
        """Our state, also when it is that already, with other keys."""
        for name, value in (keys or {}).items():
            self.store.write(f"{self.path.backend}/{name}", value)
        self.store.write(f"{self.path.backend}/state", str(int(state)))

    def offer(self, keys: dict[str, str] | None = None, *, without: tuple[str, ...] = ()) -> None:
        """INIT_WAIT, with what a backend publishes but for `without`, and other values for `keys`."""
        given = {**OFFER, **(keys or {})}
        self.write(S.INIT_WAIT, {name: value for name, value in given.items() if name not in without})

    def frontend(self) -> XenbusState:
        return xenbus.read_state(self.store, self.path.frontend)

    def keys(self, *names: str) -> dict[str, str]:
        """Of the frontend's."""
        return xenbus.read_keys(self.store, self.path.frontend, names)

    def expect(self, state: XenbusState) -> None:
        """That the frontend comes to this state."""
        queue = self.store.watch_queue()
        queue.add(f"{self.path.frontend}/state")
        deadline = time.monotonic() + DEADLINE_S
        while (now := self.frontend()) is not state:
            assert time.monotonic() < deadline, f"the frontend stays {now.name}, not {state.name}"
            queue.get(timeout_s=0.2)
        queue.close()

    def beside(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> "Future[Any]":
        """A call that waits for us."""
        return self._pool.submit(call, *arguments, **options)

    def open(self, **options: Any) -> "Future[Disk]":
        """The domain opens its disk, which takes until we have played our part."""
        return self.beside(self.domain.open_disk, "xvda", timeout_s=options.pop("timeout_s", DEADLINE_S), **options)

    def connect(self) -> Disk:
        """In good order."""
        opening = self.open()
        self.offer()
        self.expect(S.INITIALISED)
        self.write(S.CONNECTED)
        disk: Disk = opening.result(DEADLINE_S)
        self.expect(S.CONNECTED)
        return disk

    def finish(self, disk: Disk) -> None:
        """We go, and so does the frontend."""
        self.write(S.CLOSED)
        self.expect(S.CLOSED)
        disk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
