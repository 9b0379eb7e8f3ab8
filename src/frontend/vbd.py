# SPDX-License-Identifier: MIT
"""A block device of a domain: `pread`, `pwrite`, `flush` and their batch forms over the ring.

Source: Xen public/io/blkif.h. Calls may come from any thread. One of the waiting callers at a time watches the ring for
all of them; the device's own thread only follows xenstore.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from paravirt.errors import Closed, InvalidRequest, IoError, ParavirtError, PeerError, PeerGone, ReadOnly, TimedOut
from paravirt.frontend.device import FrontendDevice
from paravirt.frontend.requests import Io, RequestSlots, split
from paravirt.frontend.ring_end import RingEnd
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol import blkif
from paravirt.protocol.blkif import SECTOR_BYTES, Operation, Status
from paravirt.protocol.keys import FENCE_KEY
from paravirt.protocol.vbd import VbdOffer, VbdRequest
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.shared import RingStatistics
from paravirt.ring.waiting import LEARNT, Wait, fence_for, spin_limit, take_spin
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

OFFER_KEYS = ("sectors", "sector-size", "info", "mode", "feature-flush-cache", "max-ring-page-order")
DEFAULT_SPIN_NS = 50_000
LOCKED_SPIN_NS = 50_000  # at most, while other callers wait for the lock
DEFAULT_RING_PAGE_ORDER = 2
CONNECT_TIMEOUT_S = 10.0

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """Counts since the disk was opened."""

    reads: int  # requests answered well
    writes: int
    flushes: int
    read_bytes: int
    written_bytes: int
    errors: int  # requests answered with an error
    in_flight: int
    held_slots: int  # out of use: the backend kept a grant of an answered request
    reconnects: int  # times a new backend was connected
    reissued: int  # requests sent again after that
    ring: RingStatistics | None  # of the present ring; None while there is none


class Disk:
    """An open block device. Offsets and lengths are in bytes, multiples of `sector_size`.

    Any number of threads may use it. A signal handler that raises in the middle of a call does no harm while the main
    thread is the only one that uses the disk; Python's locks do not promise that for several.
    """

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
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Connect to the backend; errors as `FrontendDevice.start`.

        `ring_page_order`: the ring has 2**order pages if the backend takes that many (32 requests a page). `wait`: a
        caller watches the ring as long as pays, at most `spin_ns`, and then sleeps ("adaptive"); never sleeps ("spin");
        or sleeps at once ("sleep").
        """
        if not 0 <= ring_page_order <= blkif.MAX_RING_PAGE_ORDER:
            raise InvalidRequest(f"ring_page_order is {ring_page_order}, not from 0 to {blkif.MAX_RING_PAGE_ORDER}")
        self.name = name
        self._store = store
        self._path = path
        self._wanted_order = ring_page_order
        self._max_spin_ns = spin_limit(wait, spin_ns)
        self._spin_ns = take_spin(self._max_spin_ns)
        # With the lock held: not longer than that, however much it would pay.
        self._locked_spin_ns = self._spin_ns if self._max_spin_ns <= LOCKED_SPIN_NS else LOCKED_SPIN_NS
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._ready = False  # a ring is connected and requests may be issued
        self._watching = False  # a caller watches the ring, for all of them
        self._others = 0  # callers and the device's thread that wait for _changed
        self._error: ParavirtError | None = None
        self._closed = False
        self._offer: VbdOffer | None = None
        self._slots: RequestSlots | None = None
        self._end = RingEnd(hypervisor, path, blkif.NAME)
        self._connects = self._reissued = 0
        self._device = FrontendDevice(store, path, self)
        try:
            self._device.start(timeout_s)
        except BaseException:
            self.close()
            raise

    # -- what the caller sees

    @property
    def _geometry(self) -> VbdOffer:
        if self._offer is None or self._closed:
            raise Closed(f"disk {self.name} is closed")
        return self._offer

    @property
    def size_bytes(self) -> int:
        """Of the whole disk."""
        return self._geometry.sectors * SECTOR_BYTES

    @property
    def sector_size(self) -> int:
        """Bytes; every offset and length is a multiple of it."""
        return self._geometry.sector_size

    @property
    def read_only(self) -> bool:
        """Writes raise `ReadOnly`."""
        return self._geometry.read_only

    @property
    def is_closed(self) -> bool:
        """`close` was called."""
        return self._closed

    def pread(self, n_bytes: int, offset: int, *, timeout_s: float | None = None) -> bytes:
        """`n_bytes` from `offset`. Raises `InvalidRequest` (range, alignment), `IoError`, `Closed`, `PeerGone`,
        `PeerError`, `TimedOut` (the read may still be under way)."""
        self._check(offset, n_bytes)
        if n_bytes <= blkif.MAX_REQUEST_BYTES:
            io = Io(Operation.READ, offset, n_bytes)
            self._run([io], timeout_s)
            assert isinstance(io.data, bytes)
            return io.data
        out = bytearray(n_bytes)
        self._run(list(split(Operation.READ, offset, memoryview(out))), timeout_s)
        return bytes(out)

    def pwrite(self, data: Buffer, offset: int, *, timeout_s: float | None = None) -> int:
        """Write all of `data` at `offset`; its length. Raises as `pread`, and `ReadOnly`. Durable after `flush`."""
        view = memoryview(data).cast("B")
        self._check(offset, len(view))
        self._check_writable()
        self._run(list(split(Operation.WRITE, offset, view)), timeout_s)
        return len(view)

    def flush(self, *, timeout_s: float | None = None) -> None:
        """Return when every write that was answered before is on stable storage."""
        if self._geometry.flush:
            self._run([Io(Operation.FLUSH_DISKCACHE, 0, 0)], timeout_s)

    def read_many(self, offsets: Sequence[int], n_bytes: int, *, timeout_s: float | None = None) -> list[bytes]:
        """`n_bytes` (at most 44 KiB) from each offset, all in flight together as far as the ring holds them."""
        if n_bytes > blkif.MAX_REQUEST_BYTES:
            raise InvalidRequest(f"read_many takes at most {blkif.MAX_REQUEST_BYTES} bytes a request, not {n_bytes}")
        for offset in offsets:
            self._check(offset, n_bytes)
        ios = [Io(Operation.READ, offset, n_bytes) for offset in offsets]
        self._run(ios, timeout_s)
        return [io.data for io in ios if isinstance(io.data, bytes)]

    def write_many(self, writes: Iterable[tuple[int, Buffer]], *, timeout_s: float | None = None) -> int:
        """Write each (offset, data), all in flight together; the bytes written. Overlapping ones in undefined order."""
        self._check_writable()
        ios: list[Io] = []
        for offset, data in writes:
            view = memoryview(data).cast("B")
            self._check(offset, len(view))
            ios.extend(split(Operation.WRITE, offset, view))
        self._run(ios, timeout_s)
        return sum(io.length for io in ios)

    def statistics(self) -> DiskStatistics:
        """The counters, live."""
        with self._changed:
            slots = self._slots
            if slots is None:
                raise Closed(f"disk {self.name} is closed")
            done, ring = slots.counters, slots.ring
            return DiskStatistics(
                reads=done.reads,
                writes=done.writes,
                flushes=done.flushes,
                read_bytes=done.read_bytes,
                written_bytes=done.written_bytes,
                errors=done.errors,
                in_flight=slots.in_flight,
                held_slots=slots.held,
                reconnects=max(0, self._connects - 1),
                reissued=self._reissued,
                ring=ring.statistics() if ring else None,
            )

    def close(self) -> None:
        """Close the device and free everything; requests of other threads end with `Closed`. Harmless when repeated."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._end.waiter.kick()
        self._device.close()
        self.pause()
        if self._slots is not None:
            self._slots.close()
        self._end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self._ready else "waiting for its backend"
        size = self._offer.sectors * SECTOR_BYTES if self._offer else 0
        return f"<Disk {self.name} of domain {self._path.frontend_domid}, {size} bytes, {state}>"

    # -- requests

    def _check(self, offset: int, n_bytes: int) -> None:
        geometry = self._geometry
        size = geometry.sectors * SECTOR_BYTES
        if n_bytes <= 0 or offset < 0 or offset + n_bytes > size:
            raise InvalidRequest(f"{n_bytes} bytes at {offset} are not inside disk {self.name} of {size} bytes")
        if (offset | n_bytes) & (geometry.sector_size - 1):
            raise InvalidRequest(f"{n_bytes} bytes at {offset} are not whole sectors of {geometry.sector_size} bytes")

    def _check_writable(self) -> None:
        if self._geometry.read_only:
            raise ReadOnly(f"disk {self.name} is read-only")

    def _run(self, ios: Sequence[Io], timeout_s: float | None) -> None:
        """Issue requests and wait for all; raises for the first that failed, when all are answered."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        issued = answered = 0
        n = len(ios)
        spin_ns = self._spin_ns
        with self._lock:
            try:
                if n == 1 and self._exchange(ios[0]):
                    issued, answered = 1, int(ios[0].status is not None)
                    if spin_ns == LEARNT:
                        spin_ns = 0  # it has spun as long as pays
                while answered < n:
                    issued += self._issue(ios, issued)
                    self._wait(deadline, spin_ns)
                    while answered < n and ios[answered].status is not None:
                        answered += 1
            except BaseException:
                # Answers may still come: they must not be written into memory the caller has back.
                if self._slots is not None:
                    self._slots.forget(ios)
                raise
        for io in ios:
            if io.status:
                raise IoError(
                    f"{io.operation.name} of {io.length} bytes at {io.offset} failed: "
                    f"the backend answered {Status(io.status).name}",
                    io.status,
                )

    def _exchange(self, io: Io) -> bool:
        """The short way for one request when nothing else is in flight: one call into C; whether it was issued."""
        slots = self._slots
        if not self._ready or self._watching or slots is None or slots.in_flight or not slots.free:
            return False
        try:
            slots.exchange(io, self._locked_spin_ns)
        except PeerError as error:
            self._fail_soon(error)
        return True

    def _issue(self, ios: Sequence[Io], start: int) -> int:
        """Issue what fits of `ios` from `start` on; how many."""
        if self._error is not None:
            raise self._error
        if self._closed:
            raise Closed(f"disk {self.name} is closed")
        slots = self._slots
        left = len(ios) - start
        if not (left and self._ready and slots is not None):
            return 0
        n = min(left, slots.free or slots.reclaim())
        if n == len(ios):
            slots.issue(ios)
        elif n:
            slots.issue(ios[start : start + n])
        elif not slots.in_flight:
            raise PeerError(f"the backend of disk {self.name} keeps the pages of {slots.held} answered requests")
        return n

    def _wait(self, deadline: float | None, spin_ns: int) -> None:
        """Until something has changed. With the lock held, which is let go while waiting."""
        timeout_s = None if deadline is None else deadline - time.monotonic()
        if timeout_s is not None and timeout_s <= 0:
            raise TimedOut(f"disk {self.name} did not answer in time")
        slots = self._slots
        ring = slots.ring if slots else None
        if not self._ready or self._watching or ring is None or slots is None:
            self._others += 1
            try:
                self._changed.wait(timeout_s)
            finally:
                self._others -= 1
            return
        if slots.taken:  # by a caller that was interrupted before it could complete them
            self._complete(slots)
            return
        regained: list[bool] = []
        raised: BaseException | None = None
        self._watching = True
        try:
            self._lock.release()
            slots.watch(ring, spin_ns, timeout_s)
        except PeerError as error:
            self._fail_soon(error)
        finally:
            # Also when a signal handler raises, anywhere here: what was taken counts, and others must be able to watch.
            while not regained:
                try:
                    regained.extend(map(self._lock.acquire, (True,)))  # one step in C: it is done and noted, or neither
                except BaseException as error:
                    raised = error
            self._watching = False
            if self._others:
                self._changed.notify_all()
            self._complete(slots)
        if raised is not None:
            raise raised

    def _complete(self, slots: RequestSlots) -> None:
        try:
            slots.complete()
        except PeerError as error:
            self._fail_soon(error)

    def _fail_soon(self, error: PeerError) -> None:
        """The backend lied: no more requests; the device's thread closes the device."""
        self._ready = False
        self._error = error
        self._device.fail(error)

    # -- the driver's part of xenbus: called from the device's thread

    def negotiate(self, backend: str) -> dict[str, str]:
        """A new ring and port, as the backend's offer allows."""
        offer = VbdOffer.from_keys(xenbus.read_keys(self._store, backend, OFFER_KEYS))
        n_slots = blkif.ring_entries(min(self._wanted_order, offer.max_ring_page_order))
        word = xenbus.read_key(self._store, f"{backend}/{FENCE_KEY}") or ""
        fence = fence_for(word)
        refs, port = self._end.make(
            blkif.REQUEST,
            blkif.RESPONSE,
            wanted_order=self._wanted_order,
            max_order=offer.max_ring_page_order,
            data_pages=n_slots * blkif.MAX_SEGMENTS,
            fence=fence,
            max_spin_ns=self._max_spin_ns,
        )
        assert self._end.arena is not None
        if self._slots is None:
            self._slots = RequestSlots(self._end.arena, n_slots, self._path.backend_domid)
        keys = VbdRequest(refs, port).to_keys()
        return {**keys, FENCE_KEY: "full" if fence == "full" else word} if word else keys

    def connect(self, backend: str) -> None:
        """Go: what was in flight is sent again on the new ring."""
        offer = VbdOffer.from_keys(xenbus.read_keys(self._store, backend, OFFER_KEYS))
        if self._slots is None or self._end.ring is None:
            raise PeerError("the backend connected before it was asked to")
        with self._changed:
            self._offer = offer
            self._slots.ring = self._end.ring
            self._reissued += self._slots.reissue()
            self._connects += 1
            self._ready = True
            self._changed.notify_all()

    def refresh(self, backend: str) -> None:
        """Nothing a connected disk takes over."""

    def pause(self) -> None:
        """Let go of ring and port; what is in flight stays in the shadow."""
        with self._changed:
            self._ready = False
            self._end.waiter.kick()
            self._others += 1
            self._changed.wait_for(lambda: not self._watching)
            self._others -= 1
            if self._slots is not None:
                self._slots.ring = None
        self._end.drop()

    def closed(self, error: ParavirtError | None) -> None:
        """No answer will come any more."""
        with self._changed:
            self._error = error or PeerGone(f"the backend of disk {self.name} has closed")
            self._changed.notify_all()
