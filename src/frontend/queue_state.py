# SPDX-License-Identifier: MIT
"""The state of one queue of a block device: its ring, slots and transfers, who watches, and what comes and goes."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from paravirt.errors import ParavirtError, PeerError, TimedOut
from paravirt.frontend.disk_statistics import QueueStatistics
from paravirt.frontend.loop import LoopListener
from paravirt.frontend.ring_end import RingEnd
from paravirt.hypervisor.client import Arena, PageRun
from paravirt.protocol.blkif import MAX_SEGMENTS
from paravirt.ring.blkfront import Slots
from paravirt.ring.blkqueue import PagesKept, Transfer, TransferQueue, place_cell
from paravirt.ring.shared import FrontRing
from paravirt.ring.waiting import take_spin

CData = Any

LOCKED_SPIN_NS = 50_000  # at most, while other callers wait for the lock


class QueueState:
    """Made before there is a ring; `connect` and `pause` come as often as backends do."""

    transfers: TransferQueue  # from `make_slots` on
    _memory: memoryview
    _core: CData
    _ring_core: CData

    def __init__(self, name: str, end: RingEnd, max_spin_ns: int, fail: Callable[[ParavirtError], None]) -> None:
        """`name`: of the disk; `end` is owned; `fail`: told of a backend that lied, with the lock held."""
        self.end = end
        self._name = name
        self._fail = fail
        self._spin_ns = take_spin(max_spin_ns)
        # With the lock held: not longer than that, however much it would pay.
        self._locked_spin_ns = self._spin_ns if max_spin_ns <= LOCKED_SPIN_NS else LOCKED_SPIN_NS
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._ring: FrontRing | None = None  # connected
        self._holders = 0  # barriers of other queues: nothing may be sent
        self._alone = False  # a caller has the ring to himself
        self._open = False  # connected, and neither of that
        self._watching = False  # a caller watches the ring, for all of them
        self._others = 0  # callers and the device's thread that wait for _changed
        self._error: ParavirtError | None = None
        self._stuck: PagesKept | None = None  # why calls of an event loop end that nothing can be sent for
        self._at = place_cell()
        self._futures: dict[int, asyncio.Future[None]] = {}  # by number of the transfer
        self._last_number = 0
        self._alive: dict[Transfer, None] = {}  # the core has their addresses
        self._loop = LoopListener(end.waiter.fileno, self._on_readable, stays=True)
        self._reissued = 0
        self._pages: PageRun | None = None

    def make_slots(self, n_slots: int, backend_domid: int, *, merge: bool) -> None:
        """Once, when the arena is there."""
        if self._pages is not None:
            return
        arena = self.end.arena
        assert arena is not None
        self._pages = arena.allocate(n_slots * MAX_SEGMENTS)
        self._memory = self._pages.view
        slots = Slots(arena.granter, self._pages.pointer(), self._pages.gref, n_slots, backend_domid)
        self.transfers = TransferQueue(slots, n_slots, merge=merge)
        self._core = self.transfers.core

    @property
    def n_slots(self) -> int:
        return self.transfers.slots.n_slots

    @property
    def connected(self) -> bool:
        """There is a ring."""
        return self._ring is not None

    def statistics(self) -> QueueStatistics:
        """The counters, live. After `make_slots`."""
        with self.lock:
            slots, core, ring = self.transfers.slots, self._core, self._ring
            done = slots.counters
            return QueueStatistics(
                reads=done.reads,
                writes=done.writes,
                flushes=done.flushes,
                discards=done.discards,
                read_bytes=done.read_bytes,
                written_bytes=done.written_bytes,
                errors=done.errors,
                in_flight=slots.in_flight,
                held_slots=slots.held,
                waiting=core.waiting,
                merged=core.merged,
                copied_bytes=done.copied_bytes,
                direct_bytes=done.read_bytes + done.written_bytes - done.copied_bytes,
                reissued=self._reissued,
                ring=ring.statistics() if ring else None,
            )

    # -- buffers

    def set_arena(self, arena: Arena) -> None:
        """Buffers are pages of this one."""
        with self.lock:
            self.transfers.set_arena(arena.memory.address, arena.n_pages, arena.base)

    def set_buffer(self, first_page: int, n_pages: int, number: int) -> None:
        """These pages are a buffer under a number; 0: not any more."""
        with self.lock:
            self.transfers.set_buffer(first_page, n_pages, number)

    def buffer_in_flight(self, number: int) -> int:
        """Requests that use it."""
        with self.lock:
            return self.transfers.buffer_in_flight(number)

    # -- under the lock

    def _wake_futures(self) -> None:
        for future in self._futures.values():
            self._loop.wake(future)

    def _set_open(self) -> None:
        self._open = self._ring is not None and not self._holders and not self._alone

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _check_peer(self, call: Callable[[FrontRing], object]) -> None:
        """Do something with the ring; a backend that breaks the protocol is left. Raises `PagesKept`."""
        if self._ring is None:
            return
        try:
            call(self._ring)
        except PagesKept:
            raise
        except PeerError as error:
            self._fail_soon(error)

    def _fail_soon(self, error: ParavirtError) -> None:
        """No more requests; the device's thread closes the device."""
        self._open = False
        self._ring = None
        self._error = self._error or error
        self._fail(error)

    def _send(self) -> None:
        """What waits, for whoever waits for it."""
        if not self._open:
            return
        try:
            self._check_peer(self.transfers.issue)
        except PagesKept as error:
            # Threads find out when they look, which is now.
            self._changed.notify_all()
            self._stuck = error
            self._wake_futures()

    def _complete(self) -> None:
        """What was taken is over, also if the ring is gone meanwhile; there is room for others."""
        try:
            self.transfers.complete()
        except PeerError as error:
            self._fail_soon(error)
        self._send()
        self._tell()

    def _tell(self) -> None:
        """Everybody who waits, of what is done."""
        if self._others:
            self._changed.notify_all()
        if self._futures:
            while number := self.transfers.next_done():
                future = self._futures.pop(number, None)
                if future is not None:
                    self._loop.wake(future)

    def _wait(self, deadline: float | None, spin_ns: int) -> None:
        """Until something has changed. The lock is let go while waiting."""
        timeout_s = None if deadline is None else deadline - time.monotonic()
        if timeout_s is not None and timeout_s <= 0:
            raise TimedOut(f"disk {self._name} did not answer in time")
        ring = self._ring
        if ring is None or self._watching or self._alone:
            self._wait_for_change(timeout_s)
            return
        if self.transfers.taken:  # by a caller that was interrupted before it could complete them
            self._complete()
            return
        try:
            self._without_lock(lambda: self.transfers.watch(ring, spin_ns, timeout_s))
        except PeerError as error:
            self._fail_soon(error)
        if self._loop:
            self._collect()

    def _wait_for_change(self, timeout_s: float | None = None) -> None:
        self._others += 1
        try:
            self._changed.wait(timeout_s)
        finally:
            self._others -= 1

    def _without_lock(self, use: Callable[[], None]) -> None:
        """Let go of the lock while the ring is used: for watching it, or by who has it to himself."""
        raised: BaseException | None = None
        regained: list[bool] = []
        self._watching = True
        try:
            self.lock.release()
            use()
        finally:
            # Also when a signal handler raises, anywhere here: what was taken counts, and others must be able to watch.
            while not regained:
                try:
                    regained.extend(map(self.lock.acquire, (True,)))  # one step in C: it is done and noted, or neither
                except BaseException as error:
                    raised = error
            self._watching = False
            self._complete()
            if self._others:
                self._changed.notify_all()
        if raised is not None:
            raise raised

    def _collect(self) -> None:
        """Send and take what there is, until the backend rings for what comes next; a thread that watches does that."""
        while self._ring is not None and not self._watching and not self._alone:
            ring = self._ring
            self._send()
            more = [True]

            def look(ring: FrontRing, more: list[bool] = more) -> None:
                if not self.transfers.taken and not self.transfers.take(ring):
                    more[0] = ring.final_check()
                else:
                    self.transfers.complete()

            self._check_peer(look)
            self._tell()
            if not more[0] or ring is not self._ring:
                return

    def _on_readable(self) -> None:
        with self.lock:
            if self._watching or self._alone:
                return
            self.end.waiter.drain_bells()
            ring, channel = self._ring, self.end.channel
            if ring is None or channel is None:
                return
            taken = channel.take_pending()
            self._collect()
            if taken and ring is self._ring:
                ring.end_event()

    # -- the device's thread

    def set_disk(self, n_bytes: int, sector_bytes: int, max_bytes: int) -> None:
        """Size of the disk, of its sectors, and the most of one request."""
        with self.lock:
            self.transfers.set_disk(n_bytes, sector_bytes, max_bytes)

    def connect(self, *, persistent: bool) -> None:
        """Go, on the ring that was made: what was in flight is sent again, and then what waits.

        `persistent`: pages stay granted with this backend.
        """
        ring = self.end.ring
        assert ring is not None
        with self.lock:
            self._complete()
            self.transfers.slots.persist(persistent)
            self._reissued += self.transfers.slots.reissue(ring)
            self.transfers.slots.count_in(ring)
            self._ring, self._ring_core = ring, ring.core
            self._set_open()
            if self._loop:
                self._collect()
            else:
                self._send()
            self._changed.notify_all()

    def pause(self) -> None:
        """Let go of ring and port; what is in flight stays in the shadow."""
        with self.lock:
            self._open = False
            self._ring = self._ring_core = None  # the last points into memory that the ring gives back
            self.end.waiter.kick()
            self._others += 1
            self._changed.wait_for(lambda: not self._watching)
            self._others -= 1
            if self._pages is not None:
                self.transfers.slots.count_in(None)
        self.end.drop()

    def give_up(self, error: ParavirtError) -> None:
        """Nothing will be answered any more: everybody gets `error`."""
        with self.lock:
            self._error = self._error or error
            self._open = False
            self._changed.notify_all()
            self._wake_futures()
        self.end.waiter.kick()

    def close(self) -> None:
        """Give everything back, after `pause`. Nobody waits any more."""
        with self.lock:
            self._loop.close()
            if self._pages is not None:
                pages, self._pages = self._pages, None
                self._memory.release()
                if self.end.arena is not None:
                    self.end.arena.free(pages)
        self.end.close()
