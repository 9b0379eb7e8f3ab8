# SPDX-License-Identifier: MIT
"""The client of xenstored: blocking calls from any thread over one connection.

One thread of the client reads everything that comes and hands replies to the calls that wait, watch events to their
queues; so any number of threads may have requests under way at once.
"""

import itertools
import os
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self, TypeVar

from paravirt.errors import Closed, InvalidRequest, ParavirtError, PeerError, StoreGone, XenstoreError
from paravirt.xenstore.calls import StoreCalls, TransactionConflict, encode_string, error_of
from paravirt.xenstore.transport import SocketTransport, Transport
from paravirt.xenstore.watch_queue import PENDING_MAX, Subscription, Watcher, WatchEvent, WatchQueue
from paravirt.xenstore.wire import PAYLOAD_MAX_BYTES, Op, PacketParser, encode

__all__ = ["Transaction", "TransactionConflict", "WatchEvent", "WatchQueue", "XenstoreClient"]

ATTEMPTS: Final = 100
T = TypeVar("T")


class _Call:
    """A request under way. `done` is locked until its reply has come or cannot come any more."""

    __slots__ = ("done", "op", "payload")

    def __init__(self) -> None:
        self.done = threading.Lock()
        self.done.acquire()
        self.op = -1
        self.payload = b""


class XenstoreClient(StoreCalls):
    """A connection to xenstored. A context manager; not usable in a forked child (`Closed`)."""

    def __init__(self, transport: Transport) -> None:
        """Over a byte stream, which it owns from now on."""
        self._transport = transport
        self._pid = os.getpid()
        self._send_lock = threading.Lock()  # may be held for long: the reader must never need it
        self._lock = threading.Lock()  # guards the four below
        self._calls: dict[int, _Call] = {}
        self._subscriptions: dict[str, Subscription] = {}
        self._queues: set[WatchQueue] = set()
        self._ended: ParavirtError | None = None
        self._request_ids = itertools.cycle(range(1, 1 << 32))
        self._tokens = itertools.count(1)
        self._watcher = Watcher(self._watch, self._unwatch, self._forget_queue)
        self._reader = threading.Thread(target=self._read_replies, name="xenstore-client", daemon=True)
        self._reader.start()

    @classmethod
    def connect(cls, path: str | os.PathLike[str]) -> Self:
        """To a daemon's Unix socket. `NotFound` if nobody serves it."""
        return cls(SocketTransport.connect(path))

    @classmethod
    def from_socket(cls, connected: socket.socket) -> Self:
        """Over a connected socket, which it owns from now on."""
        return cls(SocketTransport(connected))

    # -- requests

    def request(self, op: Op, payload: bytes, what: str = "") -> bytes:
        return self.request_in(0, op, payload, what)

    def request_in(self, transaction_id: int, op: Op, payload: bytes, what: str = "") -> bytes:
        """One request (in a transaction unless 0) and its reply's payload; waits for it."""
        what = what or op.name
        if len(payload) > PAYLOAD_MAX_BYTES:
            raise error_of("E2BIG", what)
        call = _Call()
        with self._lock:
            self._check()
            request_id = next(self._request_ids)
            self._calls[request_id] = call
        packet = encode(op, request_id, transaction_id, payload)
        try:
            with self._send_lock:
                self._transport.send(packet)
        except (OSError, PeerError) as error:
            self._end(_gone(error))
            self._transport.shut_down()
        call.done.acquire()
        if call.op == op:
            return call.payload
        if call.op == Op.ERROR:
            raise error_of(call.payload.rstrip(b"\0").decode("ascii", "replace"), what)
        self._check()
        raise PeerError(f"xenstored answered {op.name} with operation {call.op}")

    def _check(self) -> None:
        if os.getpid() != self._pid:
            raise Closed("this xenstore client belongs to the parent of this process")
        if self._ended is not None:
            raise type(self._ended)(str(self._ended))

    def transaction(self) -> "Transaction":
        """A new transaction: `with client.transaction() as t:` commits at the end, or aborts on an exception."""
        number = self.request(Op.TRANSACTION_START, b"\0")
        return Transaction(self, int(number.rstrip(b"\0")))

    def transact(self, function: Callable[["Transaction"], T], *, attempts: int = ATTEMPTS) -> T:
        """Run `function` in a transaction and commit; again, up to `attempts` times, when there was a conflict.

        Returns what the last run returned. `TransactionConflict` when no attempt came through. EIO inside a transaction
        is one too: it found nodes at odds that it first saw at different times.
        """
        for attempt in itertools.count(1):
            try:
                with self.transaction() as transaction:
                    return function(transaction)
            except XenstoreError as error:
                conflict = isinstance(error, TransactionConflict) or error.name == "EIO"
                if not conflict or attempt >= attempts:
                    raise
        raise AssertionError("not reached")

    # -- domains

    def get_domain_path(self, domid: int) -> str:
        """The home of a domain, whether it exists or not."""
        return self.request(Op.GET_DOMAIN_PATH, b"%d\0" % domid).rstrip(b"\0").decode()

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Serve a domain over its ring page, with the event channel `port` of that domain. Dom0 only."""
        self.request(Op.INTRODUCE, b"%d\0%d\0%d\0" % (domid, gfn, port), f"domain {domid}")

    def release(self, domid: int) -> None:
        """The domain is over for the store: what it has there goes. Dom0 only."""
        self.request(Op.RELEASE, b"%d\0" % domid, f"domain {domid}")

    def resume(self, domid: int) -> None:
        """The domain runs again after it was shut down. Dom0 only."""
        self.request(Op.RESUME, b"%d\0" % domid, f"domain {domid}")

    def set_target(self, domid: int, target: int) -> None:
        """Give a domain the rights of another one. Dom0 only."""
        self.request(Op.SET_TARGET, b"%d\0%d\0" % (domid, target), f"domain {domid}")

    def is_domain_introduced(self, domid: int) -> bool:
        """Whether a domain is served. Dom0 only."""
        return self.request(Op.IS_DOMAIN_INTRODUCED, b"%d\0" % domid, f"domain {domid}") == b"T\0"

    # -- watches

    def watch_queue(self, *, pending_max: int = PENDING_MAX) -> WatchQueue:
        """A new queue; add watches to it."""
        queue = WatchQueue(self._watcher, lambda: f"{next(self._tokens):x}", pending_max=pending_max)
        with self._lock:
            self._check()
            self._queues.add(queue)
        return queue

    def reset_watches(self) -> None:
        """Drop all watches and transactions of this connection."""
        self.request(Op.RESET_WATCHES, b"")
        with self._lock:
            self._subscriptions.clear()
            queues = list(self._queues)
        for queue in queues:
            queue.forget_watches()

    def _watch(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions[subscription.wire_token] = subscription
        try:
            depth = b"" if subscription.depth is None else b"%d\0" % subscription.depth
            self.request(Op.WATCH, _watch_arguments(subscription) + depth, subscription.path)
        except BaseException:
            with self._lock:
                self._subscriptions.pop(subscription.wire_token, None)
            raise

    def _unwatch(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions.pop(subscription.wire_token, None)
        try:
            self.request(Op.UNWATCH, _watch_arguments(subscription), subscription.path)
        except XenstoreError as error:
            if error.name != "ENOENT":  # dropped meanwhile by reset_watches
                raise

    def _forget_queue(self, queue: WatchQueue) -> None:
        with self._lock:
            self._queues.discard(queue)

    # -- the reader

    def _read_replies(self) -> None:
        parser = PacketParser()
        try:
            while parser.broken is None and (data := self._transport.receive()):
                for op, request_id, _, payload in parser.feed(data):
                    if op == Op.WATCH_EVENT:
                        self._deliver(payload)
                    else:
                        self._complete(request_id, op, payload)
            self._end(_gone(parser.broken))
        except (OSError, PeerError) as error:
            self._end(_gone(error))

    def _complete(self, request_id: int, op: int, payload: bytes) -> None:
        with self._lock:
            call = self._calls.pop(request_id, None)
        if call is not None:
            call.op, call.payload = op, payload
            call.done.release()

    def _deliver(self, payload: bytes) -> None:
        words = payload.split(b"\0")
        subscription = self._subscriptions.get(words[1].decode("ascii", "replace")) if len(words) > 1 else None
        if subscription is not None:
            subscription.queue.put(subscription, words[0].decode("ascii", "replace"))

    def _end(self, error: ParavirtError) -> None:
        with self._lock:
            if self._ended is None:
                self._ended = error
            calls, self._calls = list(self._calls.values()), {}
            queues, self._queues = list(self._queues), set()
        for call in calls:
            call.done.release()
        for queue in queues:
            queue.end(self._ended)

    # -- end

    def close(self) -> None:
        """End the connection; calls and queues that wait get `Closed`. Harmless when repeated, or in a forked child."""
        if os.getpid() != self._pid:
            self._transport.close()
            return
        with self._lock:
            if self._ended is None:
                self._ended = Closed("this xenstore client is closed")
        self._transport.shut_down()
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._transport.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed or the daemon is gone."""
        return self._ended is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = self._ended or f"{len(self._calls)} calls under way, {len(self._subscriptions)} watches"
        return f"<XenstoreClient: {state}>"


