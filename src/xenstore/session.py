# SPDX-License-Identifier: MIT
"""One connection to the store: bytes in, bytes out, and what it holds in between. Pure."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from paravirt.xenstore.requests import HANDLERS
from paravirt.xenstore.store import View
from paravirt.xenstore.transaction import Transaction
from paravirt.xenstore.watches import Watch
from paravirt.xenstore.wire import HEADER, PAYLOAD_MAX_BYTES, Errno, Op, Packet, PacketParser, Reply

if TYPE_CHECKING:
    from paravirt.xenstore.domains import Domain
    from paravirt.xenstore.hub import Hub

HIGH_WATER_BYTES: Final = 256 << 10
"""With more unsent output than this a connection's further requests wait."""
CHUNK_BYTES: Final = 256 << 10

_ERROR: Final = int(Op.ERROR)
_EVENT: Final = int(Op.WATCH_EVENT)
_EVENT_START: Final = HEADER.pack(_EVENT, 0, 0, 0)[:12]


class Connection:
    """Handles the requests of one client.

    `feed` takes what was read; `output` and `sent` are for whoever writes. `broken` is None, or why this client cannot
    be served any longer. `n_dropped_events` counts events that were lost because the client did not read.
    """

    __slots__ = (
        "_congested_events",
        "_event_cause",
        "_first_event",
        "_new_events",
        "_next_transaction",
        "_output",
        "_parser",
        "_waiting",
        "broken",
        "closed",
        "domain",
        "hub",
        "n_dropped_events",
        "n_output_bytes",
        "transactions",
        "watches",
    )

    def __init__(self, hub: Hub, domain: Domain) -> None:
        self.hub = hub
        self.domain = domain
        self.transactions: dict[int, Transaction] = {}
        self.watches: dict[tuple[bytes, bytes], Watch] = {}
        self.broken: str | None = None
        self.closed = False
        self.n_output_bytes = 0
        self.n_dropped_events = 0
        self._parser = PacketParser()
        self._waiting: deque[Packet] = deque()
        self._output: deque[bytes] = deque()
        self._new_events: set[bytes] = set()  # of the cause numbered ...
        self._event_cause = 0
        self._congested_events: set[bytes] | None = None  # unread, if the client is slow
        self._first_event: Watch | None = None
        self._next_transaction = 1

    # -- input

    @property
    def wants_input(self) -> bool:
        """Whether more should be read: not while replies pile up."""
        return self.broken is None and not self._waiting and self.n_output_bytes <= HIGH_WATER_BYTES

    def feed(self, data: bytes) -> None:
        """Take bytes of the client and handle the requests they complete."""
        packets = self._parser.feed(data)
        if self._waiting:
            self._waiting.extend(packets)
        else:
            self._handle_all(packets)
        if self._parser.broken is not None and self.broken is None:
            self.give_up(self._parser.broken)

    def resume(self) -> None:
        """Go on with requests that waited for output to be read."""
        if self._waiting and self.n_output_bytes <= HIGH_WATER_BYTES:
            waiting, self._waiting = self._waiting, deque()
            self._handle_all(waiting)

    def _handle_all(self, packets: list[Packet] | deque[Packet]) -> None:
        for i, packet in enumerate(packets):
            if self.n_output_bytes > HIGH_WATER_BYTES:
                self._waiting.extend(list(packets)[i:])
                return
            if self.closed or self.broken is not None:
                return
            self._handle(packet)

    def _handle(self, packet: Packet) -> None:
        op, request_id, transaction_id, payload = packet
        self.hub.n_causes += 1
        handler = HANDLERS[op] if op < len(HANDLERS) else None
        reply: Reply
        if handler is None:
            reply = Errno.ENOSYS
        elif handler.privileged and not self.domain.privileged:
            reply = Errno.EACCES
        else:
            view: View | None = self.hub.store
            if transaction_id and handler.in_transaction:
                view = self.transactions.get(transaction_id)
            reply = handler.run(self, view, payload) if view is not None else Errno.ENOENT
        if reply.__class__ is bytes and len(reply) > PAYLOAD_MAX_BYTES:
            reply = Errno.E2BIG
        if isinstance(reply, Errno):
            op, reply = _ERROR, reply.value
        self._put(HEADER.pack(op, request_id, transaction_id, len(reply)) + reply)
        if self._first_event is not None:
            watch, self._first_event = self._first_event, None
            watch.tell(watch.path)

    # -- output

    def _put(self, packet: bytes) -> None:
        self._output.append(packet)
        self.n_output_bytes += len(packet)
        self.hub.dirty.add(self)

    def give_up(self, why: str) -> None:
        """This client cannot be served any longer."""
        self.broken = why
        self.hub.dirty.add(self)

    def send_event(self, path: bytes, token: bytes) -> None:
        """Tell the client of a change.

        Dropped if it is too long; merged with an equal one that waits unread or comes of the same cause.
        """
        length = len(path) + len(token) + 2
        if length > PAYLOAD_MAX_BYTES or self.closed:
            return
        packet = b"%b%b%b\0%b\0" % (_EVENT_START, length.to_bytes(4, "little"), path, token)
        if self._event_cause != self.hub.n_causes:
            self._event_cause = self.hub.n_causes
            self._new_events.clear()
        elif packet in self._new_events and not path.startswith(b"@"):
            return
        self._new_events.add(packet)
        unread = self._congested_events
        if unread is not None and packet in unread and not path.startswith(b"@"):
            return
        limits = self.hub.limits
        if self.domain.privileged:
            if self.n_output_bytes + len(packet) > limits.privileged_output_bytes:
                self.give_up("does not read its events")
                return
        elif self.n_output_bytes + len(packet) > limits.output_bytes:
            self.n_dropped_events += 1
            return
        if unread is not None:
            unread.add(packet)
        self._put(packet)

    def tell_after_reply(self, watch: Watch) -> None:
        """The first event of a new watch, which follows the acknowledgement."""
        self._first_event = watch

    def output(self) -> bytes:
        """The next bytes to send; call `sent` with how many were taken."""
        waiting = self._output
        if self.n_output_bytes <= CHUNK_BYTES:
            return waiting[0] if len(waiting) == 1 else b"".join(waiting)
        chunks, n_bytes = [], 0
        for packet in waiting:
            chunks.append(packet)
            n_bytes += len(packet)
            if n_bytes >= CHUNK_BYTES:
                break
        return b"".join(chunks)

    def sent(self, n_bytes: int) -> None:
        """`n_bytes` of the output are gone. If some are left the client is slow: from now on its events are merged."""
        self.n_output_bytes -= n_bytes
        waiting = self._output
        if not self.n_output_bytes:
            waiting.clear()
            self._congested_events = None
            return
        whole = True
        while n_bytes:
            packet = waiting[0]
            if len(packet) > n_bytes:
                waiting[0] = packet[n_bytes:]
                whole = False
                break
            n_bytes -= len(packet)
            waiting.popleft()
            if self._congested_events is not None:
                self._congested_events.discard(packet)
        if self._congested_events is None:
            queued = list(waiting)[0 if whole else 1 :]
            self._congested_events = {packet for packet in queued if packet[:12] == _EVENT_START}
        elif not whole:
            self._congested_events.discard(packet)

    # -- state

    def new_transaction(self) -> Transaction:
        """Open a transaction; the quota has been looked at."""
        while self._next_transaction in self.transactions or not self._next_transaction:
            self._next_transaction = (self._next_transaction + 1) & 0xFFFFFFFF
        number = self._next_transaction
        self._next_transaction = (number + 1) & 0xFFFFFFFF
        limit = 0 if self.domain.privileged else self.hub.limits.transaction_nodes
        transaction = self.transactions[number] = Transaction(self.hub.store, number=number, node_limit=limit)
        self.domain.n_transactions += 1
        return transaction

    def end_transaction(self, transaction: Transaction) -> None:
        del self.transactions[transaction.number]
        self.domain.n_transactions -= 1

    def drop_state(self) -> None:
        """Drop all watches and transactions."""
        for watch in self.watches.values():
            self.hub.watches.remove(watch)
        self.domain.n_watches -= len(self.watches)
        self.watches.clear()
        self.domain.n_transactions -= len(self.transactions)
        self.transactions.clear()

    def reset(self) -> None:
        """Back to how it was when new: watches, transactions, half a request and unsent output are gone."""
        self.drop_state()
        self._parser.reset()
        self._waiting.clear()
        self._output.clear()
        self._congested_events = None
        self.n_output_bytes = 0
        self.broken = None

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.broken or f"{self.n_output_bytes} bytes to send"
        return f"<Connection of domain {self.domain.domid}: {state}>"
