# SPDX-License-Identifier: MIT
"""Replay against a live back end: a front end that sends the requests of a recording through a real connection.

Each request is sent when its time has come, and when as many answers are there as were there before it when it was
recorded: so at most as many are in flight as were then. Pages are new ones, of zeros or of a pattern.
"""

import threading
import time
from collections.abc import Iterable
from typing import Literal

import numpy as np

from paravirt.errors import InvalidRequest, ParavirtError, PeerError, PeerGone, TimedOut
from paravirt.frontend.device import FrontendDevice
from paravirt.frontend.domain import Domain
from paravirt.frontend.ring_end import RingEnd
from paravirt.looking.compare import Answers, Report
from paravirt.looking.messages import rewriter_for
from paravirt.protocol import blkif
from paravirt.protocol.decode import Entry, decoder_for
from paravirt.protocol.device import LAYOUT_KEY, PAGE_BYTES, RING_HEADER_BYTES
from paravirt.protocol.keys import MAX_RING_PAGE_ORDER, RingRequest, number
from paravirt.protocol.recording import Header, Kind, Record
from paravirt.protocol.vbd import VbdRequest
from paravirt.protocol.xenbus import DevicePath
from paravirt.xenstore import xenbus

Data = Literal["zero", "pattern"]
CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0
SLICE_S = 0.05
_ORDER_KEY = "max-ring-page-order"


