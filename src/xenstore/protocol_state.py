# SPDX-License-Identifier: MIT
"""A client's side of a connection to xenstored: which requests wait, what goes out, what comes in, and what becomes of
all that when the connection breaks. Pure: the blocking and the asyncio client are shells that move bytes and wait.

After a connection broke (`lost`) and another one was made (`connected`):

- watches are registered again; each fires once, as every new watch does, so no change is missed;
- requests of which nothing was sent, and requests in `REPEATED`, are sent (again);
- other requests that were sent, even in part, fail with `OutcomeUnknown`;
- transactions are over: their calls and their commit fail with `TransactionConflict`, an abort succeeds. A commit that
  was sent has an unknown outcome.
"""

import itertools
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from paravirt.errors import OutcomeUnknown, ParavirtError, PeerError, StoreGone, TimedOut, XenstoreError
from paravirt.xenstore.operations import encode_string, error_of
from paravirt.xenstore.wire import ACK, HEADER_BYTES, PAYLOAD_MAX_BYTES, Op, PacketParser, encode

RECONNECT_TIMEOUT_S: Final = 30.0
FIRST_DELAY_S: Final = 0.002
LAST_DELAY_S: Final = 0.5
PROVEN_AFTER_S: Final = 1.0
OUTPUT_MAX_BYTES: Final = 65536
COMMIT: Final = b"T\0"
ABORT: Final = b"F\0"

REPEATED: Final = frozenset(
    {
        Op.READ,
        Op.DIRECTORY,
        Op.DIRECTORY_PART,
        Op.GET_PERMS,
        Op.WATCH,
        Op.RESET_WATCHES,
        Op.TRANSACTION_START,
        Op.GET_DOMAIN_PATH,
        Op.IS_DOMAIN_INTRODUCED,
        Op.GET_FEATURE,
        Op.GET_QUOTA,
    }
)
"""Operations that may run twice without harm."""

_CHANGES_THE_CLIENT: Final = frozenset({Op.TRANSACTION_START, Op.RESET_WATCHES})
_LOST_TRANSACTION: Final = "the connection broke, and the transaction with it"


class EventSink(Protocol):
    """Where the events of some watches go. Nothing here may wait or call the client."""

    def put(self, subscription: "Subscription", path: str) -> None:
        """An event has come."""

    def forget_watches(self) -> None:
        """All watches of the connection were dropped."""

    def end(self, error: ParavirtError) -> None:
        """No event can come any more."""


class Subscription:
    """One watch as the daemon has it; `wire_token` is unique in the client."""

    __slots__ = ("depth", "path", "registered", "sink", "token", "wire_token")

    def __init__(self, sink: EventSink, path: str, token: str, wire_token: str, depth: int | None) -> None:
        self.sink = sink
        self.path = path
        self.token = token
        self.wire_token = wire_token
        self.depth = depth
        self.registered = False

    def watch(self) -> "Request":
        depth = b"" if self.depth is None else b"%d\0" % self.depth
        request = Request(Op.WATCH, self._arguments() + depth, self.path)
        request.subscription = self
        return request

    def unwatch(self) -> "Request":
        return Request(Op.UNWATCH, self._arguments(), self.path)

    def _arguments(self) -> bytes:
        return encode_string(self.path) + encode_string(self.wire_token)


def _nobody_waits() -> None:
    pass


class Request:
    """One request and, once `done`, its reply or the error that came instead."""

    __slots__ = (
        "done",
        "epoch",
        "error",
        "op",
        "payload",
        "reply",
        "reply_op",
        "request_id",
        "sent",
        "subscription",
        "transaction_id",
        "wake",
        "what",
    )

    def __init__(self, op: Op, payload: bytes, what: str = "", transaction_id: int = 0, epoch: int = 0) -> None:
        """`transaction_id` is one of the connection numbered `epoch`."""
        self.op = op
        self.payload = payload
        self.what = what or op.name
        self.transaction_id = transaction_id
        self.epoch = epoch
        self.request_id = 0
        self.subscription: Subscription | None = None
        self.sent = False
        self.done = False
        self.reply_op = -1
        self.reply = b""
        self.error: ParavirtError | None = None
        self.wake: Callable[[], None] = _nobody_waits
        """Called once when it is done, by whoever feeds the protocol."""

    def outcome(self) -> bytes:
        """The payload of the reply; raises what came instead."""
        if self.reply_op == self.op:
            return self.reply
        if self.reply_op == Op.ERROR:
            raise error_of(self.reply.rstrip(b"\0").decode("ascii", "replace"), self.what)
        if self.error is not None:
            raise self.error
        raise PeerError(f"xenstored answered {self.op.name} with operation {self.reply_op}")

    def finish(self, reply_op: int, reply: bytes) -> None:
        self.reply_op, self.reply = reply_op, reply
        self._finish()

    def fail(self, error: ParavirtError) -> None:
        self.error = error
        self._finish()

    def _finish(self) -> None:
        self.done = True
        wake, self.wake = self.wake, _nobody_waits
        wake()


