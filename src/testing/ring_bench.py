# SPDX-License-Identifier: MIT
"""How fast a ring is between two processes: pairs of request and response a second, and the round trip."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import IO, Literal, Self, cast

from paravirt.errors import InvalidRequest, ParavirtError
from paravirt.ring.event import make_pair
from paravirt.ring.memory import PAGE_BYTES, create_object
from paravirt.ring.shared import ring_entries
from paravirt.ring.waiting import Fence, Wait
from paravirt.testing.bench.case import PROTOCOLS, Case, Mode, Sample
from paravirt.testing.bench.machine import two_cpus
from paravirt.testing.bench.programs import NotHere
from paravirt.testing.ring_peer import CONTROL_BYTES, PeerSetup

BLKIF_REQUEST_BYTES, BLKIF_RESPONSE_BYTES = PROTOCOLS["blkif"]
RING_HEADER_BYTES = 64
_END_S = 10

Role = Literal["front", "back"]

Progress = Callable[[str, float], None]
"""Called with what is being measured and how much of everything is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class RingResult:
    """One batch size, measured."""

    batch: int
    """Messages in one call, at most, at both ends."""
    wait: Wait
    request_bytes: int
    response_bytes: int
    pages: int
    pairs: int
    """Requests that got their response."""
    seconds: float
    pairs_per_s: float
    round_trip_p50_ns: float
    """Of one batch alone on the ring, from push to the last response."""
    round_trip_p99_ns: float
    notifications_sent: int
    """Batches of either end for which the other had to be notified."""
    notifications_suppressed: int
    sleeps: int
    cpu_s: float
    """User and system time of both processes over `seconds`."""


def _two_cpus() -> tuple[int, int] | tuple[None, None]:
    try:
        return two_cpus()
    except NotHere:
        return None, None


