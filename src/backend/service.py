# SPDX-License-Identifier: MIT
"""A backend service of Dom0: finds the devices of its class in xenstore and drives each by the transition table.

One thread looks at states and negotiates; each connected device has an engine with a thread of its own. Everything a
guest can do to this thread is rewrite its own `state`, or what else is watched of it: identical pending watch events
are merged, so that costs one look.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import ClassVar, Generic, Protocol, Self

from paravirt.backend.c_engine import make_engine
from paravirt.backend.device import DEFAULT_SPIN_NS as DEFAULT_SPIN_NS
from paravirt.backend.device import BackendDevice, RingPolicy, S
from paravirt.backend.engine import EngineFactory, EngineStatistics
from paravirt.backend.vbd import Policy, VbdBackend
from paravirt.errors import InvalidRequest, ParavirtError, StoreGone, XenstoreError
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol.blkif import DEFAULT_INDIRECT_SEGMENTS, MAX_INDIRECT_SEGMENTS
from paravirt.protocol.vbd import MAX_QUEUES
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.waiting import Fence, Wait
from paravirt.xenstore.client import WatchEvent, XenstoreClient

log = logging.getLogger(__name__)

STORE_RETRY_S = 0.5  # after xenstored has refused something
MAX_EVENTS = 256  # that are looked at together


class DeviceFactory(Protocol[S]):
    """Makes the backend half of a device that was found."""

    def __call__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        path: DevicePath,
        on_failure: Callable[[BackendDevice[S]], None],
    ) -> BackendDevice[S]: ...


class DeviceService(Generic[S]):
    """Serves all devices of one class of our domain, most often Dom0. Owns neither `hypervisor` nor `store`: they
    outlive it.

    `serve_forever` in a process of its own, or `start`/`stop` in a thread of somebody else's.
    """

    watched: ClassVar[tuple[str, ...]] = ("state",)
    """Keys of a frontend whose changes have its device looked at."""

    def __init__(self, hypervisor: Hypervisor, store: XenstoreClient, kind: str, make_device: DeviceFactory[S]) -> None:
        """`kind`: the name of the class in xenstore, such as "vbd"."""
        self.kind = kind
        self._root = f"/local/domain/{hypervisor.domid}/backend/{kind}"
        self._hypervisor = hypervisor
        self._store = store
        self._make_device = make_device
        self._devices: dict[DevicePath, BackendDevice[S]] = {}
        self._lock = threading.Lock()  # guards _devices against statistics() of other threads
        self._failed: set[DevicePath] = set()
        self._stopping = threading.Event()
        self._queue = store.watch_queue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve in a thread."""
        self._thread = threading.Thread(target=self.serve_forever, name=f"{self.kind}-backend", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop serving: rings are left, frontends keep what was not answered. Harmless when repeated.

        While no xenstored runs this does not wait for one: from now on `store` does not reconnect.
        """
        self._stopping.set()
        self._store.stop_reconnecting()
        self._queue.kick()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join()

    def serve_forever(self) -> None:
        """Serve until `stop`, or until xenstored is gone for good: connected rings then go on until `stop`."""
        try:
            self._begin()
            while not self._stopping.is_set():
                self._look_at_events()
        except StoreGone as error:
            log.error("%s; connected devices go on, nothing new is connected", error)
            self._stopping.wait()
        finally:
            self._close_all()

    def statistics(self) -> dict[DevicePath, S]:
        """Counters of every connected device."""
        with self._lock:
            devices = list(self._devices.values())
        found = {device.path: device.statistics() for device in devices}
        return {path: counters for path, counters in found.items() if counters is not None}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- the service's thread

    def _begin(self) -> None:
        """Watch what is to be followed."""
        self._queue.add(self._root, self._root)  # fires at once

    def _look_elsewhere(self, event: WatchEvent) -> None:
        """At what is no device; for classes that follow more."""

    def _scan(self) -> None:
        """Look at all devices: at the start (after a crash nobody tells us of them), and when events were lost."""
        for guest in self._list(self._root):
            for device in self._list(f"{self._root}/{guest}"):
                path = DevicePath.from_backend(f"{self._root}/{guest}/{device}")
                if path is not None:
                    self._evaluate(path)

    def _list(self, path: str) -> list[str]:
        try:
            return self._store.ls(path)
        except XenstoreError:
            return []

    def _patience(self) -> float | None:
        times = [device.retry_at for device in self._devices.values() if device.retry_at is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _look_at_events(self) -> None:
        """Wait for events, and look once at each device that any of those that are there is about: a toolstack writes
        many nodes of a device together.
        """
        event = self._queue.get(timeout_s=self._patience())
        paths, n = dict[DevicePath, None](), 0  # in order
        while event is not None:
            if event.path == self._root:
                self._scan()
            # The token of a watch on a frontend is its backend directory.
            elif path := DevicePath.from_backend(event.path) or DevicePath.from_backend(event.token):
                paths[path] = None
            else:
                self._look_elsewhere(event)
            n += 1
            event = self._queue.get_nowait() if n < MAX_EVENTS else None
        for path in paths:
            self._evaluate(path)
        with self._lock:
            failed, self._failed = self._failed, set()
        now = time.monotonic()
        due = {path for path, device in self._devices.items() if device.retry_at is not None and device.retry_at <= now}
        for path in failed | due:
            self._evaluate(path)

    def _evaluate(self, path: DevicePath) -> None:
        device = self._devices.get(path)
        known = device is not None
        if device is None:
            device = self._make_device(self._hypervisor, self._store, path, self._on_failure)
            with self._lock:
                self._devices[path] = device
        device.retry_at = None
        try:
            device.evaluate()
        except StoreGone:
            raise
        except XenstoreError as error:
            # Nothing in xenstore has changed, so nothing but time will have us look again.
            log.warning("%s: %s", path.backend, error)
            device.retry_at = time.monotonic() + STORE_RETRY_S
        except ParavirtError as error:
            log.warning("%s: %s", path.backend, error)
        except Exception as error:
            log.exception("%s: a defect of the backend; other devices go on", path.backend)
            device.give_up(ParavirtError(f"a defect of the backend: {error}"))
        if device.removed:
            self._drop(path, watched=known)
            if device.replaced:
                self._evaluate(path)
        elif not known:
            # Fires once at once, so no change between the first look and here is missed.
            for key in self.watched:
                self._queue.add(f"{path.frontend}/{key}", path.backend)

    def _drop(self, path: DevicePath, *, watched: bool) -> None:
        with self._lock:
            self._devices.pop(path, None)
        if watched:
            for key in self.watched:
                self._queue.remove(f"{path.frontend}/{key}", path.backend)

    def _on_failure(self, device: BackendDevice[S]) -> None:
        with self._lock:
            self._failed.add(device.path)
        self._queue.kick()

    def _close_all(self) -> None:
        with self._lock:
            devices, self._devices = list(self._devices.values()), {}
        for device in devices:
            device.close()
        self._queue.close()


class BackendService(DeviceService[EngineStatistics]):
    """Serves all vbds of Dom0."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        *,
        engine: EngineFactory = make_engine,
        spin_ns: int = DEFAULT_SPIN_NS,
        fence: Fence = "full",
        wait: Wait = "adaptive",
        max_indirect_segments: int = DEFAULT_INDIRECT_SEGMENTS,
        max_queues: int | None = None,
        persistent: bool = False,
    ) -> None:
        """`spin_ns`: how long an engine watches an empty ring at most before it sleeps; `wait`: how; `fence`: offered
        to frontends. See `RingPolicy`. `max_indirect_segments`: pages of one request; 0: no more than 11.
        `max_queues`: that a frontend may have for a disk; None: as many as there are CPUs. `persistent`: what a
        frontend has granted stays mapped from one request to the next, if it says that it does that, too.
        """
        if max_queues is None:
            max_queues = min(len(os.sched_getaffinity(0)), MAX_QUEUES)
        if not 1 <= max_queues <= MAX_QUEUES:
            raise InvalidRequest(f"max_queues is {max_queues}, not from 1 to {MAX_QUEUES}")
        if not 0 <= max_indirect_segments <= MAX_INDIRECT_SEGMENTS:
            raise InvalidRequest(
                f"max_indirect_segments is {max_indirect_segments}, not from 0 to {MAX_INDIRECT_SEGMENTS}"
            )
        rings = RingPolicy(max_spin_ns=spin_ns, fence=fence, wait=wait)
        policy = Policy(engine, rings, max_indirect_segments, max_queues, persistent)
        super().__init__(hypervisor, store, "vbd", partial(VbdBackend, policy=policy))
