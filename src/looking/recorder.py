# SPDX-License-Identifier: MIT
"""Recording a live ring from outside: the log that one of its ends writes while somebody listens, into a file.

Dom0's end is preferred. The end logs for as long as it is asked again each second, so a recorder that is killed
leaves nothing switched on. A log has a bounded size and never stops its ring: what does not fit is lost, and counted.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from paravirt.errors import NotFound, PeerError, XenstoreError
from paravirt.hypervisor.looking import LiveRing, LookedEnd, Looker
from paravirt.looking.dump import messages_of
from paravirt.looking.view import WRAP
from paravirt.protocol.device import LAYOUT_KEY, RESERVED
from paravirt.protocol.keys import FENCE_KEY
from paravirt.protocol.layout import MessagePair
from paravirt.protocol.recording import MAX_OFFERED, MAX_TEXT, Header, Kind, Writer
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.looking import Batch, LookedObject, Wish
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

NOT_OFFERED = (RESERVED - {"max-ring-page-order", LAYOUT_KEY}) | {"params", FENCE_KEY}
"""Keys that are of one connection, or that only the machine where it was recorded understands."""
POLL_S = 0.002
ASK_AGAIN_S = 1.0
MAX_BATCHES_A_TURN = 65536
"""Taken from a log before the recorder looks at the clock again: a process that writes without end keeps nobody."""
MAX_NONSENSE = 100
"""Times that a log may be nonsense before it is given up."""


def offer_of(store: XenstoreClient, ring: LiveRing) -> dict[str, str]:
    """What the back end of a ring published; nothing of a ring that is no device's."""
    end = ring.end
    path = DevicePath(end.kind, ring.domid, end.device_id, end.peer_domid if end.is_front else end.domid)
    with suppress(XenstoreError):
        names = [name for name in store.ls(path.backend) if name not in NOT_OFFERED]
        keys = xenbus.read_keys(store, path.backend, names[:MAX_OFFERED])
        return {name: text for name, text in keys.items() if len(text) <= MAX_TEXT}
    return {}


@dataclass(slots=True)
class Recorded:
    """What became of a recording."""

    requests: int = 0
    responses: int = 0
    lost: int = 0
    """Messages that are missing between those in the file."""
    ended: str = "the time is over"
    """Why it ended: "the time is over", "asked to stop", "the ring is gone"."""


class Recorder:
    """Records one ring. `run` returns when the time is over, when `stop` says so, or when the ring is gone."""

    def __init__(
        self,
        looker: Looker,
        ring: LiveRing,
        *,
        messages: MessagePair | None = None,
        offer: Mapping[str, str] | None = None,
        host: str = "",
    ) -> None:
        """`messages`: layout of the messages, where the caller knows better than the ring. `offer`: `offer_of` it.
        Raises `NotFound`.
        """
        end = ring.back if ring.back is not None and ring.back.domid == 0 else ring.front or ring.back
        if end is None:
            raise NotFound(f"ring {ring.name} has no end that can be recorded")
        self._looker, self._end = looker, end
        self._looked: LookedObject = looker.object(end.object)
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._next: dict[Kind, int] = {}
        self._nonsense = 0
        self.recorded = Recorded()
        self.header = Header(
            device=ring.name,
            protocol=end.protocol,
            domid=ring.domid,
            end="front" if end.is_front else "back",
            entries=end.size,
            entry_bytes=end.entry_bytes,
            request_bytes=end.request_bytes,
            response_bytes=end.response_bytes,
            started_ns=time.time_ns(),
            host=host[:MAX_TEXT],
            messages=messages or messages_of(ring),
            offer=offer or {},
        )

    @property
    def end(self) -> LookedEnd:
        """Whose log is read."""
        return self._end

    def run(self, file: BinaryIO, *, seconds: float | None, stop: Callable[[], bool]) -> Recorded:
        """Into an empty file. Raises `AlreadyExists` while somebody else records this process, `PeerError` for a
        process that logs nothing but nonsense.
        """
        writer = Writer(file, self.header)
        deadline = None if seconds is None else time.monotonic() + seconds
        self._looked.open_log()
        try:
            self._follow(writer, deadline, stop)
        finally:
            self._looked.close_log()
            writer.finish()
            self.recorded.lost = writer.lost
        return self.recorded

    def _follow(self, writer: Writer, deadline: float | None, stop: Callable[[], bool]) -> None:
        ask_at = 0.0
        while True:
            now = time.monotonic()
            over = deadline is not None and now >= deadline
            asked = stop()
            if now >= ask_at:
                if not self._is_there():
                    self._drain(writer)
                    self.recorded.ended = "the ring is gone"
                    return
                self._looker.want(self._end, Wish.LOG)
                ask_at = now + ASK_AGAIN_S
            drained = self._drain(writer)
            if over or asked:
                self.recorded.ended = "asked to stop" if asked else "the time is over"
                return
            if not drained:
                time.sleep(POLL_S)

    def _is_there(self) -> bool:
        rings = self._looker.look()
        return any(end.key == self._end.key for ring in rings for end in ring.ends.values())

    def _drain(self, writer: Writer) -> int:
        """What is there now, up to a bound; how many batches."""
        n = 0
        for batch in self._batches():
            n += 1
            if (batch.record, batch.generation) == self._end.key[1:]:
                self._write(writer, batch)
        return n

    def _batches(self) -> Iterator[Batch]:
        for _ in range(MAX_BATCHES_A_TURN):
            try:
                batch = self._looked.read_log()
            except PeerError:
                self._nonsense += 1
                if self._nonsense > MAX_NONSENSE:
                    raise
                continue
            if batch is None:
                return
            yield batch

    def _write(self, writer: Writer, batch: Batch) -> None:
        kind = Kind.RESPONSE if batch.taken == self._end.is_front else Kind.REQUEST
        expected = self._end.request_bytes if kind is Kind.REQUEST else self._end.response_bytes
        if batch.message_bytes != expected:
            self._nonsense += 1
            return
        due = self._next.get(kind, batch.index)
        missing = (batch.index - due) % WRAP
        if missing:
            writer.note_lost(missing if missing < WRAP // 2 else 1)
        self._next[kind] = (batch.index + batch.count) % WRAP
        for i in range(batch.count):
            message = batch.data[i * expected : (i + 1) * expected]
            writer.write(batch.time_ns + self._offset_ns, kind, (batch.index + i) % WRAP, message)
        if kind is Kind.REQUEST:
            self.recorded.requests += batch.count
        else:
            self.recorded.responses += batch.count
