# SPDX-License-Identifier: MIT
"""One end of a measured ring, in a process of its own. `ring_bench` starts two of these and talks to the front end.

Run as `python -m paravirt.testing.ring_peer SETUP`, SETUP being JSON (`PeerSetup`). Says "ready" when its end is made.
The front end then reads commands, one JSON object a line, and answers each with one line; end of input ends both.
"""

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from paravirt.ring.event import Half, from_half
from paravirt.ring.memory import Mapping
from paravirt.ring.shared import BackRing, FrontRing, Ring

Wait = Literal["spin", "sleep", "adaptive"]
SPIN_NS: dict[Wait, int] = {"spin": 1_000_000, "adaptive": 50_000, "sleep": 0}
"""How long an end spins before it sleeps; in `spin` it looks around after that and spins on."""

ROUNDS_PER_CLOCK_READ = 16
CONTROL_BYTES = 4096
"""A page behind the ring in the same object, for what the front end wants of the back end: a byte with an order, one
that is 1 while the back end may spin for ever, the batch size at 8, the back end's counters as JSON from 16 on."""
SERVE, STOP, COUNT = 0, 1, 2


@dataclass(frozen=True)
class PeerSetup:
    """What a peer process is told on its command line."""

    role: Literal["front", "back"]
    memory_fd: int
    half: list[int]
    ring_bytes: int
    request_bytes: int
    response_bytes: int
    wait: Wait
    cpu: int | None


def _message_type(n_bytes: int) -> "np.dtype[Any]":
    return np.dtype([("bytes", np.uint8, (n_bytes,))])


def counters(ring: Ring) -> dict[str, float]:
    """What this process counted so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    statistics = ring.statistics()
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "sent": statistics.notifications_sent,
        "suppressed": statistics.notifications_suppressed,
        "sleeps": statistics.sleeps,
    }


class FrontLoop:
    """Sends batches and takes responses, never more of either than `batch` in one call."""

    def __init__(self, ring: FrontRing, control: memoryview, wait: Wait) -> None:
        self.ring = ring
        self._control = control
        self._spin_ns = SPIN_NS[wait]
        self._sleeps = wait != "spin"

    def take(self, responses: NDArray[Any]) -> int:
        """At least one response: spin, then sleep."""
        while not (n := self.ring.take(responses, spin_ns=self._spin_ns)):
            if self._sleeps:
                self.ring.wait()
        return n

    def throughput(self, batch: int, seconds: float) -> tuple[int, float]:
        """Keep the ring full of whole batches: (pairs, seconds)."""
        ring, take = self.ring, self.take
        requests, responses = np.zeros(batch, ring.request), np.zeros(batch, ring.response)
        most = ring.size - batch
        done = outstanding = 0
        start = time.perf_counter()
        deadline = start + seconds
        while (now := time.perf_counter()) < deadline:
            for _ in range(ROUNDS_PER_CLOCK_READ):
                while outstanding <= most:
                    outstanding += ring.push(requests)
                n = take(responses)
                outstanding -= n
                done += n
        while outstanding:
            outstanding -= take(responses)
        return done, now - start

    def round_trips(self, batch: int, seconds: float) -> NDArray[Any]:
        """One batch at a time: nanoseconds from push to the last response, one value a batch."""
        ring, take = self.ring, self.take
        requests, responses = np.zeros(batch, ring.request), np.zeros(batch, ring.response)
        samples: list[int] = []
        deadline = time.perf_counter_ns() + int(seconds * 1e9)
        before = 0
        while before < deadline:
            before = time.perf_counter_ns()
            outstanding = ring.push(requests)
            while outstanding:
                outstanding -= take(responses)
            samples.append(time.perf_counter_ns() - before)
        return np.array(samples)

    def tell(self, what: int) -> None:
        """Give the back end an order. It looks for one whenever there is nothing to do, so a request wakes it."""
        self._control[0] = what
        self.ring.push(np.zeros(1, self.ring.request))
        self.take(np.zeros(1, self.ring.response))

    def both_counters(self) -> dict[str, float]:
        """Both ends' counters, summed. Costs one request."""
        self.tell(COUNT)
        while self._control[0]:
            os.sched_yield()
        theirs = json.loads(bytes(self._control[16:]).rstrip(b"\0"))
        return {name: value + theirs[name] for name, value in counters(self.ring).items()}

    def run(self, batch: int, seconds: float, round_trip_seconds: float) -> dict[str, float]:
        """Carry out one command."""
        self._control[8:12] = batch.to_bytes(4, sys.byteorder)
        self._control[1] = not self._sleeps
        before = self.both_counters()
        pairs, took_s = self.throughput(batch, seconds)
        after = self.both_counters()
        told = {name: after[name] - before[name] for name in after}
        told |= {"pairs": pairs, "seconds": took_s}
        if round_trip_seconds:
            trips = self.round_trips(batch, round_trip_seconds)
            told["round_trip_p50_ns"], told["round_trip_p99_ns"] = np.percentile(trips, (50, 99)).tolist()
        self._control[1] = 0
        return told


def run_front(ring: FrontRing, control: memoryview, wait: Wait) -> None:
    """The front end's conversation with the measuring process."""
    loop = FrontLoop(ring, control, wait)
    for line in sys.stdin:
        print(json.dumps(loop.run(**json.loads(line))), flush=True)
    loop.tell(STOP)


def run_back(ring: BackRing, control: memoryview, wait: Wait) -> None:
    """Answer what comes, at most a batch in one call, and look for orders when nothing comes."""
    requests, responses = np.zeros(ring.size, ring.request), np.zeros(ring.size, ring.response)
    spin_ns = SPIN_NS[wait]
    while control[0] != STOP:
        if control[0] == COUNT:
            told = json.dumps(counters(ring)).encode()
            control[16:] = told.ljust(CONTROL_BYTES - 16, b"\0")
            control[0] = SERVE
        if not control[1]:
            ring.wait()
        batch = max(1, int.from_bytes(control[8:12], sys.byteorder))
        while n := ring.take(requests, batch, spin_ns=spin_ns):
            ring.push(responses, n)


def main() -> None:
    setup = PeerSetup(**json.loads(sys.argv[1]))
    if setup.cpu is not None:
        os.sched_setaffinity(0, {setup.cpu})
    waiter, port = from_half(Half(*setup.half))
    request, response = _message_type(setup.request_bytes), _message_type(setup.response_bytes)
    with waiter, Mapping(setup.memory_fd, setup.ring_bytes + CONTROL_BYTES) as mapping:
        memory, control = (mapping, 0, setup.ring_bytes), mapping.view[setup.ring_bytes :]
        ring: Ring
        if setup.role == "front":
            ring = FrontRing.create(memory, request, response, port=port)
        else:
            ring = BackRing.attach(memory, request, response, port=port)
        with ring, control:
            print("ready", flush=True)
            if isinstance(ring, FrontRing):
                run_front(ring, control, setup.wait)
            elif isinstance(ring, BackRing):
                run_back(ring, control, setup.wait)


if __name__ == "__main__":
    main()
