# SPDX-License-Identifier: MIT
"""A block device and its queues: negotiation, recovery, statistics. `frontend/vbd.py` has what users call.

Source: Xen public/io/blkif.h. The device's own thread only follows xenstore; data moves in the threads that call.
"""

import itertools
import logging
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import Closed, InvalidRequest, ParavirtError, PeerError, PeerGone
from paravirt.frontend.device import FrontendDevice
from paravirt.frontend.disk_buffers import BufferPages, DiskBuffers
from paravirt.frontend.disk_statistics import DiskStatistics, total
from paravirt.frontend.geometry import Geometry
from paravirt.frontend.queue import DiskQueue
from paravirt.frontend.requests import max_request_bytes
from paravirt.frontend.ring_end import RingEnd
from paravirt.frontend.suspend import Suspendable
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol import blkif
from paravirt.protocol.blkif import SECTOR_BYTES
from paravirt.protocol.keys import FENCE_KEY, RingRequest, number
from paravirt.protocol.vbd import MAX_QUEUES, OFFER_KEYS, QUEUES_KEY, VbdOffer, VbdRequest, max_queues
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.blkqueue import Transfer
from paravirt.ring.memory import PAGE_BYTES
from paravirt.ring.waiting import Wait, fence_for, spin_limit
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

log = logging.getLogger(__name__)

DEFAULT_SPIN_NS = 50_000
DEFAULT_RING_PAGE_ORDER = 2
CONNECT_TIMEOUT_S = 10.0
MAX_DEFAULT_QUEUES = 4  # as blkfront's max_queues
ORDER_KEY = "max-ring-page-order"
PERSISTENT_KEY = "feature-persistent"
TRUSTED_KEY = "trusted"  # in the frontend's own directory


