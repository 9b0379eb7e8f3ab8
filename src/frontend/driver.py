# SPDX-License-Identifier: MIT
"""The frontend half of any device class that is declared as a `DeviceProtocol`: subclass `DeviceFrontend`.

Calls may come from any thread and from one event loop. One of the waiting threads at a time watches the ring for all;
in an event loop the doorbell is one more descriptor. What is in flight outlives its backend: the next one gets it on a
new ring, so a request may be done twice, as with Xen's block device.

A signal handler that raises while a call waits does no harm. One that raises in the few microseconds in which a call
changes what is in flight ends the device, with an error that says so.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import Closed, InvalidRequest, ParavirtError, PeerError, PeerGone, TimedOut
from paravirt.frontend.buffer import Buffer, carried_by, check_carried
from paravirt.frontend.device import FrontendDevice
from paravirt.frontend.driver_statistics import FrontendStatistics as FrontendStatistics
from paravirt.frontend.loop import LoopListener
from paravirt.frontend.pending import InFlight, Pending, PendingCall, as_batch
from paravirt.frontend.ring_end import RingEnd
from paravirt.frontend.suspend import Suspendable
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol.device import DeviceOffer, DeviceProtocol, DeviceRequest, put_message
from paravirt.protocol.keys import FENCE_KEY, MAX_RING_PAGE_ORDER
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.collect import Collector
from paravirt.ring.memory import PAGE_BYTES
from paravirt.ring.shared import FrontRing
from paravirt.ring.waiting import Wait, fence_for, spin_limit, take_spin
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

DEFAULT_SPIN_NS = 50_000
DEFAULT_RING_PAGE_ORDER = 2
DEFAULT_BUFFER_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 10.0


class DeviceFrontend(Suspendable):
    """An open device. A subclass names its `protocol` and gives its users methods made of `call` and `exchange`."""

    protocol: ClassVar[DeviceProtocol]

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        path: DevicePath,
        *,
        ring_page_order: int = DEFAULT_RING_PAGE_ORDER,
        buffer_bytes: int = DEFAULT_BUFFER_BYTES,
        spin_ns: int = DEFAULT_SPIN_NS,
        wait: Wait = "adaptive",
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Connect to the backend; made by `Domain.open`. Errors as `FrontendDevice.start`.

        `ring_page_order`: the ring has 2**order pages if the backend takes that many. `buffer_bytes`: of all buffers
        together, whole pages; 0 for a protocol without pages. `wait`: a waiting thread watches the ring as long as
        pays, at most `spin_ns`, and then sleeps ("adaptive"); never sleeps ("spin"); or sleeps at once ("sleep").
        """
        if not 0 <= ring_page_order <= MAX_RING_PAGE_ORDER:
            raise InvalidRequest(f"ring_page_order is {ring_page_order}, not 0 to {MAX_RING_PAGE_ORDER}")
        self._path, self._store = path, store
        self._wanted_order, self._max_spin_ns = ring_page_order, spin_limit(wait, spin_ns)
        self._data_pages = -(-buffer_bytes // PAGE_BYTES) if self.protocol.pages else 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._ring: FrontRing | None = None  # connected: requests may be sent
        self._watching = False  # a thread watches the ring, for all of them
        self._inside = False  # with the lock free: the last holder was interrupted while it changed what is in flight
        self._queue: deque[Pending] = deque()  # not all of their requests are sent
        self._in_flight: InFlight | None = None
        self._collector: Collector | None = None
        self._offer: DeviceOffer | None = None
        self._error: ParavirtError | None = None
        self._closed = False
        self._requests = self._responses = self._errors = self._kept = self._connects = self._reissued = 0
        self._end = RingEnd(hypervisor, path, path.kind)
        self._loop = LoopListener(self._end.waiter.fileno, self._on_readable)
        self._device = FrontendDevice(store, path, self)
        try:
            self._device.start(timeout_s)
        except BaseException:
            self.close()
            raise

    # -- what the subclass and its users call

    @property
    def offer(self) -> Any:
        """What the backend said of itself: the protocol's `offer`."""
        if self._offer is None:
            raise Closed(f"{self!r} was never connected")
        return self._offer.values

    @property
    def is_closed(self) -> bool:
        """`close` was called."""
        return self._closed

    def requests(self, n: int) -> NDArray[Any]:
        """An array of `n` requests, zero, in the layout of the ring: what is written there is what C copies into it."""
        return np.zeros(n, self.protocol.request)

    def buffer(self, n_bytes: int, *, read_only: bool = False) -> Buffer:
        """Memory that goes with a request without being copied; `read_only` for the backend.

        Raises `ResourceLimit` when `buffer_bytes` are used up, `InvalidRequest` for more than a request carries.
        """
        if n_bytes > self.protocol.pages * PAGE_BYTES:
            raise InvalidRequest(f"a request of {self.protocol.name} carries {self.protocol.pages} pages at most")
        arena = self._end.arena
        if arena is None or self._closed:
            raise Closed(f"{self!r} is closed")
        return Buffer(arena, n_bytes, read_only=read_only)

    def submit(self, requests: Any, buffers: Sequence[Buffer | None] = ()) -> Pending:
        """Send a batch, of any length: an array of `requests`, another structured array, dataclasses or dictionaries.

        `buffers`: the one of each request, or None. The array from `requests` is used as it is, and is the shadow of
        what is in flight: leave it alone until it is answered. Raises `InvalidRequest`, `Closed`, `PeerGone`,
        `PeerError`. Sending and taking goes on whenever somebody waits; `Pending.done` looks once.
        """
        batch = as_batch(self.protocol, requests)
        pending = Pending(self, batch, self.protocol.response)
        self._submit(pending, buffers)
        return pending

    def exchange(
        self, requests: Any, buffers: Sequence[Buffer | None] = (), *, timeout_s: float | None = None
    ) -> NDArray[Any]:
        """`submit`, and wait: the responses in the order of the requests. Raises as `submit` and `Pending.result`."""
        responses: NDArray[Any] = self.submit(requests, buffers).result(timeout_s)
        return responses

    def send(self, request: Any = None, *, buffer: Buffer | None = None, **fields: Any) -> PendingCall:
        """Send one request, of a dataclass or of fields by name: `await` it, or take its `result()`."""
        batch = self.requests(1)
        put_message(self.protocol, batch, 0, fields if request is None else request)
        pending = PendingCall(self, batch, self.protocol.response)
        pending.response_class = self.protocol.response_class
        self._submit(pending, () if buffer is None else (buffer,))
        return pending

    def write(
        self,
        max_count: int,
        fill: Callable[[NDArray[Any]], object],
        buffers: Sequence[Buffer | None] = (),
        *,
        timeout_s: float | None = None,
    ) -> Pending:
        """Send 1 to `max_count` requests that `fill` writes where the backend reads them: into the ring itself.

        `fill` gets as many slots as there is room for side by side: an array in the protocol's layout, zero. It fills
        them at once, reads nothing back, does not keep the array, and does not call this device. `result()` and `await`
        are as for `submit`; how many there were is the length of the responses. `buffers`: the first of them go with
        the requests, one each.

        Nobody else has a copy: when the backend dies these end with `PeerGone`, and are the caller's to send again.
        Waits for room, up to `timeout_s`. Raises as `submit`, and `TimedOut`.
        """
        if max_count < 1:
            raise InvalidRequest(f"{max_count} requests cannot be written")
        check_carried(buffers, max_count)
        with self._lock:
            self._wait_until(self._has_room, timeout_s)
            self._check()
            assert self._ring is not None
            assert self._in_flight is not None
            slots = self._ring.reserve(min(max_count, self._in_flight.free))
            slots[:] = np.zeros((), self.protocol.request)
            fill(slots)
            pending = Pending(self, self.requests(0), self.protocol.response, len(slots))
            carried = carried_by(buffers[: len(slots)])
            self._inside = True
            pending.carry(buffers[: len(slots)], carried)
            self._requests += pending.n
            try:
                self._in_flight.send_in_place(pending, slots, self._ring)
            except PeerError as error:
                self._fail_soon(error)
            self._inside = False
        return pending

    def call(
        self, request: Any = None, *, buffer: Buffer | None = None, timeout_s: float | None = None, **fields: Any
    ) -> Any:
        """Send one request and wait: its response, a dataclass if the protocol has one, else a record.

        Raises `IoError` for a status other than 0, and as `submit` and `Pending.result`.
        """
        return self.send(request, buffer=buffer, **fields).result(timeout_s)

    def statistics(self) -> FrontendStatistics:
        """The counters, live."""
        with self._lock:
            if self._closed or self._end.arena is None:
                raise Closed(f"{self!r} is closed")
            return FrontendStatistics(
                requests=self._requests,
                responses=self._responses,
                errors=self._errors,
                in_flight=len(self._in_flight or ()),
                queued=sum(pending.n - pending.issued for pending in self._queue),
                granted_pages=self._end.arena.statistics().granted_pages,
                kept_pages=self._kept,
                reconnects=max(0, self._connects - 1),
                reissued=self._reissued,
                ring=self._ring.statistics() if self._ring else None,
            )

    def close(self) -> None:
        """Close the device and free everything; what is under way ends with `Closed`. Harmless when repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._give_up(Closed(f"{self.protocol.name} {self._path.device_id} is closed"))
        self._end.waiter.kick()
        self._device.close()
        self.pause()
        self._end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self._ring else "waiting for its backend"
        path = self._path
        return f"<{type(self).__name__} {path.kind} {path.device_id} of domain {path.frontend_domid}, {state}>"

    # -- sending and taking, under the lock

    def _submit(self, pending: Pending, buffers: Sequence[Buffer | None]) -> None:
        check_carried(buffers, pending.n)
        with self._lock:
            self._check()
            carried = carried_by(buffers)
            self._inside = True
            pending.carry(buffers, carried)
            self._requests += pending.n
            self._queue.append(pending)
            self._send()
            self._inside = False

    def _has_room(self) -> bool:
        if self._closed or self._error is not None:
            return True  # to be told
        self._collect()
        if self._ring is None or self._in_flight is None or self._queue:
            return False
        return self._in_flight.free > 0

    def _check_whole(self) -> None:
        """After a signal handler raised where it must not, nobody knows what is in flight: that is the device's end."""
        if self._inside:
            self._inside = False
            self._fail_soon(ParavirtError("a call was interrupted half-way into the ring: open the device again"))

    def _check(self) -> None:
        self._check_whole()
        if self._closed:
            raise Closed(f"{self.protocol.name} {self._path.device_id} is closed")
        if self._error is not None:
            raise self._error

    def _send(self) -> None:
        """As much of the queue as there is room for."""
        while self._queue and self._ring is not None and self._in_flight is not None:
            pending = self._queue[0]
            try:
                if pending.error is None and pending.issued < pending.n:
                    if not self._in_flight.free:
                        return
                    self._in_flight.send(pending, self._ring)
            except PeerError as error:
                self._fail_soon(error)
                return
            if pending.error is not None or pending.issued == pending.n:
                self._queue.popleft()
                if pending.finished:  # an empty batch
                    self._announce([pending])

    def _settle(self) -> None:
        """Give what was taken to those who asked."""
        if self._collector is None or self._in_flight is None or not self._collector.taken:
            return
        self._inside = True
        responses = self._collector.hand_over()
        self._responses += len(responses)
        self._errors += int(np.count_nonzero(responses["status"]))
        finished, kept, error = self._in_flight.settle(responses)
        self._kept += kept
        self._announce(finished)
        if error is not None:
            self._fail_soon(error)
        self._send()
        self._inside = False

    def _collect(self) -> None:
        """Take what is there, until the backend rings for what comes next; a thread that watches does that itself."""
        while self._ring is not None and self._collector is not None and not self._watching:
            try:
                if not self._collector.taken and not self._collector.take(self._ring):
                    if self._ring.final_check():
                        continue
                    return
            except PeerError as error:
                self._fail_soon(error)
                return
            self._settle()

    def _announce(self, finished: list[Pending]) -> None:
        for pending in finished:
            for future in pending.futures:
                self._loop.wake(future)
            pending.futures.clear()
        if finished:
            self._changed.notify_all()

    def _give_up(self, error: ParavirtError) -> None:
        """Nothing will be answered any more: everybody gets `error`."""
        under_way = {*self._queue, *(self._in_flight.pending() if self._in_flight else ())}
        self._queue.clear()
        for pending in under_way:
            if not pending.finished:
                pending.error = error
            for buffer in pending.buffers[pending.issued :]:
                if buffer is not None:
                    buffer.answered()
        self._announce(list(under_way))
        self._changed.notify_all()

    def _fail_soon(self, error: ParavirtError) -> None:
        """The backend lied, or so: no more requests; the device's thread closes the device."""
        self._ring = None
        self._error = self._error or error
        self._give_up(error)
        self._device.fail(error)

    # -- waiting

    def look(self) -> None:
        """Take the answers that are there."""
        with self._lock:
            self._check_whole()
            self._collect()

    def wait_for(self, pending: Pending, timeout_s: float | None) -> None:
        """Until it is finished. Raises `TimedOut`."""
        with self._lock:
            self._wait_until(lambda: pending.finished, timeout_s)

    def _wait_until(self, true: Callable[[], bool], timeout_s: float | None) -> None:
        """With the lock held, which is let go meanwhile: until answers have made it true. Raises `TimedOut`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._check_whole()
        while not true():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimedOut(f"{self.protocol.name} {self._path.device_id} did not answer in time")
            if self._ring is None or self._watching or self._collector is None:
                self._changed.wait(left)
            elif self._collector.taken:  # by one that was interrupted before it could settle it
                self._settle()
            else:
                self._watch(self._ring, self._collector, left)

    def _watch(self, ring: FrontRing, collector: Collector, timeout_s: float | None) -> None:
        """Wait for answers, for everybody. With the lock held, which is let go meanwhile."""
        failed: PeerError | None = None
        raised: BaseException | None = None
        regained: list[bool] = []
        self._watching = True
        try:
            self._lock.release()
            collector.watch(ring, take_spin(self._max_spin_ns), timeout_s)
        except PeerError as error:
            failed = error
        finally:
            # Also when a signal handler raises, anywhere here: what was taken counts, and others must be able to watch.
            while not regained:
                try:
                    regained.extend(map(self._lock.acquire, (True,)))  # one step in C: it is done and noted, or neither
                except BaseException as error:
                    raised = error
            self._watching = False
            self._settle()
            self._changed.notify_all()
        if failed is not None:
            self._fail_soon(failed)
        if self._loop:
            self._collect()
        if raised is not None:
            raise raised

    async def wait_for_async(self, pending: Pending) -> None:
        """Until it is finished, without blocking the event loop. Raises `InvalidRequest` in a second loop."""
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            self._check_whole()
            if pending.finished:
                return
            self._loop.enter(future.get_loop())
            pending.futures.append(future)
            self._collect()
        try:
            await future
        finally:
            with self._lock:
                self._loop.leave()

    def _on_readable(self) -> None:
        with self._lock:
            self._check_whole()
            if self._closed or self._watching:
                return
            self._end.waiter.drain_bells()
            ring, channel = self._ring, self._end.channel
            if ring is None or channel is None:
                return
            taken = channel.take_pending()
            self._collect()
            if taken:
                ring.end_event()

    # -- the driver's part of xenbus: called from the device's thread

    def negotiate(self, backend: str) -> dict[str, str]:
        """A new ring and port, as the backend's offer allows."""
        protocol = self.protocol
        offer = DeviceOffer.from_keys(protocol, xenbus.read_keys(self._store, backend, DeviceOffer.names(protocol)))
        word = xenbus.read_key(self._store, f"{backend}/{FENCE_KEY}") or ""
        fence = fence_for(word)
        refs, port = self._end.make(
            protocol.request,
            protocol.response,
            wanted_order=self._wanted_order,
            max_order=offer.max_ring_page_order,
            data_pages=self._data_pages,
            fence=fence,
            max_spin_ns=self._max_spin_ns,
        )
        keys = DeviceRequest(refs, port).to_keys(protocol)
        return {**keys, FENCE_KEY: "full" if fence == "full" else word} if word else keys

    def connect(self, backend: str) -> None:
        """Go: what was in flight is sent again on the new ring."""
        protocol, ring = self.protocol, self._end.ring
        offer = DeviceOffer.from_keys(protocol, xenbus.read_keys(self._store, backend, DeviceOffer.names(protocol)))
        if ring is None:
            raise PeerError("the backend connected before it was asked to")
        with self._lock:
            self._check_whole()
            self._offer = offer
            if self._in_flight is None:
                self._in_flight = InFlight(protocol, ring.size)
                self._collector = Collector(protocol.response, ring.size)
            self._ring = ring
            self._connects += 1
            lost = PeerGone(f"the backend of {protocol.name} is another one: what was written in place is lost")
            self._announce(self._in_flight.lose_in_place(lost))
            self._reissued += self._in_flight.send_again(ring)
            self._send()
            if self._loop:
                self._collect()
            self._changed.notify_all()

    def refresh(self, backend: str) -> None:
        """Nothing a connected device takes over."""

    def pause(self) -> None:
        """Let go of ring and port; what is in flight stays in the shadow."""
        with self._lock:
            self._ring = None
            self._end.waiter.kick()
            self._changed.wait_for(lambda: not self._watching)
        self._end.drop()

    def closed(self, error: ParavirtError | None) -> None:
        """No answer will come any more."""
        with self._lock:
            name = f"{self.protocol.name} {self._path.device_id}"
            self._error = self._error or error or PeerGone(f"the backend of {name} has closed")
            self._give_up(self._error)
