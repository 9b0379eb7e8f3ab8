# SPDX-License-Identifier: MIT
"""A block device of a domain: `pread`, `pwrite`, `flush` and their batch forms over the ring.

Source: Xen public/io/blkif.h. Calls may come from any thread. One of the waiting callers at a time watches the ring for
all of them; the device's own thread only follows xenstore.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from paravirt.errors import Closed, InvalidRequest, IoError, ParavirtError, PeerError, PeerGone, TimedOut
from paravirt.frontend.device import FrontendDevice
from paravirt.frontend.geometry import Geometry
from paravirt.frontend.requests import Io, RequestSlots, max_request_bytes, slots_needed, split
from paravirt.frontend.ring_end import RingEnd
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol import blkif
from paravirt.protocol.blkif import SECTOR_BYTES, Operation, Status
from paravirt.protocol.keys import FENCE_KEY, number
from paravirt.protocol.vbd import OFFER_KEYS, VbdOffer, VbdRequest
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.shared import RingStatistics
from paravirt.ring.waiting import LEARNT, Wait, fence_for, spin_limit, take_spin
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

log = logging.getLogger(__name__)

DEFAULT_SPIN_NS = 50_000
LOCKED_SPIN_NS = 50_000  # at most, while other callers wait for the lock
DEFAULT_RING_PAGE_ORDER = 2
CONNECT_TIMEOUT_S = 10.0
ORDER_KEY = "max-ring-page-order"

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """Counts since the disk was opened."""

    reads: int  # requests answered well
    writes: int  # with and without a barrier
    flushes: int
    discards: int
    read_bytes: int
    written_bytes: int
    errors: int  # requests answered with an error
    in_flight: int
    held_slots: int  # out of use: the backend kept a grant of an answered request
    reconnects: int  # times a new backend was connected
    reissued: int  # requests sent again after that
    ring: RingStatistics | None  # of the present ring; None while there is none


class Disk(Geometry):
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
        max_segments: int = blkif.DEFAULT_INDIRECT_SEGMENTS,
        on_resize: Callable[[int], None] | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Connect to the backend; errors as `FrontendDevice.start`.

        `ring_page_order`: the ring has 2**order pages if the backend takes that many (32 requests a page). `wait`: a
        caller watches the ring as long as pays, at most `spin_ns`, and then sleeps ("adaptive"); never sleeps ("spin");
        or sleeps at once ("sleep").

        `max_segments`: pages of one request, if the backend takes so many; 11: never more than fit a slot of the ring.
        `on_resize`: called with the new size in bytes, from the device's thread; it must not close the disk.
        """
        if not blkif.MAX_SEGMENTS <= max_segments <= blkif.MAX_INDIRECT_SEGMENTS:
            raise InvalidRequest(
                f"max_segments is {max_segments}, not from {blkif.MAX_SEGMENTS} to {blkif.MAX_INDIRECT_SEGMENTS}"
            )
        if not 0 <= ring_page_order <= blkif.MAX_RING_PAGE_ORDER:
            raise InvalidRequest(f"ring_page_order is {ring_page_order}, not from 0 to {blkif.MAX_RING_PAGE_ORDER}")
        super().__init__(name)
        self._store = store
        self._path = path
        self._wanted_order = ring_page_order
        self._max_segments = max_segments
        self._on_resize = on_resize
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
        self._run(list(split(Operation.READ, offset, memoryview(out), self._max_bytes)), timeout_s, n_bytes)
        return bytes(out)

    def pwrite(self, data: Buffer, offset: int, *, barrier: bool = False, timeout_s: float | None = None) -> int:
        """Write all of `data` at `offset`; its length. Raises as `pread`, and `ReadOnly`. Durable after `flush`.

        `barrier`: what was answered before is durable before it, and it is durable itself when it is answered; other
        calls do not overtake it. `InvalidRequest` where the backend has none.
        """
        view = memoryview(data).cast("B")
        self._check(offset, len(view))
        self._check_writable()
        if barrier and not self._geometry.barrier:
            raise InvalidRequest(f"the backend of disk {self.name} has no barriers")
        operation = Operation.WRITE_BARRIER if barrier else Operation.WRITE
        self._run(list(split(operation, offset, view, self._max_bytes)), timeout_s, len(view))
        return len(view)

    def flush(self, *, timeout_s: float | None = None) -> None:
        """Return when every write that was answered before is on stable storage."""
        if self._geometry.flush:
            self._run([Io(Operation.FLUSH_DISKCACHE, 0, 0)], timeout_s)
        elif self._geometry.barrier:
            self._run([Io(Operation.WRITE_BARRIER, 0, 0)], timeout_s)

    def discard(self, offset: int, n_bytes: int, *, secure: bool = False, timeout_s: float | None = None) -> None:
        """Tell that these bytes are not needed: they read as zeroes or as they were, until they are written again.

        `secure`: nobody can read the old ones afterwards. `InvalidRequest` where the backend has none of that; raises
        as `pwrite`, too.
        """
        self._check(offset, n_bytes)
        self._check_writable()
        if not self._geometry.discard or (secure and not self._geometry.discard_secure):
            raise InvalidRequest(f"the backend of disk {self.name} has no {'secure ' if secure else ''}discard")
        flag = blkif.DISCARD_SECURE if secure else 0
        self._run([Io(Operation.DISCARD, offset, n_bytes, flag=flag)], timeout_s)

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
        longest = 0
        for offset, data in writes:
            view = memoryview(data).cast("B")
            self._check(offset, len(view))
            ios.extend(split(Operation.WRITE, offset, view, self._max_bytes))
            longest = max(longest, len(view))
        self._run(ios, timeout_s, longest)
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
                discards=done.discards,
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

    def _run(self, ios: Sequence[Io], timeout_s: float | None, longest: int = 0) -> None:
        """Issue requests and wait for all; raises for the first that failed, when all are answered.

        `longest`: bytes of the longest transfer they are parts of.
        """
        each = slots_needed(min(longest, self._max_bytes))  # slots
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        issued = answered = 0
        n = len(ios)
        spin_ns = self._spin_ns
        with self._lock:
            try:
                if n == 1 and self._exchange(ios[0], each):
                    issued, answered = 1, int(ios[0].status is not None)
                    if spin_ns == LEARNT:
                        spin_ns = 0  # it has spun as long as pays
                while answered < n:
                    issued += self._issue(ios, issued, each)
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
                if io.status == Status.EOPNOTSUPP:
                    self._forget_feature(io.operation)
                raise IoError(
                    f"{io.operation.name} of {io.length} bytes at {io.offset} failed: "
                    f"the backend answered {Status(io.status).name}",
                    io.status,
                )

    def _forget_feature(self, operation: Operation) -> None:
        """The backend does not have it, whatever it has offered."""
        with self._lock:
            if self._offer is None:
                return
            if operation is Operation.FLUSH_DISKCACHE:
                self._offer = replace(self._offer, flush=False)
            elif operation is Operation.WRITE_BARRIER:
                self._offer = replace(self._offer, barrier=False)
            elif operation is Operation.DISCARD:
                self._offer = replace(self._offer, discard=False, discard_secure=False)

    def _exchange(self, io: Io, each: int) -> bool:
        """The short way for one request when nothing else is in flight: one call into C; whether it was issued."""
        slots = self._slots
        if not self._ready or self._watching or slots is None or slots.in_flight or slots.free < each:
            return False
        try:
            slots.exchange(io, self._locked_spin_ns)
        except PeerError as error:
            self._fail_soon(error)
        return True

    def _issue(self, ios: Sequence[Io], start: int, each: int) -> int:
        """Issue what fits of `ios` from `start` on, `each` taking so many slots at most; how many."""
        if self._error is not None:
            raise self._error
        if self._closed:
            raise Closed(f"disk {self.name} is closed")
        slots = self._slots
        left = len(ios) - start
        if not (left and self._ready and slots is not None):
            return 0
        n = min(left, slots.free // each or slots.reclaim() // each)
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
        max_order = number(xenbus.read_keys(self._store, backend, (ORDER_KEY,)), ORDER_KEY, 0)
        max_order = min(max_order, blkif.MAX_RING_PAGE_ORDER)
        n_slots = blkif.ring_entries(min(self._wanted_order, max_order))
        word = xenbus.read_key(self._store, f"{backend}/{FENCE_KEY}") or ""
        fence = fence_for(word)
        refs, port = self._end.make(
            blkif.REQUEST,
            blkif.RESPONSE,
            wanted_order=self._wanted_order,
            max_order=max_order,
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
        max_bytes = max_request_bytes(self._slots.n_slots, min(offer.max_indirect_segments, self._max_segments))
        if max_bytes < self._max_bytes:
            raise PeerError(f"a new backend takes requests of {max_bytes} bytes, the last one of {self._max_bytes}")
        if self._offer is not None and offer.sector_size != self._offer.sector_size:
            raise PeerError(f"a new backend has sectors of {offer.sector_size} bytes, not {self._offer.sector_size}")
        with self._changed:
            before, self._offer = self._offer, offer
            self._max_bytes = max_bytes
            self._slots.ring = self._end.ring
            self._reissued += self._slots.reissue()
            self._connects += 1
            self._ready = True
            self._changed.notify_all()
        self._tell_size(before)

    def refresh(self, backend: str) -> None:
        """Take over another size, and what the disk can no longer do."""
        new = VbdOffer.from_keys(xenbus.read_keys(self._store, backend, OFFER_KEYS))
        with self._changed:
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
