# SPDX-License-Identifier: MIT
"""Replay against a live front end: a back end that answers as recorded.

The front end's requests are compared with the recorded ones, in their order, and get the recorded answers in the order
and at the pace in which these were given. A front end that waits for an answer before it sends what would come first
gets it early.
"""

import errno
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from paravirt.backend.connection import Connection
from paravirt.backend.device import BackendDevice, RingPlaces
from paravirt.errors import ParavirtError, PeerError
from paravirt.hypervisor.client import Hypervisor
from paravirt.looking.compare import Report
from paravirt.looking.messages import Rewriter, rewriter_for
from paravirt.looking.replay_to_back import pattern
from paravirt.protocol import blkif
from paravirt.protocol.decode import Entry, decoder_for
from paravirt.protocol.device import PAGE_BYTES
from paravirt.protocol.keys import RING_KEYS, RingRequest
from paravirt.protocol.recording import Header, Kind, Record
from paravirt.protocol.vbd import QUEUES_KEY
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.grant import GrantFailed
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

log = logging.getLogger(__name__)

PATIENCE_S = 0.2
"""Without a request of the front end for so long, it gets an answer before its time."""
SLICE_S = 0.02
MAX_AHEAD = 65536
"""Records that are read before their turn."""


@dataclass(slots=True)
class _Answer:
    number: int
    """Of the request in the recording."""
    message: bytes
    time_ns: int


class Script:
    """A recording as a back end needs it: the k-th request, and the answers in their order. Reads ahead as needed."""

    def __init__(self, header: Header, records: Iterable[Record], rewriter: Rewriter) -> None:
        self._records = iter(records)
        self._request, self._response = (decoder_for(header.protocol, rewriter.messages) for _ in range(2))
        self._asked: dict[int | None, int] = {}
        self._read = 0
        self.requests: deque[Entry] = deque()
        self.answers: deque[_Answer] = deque()

    def _step(self) -> bool:
        record = next(self._records, None)
        if record is None:
            return False
        if record.kind is Kind.REQUEST:
            entry = self._request.request(record.message)
            self._asked[entry.id] = self._read
            self._read += 1
            self.requests.append(entry)
        else:
            asked = self._asked.pop(self._response.response(record.message).id, None)
            if asked is not None:
                self.answers.append(_Answer(asked, record.message, record.time_ns))
        return True

    def next_request(self) -> Entry | None:
        """The next one of the recording; None: there are no more."""
        while not self.requests:
            if not self._step():
                return None
        return self.requests.popleft()

    def next_answer(self, waiting: Iterable[int], *, early: bool) -> _Answer | None:
        """The next answer to one of the requests that are `waiting`; with `early`, before its turn if need be."""
        there = set(waiting)
        for _ in range(MAX_AHEAD):
            found = next((each for each in self.answers if each.number in there), None) if early else None
            head = self.answers[0] if self.answers else None
            if head is not None and (head.number in there or not early):
                return self.answers.popleft() if head.number in there else None
            if found is not None:
                self.answers.remove(found)
                return found
            if not self._step():
                return None
        return None


