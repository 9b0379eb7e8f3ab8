# SPDX-License-Identifier: MIT
"""One queue of a network device at the guest: two rings, the pages of their entries, sending and receiving.

Source: Xen public/io/netif.h. What is in flight when a backend dies is lost, as packets may be; nothing is sent twice.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from paravirt.errors import Closed, InvalidRequest, ParavirtError, PeerError, TimedOut
from paravirt.frontend.ring_end import RingEnd
from paravirt.frontend.vif_control import DATA_PAGES as CONTROL_PAGES
from paravirt.hypervisor.client import Arena, EventChannel, Hypervisor, PageRun
from paravirt.protocol import netif
from paravirt.protocol.netif import Mac
from paravirt.protocol.vif import VifOffer, VifQueue
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.event import WaitResult
from paravirt.ring.netif import Burst, NetFront, Takes
from paravirt.ring.netload import NetLoad, NetLoadResult
from paravirt.ring.shared import FrontRing, RingStatistics
from paravirt.ring.waiting import Fence

ENTRIES = 256
"""Of a ring of one page, either kind."""
ROOM_POLL_S = 0.001
Way = Literal["tx", "rx"]


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """Packets and bytes that went (tx) and came (rx)."""

    tx_packets: int
    tx_bytes: int
    tx_errors: int
    """Answers other than okay."""
    tx_refused: int
    """Frames that could not be sent."""
    tx_segmented: int
    tx_checksums: int
    tx_lost: int
    """In flight when a backend went."""
    rx_packets: int
    rx_bytes: int
    rx_errors: int
    """Packets that the backend got wrong, and were dropped."""
    rx_too_long: int
    tx_ring: RingStatistics
    rx_ring: RingStatistics


_COUNTED = tuple(name for name in QueueStatistics.__slots__ if name not in ("tx_lost", "tx_ring", "rx_ring"))


class Event(NamedTuple):
    """One that was taken for a foreign poll loop, and how far the rings had been read then."""

    channel: EventChannel
    read: tuple[tuple[FrontRing, int], ...]


class Mover(Protocol):
    """Who moves the frames of a queue himself."""

    def connected(self, front: NetFront, events: tuple[EventChannel, EventChannel]) -> None:
        """It can be used now."""

    def paused(self) -> None:
        """It is not used any more when this returns."""

    def still(self) -> AbstractContextManager[None]:
        """It is not used meanwhile."""


class VifQueueEnd:
    """Made and connected by its device's thread; any thread sends, any receives, one at a time each way."""

    def __init__(
        self, hypervisor: Hypervisor, path: DevicePath, queue: int, beside: "VifQueueEnd | None", max_spin_ns: int
    ) -> None:
        first: RingEnd | None = None if beside is None else beside.tx_end
        self.tx_end: RingEnd = RingEnd(hypervisor, path, netif.TX_NAME, queue=queue, beside=first)
        self.rx_end: RingEnd = RingEnd(hypervisor, path, netif.RX_NAME, queue=queue, beside=first or self.tx_end)
        self.front: NetFront | None = None
        self.listeners: set[Callable[[], None]] = set()
        """Called when it is connected or given up, and after each call of a thread; from any thread."""
        self._mover: Mover | None = None  # who moves its frames instead of callers
        self._max_spin_ns = max_spin_ns
        self._pages: PageRun | None = None
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._changed = threading.Condition()
        self._connected = False
        self._error: ParavirtError | None = None
        self._kept = dict.fromkeys(_COUNTED, 0)  # of former connections
        self._lost = 0

    # -- the device's thread

    def make(self, offer: VifOffer, n_queues: int, wanted_order: int, fence: Fence) -> VifQueue:
        """New rings and ports, as the backend's offer allows. `PeerError` when it takes less than the last one."""
        max_order = offer.max_ring_page_order
        order = min(wanted_order, max_order)
        # Two data pages an entry, and room for the rings of a later connection beside the present ones.
        data_pages = n_queues * 2 * (ENTRIES << order) + n_queues * 6 * (1 << order) + CONTROL_PAGES
        tx_refs, tx_port = self.tx_end.make(
            netif.TX_REQUEST,
            netif.TX_RESPONSE,
            wanted_order=wanted_order,
            max_order=max_order,
            data_pages=data_pages,
            fence=fence,
            max_spin_ns=self._max_spin_ns,
        )
        rx_refs, rx_port = self.rx_end.make(
            netif.RX_REQUEST,
            netif.RX_RESPONSE,
            wanted_order=wanted_order,
            max_order=max_order,
            data_pages=0,
            fence=fence,
            max_spin_ns=self._max_spin_ns,
            channel=None if offer.split_channels else self.tx_end.channel,
        )
        arena = self.tx_end.arena
        assert arena is not None
        self._have_pages(arena)
        return VifQueue(tx_refs, rx_refs, tx_port, rx_port)

    def _have_pages(self, arena: Arena) -> None:
        """A page for each entry of both rings: they stay granted from one backend to the next."""
        if self._pages is not None:
            return
        assert self.tx_end.ring is not None
        assert self.rx_end.ring is not None
        n_tx, n_rx = self.tx_end.ring.size, self.rx_end.ring.size
        pages = arena.allocate(n_tx + n_rx)
        for i in range(n_tx + n_rx):
            arena.grant(pages.gref + i, read_only=i < n_tx)
        self._pages = pages

    def connect(self, features: Takes, groups: Iterable[Mac] = ()) -> None:
        """Go. `groups`: to be asked for, before anything else."""
        tx, rx, pages = self.tx_end.ring, self.rx_end.ring, self._pages
        if tx is None or rx is None or pages is None:
            raise PeerError("the backend connected before it was asked to")
        front = NetFront(
            tx,
            rx,
            (pages.pointer(), pages.gref),
            (pages.pointer(offset_bytes=tx.size * netif.PAGE_BYTES), pages.gref + tx.size),
            features,
        )
        front.post_all()
        for group in groups:
            front.wish(group, join=True)
        with self._sending:  # a mover may send before it moves, and a wish may come
            with self._changed:
                self.front = front
                self._connected = True
                self._changed.notify_all()
                mover = self._mover
            self.tell(front)
            if mover is not None:
                mover.connected(front, self.events)
        self._tell_listeners()

    def lend(self, mover: Mover | None) -> None:
        """From now on `mover` moves its frames; None: callers do again. Not while a call is under way."""
        with self._sending, self._receiving, self._changed:
            before, self._mover = self._mover, mover
            front = self.front
        if before is not None and front is not None:
            before.paused()
        if mover is not None and front is not None:
            mover.connected(front, self.events)

    def pause(self) -> None:
        """Let go of rings and ports; callers wait for the next connection."""
        with self._changed:
            self._connected = False
        self.tx_end.waiter.kick()
        self.rx_end.waiter.kick()
        with self._sending, self._receiving:
            front, self.front = self.front, None
            if front is not None and self._mover is not None:
                self._mover.paused()
            if front is not None:
                self._lost += front.in_flight
                for name in _COUNTED:
                    self._kept[name] += getattr(front.counters, name)
                front.close()
            self.rx_end.drop()
            self.tx_end.drop()

    def give_up(self, error: ParavirtError) -> None:
        """No backend will come any more: calls end with this."""
        with self._changed:
            self._error = self._error or error
            self._connected = False
            self._changed.notify_all()
        self.tx_end.waiter.kick()
        self.rx_end.waiter.kick()
        self._tell_listeners()

    def _tell_listeners(self) -> None:
        for listener in list(self.listeners):
            listener()

    def close(self) -> None:
        """After `pause` and `give_up`; of several queues, the first last."""
        pages, self._pages = self._pages, None
        if pages is not None and self.tx_end.arena is not None:
            self.tx_end.arena.free(pages)
        self.rx_end.close()
        self.tx_end.close()

    # -- callers

    def send(self, burst: Burst, deadline: float | None) -> int:
        """Frames of a burst, in order, until all are with the backend or the time is up; how many."""
        done = 0
        while True:
            with self._usable(self._sending, deadline) as front:
                if front is not None:
                    n = front.send(burst, done)
                    self.tell(front)
                    done += n
                    if done >= len(burst):
                        return done
                    self._await_room(deadline)
            if deadline is not None and time.monotonic() >= deadline:
                return done

    def _await_room(self, deadline: float | None) -> None:
        ring = self.tx_end.ring
        assert ring is not None
        if self.rx_end.channel is self.tx_end.channel:
            time.sleep(ROOM_POLL_S)  # the receiver waits for events of both rings
            return
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ring.wait(timeout_s=left)

    def wish(self, group: Mac, *, join: bool, deadline: float | None) -> bool:
        """Ask the backend for what goes to a group, or no more; whether it granted that. One at a time; also while a
        mover has the queue. `TimedOut`.
        """
        asked: NetFront | None = None
        refused = 0
        while True:
            with self._still(deadline) as (front, is_moved):
                if front is not None:
                    front.reap()
                    if front is not asked:
                        refused = front.wishes[1]
                        asked = front if front.wish(group, join=join) else None
                        self.tell(front)
                    elif not front.wishes[0]:
                        return front.wishes[1] == refused
                    if not is_moved:
                        self._await_room(deadline)
            if is_moved:
                time.sleep(ROOM_POLL_S)  # the mover waits for events
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(f"the backend did not say in time whether {group} is {'joined' if join else 'left'}")

    def receive(self, burst: Burst, max_packets: int, deadline: float | None) -> int:
        """Packets to the end of a burst; how many, 0 when the time is up."""
        while True:
            with self._usable(self._receiving, deadline) as front:
                if front is not None:
                    n = front.take(burst, max_packets)
                    self.tell(front)
                    if n:
                        return n
                    ring = self.rx_end.ring
                    assert ring is not None
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    if ring.wait(timeout_s=left) is WaitResult.TIMEOUT:
                        return 0
            if deadline is not None and time.monotonic() >= deadline:
                return 0

    # -- callers that do not wait here

    def try_send(self, burst: Burst, start: int) -> int | None:
        """Frames of a burst from `start` on that are with the backend now; None: a thread is sending."""
        return self._attempt(self._sending, lambda front: front.send(burst, start))

    def try_receive(self, burst: Burst, max_packets: int) -> int | None:
        """Packets that are there, to the end of a burst; None: a thread is receiving."""
        return self._attempt(self._receiving, lambda front: front.take(burst, max_packets))

    def _attempt(self, lock: threading.Lock, call: Callable[[NetFront], int]) -> int | None:
        self._check()
        if not lock.acquire(blocking=False):
            return None
        try:
            front = self.front if self._connected else None
            if front is None:
                return 0
            n = call(front)
            self.tell(front)
            return n
        finally:
            lock.release()

    def doorbell(self, way: Way) -> Way:
        """Whose waiter has the events of this ring in the present connection."""
        return "tx" if self.rx_end.channel is self.tx_end.channel else way

    def is_ready(self, way: Way) -> bool:
        """Whether another attempt is worth it now; else the doorbell rings, or `listeners` are told, once it is."""
        lock, end = (self._sending, self.tx_end) if way == "tx" else (self._receiving, self.rx_end)
        if self._error is not None or not lock.acquire(blocking=False):
            return True
        try:
            return self._connected and end.ring is not None and end.ring.final_check()
        finally:
            lock.release()

    def take_event(self, doorbell: Way) -> Event | tuple[()] | None:
        """An event, to be given to `end_event` after what there is was taken; () if there is none; None, and the
        doorbell rings on, when a thread hears it.
        """
        end, lock = (self.tx_end, self._sending) if doorbell == "tx" else (self.rx_end, self._receiving)
        with ExitStack() as stack:
            # One channel for both rings: a thread that receives waits at the doorbell of the other one.
            for needed in (self._sending, self._receiving) if self.doorbell("rx") == "tx" else (lock,):
                if not needed.acquire(blocking=False):
                    return None
                stack.callback(needed.release)
            end.waiter.drain_bells()
            if not self._connected or end.channel is None or not end.channel.take_pending():
                return ()
            ends = (self.tx_end, self.rx_end) if self.rx_end.channel is self.tx_end.channel else (end,)
            return Event(end.channel, tuple((each.ring, each.ring.core.cons) for each in ends if each.ring is not None))

    def end_event(self, event: Event) -> None:
        """The channel may ring again: at once if something was taken, else later and later."""
        with self._changed:
            if not self._connected or event.channel not in (self.tx_end.channel, self.rx_end.channel):
                return
            if len(event.read) == 1:
                event.read[0][0].end_event()
            else:
                event.channel.eoi(spurious=all(ring.core.cons == cons for ring, cons in event.read))

    def run(self, load: NetLoad, *, takes: bool) -> NetLoadResult:
        """A load in C on this connection; other calls of that direction wait meanwhile. `takes`: it only takes.

        Raises `Closed` for a queue that is not connected; as `NetLoad.run`.
        """
        with self._usable(self._receiving if takes else self._sending, time.monotonic()) as front:
            if front is None:
                raise Closed("this queue is not connected")
            return load.run(front)

    @contextmanager
    def _usable(self, lock: threading.Lock, deadline: float | None) -> Iterator[NetFront | None]:
        """The connection, or None when there was none in time."""
        with self._changed:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._changed.wait_for(lambda: self._connected or self._error is not None, left)
            self._check()
        try:
            with lock:
                yield self.front if self._connected else None
        finally:
            self._tell_listeners()  # the event that they wait for may have been ours

    @contextmanager
    def _still(self, deadline: float | None) -> Iterator[tuple[NetFront | None, bool]]:
        """As `_usable` for who sends; a mover, if there is one, stands still meanwhile. And whether there is one."""
        with self._changed:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._changed.wait_for(lambda: self._connected or self._error is not None, left)
            if self._error is not None:
                raise self._error
        with self._sending, nullcontext() if self._mover is None else self._mover.still():
            yield self.front if self._connected else None, self._mover is not None

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._mover is not None:
            raise InvalidRequest("this queue is in use by an interface of the kernel")

    def tell(self, front: NetFront) -> None:
        """Find the backend again, if it could not be notified."""
        if front.take_untold():
            for channel in {self.tx_end.channel, self.rx_end.channel} - {None}:
                assert channel is not None
                channel.notify_stale()

    @property
    def events(self) -> tuple[EventChannel, EventChannel]:
        """Channels of the transmit and receive ring."""
        assert self.tx_end.channel is not None
        assert self.rx_end.channel is not None
        return self.tx_end.channel, self.rx_end.channel

    def statistics(self) -> QueueStatistics:
        """Live; `Closed` while there is no connection."""
        with self._changed:
            front, tx, rx = self.front, self.tx_end.ring, self.rx_end.ring
            if front is None or tx is None or rx is None:
                raise Closed("this queue is not connected")
            counted = {name: self._kept[name] + getattr(front.counters, name) for name in _COUNTED}
            return QueueStatistics(**counted, tx_lost=self._lost, tx_ring=tx.statistics(), rx_ring=rx.statistics())


def features_of(offer: VifOffer) -> Takes:
    """What a backend takes, for the core."""
    said = {
        Takes.SG: offer.sg,
        Takes.GSO4: offer.gso_tcpv4 and offer.sg,
        Takes.GSO6: offer.gso_tcpv6 and offer.sg,
        Takes.CSUM6: offer.ipv6_csum,
    }
    takes = Takes(0)
    for bit, is_there in said.items():
        if is_there:
            takes |= bit
    return takes
