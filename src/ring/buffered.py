# SPDX-License-Identifier: MIT
"""One message at a time over either end of a ring, moved in batches underneath: for programs without arrays.

`put` collects messages and `get` hands out what was taken together, so that a call into C is paid for by many of both.
What was collected is sent when a batch is full, by `flush`, and before this end waits: no answer is waited for that a
collected message would bring.
"""

from collections.abc import Iterator

import numpy as np

from paravirt.errors import InvalidRequest
from paravirt.ring.event import WaitResult
from paravirt.ring.shared import FrontRing, Ring

DEFAULT_BATCH = 64


class BufferedMessages:
    """Single messages as bytes, over a ring that stays the caller's. One thread at a time."""

    def __init__(self, ring: Ring, *, batch: int = DEFAULT_BATCH, one_way: bool = False) -> None:
        """`batch`: messages collected at most; not more than half of the ring, so that both ends can work.

        `one_way`, at both ends alike: the back end answers every request itself with zeros, as soon as it has taken it,
        and the front end drops these answers. Raises `InvalidRequest`.
        """
        if batch < 1:
            raise InvalidRequest(f"a batch has 1 or more messages, not {batch}")
        self.ring = ring
        self.one_way = one_way
        self._is_front = isinstance(ring, FrontRing)
        out, into = (ring.request, ring.response) if self._is_front else (ring.response, ring.request)
        self._out_bytes = out.itemsize
        self._batch = min(batch, max(1, ring.size // 2))
        self._collected: list[bytes | bytearray | memoryview] = []
        self._inbox = np.zeros(self._batch, into)
        self._messages = self._inbox.view(np.dtype((np.void, into.itemsize)))
        self._answers = np.zeros(self._batch, out)
        self._taken: Iterator[bytes] = iter(())
        self._early: list[bytes] = []

    def put(self, message: bytes | bytearray | memoryview) -> None:
        """Send it, with the next batch. Do not change it before.

        Front: waits for room when the ring is full; responses that come meanwhile are kept for `get`. Back: raises
        `InvalidRequest` when a batch has more responses than requests were taken. Raises `InvalidRequest` for a message
        that has not the size of the ring's, `PeerError`, `Closed`.
        """
        if len(message) != self._out_bytes:
            raise InvalidRequest(f"a message of this ring has {self._out_bytes} bytes, not {len(message)}")
        collected = self._collected
        collected.append(message)
        if len(collected) >= self._batch:
            self.flush()

    def flush(self) -> bool:
        """Send what was collected. False when a kick, or a change of the channel, ended the wait for room: the rest is
        still collected. Raises as `put`.
        """
        collected = self._collected
        while collected:
            sent = self.ring.push(b"".join(collected))
            del collected[:sent]
            if collected and not self._make_room():
                return False
        return True

    def _make_room(self) -> bool:
        """Front: take responses, which frees their slots, after waiting for the first."""
        n = self._wait_and_take(None)
        if not self.one_way:
            self._early += self._messages[:n].tolist()
        return n > 0

    def _wait_and_take(self, timeout_s: float | None) -> int:
        """How many are in the inbox; 0 when the time is over or the wait was ended otherwise."""
        ring, inbox = self.ring, self._inbox
        while not (n := ring.take(inbox)):
            if ring.wait(timeout_s=timeout_s) is not WaitResult.EVENT:
                return 0
        return n

    def get(self, timeout_s: float | None = None) -> bytes | None:
        """The next message, after sending what was collected if it has to wait; None when the time is over or a kick
        came. Raises `PeerError`, `Closed`.
        """
        message = next(self._taken, None)
        if message is None:
            self._take(timeout_s)
            message = next(self._taken, None)
        return message

    def get_nowait(self) -> bytes | None:
        """The next message; None when there is none now."""
        return self.get(0)

    def __iter__(self) -> Iterator[bytes]:
        """All messages, until a wait is ended by a kick. The shortest way to get them."""
        while True:
            yield from self._taken
            self._take(None)
            first = next(self._taken, None)
            if first is None:
                return
            yield first

    def _take(self, timeout_s: float | None) -> None:
        """Take a batch: what came early, what is there now, or what comes while we wait."""
        if self._is_front and self.one_way:
            raise InvalidRequest("one way: there is nothing to get at the front end")
        if not self._early:
            self.flush()
        if self._early:
            self._taken, self._early = iter(self._early), []
            return
        n = self._wait_and_take(timeout_s)
        self._taken = iter(self._messages[:n].tolist())
        if self.one_way and n:
            self.ring.push(self._answers, n)

    def __repr__(self) -> str:
        way = ", one way" if self.one_way else ""
        return f"<BufferedMessages {len(self._collected)} collected{way}, {self.ring!r}>"
