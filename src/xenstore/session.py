# SPDX-License-Identifier: MIT
"""One connection to the store: bytes in, bytes out, and what it holds in between. Pure."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from paravirt.xenstore import trace
from paravirt.xenstore.outbox import Outbox, Request
from paravirt.xenstore.requests import HANDLERS
from paravirt.xenstore.store import View
from paravirt.xenstore.transaction import Transaction
from paravirt.xenstore.watches import Watch
from paravirt.xenstore.wire import HEADER, HEADER_BYTES, PAYLOAD_MAX_BYTES, Errno, Op, Packet, PacketParser, Reply

if TYPE_CHECKING:
    from paravirt.xenstore.domains import Domain
    from paravirt.xenstore.hub import Hub

HIGH_WATER_BYTES: Final = 256 << 10
"""With more unsent output than this a connection's further requests wait."""
SMALL_REPLY_BYTES: Final = 16
"""A reply up to this is sent whatever memory a domain holds."""

_ERROR: Final = int(Op.ERROR)
_EVENT: Final = int(Op.WATCH_EVENT)
_EVENT_START: Final = HEADER.pack(_EVENT, 0, 0, 0)[:12]


class Connection:
    """Handles the requests of one client.

    `feed` takes what was read; `output` and `sent` are for whoever writes. `broken` is None, or why this client cannot
    be served any longer. `n_dropped_events` counts events that were lost because the client did not read.
    `number` tells it from all others.
    """

    __slots__ = (
        "_first_event",
        "_next_transaction",
        "_outbox",
        "_parser",
        "_waiting",
        "broken",
        "closed",
        "domain",
        "hub",
        "n_dropped_events",
        "number",
        "transactions",
        "watches",
    )

    def __init__(self, hub: Hub, domain: Domain, number: int) -> None:
        self.hub = hub
        self.domain = domain
        self.number = number
        self.transactions: dict[int, Transaction] = {}
        self.watches: dict[tuple[bytes, bytes], Watch] = {}
        self.broken: str | None = None
        self.closed = False
        self.n_dropped_events = 0
        self._parser = PacketParser()
        self._waiting: deque[Packet] = deque()
        self._outbox = Outbox(domain)
        self._first_event: Watch | None = None
        self._next_transaction = 1

    # -- input

    @property
    def wants_input(self) -> bool:
        """Whether more should be read: not while replies pile up or its domain is over a limit. Once it may be read
        again, the connection is in the hub's `dirty`."""
        if self.closed or self.broken is not None or self._waiting or self._outbox.n_bytes > HIGH_WATER_BYTES:
            return False
        return self.domain.may_be_read() or self.hub.stall(self.domain)

    @property
    def has_waiting(self) -> bool:
        """Whether requests wait that were read."""
        return bool(self._waiting)

    def feed(self, data: bytes) -> None:
        """Take bytes of the client and handle the requests they complete."""
        packets = self._parser.feed(data)
        if self._waiting:
            self._wait(packets)
        else:
            self._handle_all(packets)
        self._look_at_parser()
        self.hub.settle()

    def resume(self) -> None:
        """Go on with requests that waited, as far as they may be handled now."""
        waiting = self._waiting
        if waiting and self.broken is None:
            self._waiting = deque()
            self.domain.held_bytes -= _n_bytes(waiting)
            self._handle_all(waiting)
            self._look_at_parser()
            self.hub.settle()

    def _look_at_parser(self) -> None:
        """Give the client up for what it sent, once the requests before that are handled."""
        if self._parser.broken is not None and self.broken is None and not self._waiting:
            self.give_up(self._parser.broken)

    def _wait(self, packets: list[Packet] | deque[Packet]) -> None:
        self._waiting.extend(packets)
        self.domain.held_bytes += _n_bytes(packets)

    def _handle_all(self, packets: list[Packet] | deque[Packet]) -> None:
        todo = deque(packets)
        while todo and not self.closed and self.broken is None:
            if self._outbox.n_bytes > HIGH_WATER_BYTES:
                self._wait(todo)
                return
            if not self.domain.may_be_handled():
                self._wait(todo)
                self.hub.stall(self.domain)
                return
            self._handle(todo.popleft())

    def _handle(self, packet: Packet) -> None:
        hub, domain = self.hub, self.domain
        started_us = hub.clock_us() if (hub.trace is not None or hub.trace_log.on) and hub.traces(packet) else None
        request = hub.request = None if domain.privileged else Request(domain)
        try:
            reply = self._run(packet)
        except BaseException:
            if request is not None:
                request.one_less()
            raise
        finally:
            hub.request = None
        if reply.__class__ is bytes:
            reply = self._fitting(reply)
        op, request_id, transaction_id, _ = packet
        payload = reply
        if isinstance(payload, Errno):
            op, payload = _ERROR, payload.value
        self._outbox.put_reply(HEADER.pack(op, request_id, transaction_id, len(payload)) + payload, request)
        hub.dirty.add(self)
        if self._first_event is not None:
            watch, self._first_event = self._first_event, None
            watch.tell(watch.path)
        if not domain.privileged:
            hub.note_memory(domain)
        if started_us is not None:
            hub.traced(trace.line(self, packet, reply, started_us, hub.clock_us()))

    def _run(self, packet: Packet) -> Reply:
        op, _, transaction_id, payload = packet
        handler = HANDLERS[op] if op < len(HANDLERS) else None
        if handler is None:
            return Errno.ENOSYS
        if handler.privileged and not self.domain.privileged:
            return Errno.EACCES
        view: View | None = self.hub.store
        if transaction_id and handler.in_transaction:
            view = self.transactions.get(transaction_id)
        return handler.run(self, view, payload) if view is not None else Errno.ENOENT

    def _fitting(self, payload: bytes) -> Reply:
        """The reply, or why it cannot be sent: it is too long, or its domain holds too much memory for it."""
        n_bytes = len(payload)
        if n_bytes > PAYLOAD_MAX_BYTES:
            return Errno.E2BIG
        domain = self.domain
        if n_bytes > SMALL_REPLY_BYTES and domain.over("memory", domain.memory_bytes + HEADER_BYTES + n_bytes):
            return Errno.ENOMEM
        return payload

    # -- output

    @property
    def n_output_bytes(self) -> int:
        """What is still to be sent."""
        return self._outbox.n_bytes

    @property
    def n_output_packets(self) -> int:
        """Replies and events that are not fully sent."""
        return len(self._outbox)

    @property
    def n_held_bytes(self) -> int:
        """What it counts in its domain's `held_bytes`, from scratch."""
        return (
            self._outbox.n_held_bytes
            + _n_bytes(self._waiting)
            + sum(watch.n_bytes for watch in self.watches.values())
            + sum(transaction.n_bytes for transaction in self.transactions.values())
        )

    def give_up(self, why: str) -> None:
        """This client cannot be served any longer."""
        self.broken = why
        self.hub.dirty.add(self)

    def send_event(self, path: bytes, token: bytes) -> None:
        """Tell the client of a change.

        Dropped if it is too long, or its domain would hold too much memory; merged with an equal one that is not yet
        fully sent, unless it is of a special path.
        """
        length = len(path) + len(token) + 2
        if length > PAYLOAD_MAX_BYTES or self.closed:
            return
        packet = b"%b%b%b\0%b\0" % (_EVENT_START, length.to_bytes(4, "little"), path, token)
        outbox, hub, domain = self._outbox, self.hub, self.domain
        if outbox.has_event(packet) and not path.startswith(b"@"):
            return
        expires_ms = 0
        if domain.privileged:
            if outbox.n_bytes + len(packet) > hub.limits.privileged_output_bytes:
                self.give_up("does not read its events")
                return
        elif domain.over("memory", domain.memory_bytes + len(packet)):
            self.n_dropped_events += 1
            return
        elif hub.limits.watch_event_timeout_ms:
            expires_ms = hub.now_ms + hub.limits.watch_event_timeout_ms
            hub.timed.add(self)
        outbox.put_event(packet, hub.request, expires_ms)
        hub.dirty.add(self)

    def tell_after_reply(self, watch: Watch) -> None:
        """The first event of a new watch, which follows the acknowledgement."""
        self._first_event = watch

    def output(self) -> bytes:
        """The next bytes to send; call `sent` with how many were taken."""
        return self._outbox.next_bytes()

    def sent(self, n_bytes: int) -> None:
        """`n_bytes` of the output are gone."""
        self._outbox.sent(n_bytes)
        self.hub.settle()

    def drop_old_events(self) -> bool:
        """Drop events that were not read in time; whether there are others that may have to be dropped later."""
        self.n_dropped_events += self._outbox.expire(self.hub.now_ms)
        return self._outbox.next_expiry_ms() is not None

    def next_expiry_ms(self) -> int | None:
        """When `drop_old_events` has something to do next."""
        return self._outbox.next_expiry_ms()

    # -- state

    def new_transaction(self) -> Transaction:
        """Open a transaction; the quota has been looked at."""
        while self._next_transaction in self.transactions or not self._next_transaction:
            self._next_transaction = (self._next_transaction + 1) & 0xFFFFFFFF
        number = self._next_transaction
        self._next_transaction = (number + 1) & 0xFFFFFFFF
        transaction = self.transactions[number] = Transaction(self.hub.store, self.domain, number=number)
        self.domain.n_transactions += 1
        self.hub.n_transactions += 1
        return transaction

    def end_transaction(self, transaction: Transaction) -> None:
        """It is no longer open; it may still commit."""
        del self.transactions[transaction.number]
        self.domain.n_transactions -= 1
        self.hub.n_transactions -= 1
        transaction.close()

    def add_watch(self, path: bytes, token: bytes, *, n_prefix: int, depth: int) -> Watch:
        """Set a watch; the quotas have been looked at."""
        watch = self.hub.watches.add(self, path, token, n_prefix=n_prefix, depth=depth)
        self.watches[path, token] = watch
        self.domain.n_watches += 1
        self.domain.held_bytes += watch.n_bytes
        return watch

    def remove_watch(self, watch: Watch) -> None:
        """Take a watch away."""
        del self.watches[watch.path, watch.token]
        self.hub.watches.remove(watch)
        self.domain.n_watches -= 1
        self.domain.held_bytes -= watch.n_bytes

    def drop_state(self) -> None:
        """Drop all watches and transactions."""
        for watch in list(self.watches.values()):
            self.remove_watch(watch)
        for transaction in list(self.transactions.values()):
            self.end_transaction(transaction)

    def reset(self) -> None:
        """Back to how it was when new: watches, transactions, half a request and unsent output are gone."""
        self.drop_state()
        self._parser.reset()
        self.domain.held_bytes -= _n_bytes(self._waiting)
        self._waiting.clear()
        self._outbox.clear()
        self.broken = None
        self.hub.settle()

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.broken or f"{self.n_output_bytes} bytes to send"
        return f"<Connection {self.number} of domain {self.domain.domid}: {state}>"


def _n_bytes(packets: list[Packet] | deque[Packet]) -> int:
    """What packets count in memory."""
    return sum(HEADER_BYTES + len(packet[3]) for packet in packets)