def default_queues() -> int:
    """Half of this process's CPUs, 1 to 4. A queue keeps a thread of the backend busy beside the one that asks: with
    two CPUs a second queue would only have four threads take turns.
    """
    return max(1, min(len(os.sched_getaffinity(0)) // 2, MAX_DEFAULT_QUEUES))


class DiskDevice(Suspendable, Geometry):
    """The device behind a `Disk`."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        path: DevicePath,
        *,
        name: str,
        ring_page_order: int = DEFAULT_RING_PAGE_ORDER,
        spin_ns: int = DEFAULT_SPIN_NS,
        wait: Wait = "adaptive",
        max_segments: int = blkif.DEFAULT_INDIRECT_SEGMENTS,
        persistent: bool = True,
        queues: int | None = None,
        merge: bool = True,
        buffer_bytes: int = 0,
        on_resize: Callable[[int], None] | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Connect to the backend; errors as `FrontendDevice.start`.

        `ring_page_order`: the ring has 2**order pages if the backend takes that many (32 requests a page). `wait`: a
        caller watches the ring as long as pays, at most `spin_ns`, and then sleeps ("adaptive"); never sleeps ("spin");
        or sleeps at once ("sleep").

        `max_segments`: pages of one request, if the backend takes so many; 11: never more than fit a slot of the ring.
        `persistent`: pages stay granted from one request to the next where the backend offers to keep them mapped.
        `queues`: each has a ring of its own, and what one thread asks goes to one of them, so that it keeps its order;
        None: one for every two CPUs of this process, at most 4, as the other CPU is the backend's; never more than the
        backend takes. `merge`: neighbours on the disk that are asked for one after the other become one request.
        `buffer_bytes`: room for `buffers`. `on_resize`: called with the new size in bytes, from the device's thread; it
        must not close the disk.
        """
        if not blkif.MAX_SEGMENTS <= max_segments <= blkif.MAX_INDIRECT_SEGMENTS:
            raise InvalidRequest(
                f"max_segments is {max_segments}, not from {blkif.MAX_SEGMENTS} to {blkif.MAX_INDIRECT_SEGMENTS}"
            )
        if not 0 <= ring_page_order <= blkif.MAX_RING_PAGE_ORDER:
            raise InvalidRequest(f"ring_page_order is {ring_page_order}, not from 0 to {blkif.MAX_RING_PAGE_ORDER}")
        if queues is not None and not 1 <= queues <= MAX_QUEUES:
            raise InvalidRequest(f"queues is {queues}, not from 1 to {MAX_QUEUES}")
        if buffer_bytes < 0:
            raise InvalidRequest(f"buffer_bytes is {buffer_bytes}")
        super().__init__(name)
        self._hypervisor = hypervisor
        self._store = store
        self._path = path
        self._wanted_order = ring_page_order
        self._max_segments = max_segments
        self._want_persistent = persistent
        self._persistent = False  # with the present backend
        self._merge = merge
        # Anything but a plain yes is a no.
        self._trusted = xenbus.read_key(store, f"{path.frontend}/{TRUSTED_KEY}") in (None, "1")
        self._on_resize = on_resize
        self._max_spin_ns = spin_limit(wait, spin_ns)
        self._lock = threading.Lock()
        self._barrier_lock = threading.Lock()  # one barrier at a time, with several queues
        self._buffer_pages = BufferPages(-(-buffer_bytes // PAGE_BYTES))
        self._wanted_queues = default_queues() if queues is None else queues
        self._queues = [self._make_queue(0)]
        self._mine = threading.local()  # the queue of a thread, with several
        self._next_queue = itertools.count()
        self._connects = 0
        self._connected = False
        self._device = FrontendDevice(store, path, self)
        try:
            self._device.start(timeout_s)
        except BaseException:
            self.close()
            raise

    def _make_queue(self, i: int) -> DiskQueue:
        beside = self._queues[0].end if i else None
        end = RingEnd(self._hypervisor, self._path, blkif.NAME, queue=i, beside=beside)
        return DiskQueue(self.name, end, self._max_spin_ns, self._fail)

    def _fail(self, error: ParavirtError) -> None:
        self._device.fail(error)

    @property
    def queue(self) -> DiskQueue:
        """The one this thread's requests go to, so that they keep their order."""
        if len(self._queues) == 1:
            return self._queues[0]
        mine: DiskQueue | None = getattr(self._mine, "queue", None)
        if mine is None:
            mine = self._mine.queue = self._queues[next(self._next_queue) % len(self._queues)]
        return mine

    @property
    def n_queues(self) -> int:
        """Queues that it has, agreed on with its first backend."""
        return len(self._queues)

    def fill(
        self, transfer: Transfer, operation: int, offsets: NDArray[np.int64], n_bytes: int, address: int
    ) -> int | None:
        """`TransferQueue.fill`."""
        return self._queues[0].transfers.fill(transfer, operation, offsets, n_bytes, address)

    def _run_barrier(self, transfer: Transfer, timeout_s: float | None) -> None:
        """With nothing else in flight on other queues, and nothing sent there meanwhile."""
        own = self.queue
        others = [queue for queue in self._queues if queue is not own]
        held: list[DiskQueue] = []
        with self._barrier_lock if others else nullcontext():
            try:
                for queue in others:
                    held.append(queue)
                    queue.hold(timeout_s)
                own.run(transfer, timeout_s)
            finally:
                for queue in held:
                    queue.go_on()

    # -- what the caller sees

    def buffers(self, n_bytes: int, count: int = 1) -> DiskBuffers:
        """`count` buffers of `n_bytes` (whole sectors) each, in memory that the backend reads and writes itself.

        Every call takes them as it takes any memory, and copies nothing. Raises `ResourceLimit` when `buffer_bytes` are
        used up, `InvalidRequest` (also where the toolstack says that the backend is not to be trusted), `Closed`.
        """
        geometry = self._geometry
        if n_bytes <= 0 or count <= 0 or n_bytes % geometry.sector_size:
            raise InvalidRequest(f"{count} buffers of {n_bytes} bytes are not whole sectors of {geometry.sector_size}")
        if not self._trusted:
            raise InvalidRequest(f"disk {self.name} shares no buffers: its backend is not trusted, so data is copied")
        return self._buffer_pages.make(n_bytes, count)

    def statistics(self) -> DiskStatistics:
        """The counters, live."""
        if self._closed or not self._connected:
            raise Closed(f"disk {self.name} is closed")
        self._buffer_pages.collect()
        return total(tuple(queue.statistics() for queue in self._queues), max(0, self._connects - 1))

    def close(self) -> None:
        """Close the device and free everything; requests of other threads end with `Closed`. Harmless when repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._give_up(Closed(f"disk {self.name} is closed"))
        self._device.close()
        self.pause()
        self._buffer_pages.close()
        for queue in reversed(self._queues):
            queue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self._queues[0].connected else "waiting for its backend"
        size = self._offer.sectors * SECTOR_BYTES if self._offer else 0
        return f"<Disk {self.name} of domain {self._path.frontend_domid}, {size} bytes, {state}>"

    # -- the driver's part of xenbus: called from the device's thread

    def negotiate(self, backend: str) -> dict[str, str]:
        """A new ring and port for each queue, as the backend's offer allows."""
        offered = xenbus.read_keys(self._store, backend, (ORDER_KEY, QUEUES_KEY, PERSISTENT_KEY))
        max_order = min(number(offered, ORDER_KEY, 0), blkif.MAX_RING_PAGE_ORDER)
        n_slots = blkif.ring_entries(min(self._wanted_order, max_order))
        if self._queues[0].end.arena is None:
            n_queues = min(self._wanted_queues, max_queues(offered))
            self._queues += [self._make_queue(i) for i in range(1, n_queues)]
        elif max_queues(offered) < self.n_queues:
            raise PeerError(f"a new backend takes {max_queues(offered)} queues, the last one {self.n_queues}")
        word = xenbus.read_key(self._store, f"{backend}/{FENCE_KEY}") or ""
        fence = fence_for(word)
        pages = self.n_queues * n_slots * blkif.MAX_SEGMENTS + self._buffer_pages.n_pages
        rings = []
        for queue in self._queues:
            rings.append(
                queue.end.make(
                    blkif.REQUEST,
                    blkif.RESPONSE,
                    wanted_order=self._wanted_order,
                    max_order=max_order,
                    data_pages=pages + 2 * (self.n_queues - 1 << min(self._wanted_order, max_order)),
                    fence=fence,
                    max_spin_ns=self._max_spin_ns,
                )
            )
            queue.make_slots(n_slots, self._path.backend_domid, merge=self._merge)
        arena = self._queues[0].end.arena
        assert arena is not None
        self._buffer_pages.use(arena, self._queues)
        self._persistent = self._want_persistent and number(offered, PERSISTENT_KEY, 0) != 0
        queues = tuple(RingRequest(refs, port) for refs, port in rings)
        keys = VbdRequest(queues, persistent=self._persistent).to_keys()
        return {**keys, FENCE_KEY: "full" if fence == "full" else word} if word else keys

    def connect(self, backend: str) -> None:
        """Go: what was in flight is sent again on the new ring."""
        offer = VbdOffer.from_keys(xenbus.read_keys(self._store, backend, OFFER_KEYS))
        if any(queue.end.ring is None for queue in self._queues):
            raise PeerError("the backend connected before it was asked to")
        n_slots = self._queues[0].n_slots
        max_bytes = max_request_bytes(n_slots, min(offer.max_indirect_segments, self._max_segments))
        if max_bytes < self._max_bytes:
            raise PeerError(f"a new backend takes requests of {max_bytes} bytes, the last one of {self._max_bytes}")
        if self._offer is not None and offer.sector_size != self._offer.sector_size:
            raise PeerError(f"a new backend has sectors of {offer.sector_size} bytes, not {self._offer.sector_size}")
        before, self._offer = self._offer, offer
        self._max_bytes = max_bytes
        self._connects += 1
        self._connected = True
        for queue in self._queues:
            queue.set_disk(offer.sectors * SECTOR_BYTES, offer.sector_size, max_bytes)
            queue.connect(persistent=self._persistent)
        self._tell_size(before)

    def refresh(self, backend: str) -> None:
        """Take over another size, and what the disk can no longer do."""
        new = VbdOffer.from_keys(xenbus.read_keys(self._store, backend, OFFER_KEYS))
        before = self._offer
        assert before is not None
        self._offer = replace(
            before,
            sectors=new.sectors,
            read_only=new.read_only,
            flush=new.flush,
            barrier=new.barrier,
            discard=new.discard,
            discard_secure=new.discard_secure,
        )
        for queue in self._queues:
            queue.set_disk(new.sectors * SECTOR_BYTES, before.sector_size, self._max_bytes)
        self._tell_size(before)

    def _tell_size(self, before: VbdOffer | None) -> None:
        """Of a size that is another one than it was."""
        now = self._offer
        if self._on_resize is None or before is None or now is None or before.sectors == now.sectors:
            return
        try:
            self._on_resize(now.sectors * SECTOR_BYTES)
        except Exception:
            log.exception("%s: on_resize failed", self._path.frontend)

    def pause(self) -> None:
        """Let go of rings and ports; what is in flight stays in the shadow."""
        for queue in self._queues:
            queue.pause()

    def closed(self, error: ParavirtError | None) -> None:
        """No answer will come any more."""
        self._give_up(error or PeerGone(f"the backend of disk {self.name} has closed"))

    def _give_up(self, error: ParavirtError) -> None:
        for queue in self._queues:
            queue.give_up(error)