class Transaction(StoreCalls):
    """The calls of a client, all done at once at the end or not at all."""

    def __init__(self, client: XenstoreClient, number: int) -> None:
        self._client = client
        self._number = number

    def request(self, op: Op, payload: bytes, what: str = "") -> bytes:
        if not self._number:
            raise InvalidRequest("this transaction is over")
        return self._client.request_in(self._number, op, payload, what)

    def commit(self) -> None:
        """Make it real. `TransactionConflict`: something it has seen was changed meanwhile, nothing was done."""
        self._finish(b"T\0")

    def abort(self) -> None:
        """Give it up."""
        self._finish(b"F\0")

    def _finish(self, verdict: bytes) -> None:
        try:
            self.request(Op.TRANSACTION_END, verdict, "transaction")
        finally:
            self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._number:
            return
        if kind is None:
            self.commit()
            return
        try:
            self.abort()
        except ParavirtError:
            pass  # the first error tells more; the daemon forgets the transaction with the connection

    def __repr__(self) -> str:
        return f"<Transaction {self._number or 'over'}>"


def _gone(why: Exception | str | None) -> StoreGone:
    return StoreGone(f"xenstored is gone: {getattr(why, 'strerror', None) or why}" if why else "xenstored is gone")


def _watch_arguments(subscription: Subscription) -> bytes:
    return encode_string(subscription.path) + encode_string(subscription.wire_token)
