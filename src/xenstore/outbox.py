# SPDX-License-Identifier: MIT
"""What a connection has to send, and which requests wait for it to be gone. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from paravirt.xenstore.domains import Domain

CHUNK_BYTES: Final = 256 << 10


class Request:
    """A guest's request. It is outstanding until its reply and all events it caused are sent, or dropped."""

    __slots__ = ("domain", "n_pending")

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.n_pending = 1  # its reply
        domain.n_outstanding += 1
        domain.note("outstanding", domain.n_outstanding)

    def one_less(self) -> None:
        """One of the packets that belong to it is out of the way."""
        self.n_pending -= 1
        if not self.n_pending:
            self.domain.n_outstanding -= 1


class _Outgoing:
    """One packet. `expires_ms` is when it is dropped if it was not sent until then, 0 for never."""

    __slots__ = ("expires_ms", "is_event", "packet", "request")

    def __init__(self, packet: bytes, request: Request | None, *, is_event: bool, expires_ms: int) -> None:
        self.packet = packet
        self.request = request
        self.is_event = is_event
        self.expires_ms = expires_ms


class Outbox:
    """The packets of one connection that are not fully sent, oldest first. Their memory counts as their domain's."""

    __slots__ = ("_domain", "_events", "_n_sent", "_queue", "n_bytes")

    def __init__(self, domain: Domain) -> None:
        self.n_bytes = 0
        """Still to be sent."""
        self._domain = domain
        self._queue: deque[_Outgoing] = deque()
        self._events: set[bytes] = set()
        self._n_sent = 0  # of the first packet

    def put_reply(self, packet: bytes, request: Request | None) -> None:
        """Queue a reply; `request` counts it already."""
        self._put(_Outgoing(packet, request, is_event=False, expires_ms=0))

    def put_event(self, packet: bytes, request: Request | None, expires_ms: int) -> None:
        """Queue an event; `request` caused it."""
        if request is not None:
            request.n_pending += 1
        self._events.add(packet)
        self._put(_Outgoing(packet, request, is_event=True, expires_ms=expires_ms))

    def _put(self, outgoing: _Outgoing) -> None:
        n_bytes = len(outgoing.packet)
        self._queue.append(outgoing)
        self.n_bytes += n_bytes
        self._domain.held_bytes += n_bytes

    @property
    def n_held_bytes(self) -> int:
        """What it counts in its domain's memory, from scratch: a packet counts whole until it is fully sent."""
        return sum(len(outgoing.packet) for outgoing in self._queue)

    def has_event(self, packet: bytes) -> bool:
        """Whether an equal event is queued and not fully sent."""
        return packet in self._events

    def next_bytes(self) -> bytes:
        """The next bytes to send, at most about `CHUNK_BYTES`; call `sent` with how many were taken."""
        queue, n_sent = self._queue, self._n_sent
        if len(queue) == 1 and not n_sent:
            return queue[0].packet
        chunks, n_bytes = [], 0
        for outgoing in queue:
            chunks.append(outgoing.packet)
            n_bytes += len(outgoing.packet)
            if n_bytes >= CHUNK_BYTES:
                break
        data = b"".join(chunks)
        return data[n_sent:] if n_sent else data

    def sent(self, n_bytes: int) -> None:
        """`n_bytes` of what `next_bytes` gave are gone."""
        queue = self._queue
        self.n_bytes -= n_bytes
        n_bytes += self._n_sent
        while queue and n_bytes >= len(queue[0].packet):
            outgoing = queue.popleft()
            n_bytes -= len(outgoing.packet)
            self._finish(outgoing)
        self._n_sent = n_bytes

    def expire(self, now_ms: int) -> int:
        """Drop events whose time is over, never one that is partly sent; how many."""
        old = [outgoing for outgoing in self._unsent() if 0 < outgoing.expires_ms <= now_ms]
        for outgoing in old:
            self._queue.remove(outgoing)
            self.n_bytes -= len(outgoing.packet)
            self._finish(outgoing)
        return len(old)

    def next_expiry_ms(self) -> int | None:
        """When `expire` has something to drop next."""
        return next((outgoing.expires_ms for outgoing in self._unsent() if outgoing.expires_ms), None)

    def _unsent(self) -> Iterator[_Outgoing]:
        return islice(self._queue, 1 if self._n_sent else 0, None)

    def clear(self) -> None:
        """Drop everything."""
        while self._queue:
            self._finish(self._queue.popleft())
        self.n_bytes = self._n_sent = 0

    def _finish(self, outgoing: _Outgoing) -> None:
        self._domain.held_bytes -= len(outgoing.packet)
        if outgoing.is_event:
            self._events.discard(outgoing.packet)
        if outgoing.request is not None:
            outgoing.request.one_less()

    def __len__(self) -> int:
        return len(self._queue)