class ReplayEngine:
    """Serves one ring as a recording says. `finished` is set when all of it was replayed."""

    def __init__(
        self,
        connection: Connection,
        header: Header,
        records: Iterable[Record],
        *,
        speed: float,
        fill: bool,
        on_failure: Callable[[ParavirtError], None],
    ) -> None:
        self._ring, self._waiter, self._arena = connection.ring, connection.waiter, connection.arena
        self._rewriter = rewriter_for(header)
        self._header, self._speed, self._fill, self._on_failure = header, speed, fill, on_failure
        self._decoder = decoder_for(header.protocol, self._rewriter.messages)
        self._script = Script(header, records, self._rewriter)
        self._waiting: dict[int, Entry] = {}  # requests of the front end, by their number in the recording
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)
        self._stopping = threading.Event()
        self._last_ns = 0  # recorded time of the answer that was given last, ...
        self._last_s = 0.0  # ...and when that was
        self._idle_since_s = 0.0
        self._arrived = 0
        self.report = Report()
        self.finished = threading.Event()

    def start(self) -> None:
        """Begin serving."""
        self._thread.start()

    def stop(self) -> None:
        """Harmless when repeated."""
        self._stopping.set()
        self._waiter.kick()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def statistics(self) -> Report:
        """What came of it so far."""
        return self.report

    # The thread

    def _run(self) -> None:
        begun = time.monotonic()
        try:
            while not self._stopping.is_set():
                if not self._take() and not self._answer():
                    self._ring.wait(timeout_s=SLICE_S)
                self.report.seconds = time.monotonic() - begun
        except ParavirtError as error:
            self._on_failure(error)
        except Exception as error:
            log.exception("the replay failed")
            self._on_failure(ParavirtError(f"the replay failed: {error}"))
        finally:
            self.finished.set()

    def _take(self) -> int:
        """Requests that came."""
        batch = self._ring.take_batch()
        for message in batch:
            self._compare(self._decoder.request(message.tobytes()))
        if len(batch):
            self._idle_since_s = time.monotonic()
        return len(batch)

    def _compare(self, now: Entry) -> None:
        number, self._arrived = self._arrived, self._arrived + 1
        recorded = self._script.next_request()
        if recorded is None:
            self.report.beyond += 1
            self._push(self._refusal(now))
            self.finished.set()
            return
        self.report.requests += 1
        self._waiting[number] = now
        if _asked(recorded) != _asked(now):
            self.report.note(number, "the request", recorded, now)

    def _answer(self) -> bool:
        """Give the next answer whose time has come; whether one was given."""
        if not self._waiting:
            if self._arrived and not self._script.requests and not self._script.answers and self._is_over():
                self.finished.set()
            return False
        early = time.monotonic() - self._idle_since_s >= PATIENCE_S
        answer = self._script.next_answer(self._waiting, early=early)
        if answer is None:
            if early and self._is_over():  # requests without a recorded answer
                self.report.unknown += len(self._waiting)
                for entry in self._waiting.values():
                    self._push(self._refusal(entry))
                self._waiting.clear()
            return False
        self._pace(answer.time_ns)
        self.report.reordered += early
        entry = self._waiting.pop(answer.number)
        if self._fill and self._rewriter.is_read(entry):
            self._fill_pages(answer.number, entry)
        self._push(self._rewriter.response(answer.message, entry.id or 0))
        return True

    def _is_over(self) -> bool:
        """The recording has no more requests."""
        entry = self._script.next_request()
        if entry is None:
            return True
        self._script.requests.appendleft(entry)
        return False

    def _pace(self, time_ns: int) -> None:
        """As long after the answer before as it was then."""
        if self._speed > 0 and self._last_ns:
            gap = max(0.0, (time_ns - self._last_ns) / 1e9 / self._speed)
            self._stopping.wait(max(0.0, self._last_s + gap - time.monotonic()))
        self._last_ns, self._last_s = time_ns, time.monotonic()

    def _fill_pages(self, number: int, entry: Entry) -> None:
        try:
            with self._arena.map_pages(entry.grefs) as pages:
                pages.view[:] = pattern(number, len(entry.grefs) * PAGE_BYTES)
        except GrantFailed as error:
            self.report.note(number, "its pages", "granted", error)

    def _refusal(self, entry: Entry) -> bytes:
        """An answer that says no, for a request that the recording has no answer for."""
        identity = entry.id or 0
        if self._header.protocol == blkif.NAME:
            return struct.pack("<QBxhI", identity, 0, int(blkif.Status.ERROR), 0)
        response = np.zeros(1, self._rewriter.messages.response)
        response["id"], response["status"] = identity, -errno.EIO
        return bytes(response.tobytes())

    def _push(self, message: bytes) -> None:
        self._ring.push(np.frombuffer(message, np.uint8))
        self.report.responses += 1


def _asked(entry: Entry) -> tuple[object, ...]:
    """A request without what is of its own life: its id and references."""
    return entry.kind, _without_grefs(entry.fields), len(entry.grefs)


def _without_grefs(value: object) -> object:
    if isinstance(value, dict):
        return {name: _without_grefs(part) for name, part in value.items() if name != "gref"}
    if isinstance(value, list):
        return [_without_grefs(part) for part in value]
    return value


class ReplayDevice(BackendDevice[Report]):
    """The backend half of the device that is replayed."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        path: DevicePath,
        on_failure: Callable[[BackendDevice[Report]], None],
        *,
        header: Header,
        records: Callable[[], Iterator[Record]],
        speed: float,
        fill: bool,
        on_start: Callable[[ReplayEngine], None],
    ) -> None:
        """`records`: begins anew for each connection. `fill`: write a pattern into pages that are read."""
        super().__init__(hypervisor, store, path, on_failure)
        messages = rewriter_for(header).messages
        self.messages = (messages.request, messages.response)
        self.message_protocol = header.protocol
        self._header, self._records, self._speed, self._fill = header, records, speed, fill
        self._on_start = on_start

    def _prepare(self) -> dict[str, str]:
        offer = dict(self._header.offer)
        offer.pop(QUEUES_KEY, None)  # one ring was recorded
        return offer

    def _read_request(self) -> RingPlaces:
        keys = xenbus.read_keys(self._store, self.path.frontend, RING_KEYS)
        return RingRequest.from_keys(keys)

    def _make_engine(self, connection: Connection) -> ReplayEngine:
        if connection.ring.entry_bytes != self._header.entry_bytes:
            raise PeerError(f"entries of {connection.ring.entry_bytes} bytes, recorded {self._header.entry_bytes}")
        engine = ReplayEngine(
            connection, self._header, self._records(), speed=self._speed, fill=self._fill, on_failure=self.fail
        )
        self._on_start(engine)
        return engine

    def _release(self) -> None:
        """Nothing was taken."""