class ClientProtocol:
    """The state of one client. Not safe for threads: its shell has a lock.

    `epoch` counts the connections that broke; `ended` is None, or why the client is of no use any more. `answered` says
    whether the present connection has brought a reply.
    """

    def __init__(self, *, reconnects: bool) -> None:
        """`reconnects`: whether there may be another connection after the first."""
        self.epoch = 0
        self.answered = False
        self.ended: ParavirtError | None = None
        self.subscriptions: dict[str, Subscription] = {}
        self.sinks: set[EventSink] = set()
        self._reconnects = reconnects
        self._connected = True
        self._requests = itertools.count()
        self._tokens = itertools.count(1)
        self._under_way: dict[int, Request] = {}
        self._output: deque[tuple[Request, bytes]] = deque()
        self._taken: list[tuple[Request, bytes]] = []
        self._parser = PacketParser()

    def check(self) -> None:
        """Raises why the client is of no use any more, if it is."""
        if self.ended is not None:
            raise fresh(self.ended)

    @property
    def n_under_way(self) -> int:
        return len(self._under_way)

    def new_token(self) -> str:
        """A token for the wire that no other watch of this client has."""
        return f"{next(self._tokens):x}"

    # -- requests

    def submit(self, request: Request) -> None:
        """Take a request; it is done at once where it cannot be sent."""
        if self.ended is not None:
            request.fail(fresh(self.ended))
        elif len(request.payload) > PAYLOAD_MAX_BYTES:
            request.finish(Op.ERROR, b"E2BIG\0")
        elif request.transaction_id and request.epoch != self.epoch:
            _fail_in_lost_transaction(request)
        elif not self._connected and request.op == Op.UNWATCH:
            request.finish(Op.UNWATCH, ACK)  # the watch went with the connection
        else:
            request.request_id = 1 + next(self._requests) % (2**32 - 1)
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        if request.subscription is not None:
            self.subscriptions[request.subscription.wire_token] = request.subscription
        self._under_way[request.request_id] = request
        if self._connected:
            packet = encode(request.op, request.request_id, request.transaction_id, request.payload)
            self._output.append((request, packet))

    def abandon_start(self, request: Request) -> None:
        """Nobody waits any more for this start of a transaction: abort it as soon as its number is known."""
        if request.done:
            self._abort(request)
        else:
            request.wake = lambda: self._abort(request)

    def _abort(self, start: Request) -> None:
        number = start.reply.rstrip(b"\0")
        if start.reply_op == Op.TRANSACTION_START and number.isdigit():
            self.submit(Request(Op.TRANSACTION_END, ABORT, "transaction", int(number), start.epoch))

    @property
    def has_output(self) -> bool:
        """Whether something waits to be sent. May be looked at without a lock."""
        return bool(self._output)

    def take_output(self) -> bytes:
        """The next bytes to send; empty when there are none. All count as sent until `give_back` says otherwise; that
        or `all_sent` comes before anything else is taken.
        """
        waiting, taken = self._output, self._taken
        n_bytes = 0
        while waiting and n_bytes < OUTPUT_MAX_BYTES:
            item = waiting.popleft()
            item[0].sent = True
            taken.append(item)
            n_bytes += len(item[1])
        return taken[0][1] if len(taken) == 1 else b"".join([packet for _, packet in taken])

    def all_sent(self) -> None:
        """What was taken went out. Needs no lock."""
        self._taken.clear()

    def give_back(self, n_sent_bytes: int) -> None:
        """Only so many of the bytes that were taken last went out."""
        rest = []
        for request, packet in self._taken:
            if len(packet) > n_sent_bytes:
                request.sent = n_sent_bytes > 0 or len(packet) < HEADER_BYTES + len(request.payload)  # in part
                rest.append((request, packet[n_sent_bytes:]))
            n_sent_bytes = max(0, n_sent_bytes - len(packet))
        self._taken.clear()
        if self._connected:
            self._output.extendleft(reversed(rest))

    # -- replies and events

    def receive(self, data: bytes) -> None:
        """Take what was read. `PeerError` when the stream cannot be followed any longer: call `lost`."""
        for op, request_id, _, payload in self._parser.feed(data):
            if op == Op.WATCH_EVENT:
                self._deliver(payload)
                continue
            request = self._under_way.pop(request_id, None)
            if request is None:
                raise PeerError(f"xenstored answered a request {request_id} that nobody made")
            self._complete(request, op, payload)
        if self._parser.broken is not None:
            raise PeerError(self._parser.broken)

    def _complete(self, request: Request, op: int, payload: bytes) -> None:
        self.answered = True
        if request.subscription is not None:
            self._complete_watch(request.subscription, op, payload)
        elif request.op in _CHANGES_THE_CLIENT and op == request.op:
            request.epoch = self.epoch
            if op == Op.RESET_WATCHES:
                self.subscriptions.clear()
                for sink in self.sinks:
                    sink.forget_watches()
        request.finish(op, payload)

    def _complete_watch(self, subscription: Subscription, op: int, payload: bytes) -> None:
        again, subscription.registered = subscription.registered, op == Op.WATCH
        if not subscription.registered:
            self.subscriptions.pop(subscription.wire_token, None)
            if again:
                name = payload.rstrip(b"\0").decode("ascii", "replace")
                subscription.sink.end(error_of(name, subscription.path, "could not be watched again"))

    def _deliver(self, payload: bytes) -> None:
        words = payload.split(b"\0")
        subscription = self.subscriptions.get(words[1].decode("ascii", "replace")) if len(words) > 1 else None
        if subscription is not None:  # else it was just given up
            subscription.sink.put(subscription, words[0].decode("ascii", "replace"))

    # -- the connection

    def lost(self, error: StoreGone) -> None:
        """The connection broke. Nothing is sent until `connected`; without another connection this is the `end`."""
        if not self._reconnects or self.ended is not None:
            self.end(error)
            return
        self._connected = False
        self.epoch += 1
        self._parser.reset()
        self._output.clear()
        former, self._under_way = self._under_way, {}
        for request_id, request in former.items():
            if request.transaction_id:
                _fail_in_lost_transaction(request)
            elif request.op == Op.UNWATCH:
                request.finish(Op.UNWATCH, ACK)  # the watch went with the connection
            elif request.sent and request.op not in REPEATED:
                request.fail(OutcomeUnknown(f"{request.what}: {error}; {request.op.name} was sent, and has run or not"))
            elif request.subscription is None or not request.subscription.registered:
                self._under_way[request_id] = request  # else `connected` makes another one

    def connected(self) -> None:
        """There is a new connection: watches first, then what waits."""
        self._connected, self.answered = True, False
        waiting, self._under_way = self._under_way, {}
        for subscription in self.subscriptions.values():
            if subscription.registered:
                request = subscription.watch()
                request.request_id = 1 + next(self._requests) % (2**32 - 1)
                self._enqueue(request)
        for request in waiting.values():
            request.sent = False
            self._enqueue(request)

    def end(self, error: ParavirtError) -> None:
        """No connection any more, for good. Everything that waits gets `error`."""
        if self.ended is None:
            self.ended = error
        self._connected = False
        self._output.clear()
        requests, self._under_way = list(self._under_way.values()), {}
        sinks, self.sinks = list(self.sinks), set()
        for request in requests:
            request.fail(fresh(self.ended))
        for sink in sinks:
            sink.end(self.ended)


