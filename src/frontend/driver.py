# SPDX-License-Identifier: MIT
"""The frontend half of any device class that is declared as a `DeviceProtocol`: subclass `DeviceFrontend`.

Calls may come from any thread and from one event loop. One of the waiting threads at a time watches the ring for all;
in an event loop the doorbell is one more descriptor. What is in flight outlives its backend: the next one gets it on a
new ring, so a request may be done twice, as with Xen's block device.

A signal handler that raises while a call waits does no harm. One that raises in the few microseconds in which a call
changes what is in flight ends the device, with an error that says so.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import Closed, InvalidRequest, ParavirtError, PeerError, PeerGone, TimedOut
from paravirt.frontend.buffer import Buffer
from paravirt.frontend.device import FrontendDevice
from paravirt.frontend.pending import InFlight, Pending, PendingCall, as_batch
from paravirt.frontend.ring_end import RingEnd
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol.device import DeviceOffer, DeviceProtocol, DeviceRequest, put_message
from paravirt.protocol.keys import MAX_RING_PAGE_ORDER
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.collect import Collector
from paravirt.ring.memory import PAGE_BYTES
from paravirt.ring.shared import FrontRing, RingStatistics
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

DEFAULT_SPIN_NS = 30_000
DEFAULT_RING_PAGE_ORDER = 2
DEFAULT_BUFFER_BYTES = 1 << 20
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class FrontendStatistics:
    """Counts since the device was opened."""

    requests: int
    """Handed to the device."""
    responses: int
    errors: int
    """Of the responses: with a status other than 0."""
    in_flight: int
    """Sent, not answered."""
    queued: int
    """Handed over, not sent: the ring is full, or there is none at the moment."""
    granted_pages: int
    """Pages that the backend may use now, those of the ring included."""
    kept_pages: int
    """Times a page could not be taken back after its answer, because the backend still used it."""
    reconnects: int
    """Times a new backend was connected."""
    reissued: int
    """Requests sent again after that."""
    ring: RingStatistics | None
    """Of the present ring; None while there is none."""


class DeviceFrontend:
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
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Connect to the backend; made by `Domain.open`. Errors as `FrontendDevice.start`.

        `ring_page_order`: the ring has 2**order pages if the backend takes that many. `buffer_bytes`: of all buffers
        together, whole pages; 0 for a protocol without pages. `spin_ns`: how long a waiting thread watches the ring
        before it sleeps; 0 for never.
        """
        if not 0 <= ring_page_order <= MAX_RING_PAGE_ORDER:
            raise InvalidRequest(f"ring_page_order is {ring_page_order}, not 0 to {MAX_RING_PAGE_ORDER}")
        self._path, self._store = path, store
        self._wanted_order, self._spin_ns = ring_page_order, spin_ns
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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread = self._loop_fd = self._listeners = 0
        self._requests = self._responses = self._errors = self._kept = self._connects = self._reissued = 0
        self._end = RingEnd(hypervisor, path.backend_domid)
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
                queued=sum(len(pending.requests) - pending.issued for pending in self._queue),
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
        if buffers and len(buffers) != len(pending.requests):
            raise InvalidRequest(f"{len(buffers)} buffers do not fit {len(pending.requests)} requests")
        carried = [buffer for buffer in buffers if buffer is not None]
        if len(set(map(id, carried))) != len(carried):
            raise InvalidRequest("a buffer is carried by one request at a time")
        with self._lock:
            self._check()
            for buffer in carried:
                buffer.check_usable()
            self._inside = True
            for buffer in carried:
                buffer.in_flight = True
            pending.buffers = buffers if carried else ()
            self._requests += len(pending.requests)
            self._queue.append(pending)
            self._send()
            self._inside = False

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
                if pending.error is None and pending.issued < len(pending.requests):
                    if not self._in_flight.free:
                        return
                    self._in_flight.send(pending, self._ring)
            except PeerError as error:
                self._fail_soon(error)
                return
            if pending.error is not None or pending.issued == len(pending.requests):
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
                self._wake(future)
            pending.futures.clear()
        if finished:
            self._changed.notify_all()

    def _wake(self, future: "asyncio.Future[None]") -> None:
        def done() -> None:
            if not future.done():
                future.set_result(None)

        if threading.get_ident() == self._loop_thread:
            done()
        else:
            with suppress(RuntimeError):  # the loop is closed
                future.get_loop().call_soon_threadsafe(done)

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
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._check_whole()
            while not pending.finished:
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
            collector.watch(ring, self._spin_ns, timeout_s)
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
        if self._listeners:
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
            self._listen(future.get_loop())
            pending.futures.append(future)
            self._collect()
        try:
            await future
        finally:
            with self._lock:
                self._unlisten()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is None:
            # A descriptor of our own: the waiter may be closed before the loop has forgotten it.
            self._loop_fd = os.dup(self._end.waiter.fileno())
            loop.add_reader(self._loop_fd, self._on_readable)
            self._loop, self._loop_thread = loop, threading.get_ident()
        elif self._loop is not loop:
            raise InvalidRequest(f"another event loop waits for {self!r}")
        self._listeners += 1

    def _unlisten(self) -> None:
        self._listeners -= 1
        if not self._listeners and self._loop is not None:
            self._loop.remove_reader(self._loop_fd)
            os.close(self._loop_fd)
            self._loop, self._loop_thread = None, 0

    def _on_readable(self) -> None:
        with self._lock:
            self._check_whole()
            if self._closed or self._watching:
                return
            self._end.waiter.drain_bells()
            if self._ring is not None and self._end.channel is not None:
                self._end.channel.take_pending()
                self._collect()

    # -- the driver's part of xenbus: called from the device's thread

    def negotiate(self, backend: str) -> dict[str, str]:
        """A new ring and port, as the backend's offer allows."""
        protocol = self.protocol
        offer = DeviceOffer.from_keys(protocol, xenbus.read_keys(self._store, backend, DeviceOffer.names(protocol)))
        refs, port = self._end.make(
            protocol.request,
            protocol.response,
            wanted_order=self._wanted_order,
            max_order=offer.max_ring_page_order,
            data_pages=self._data_pages,
        )
        return DeviceRequest(refs, port).to_keys(protocol)

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
            self._reissued += self._in_flight.send_again(ring)
            self._send()
            if self._listeners:
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