def pattern(number: int, n_bytes: int) -> bytes:
    """What pages of request `number` hold."""
    return (number % 2**32).to_bytes(4, "little") * (n_bytes // 4)


class BackReplay:
    """An open device that is told what a recording says. A context manager."""

    def __init__(
        self,
        domain: Domain,
        path: DevicePath,
        header: Header,
        *,
        data: Data = "zero",
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        """Connect. Errors as `FrontendDevice.start`, and `InvalidRequest` for a recording that cannot be replayed."""
        self._rewriter = rewriter_for(header)
        self._header, self._path, self._store = header, path, domain.store
        self._data, self._timeout_s = data, answer_timeout_s
        self._request, self._response = (decoder_for(header.protocol, self._rewriter.messages) for _ in range(2))
        self._end = RingEnd(domain.hypervisor, path, header.protocol)
        self._lock = threading.Lock()  # the ring is in use, by the caller of `run`
        self._gone: ParavirtError | None = None
        self._free: list[int] = []
        self._in_flight: dict[int, list[int]] = {}
        self._device = FrontendDevice(domain.store, path, self)
        try:
            self._device.start(CONNECT_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def run(self, records: Iterable[Record], *, speed: float = 1.0, in_flight: int | None = None) -> Report:
        """Replay. `speed`: 1 for the recorded pace, 2 for twice as fast, 0 for as fast as it goes. `in_flight`: at most
        so many, instead of as many as when it was recorded.

        Raises `PeerGone`, `PeerError`, and what `records` raises; a missing answer is in the report.
        """
        report = Report()
        answers = Answers(report, self._response.response)
        begun, recorded_done = time.monotonic(), 0
        numbers: dict[int | None, int] = {}
        try:
            for record in records:
                if record.kind is Kind.RESPONSE:
                    asked = numbers.pop(self._response.response(record.message).id, None)
                    if asked is not None:
                        recorded_done += 1
                        answers.recorded(asked, record.message)
                    continue
                entry = self._request.request(record.message)
                if not self._rewriter.can_replay(entry):
                    report.skipped += 1
                    continue
                if speed > 0:
                    at = begun + (record.time_ns - self._header.started_ns) / 1e9 / speed
                    while (left := at - time.monotonic()) > 0:
                        self._settle(report, answers, min(left, SLICE_S))
                limit = report.requests - recorded_done + 1 if in_flight is None else in_flight
                self._make_room(report, answers, max(1, limit), len(entry.grefs))
                numbers[entry.id] = report.requests
                self._send(report.requests, record.message, entry)
                report.requests += 1
            self._make_room(report, answers, 1, 0)
        except TimedOut:
            report.unanswered = len(self._in_flight)
        answers.finish()
        report.seconds = time.monotonic() - begun
        return report

    def _make_room(self, report: Report, answers: Answers, limit: int, pages: int) -> None:
        """Until fewer than `limit` are in flight, and there are pages. Raises `TimedOut` when no answer comes."""
        deadline = time.monotonic() + self._timeout_s
        while len(self._in_flight) >= limit or len(self._free) < pages or self._is_full():
            if self._settle(report, answers, SLICE_S):
                deadline = time.monotonic() + self._timeout_s
            elif time.monotonic() >= deadline:
                raise TimedOut(f"{len(self._in_flight)} requests are not answered")

    def _is_full(self) -> bool:
        with self._lock:
            self._check()
            assert self._end.ring is not None
            return self._end.ring.full

    def _send(self, request_number: int, message: bytes, entry: Entry) -> None:
        arena, n = self._end.arena, len(entry.grefs)
        if arena is None or n > self._rewriter.pages:
            raise InvalidRequest(f"request {request_number} has {n} pages")
        grefs = [self._free.pop() for _ in range(n)]
        for gref in grefs:
            content = pattern(request_number, PAGE_BYTES) if self._data == "pattern" else bytes(PAGE_BYTES)
            start = (gref - arena.base) * PAGE_BYTES
            arena.memory.view[start : start + PAGE_BYTES] = content
            arena.grant(gref, read_only=self._rewriter.is_read_only(entry))
        changed = self._rewriter.request(message, request_number, grefs)
        self._in_flight[request_number] = grefs
        with self._lock:
            self._check()
            assert self._end.ring is not None
            self._end.ring.push(np.frombuffer(changed, np.uint8))

    def _settle(self, report: Report, answers: Answers, timeout_s: float) -> int:
        """Take answers, after waiting for one; how many."""
        with self._lock:
            self._check()
            ring = self._end.ring
            assert ring is not None
            got = ring.take_batch()
            if not len(got):
                ring.wait(timeout_s=timeout_s)
                got = ring.take_batch()
        for response in got:
            self._answered(response.tobytes(), report, answers)
        return len(got)

    def _answered(self, message: bytes, report: Report, answers: Answers) -> None:
        identity = self._response.response(message).id
        grefs = None if identity is None else self._in_flight.pop(identity, None)
        if identity is None or grefs is None:
            raise PeerError(f"the backend answered request {identity}, which is not in flight")
        report.responses += 1
        arena = self._end.arena
        assert arena is not None
        self._free += [gref for gref in grefs if arena.revoke(gref)]
        answers.now(identity, message)

    def _check(self) -> None:
        if self._gone is not None:
            raise self._gone

    # The driver's part of xenbus: called from the device's thread

    def negotiate(self, backend: str) -> dict[str, str]:
        """A new ring, as large as the recorded one if the backend takes that."""
        header = self._header
        offered = xenbus.read_keys(self._store, backend, (_ORDER_KEY, LAYOUT_KEY))
        layout = offered.get(LAYOUT_KEY)
        sizes = f"{header.request_bytes}-{header.response_bytes}-"
        if layout is not None and not layout.startswith(sizes):
            raise PeerError(f"the backend has messages {layout[:40]!r}, the recording {sizes}")
        n_bytes = RING_HEADER_BYTES + header.entries * header.entry_bytes
        wanted = min(MAX_RING_PAGE_ORDER, max(0, (-(-n_bytes // PAGE_BYTES) - 1).bit_length()))
        order = min(wanted, number(offered, _ORDER_KEY, 0))
        messages = self._rewriter.messages
        refs, port = self._end.make(
            messages.request,
            messages.response,
            wanted_order=order,
            max_order=order,
            data_pages=self._rewriter.pages * header.entries,
            entry_bytes=header.entry_bytes,
        )
        assert self._end.arena is not None
        if self._rewriter.pages and not self._free:
            run = self._end.arena.allocate(self._rewriter.pages * header.entries, owner="replay")
            self._free = list(range(run.gref, run.gref + run.n_pages))
        if header.protocol == blkif.NAME:
            return VbdRequest.single(refs, port).to_keys()
        return {**RingRequest(refs, port).to_keys(), **({} if layout is None else {LAYOUT_KEY: layout})}

    def connect(self, backend: str) -> None:
        """Nothing is in flight yet."""

    def refresh(self, backend: str) -> None:
        """Nothing that is taken over."""

    def pause(self) -> None:
        """A backend that goes ends the replay."""
        self._gone = self._gone or PeerGone(f"the backend of {self._path.kind} {self._path.device_id} is gone")
        self._end.waiter.kick()
        with self._lock:
            self._end.drop()

    def closed(self, error: ParavirtError | None) -> None:
        """No answer will come any more."""
        self._gone = error or self._gone

    def close(self) -> None:
        """Close the device. Harmless when repeated."""
        self._device.close()
        self._end.close()

    def __enter__(self) -> "BackReplay":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
