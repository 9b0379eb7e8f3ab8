# SPDX-License-Identifier: MIT
"""The client of xenstored for asyncio: the calls of `client` as coroutines, in the event loop's own thread.

Requests of tasks that run at the same time go out together (`asyncio.gather` is the pipeline). What becomes of them
when the connection breaks: see `protocol_state`.
"""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from paravirt.errors import (
    AccessRefused,
    Closed,
    NoSuchNode,
    ParavirtError,
    StoreFailure,
    StoreGone,
    TransactionConflict,
    XenstoreError,
)
from paravirt.xenstore.async_calls import AsyncDomainCalls, AsyncStoreCalls
from paravirt.xenstore.async_watch import AsyncWatcher, AsyncWatchQueue
from paravirt.xenstore.client import ATTEMPTS
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
from paravirt.xenstore.watch_queue import PENDING_MAX
from paravirt.xenstore.wire import Op

if TYPE_CHECKING:
    from paravirt.ring.event import EventPort, EventWaiter
    from paravirt.ring.memory import Mapping

READS_PER_WAKE_UP = 16
T = TypeVar("T")


class AsyncXenstoreClient(AsyncDomainCalls):
    """A connection to xenstored, of one event loop. `async with AsyncXenstoreClient.connect(path) as client: ...`.

    A call that is cancelled may have run. With a `connector` the client outlives its connections, as `XenstoreClient`.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        connector: Connector | None = None,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> None:
        """Over a byte stream, which it owns from now on. Inside the event loop that it is for."""
        self._loop = asyncio.get_running_loop()
        self._connector = connector
        self._patience = Patience(reconnect_timeout_s, time.monotonic())
        self._pid = os.getpid()
        self._protocol = ClientProtocol(reconnects=connector is not None)
        self._watcher = AsyncWatcher(self._watch, self._unwatch, self._protocol.sinks.discard)
        self._transport: Transport | None = None
        self._polls_for_room = False
        self._flush_is_due = False
        self._reconnecting: asyncio.Task[None] | None = None
        self._use(transport)

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        reconnect: bool = False,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
    ) -> Self:
        """To a daemon's Unix socket; as `XenstoreClient.connect`. It connects at once, so `await` is not needed."""
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
        """Over a guest's xenstore page, as `XenstoreClient.over_ring`; the loop polls the waiter's descriptor."""
        from paravirt.xenstore.ring_transport import RingConnector, RingTransport

        connector = RingConnector(page, waiter, port) if reconnect else None
        transport = RingTransport(page, waiter, port)
        return cls(transport, connector=connector, reconnect_timeout_s=reconnect_timeout_s)

    def __await__(self) -> Generator[Any, None, Self]:
        """Itself: for those who write `await AsyncXenstoreClient.connect(path)`."""
        yield from ()
        return self

    # -- requests

    async def request(self, op: Op, payload: bytes, what: str = "") -> bytes:
        request = Request(op, payload, what)
        await self.exchange(request)
        return request.outcome()

    async def exchange(self, request: Request) -> None:
        """Send one request and wait until it is done."""
        self._submit(request)
        if request.done:
            return
        done = self._loop.create_future()
        request.wake = lambda: None if done.done() else done.set_result(None)
        await done

    async def follow(self, requests: Requests[T]) -> T:
        """Make requests that depend on each other."""
        try:
            while True:
                await self.exchange(next(requests))
        except StopIteration as end:
            value: T = end.value
            return value

    def _submit(self, request: Request) -> None:
        if os.getpid() != self._pid:
            raise Closed("this xenstore client belongs to the parent of this process")
        self._protocol.check()
        self._protocol.submit(request)
        if not self._flush_is_due:
            self._flush_is_due = True  # later, so that what other tasks ask for now goes with it
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        transport = self._transport
        if transport is None:
            return
        protocol, n_bytes = self._protocol, 1
        while n_bytes and protocol.has_output:
            data = protocol.take_output()
            try:
                n_bytes = transport.send_nowait(data)
            except (OSError, ParavirtError) as error:
                protocol.give_back(0)
                self._lost(error)
                return
            protocol.give_back(n_bytes)
        waits = not n_bytes and transport.polls_for_room
        if waits and not self._polls_for_room:
            self._loop.add_writer(transport.fileno(), self._flush)
        elif self._polls_for_room and not waits:
            self._loop.remove_writer(transport.fileno())
        self._polls_for_room = waits

    # -- what comes in

    def _on_readable(self) -> None:
        transport = self._transport
        if transport is None:
            return
        try:
            for _ in range(READS_PER_WAKE_UP):  # then it is others' turn
                data = transport.receive_nowait()
                if data is None:
                    break
                if not data:
                    self._lost(None)
                    return
                self._protocol.receive(data)
        except (OSError, ParavirtError) as error:
            self._lost(error)
            return
        if not transport.polls_for_room:
            self._flush()
            if data is not None:
                self._loop.call_soon(self._on_readable)  # its descriptor tells of new events only

    # -- the connection

    def _use(self, transport: Transport) -> None:
        self._transport = transport
        self._loop.add_reader(transport.fileno(), self._on_readable)
        if not transport.polls_for_room:
            self._loop.call_soon(self._on_readable)  # what came before its descriptor was looked at

    def _let_go(self) -> None:
        transport, self._transport = self._transport, None
        if transport is None:
            return
        self._loop.remove_reader(transport.fileno())
        if self._polls_for_room:
            self._loop.remove_writer(transport.fileno())
            self._polls_for_room = False
        transport.shut_down()
        transport.close()

    def _lost(self, error: Exception | None) -> None:
        self._let_go()
        self._patience.lost(time.monotonic(), answered=self._protocol.answered)
        self._protocol.lost(gone(error))
        if self._protocol.ended is None:
            self._reconnecting = self._loop.create_task(self._connect_again(gone(error)))

    async def _connect_again(self, failure: StoreGone) -> None:
        try:
            transport = await self._find_daemon(failure)
        except StoreGone as late:
            self._protocol.end(late)
            return
        except Exception as defect:  # of a connector: nobody may wait for ever
            self._protocol.end(StoreGone(f"the store's client has failed: {defect!r}"))
            raise
        self._patience.connected(time.monotonic())
        self._protocol.connected()
        self._use(transport)
        self._flush()

    async def _find_daemon(self, failure: StoreGone) -> Transport:
        """The next connection. `StoreGone` when there is none in time."""
        assert self._connector is not None
        why = ""
        while (delay := self._patience.next_delay_s(time.monotonic())) is not None:
            await asyncio.sleep(delay)
            try:
                transport = self._connector.connect_nowait()
            except (OSError, ParavirtError) as error:
                why = f" ({error})"
            else:
                if transport is not None:
                    return transport
        raise not_back(failure, self._patience.timeout_s, why)

    async def close(self) -> None:
        """End the connection; calls and queues that wait get `Closed`. Harmless when repeated, or in a forked child."""
        if os.getpid() != self._pid:
            return
        self._protocol.end(Closed("this xenstore client is closed"))
        self._let_go()
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.gather(self._reconnecting, return_exceptions=True)

    # -- transactions

    def transaction(self, *, attempts: int = 1) -> "AsyncTransaction":
        """`async with client.transaction() as t:`; what `attempts` does: see `XenstoreClient.transaction`."""
        return AsyncTransaction(self, attempts)

    async def transact(self, function: "Callable[[AsyncTransaction], Awaitable[T]]", *, attempts: int = ATTEMPTS) -> T:
        """Await `function(transaction)` and commit; again when there was a conflict, as `XenstoreClient.transact`."""
        while True:
            attempts -= 1
            try:
                async with self.transaction() as transaction:
                    return await function(transaction)
            except (TransactionConflict, StoreFailure):
                if attempts < 1:
                    raise

    async def start(self, steps: TransactionSteps) -> None:
        """Start a transaction; one whose start is cancelled does not stay behind."""
        requests = steps.start()
        request = next(requests)
        try:
            await self.exchange(request)
        except asyncio.CancelledError:
            self._protocol.abandon_start(request)
            self._flush()
            raise
        for _ in requests:
            raise AssertionError("a start is one request")

    # -- watches

    def watch_queue(self, *, pending_max: int = PENDING_MAX) -> AsyncWatchQueue:
        """A new queue; add watches to it."""
        self._protocol.check()
        queue = AsyncWatchQueue(self._watcher, self._protocol.new_token, pending_max=pending_max)
        self._protocol.sinks.add(queue)
        return queue

    def watch(self, path: str, token: str | None = None, *, depth: int | None = None) -> AsyncWatchQueue:
        """`async with client.watch(path) as events: async for event in events: ...`. The first comes at once."""
        queue = self.watch_queue()
        queue.begin_with(path, token, depth)
        return queue

    async def wait_for(
        self, path: str, predicate: Callable[[bytes | None], object], timeout_s: float | None = None
    ) -> bytes | None:
        """As `XenstoreClient.wait_for`."""
        value: bytes | None = None
        try:
            async with asyncio.timeout(timeout_s), self.watch(path) as events:
                async for _ in events:
                    value = await self._value(path)
                    if predicate(value):
                        return value
        except TimeoutError as error:
            if isinstance(error, ParavirtError):
                raise
            raise not_in_time(path, value, timeout_s) from error
        raise Closed("this xenstore client is closed")

    async def _value(self, path: str) -> bytes | None:
        try:
            return await self.read(path)
        except (NoSuchNode, AccessRefused):
            return None

    async def reset_watches(self) -> None:
        """Drop all watches and transactions of this connection."""
        await self.request(Op.RESET_WATCHES, b"")

    async def _watch(self, subscription: Subscription) -> None:
        request = subscription.watch()
        try:
            await self.exchange(request)
            request.outcome()
        except XenstoreError:
            raise
        except BaseException:
            # Cancelled: take the watch away that may have been sent, without waiting for that either.
            if self._protocol.subscriptions.pop(subscription.wire_token, None) is not None and not self.closed:
                self._submit(subscription.unwatch())
            raise

    async def _unwatch(self, subscription: Subscription) -> None:
        self._protocol.subscriptions.pop(subscription.wire_token, None)
        request = subscription.unwatch()
        await self.exchange(request)
        try:
            request.outcome()
        except NoSuchNode:
            pass  # dropped meanwhile by reset_watches

    # -- end

    @property
    def closed(self) -> bool:
        """Whether it was closed or the daemon is gone for good."""
        return self._protocol.ended is not None

    @property
    def n_reconnects(self) -> int:
        """Connections that broke and were, or are being, replaced."""
        return self._protocol.epoch

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        protocol = self._protocol
        watches = f"{len(protocol.subscriptions)} watches"
        return f"<AsyncXenstoreClient: {protocol.ended or f'{protocol.n_under_way} calls under way, {watches}'}>"


class AsyncTransaction(AsyncStoreCalls):
    """The calls of a client, all done at once at the end or not at all. It starts when its block is entered."""

    def __init__(self, client: AsyncXenstoreClient, attempts: int) -> None:
        self._client = client
        self._steps = TransactionSteps(attempts)

    async def start(self) -> None:
        """What entering the block does."""
        await self._client.start(self._steps)

    async def request(self, op: Op, payload: bytes, what: str = "") -> bytes:
        return await self._client.follow(self._steps.ask(op, payload, what))

    async def commit(self) -> None:
        """Make it real. `TransactionConflict`: something it has seen was changed meanwhile, nothing was done."""
        await self._client.follow(self._steps.commit())

    async def abort(self) -> None:
        """Give it up."""
        await self._client.follow(self._steps.abort())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._steps.number:
            return
        if kind is None:
            await self.commit()
            return
        try:
            await self.abort()
        except ParavirtError:
            pass  # the first error tells more; the daemon forgets the transaction with the connection

    def __repr__(self) -> str:
        return f"<AsyncTransaction {self._steps.number or 'over'}>"