class RingRun:
    """Two processes, or two threads of one, with a ring between them, ready to be measured again and again."""

    def __init__(
        self,
        *,
        pages: int = 4,
        request_bytes: int = BLKIF_REQUEST_BYTES,
        response_bytes: int = BLKIF_RESPONSE_BYTES,
        wait: Wait = "spin",
        fence: Fence = "full",
        in_place: bool = False,
        processes: int = 2,
        slots: int | None = None,
    ) -> None:
        """Start both ends, each on a CPU of its own where there are two, as so many processes.

        `in_place`: messages are written into the slots, not copied in as batches. `slots`: no more than these, a power
        of two, of those that fit the pages. Raises `InvalidRequest` for messages
        that fit no ring of so many pages, `ResourceLimit` without the memory.
        """
        self.pages, self.wait = pages, wait
        self.request_bytes, self.response_bytes = request_bytes, response_bytes
        largest, ring_bytes = max(request_bytes, response_bytes), pages * PAGE_BYTES
        if slots is not None:
            ring_bytes = min(ring_bytes, RING_HEADER_BYTES + slots * largest)
        self.size = ring_entries(ring_bytes, largest)
        if not self.size or min(request_bytes, response_bytes) < 1:
            raise InvalidRequest(
                f"no ring of {request_bytes}/{response_bytes}-byte messages fits {pages} pages (1 to 16)"
            )
        self._memory_fd = create_object("memfd", pages * PAGE_BYTES + CONTROL_BYTES)
        self._processes: list[subprocess.Popen[str]] = []
        roles: tuple[Role, Role] = ("front", "back")
        halves, cpus = make_pair(), _two_cpus()
        ends = [
            PeerSetup(role, self._memory_fd, list(half), ring_bytes, request_bytes, response_bytes, wait, cpu,
                      fence, in_place)
            for role, half, cpu in zip(roles, halves, cpus, strict=True)
        ]  # fmt: skip
        try:
            for own in [ends] if processes == 1 else [[end] for end in ends]:
                self._start(own)
        except BaseException:
            self.close()
            raise
        finally:
            for half in halves:
                half.close()

    def _start(self, ends: list[PeerSetup]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "paravirt.testing.ring_peer", *(json.dumps(asdict(end)) for end in ends)],
            pass_fds=[fd for end in ends for fd in (self._memory_fd, *end.half)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)
        self._line(process)

    @staticmethod
    def _line(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise ParavirtError(f"the measuring process {process.pid} ended early")
        return line

    def _input(self) -> IO[str]:
        front = self._processes[0].stdin
        assert front is not None
        return front

    def measure(self, batch: int, seconds: float, *, round_trips: bool = True) -> RingResult:
        """Measure throughput for `seconds`, and round trips for a quarter of that. Raises `InvalidRequest`."""
        if not 1 <= batch <= self.size:
            raise InvalidRequest(f"a batch of {batch} does not fit a ring of {self.size} entries")
        told = self._ask("echo", batch, self.size, seconds, seconds / 4 if round_trips else 0)
        return RingResult(
            batch=batch,
            wait=self.wait,
            request_bytes=self.request_bytes,
            response_bytes=self.response_bytes,
            pages=self.pages,
            pairs=int(told["messages"]),
            seconds=told["seconds"],
            pairs_per_s=told["messages"] / told["seconds"],
            round_trip_p50_ns=told.get("round_trip_p50_ns", 0.0),
            round_trip_p99_ns=told.get("round_trip_p99_ns", 0.0),
            notifications_sent=int(told["sent"]),
            notifications_suppressed=int(told["suppressed"]),
            sleeps=int(told["sleeps"]),
            cpu_s=told["cpu_s"],
        )

    def sample(self, case: Case, seconds: float) -> Sample:
        """Measure a case whose messages are of this ring's sizes. Raises `InvalidRequest`."""
        if case.in_flight > self.size:
            raise InvalidRequest(f"{case.in_flight} requests in flight do not fit a ring of {self.size} entries")
        told = self._ask(case.mode, case.batch, case.in_flight, seconds, 0)
        return Sample(
            told["messages"] / told["seconds"],
            told.get("round_trip_p50_ns"),
            told.get("round_trip_p99_ns"),
            told["cpu_s"],
            told["sent"] / max(told["messages"], 1),
            told["sleeps"] / max(told["messages"], 1),
        )

    def _ask(
        self, mode: Mode, batch: int, in_flight: int, seconds: float, round_trip_seconds: float
    ) -> dict[str, float]:
        command = {
            "mode": mode,
            "batch": batch,
            "in_flight": in_flight,
            "seconds": seconds,
            "round_trip_seconds": round_trip_seconds,
        }
        print(json.dumps(command), file=self._input(), flush=True)
        return cast("dict[str, float]", json.loads(self._line(self._processes[0])))

    def pids(self) -> list[int]:
        """Of the front end's process and the back end's."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End both processes."""
        if self._memory_fd < 0:
            return
        if self._processes and all(process.poll() is None for process in self._processes):
            self._input().close()
            self._wait_for_the_end()
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        os.close(self._memory_fd)
        self._memory_fd = -1

    def _wait_for_the_end(self) -> None:
        for process in self._processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Clock:
    """Tells `progress` ten times a second how far a measurement of known length is."""

    def __init__(self, progress: Progress, label: str, done: float, share: float, seconds: float) -> None:
        self._progress, self._label, self._done, self._share, self._seconds = progress, label, done, share, seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _tell(self, elapsed_s: float) -> None:
        self._progress(self._label, self._done + self._share * min(elapsed_s / self._seconds, 1.0))

    def _run(self) -> None:
        elapsed_s = 0.0
        self._tell(elapsed_s)
        while not self._over.wait(0.1):
            elapsed_s += 0.1
            self._tell(elapsed_s)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()


def measure_rings(
    batches: Sequence[int],
    seconds: float,
    *,
    pages: int = 4,
    request_bytes: int = BLKIF_REQUEST_BYTES,
    response_bytes: int = BLKIF_RESPONSE_BYTES,
    wait: Wait = "adaptive",
    progress: Progress = lambda label, share: None,
) -> list[RingResult]:
    """Measure one batch size after the other, about `seconds` each, between two processes.

    `wait`: `spin` never sleeps, `sleep` never spins, `adaptive` spins for 50 µs and then sleeps.
    Raises `InvalidRequest` for messages or batches that do not fit the ring.
    """
    results = []
    with RingRun(pages=pages, request_bytes=request_bytes, response_bytes=response_bytes, wait=wait) as run:
        for i, batch in enumerate(batches):
            label = f"ring: batches of {batch}"
            with _Clock(progress, label, i / len(batches), 1 / len(batches), seconds):
                results.append(run.measure(batch, seconds * 0.8))
    progress("ring: done", 1.0)
    return results
