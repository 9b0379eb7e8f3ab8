# SPDX-License-Identifier: MIT
"""The client of xenstored: blocking calls from any thread over one connection.

One thread of the client reads everything that comes and hands replies to the calls that wait, watch events to their
queues; so any number of threads may have requests under way at once. With reconnection it is also the thread that makes
the next connection (see `protocol_state` for what becomes of what was under way).
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

from paravirt.errors import (
    AccessRefused,
    Closed,
    NoSuchNode,
    ParavirtError,
    StoreFailure,
    StoreGone,
    TimedOut,
    XenstoreError,
)
from paravirt.xenstore.calls import DomainCalls, TransactionConflict
from paravirt.xenstore.client_transaction import Transaction
from paravirt.xenstore.pipeline import Pipeline
from paravirt.xenstore.protocol_state import (
    RECONNECT_TIMEOUT_S,
    ClientProtocol,
    Patience,
    Request,
    Subscription,
    gone,
    not_back,
    not_in_time,
)
from paravirt.xenstore.transaction_steps import Requests, TransactionSteps
from paravirt.xenstore.transport import CallConnector, Connector, SocketConnector, SocketTransport, Transport
from paravirt.xenstore.watch_queue import PENDING_MAX, Watcher, WatchEvent, WatchQueue
from paravirt.xenstore.wire import Op

if TYPE_CHECKING:
    from paravirt.ring.event import EventPort, EventWaiter
    from paravirt.ring.memory import Mapping

__all__ = ["Transaction", "TransactionConflict", "WatchEvent", "WatchQueue", "XenstoreClient"]

ATTEMPTS: Final = 100
T = TypeVar("T")


class XenstoreClient(DomainCalls):
    """A connection to xenstored. A context manager; not usable in a forked child (`Closed`).

    With a `connector` the client outlives its connections: when one breaks, others are tried for
    `reconnect_timeout_s`, and only then calls raise `StoreGone`. Meanwhile calls wait.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        connector: Connector | None = None,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> None:
        """Over a byte stream, which it owns from now on."""
        self._transport = transport
        self._connector = connector
        self._patience = Patience(reconnect_timeout_s, time.monotonic())
        self._pid = os.getpid()
        self._send_lock = threading.Lock()  # taken first, and may be held for long: reading must never need it
        self._lock = threading.Lock()  # guards the two below
        self._protocol = ClientProtocol(reconnects=connector is not None)
        self._broken: Exception | None = None  # what a sender has met
        self._closing = threading.Event()
        self._hurry = threading.Event()  # nobody waits for a next connection any more
        self._flusher: threading.Thread | None = None
        self._watcher = Watcher(self._watch, self._unwatch, self._forget_queue)
        self._reader = threading.Thread(target=self._run, name="xenstore-client", daemon=True)
        self._reader.start()

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        reconnect: bool = False,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> Self:
        """To a daemon's Unix socket. `NotFound` if nobody serves it.

        `reconnect`: outlive the daemon, for a program that has to go on after its restart. Off by default, so that a
        command says at once that the daemon is gone.
        """
        connector = SocketConnector(path) if reconnect else None
        return cls(SocketTransport.connect(path), connector=connector, reconnect_timeout_s=reconnect_timeout_s)

    @classmethod
    def from_socket(
        cls,
        connected: socket.socket,
        *,
        again: Callable[[], socket.socket] | None = None,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> Self:
        """Over a connected socket, which it owns from now on. `again` makes another one when it breaks."""
        connector = CallConnector(again) if again is not None else None
        return cls(SocketTransport(connected), connector=connector, reconnect_timeout_s=reconnect_timeout_s)

    @classmethod
    def over_ring(
        cls,
        page: "Mapping | memoryview",
        waiter: "EventWaiter",
        port: "EventPort",
        *,
        reconnect: bool = False,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> Self:
        """Over a guest's xenstore page. It owns none of what it is given, and waits on `waiter` in a thread of its own.

        `reconnect`: when the daemon stops serving the page, have it start anew, by the page's reconnection feature.
        """
        from paravirt.xenstore.ring_transport import RingConnector, RingTransport

        connector = RingConnector(page, waiter, port) if reconnect else None
        transport = RingTransport(page, waiter, port)
        return cls(transport, connector=connector, reconnect_timeout_s=reconnect_timeout_s)

    # -- requests

    def request(self, op: Op, payload: bytes, what: str = "") -> bytes:
        request = Request(op, payload, what)
        self.exchange(request)
        return request.outcome()

    def exchange(self, request: Request) -> None:
        """Send one request and wait until it is done."""
        done = threading.Lock()
        done.acquire()
        request.wake = done.release
        self._submit(request)
        done.acquire()

    def follow(self, requests: Requests[T]) -> T:
        """Make requests that depend on each other."""
        try:
            while True:
                self.exchange(next(requests))
        except StopIteration as end:
            value: T = end.value
            return value

    def make(self, op: Op, payload: bytes, what: str) -> Request:
        """For a pipeline: a request that is not sent yet."""
        return Request(op, payload, what)

    def send(self, requests: list[Request]) -> None:
        """For a pipeline: send them together; no reply is waited for."""
        self._submit(*requests)

    def wait(self, request: Request) -> None:
        """For a pipeline: until a request that was sent is done. One thread at a time."""
        if self._protocol.has_output:  # a signal handler has raised before it went out
            self._flush()
        done = threading.Lock()
        done.acquire()
        with self._lock:  # requests are done under the lock only
            if request.done:
                return
            request.wake = done.release
        done.acquire()

    def pipeline(self) -> Pipeline:
        """Many requests at once: `with client.pipeline() as p: a = p.read("x"); p.write("y", "1")`, then `a.value`."""
        return Pipeline(self)

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise Closed("this xenstore client belongs to the parent of this process")
        self._protocol.check()

    def _submit(self, *requests: Request) -> None:
        """Take requests, and send what there is to send. The calling thread waits where there is no room."""
        self._check()
        with self._send_lock:
            while self._send_some(requests) and self._protocol.has_output:
                requests = ()

    def _flush(self) -> None:
        """Send what there is to send."""
        with contextlib.suppress(ParavirtError):  # over already: whoever waits knows
            self._submit()

    def _send_some(self, requests: tuple[Request, ...]) -> bool:
        """Take requests, and send what fits; whether the connection is in order. Under the send lock."""
        data, counts = b"", list[int]()
        try:
            with self._lock:
                for request in requests:
                    self._protocol.submit(request)
                data = self._protocol.take_output()
            if data:
                self._transport.send(data, counts)
        except (OSError, ParavirtError) as error:
            self._broken = self._broken or error
            self._transport.shut_down()  # the reader sees that, and does what is to be done
            return False
        finally:  # also when the handler of a signal has raised
            if counts == [len(data)]:
                self._protocol.all_sent()
            else:
                with self._lock:
                    self._protocol.give_back(sum(counts))
        return True

    # -- transactions

    def transaction(self, *, attempts: int = 1) -> Transaction:
        """A new transaction: `with client.transaction() as t:` commits at the end, or aborts on an exception.

        A `with` block cannot run twice. With more `attempts`, a conflict at its end makes the requests of the block
        again in a new transaction, and commits if all of them get the answers that the block has got: then the block
        would have done just the same. If one gets another answer (or after the last attempt) `TransactionConflict` is
        raised and nothing was done; `transact` is for what has to look again.
        """
        steps = TransactionSteps(attempts)
        requests = steps.start()
        request = next(requests)
        try:
            self.exchange(request)
        except BaseException:
            with self._lock:
                self._protocol.abandon_start(request)
            raise
        for _ in requests:
            raise AssertionError("a start is one request")
        return Transaction(self, steps)

    def transact(self, function: Callable[[Transaction], T], *, attempts: int = ATTEMPTS) -> T:
        """Run `function` in a transaction and commit; again, up to `attempts` times, when there was a conflict.

        Returns what the last run returned. `TransactionConflict` when no attempt came through. EIO inside a transaction
        is one too: it found nodes at odds that it first saw at different times.
        """
        while True:
            attempts -= 1
            try:
                with self.transaction() as transaction:
                    return function(transaction)
            except (TransactionConflict, StoreFailure):
                if attempts < 1:
                    raise

    # -- watches

    def watch_queue(self, *, pending_max: int = PENDING_MAX) -> WatchQueue:
        """A new queue; add watches to it."""
        queue = WatchQueue(self._watcher, self._protocol.new_token, pending_max=pending_max)
        with self._lock:
            self._check()
            self._protocol.sinks.add(queue)
        return queue

    def watch(self, path: str, token: str | None = None, *, depth: int | None = None) -> WatchQueue:
        """Watch one path: `with client.watch(path) as events: for event in events: ...`. The first comes at once.

        `depth`: only so many levels below it (a feature of newer daemons).
        """
        queue = self.watch_queue()
        try:
            queue.add(path, token, depth=depth)
        except BaseException:
            queue.close()
            raise
        return queue

    def wait_for(
        self, path: str, predicate: Callable[[bytes | None], object], timeout_s: float | None = None
    ) -> bytes | None:
        """Wait until `predicate` is true of the value of a node, and return that value.

        The value is None while there is no such node, or none that may be read. `TimedOut` (a `TimeoutError` too) after
        `timeout_s`, naming the path and its last value.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self.watch(path) as events:
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                event = events.get(left)
                value = self._value(path)
                if predicate(value):
                    return value
                if event is None:
                    raise TimedOut(not_in_time(path, value, timeout_s))

    def _value(self, path: str) -> bytes | None:
        try:
            return self.read(path)
        except (NoSuchNode, AccessRefused):
            return None

    def reset_watches(self) -> None:
        """Drop all watches and transactions of this connection."""
        self.request(Op.RESET_WATCHES, b"")

    def _watch(self, subscription: Subscription) -> None:
        request = subscription.watch()
        try:
            self.exchange(request)
            request.outcome()
        except XenstoreError:
            raise
        except BaseException:
            self._give_up_watch(subscription)
            raise

    def _give_up_watch(self, subscription: Subscription) -> None:
        """Nobody waits any more for a watch that may have been sent: take it away without waiting for that either."""
        with self._lock:
            known = self._protocol.subscriptions.pop(subscription.wire_token, None)
        if known is not None and not self.closed:
            self._submit(subscription.unwatch())

    def _unwatch(self, subscription: Subscription) -> None:
        with self._lock:
            self._protocol.subscriptions.pop(subscription.wire_token, None)
        request = subscription.unwatch()
        self.exchange(request)
        try:
            request.outcome()
        except NoSuchNode:
            pass  # dropped meanwhile by reset_watches

    def _forget_queue(self, queue: WatchQueue) -> None:
        with self._lock:
            self._protocol.sinks.discard(queue)

    # -- the reader

    def _run(self) -> None:
        try:
            error = self._read()
            while self._connect_again(error):
                error = self._read()
        except BaseException as defect:  # of ours or of a connector: nobody may wait for ever
            with self._lock:
                self._protocol.end(StoreGone(f"the store's client has failed: {defect!r}"))
            raise

    def _read(self) -> Exception | None:
        """Until the connection breaks; why it did, None at its end."""
        try:
            while data := self._transport.receive():
                with self._lock:
                    self._protocol.receive(data)
        except (OSError, ParavirtError) as error:
            return error
        return None

    def _connect_again(self, error: Exception | None) -> bool:
        """Whether there is another connection; if not, everything that waited has been told why."""
        self._transport.shut_down()
        with self._send_lock, self._lock:  # no sender is under way now: what was sent is known
            error, self._broken = self._broken or error, None
            self._patience.lost(time.monotonic(), answered=self._protocol.answered)
            self._protocol.lost(gone(error))
            if self._protocol.ended is not None:
                return False
        self._transport.close()
        try:
            transport = self._find_daemon(gone(error))
        except ParavirtError as end:
            with self._lock:
                self._protocol.end(end)
            return False
        if not self._adopt(transport):
            return False
        self._join_flusher()
        # Not by this thread: it has to read while there is no room.
        self._flusher = threading.Thread(target=self._flush, name="xenstore-flush", daemon=True)
        self._flusher.start()
        return True

    def _find_daemon(self, failure: StoreGone) -> Transport:
        """The next connection. `StoreGone` when there is none in time, `Closed` when the client is closed."""
        assert self._connector is not None
        why = ""
        while (delay := self._patience.next_delay_s(time.monotonic())) is not None:
            if self._hurry.wait(delay):
                if self._closing.is_set():
                    raise Closed("this xenstore client is closed")
                raise failure
            try:
                transport = self._connector.connect_nowait()
            except (OSError, ParavirtError) as error:
                why = f" ({error})"
            else:
                if transport is not None:
                    return transport
        raise not_back(failure, self._patience.timeout_s, why)

    def _adopt(self, transport: Transport) -> bool:
        """Go on over a new connection, unless the client was closed meanwhile."""
        with self._send_lock, self._lock:
            ended = self._protocol.ended
            if ended is None:
                self._transport = transport
                self._patience.connected(time.monotonic())
                self._protocol.connected()
            else:
                self._protocol.end(ended)
        if ended is not None:
            transport.close()
        return ended is None

    def _join_flusher(self) -> None:
        if self._flusher is not None:
            self._flusher.join()
            self._flusher = None

    # -- end

    def stop_reconnecting(self) -> None:
        """From now on a lost connection is the end: calls that wait for the next one get `StoreGone`. For shutting down
        while no daemon may run."""
        self._hurry.set()

    def close(self) -> None:
        """End the connection; calls and queues that wait get `Closed`. Harmless when repeated, or in a forked child."""
        if os.getpid() != self._pid:
            self._transport.close()
            return
        self._closing.set()
        self._hurry.set()
        with self._lock:
            if self._protocol.ended is None:
                self._protocol.ended = Closed("this xenstore client is closed")
            transport = self._transport
        transport.shut_down()
        if threading.current_thread() is not self._reader:
            self._reader.join()
            self._join_flusher()
        self._transport.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed or the daemon is gone for good."""
        return self._protocol.ended is not None

    @property
    def n_reconnects(self) -> int:
        """Connections that broke and were, or are being, replaced."""
        return self._protocol.epoch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        protocol = self._protocol
        watches = f"{len(protocol.subscriptions)} watches"
        return f"<XenstoreClient: {protocol.ended or f'{protocol.n_under_way} calls under way, {watches}'}>"