def gone(why: Exception | None) -> StoreGone:
    """What a broken connection means for a client."""
    return StoreGone(f"xenstored is gone: {getattr(why, 'strerror', None) or why}" if why else "xenstored is gone")


def not_back(failure: StoreGone, timeout_s: float, why: str) -> StoreGone:
    """When no other connection came about; `why` the last attempt failed, in brackets if anything is known."""
    return StoreGone(f"{failure}, and was not back in {timeout_s:g} s{why}")


def not_in_time(path: str, value: bytes | None, timeout_s: float | None) -> TimedOut:
    """When a node did not become what was waited for."""
    state = "it does not exist" if value is None else f"it is {value[:60]!r}"
    return TimedOut(f"{path} did not become what was waited for in {timeout_s or 0:g} s: {state}")


class Patience:
    """When to try to connect again, and when to give up. Times in seconds of any monotonic clock.

    A connection that broke at once without one answer does not count: the time limit and the pauses go on from the one
    before, so that a daemon which refuses its clients is not asked for ever.
    """

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self.timeout_s = timeout_s
        self._connected_at = now_s
        self._deadline = 0.0
        self._delay = 0.0
        self._counts = True

    def connected(self, now_s: float) -> None:
        self._connected_at = now_s
        self._counts = False

    def lost(self, now_s: float, *, answered: bool) -> None:
        """`answered`: whether the connection has brought anything."""
        if self._counts or answered or now_s - self._connected_at >= PROVEN_AFTER_S:
            self._deadline = now_s + self.timeout_s
            self._delay = 0.0

    def next_delay_s(self, now_s: float) -> float | None:
        """How long to wait before the next attempt, also the first; None: give up."""
        left = self._deadline - now_s
        if left <= 0:
            return None
        delay, self._delay = self._delay, min(max(2 * self._delay, FIRST_DELAY_S), LAST_DELAY_S)
        return min(delay, left)


def fresh(error: ParavirtError) -> ParavirtError:
    """The same error once more, for another one who waits: an exception that is raised twice gathers both traces."""
    if isinstance(error, XenstoreError):
        return type(error)(str(error), error.name)
    return type(error)(str(error))


def _fail_in_lost_transaction(request: Request) -> None:
    if request.op != Op.TRANSACTION_END:
        request.fail(error_of("EAGAIN", request.what, _LOST_TRANSACTION))
    elif request.payload == ABORT:
        request.finish(request.op, ACK)
    elif request.sent:
        request.fail(OutcomeUnknown(f"{request.what}: the connection broke after the commit was sent"))
    else:
        request.fail(error_of("EAGAIN", request.what, _LOST_TRANSACTION))
