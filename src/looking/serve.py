# SPDX-License-Identifier: MIT
"""A recording in the place of a device: a back end in a domain of its own, so that no other one is in its way."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from paravirt.backend.service import DeviceService
from paravirt.errors import InvalidRequest, ParavirtError
from paravirt.frontend.domain import Domain
from paravirt.host import device as devices
from paravirt.host import domains
from paravirt.hypervisor.client import Hypervisor
from paravirt.looking.compare import Report
from paravirt.looking.messages import rewriter_for
from paravirt.looking.replay_to_front import ReplayDevice, ReplayEngine
from paravirt.protocol.recording import Header, Reader, Record
from paravirt.protocol.vbd import QUEUES_KEY
from paravirt.protocol.xenbus import DevicePath
from paravirt.xenstore.client import XenstoreClient

SLICE_S = 0.05
_NOT_REPLAYED = frozenset(("state", "online", "frontend", "frontend-id", "hotplug-status", "hotplug-error", QUEUES_KEY))


def recorded_device(header: Header) -> tuple[str, int]:
    """Class and number of the device that was recorded. Raises `InvalidRequest` when the recording does not say."""
    kind, _, rest = header.device.partition("/")
    number = rest.split("/")[1] if rest.count("/") else ""
    if not kind.replace("_", "").isalnum() or not number.isdecimal() or len(number) > 10:
        raise InvalidRequest(f"{header.device!r} is no device: say which one is meant")
    return kind, int(number)


class FrontReplay:
    """A device of a domain that answers as a recording says. A context manager; on exit the device is gone.

    To be used by Dom0. The domain opens it as it would open the real one.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        domid: int,
        file: Path,
        *,
        header: Header | None = None,
        device: tuple[str, int] | None = None,
        speed: float = 1.0,
        fill: bool = False,
    ) -> None:
        """`header`: the recording's, with the layout of its messages where the file lacks it. `device`: class and
        number; None: as recorded. `speed`: as for `BackReplay.run`. `fill`: write a pattern into pages that are read.

        Raises `InvalidRequest`, `AlreadyExists` (the domain has such a device), and as `devices.attach`.
        """
        with file.open("rb") as opened:
            self.header = header or Reader(opened).header
        rewriter_for(self.header)
        self._file = file
        self._engine: ReplayEngine | None = None
        self._torn: str | None = None
        kind, number = device or recorded_device(self.header)
        with ExitStack() as stack:
            info = domains.create(hypervisor, store, f"replay-{os.getpid()}-{domid}-{number}", isolated=False)
            stack.callback(domains.destroy, hypervisor, store, info.domid)
            fd = hypervisor.domain_socket(info.domid)
            backend = stack.enter_context(Domain(Hypervisor.from_fd(fd)))
            self.path = DevicePath(kind, domid, number, info.domid)
            make = partial(
                ReplayDevice,
                header=self.header,
                records=self._records,
                speed=speed,
                fill=fill,
                on_start=self._started,
            )
            stack.enter_context(DeviceService(backend.hypervisor, backend.store, kind, make))
            self._attach(stack, store, kind, number)
            self._stack = stack.pop_all()

    def _attach(self, stack: ExitStack, store: XenstoreClient, kind: str, number: int) -> None:
        name = f"{kind} {number}"
        keys = {key: text for key, text in self.header.offer.items() if key not in _NOT_REPLAYED}
        frontend_keys = {"virtual-device": str(number), "device-type": "disk"} if kind == "vbd" else None
        devices.attach(store, self.path, keys, name=name, frontend_keys=frontend_keys)
        stack.callback(devices.detach, store, self.path, name=name)

    def _records(self) -> Iterator[Record]:
        with self._file.open("rb") as opened:
            reader = Reader(opened)
            yield from reader
            self._torn = reader.torn

    def _started(self, engine: ReplayEngine) -> None:
        self._engine = engine

    def wait(self, *, timeout_s: float | None = None, stop: Callable[[], bool] = lambda: False) -> Report:
        """Until all of the recording was replayed, the time is over or `stop` says so."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not stop() and (deadline is None or time.monotonic() < deadline):
            engine = self._engine
            if engine is not None and engine.finished.wait(SLICE_S):
                break
            if engine is None:
                time.sleep(SLICE_S)
        return self.report

    @property
    def report(self) -> Report:
        """What came of it so far."""
        report = Report() if self._engine is None else self._engine.statistics()
        report.torn = self._torn
        return report

    def close(self) -> None:
        """Take the device away. Harmless when repeated."""
        self._stack.close()

    def __enter__(self) -> "FrontReplay":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_recording(file: Path) -> Header:
    """The description of a recording. Raises `InvalidRequest`, which names the file."""
    try:
        with file.open("rb") as opened:
            return Reader(opened).header
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}") from error
    except ParavirtError as error:
        raise InvalidRequest(f"{file}: {error}") from error
