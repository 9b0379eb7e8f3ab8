# SPDX-License-Identifier: MIT
"""Ends of a measured ring, one a process or both in one. `ring_bench` starts these and talks to the front end.

Run as `python -m paravirt.testing.ring_peer SETUP...`, each SETUP being JSON (`PeerSetup`): of one end, or of both, and
then the back end is a thread. Says "ready" when its end is made. The front end then reads commands, one JSON object a
line, and answers each with one line; end of input ends both.
"""

import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from paravirt.ring.event import Half, from_half
from paravirt.ring.memory import PAGE_BYTES, Mapping
from paravirt.ring.shared import BackRing, FrontRing, Ring
from paravirt.ring.waiting import Fence, Wait
from paravirt.testing.bench.case import Mode

SPIN_NS: dict[Wait, int] = {"spin": 1_000_000, "adaptive": 50_000, "sleep": 0}
"""How long an end spins before it sleeps; in `spin` it looks around after that and spins on."""

ROUNDS_PER_CLOCK_READ = 16
CONTROL_BYTES = 4096
"""A page behind those of the ring in the same object, for what the front end wants of the back end: a byte with an
order, one that is 1 while the back end may spin for ever, one that is 1 while only requests matter, the batch size at
8, the back end's counters as JSON from 16 on."""
SERVE, STOP, COUNT = 0, 1, 2
ORDER, MAY_SPIN, ONE_WAY = 0, 1, 2


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
    fence: Fence = "full"
    in_place: bool = False
    """Messages are written into the slots themselves, not copied in as a batch."""


def _message_type(n_bytes: int) -> "np.dtype[Any]":
    return np.dtype([("bytes", np.uint8, (n_bytes,))])


def counters(ring: Ring) -> dict[str, float]:
    """What this end counted so far."""
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    statistics = ring.statistics()
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "sent": statistics.notifications_sent,
        "suppressed": statistics.notifications_suppressed,
        "sleeps": statistics.sleeps,
    }


def push_in_place(ring: Ring, messages: NDArray[Any], count: int) -> int:
    """Write `count` messages of a batch into the ring's slots, run by run: how many found room."""
    sent = 0
    while sent < count and (n := len(slots := ring.reserve(count - sent))):
        slots[:] = messages[sent : sent + n]
        sent += ring.commit(n)
    return sent


def hand_back(ring: BackRing, owed: int) -> None:
    """Give `owed` slots back to the front end, by responses that nobody writes."""
    while owed:
        owed -= ring.commit(len(ring.reserve(owed)))


def push_of(ring: Ring, *, in_place: bool) -> Callable[[NDArray[Any], int], int]:
    """How this end sends the first so many messages of a batch."""
    return partial(push_in_place, ring) if in_place else ring.push


class FrontLoop:
    """Sends batches and takes responses, never more of either than `batch` in one call."""

    def __init__(self, ring: FrontRing, control: memoryview, setup: PeerSetup) -> None:
        self.ring = ring
        self._push = push_of(ring, in_place=setup.in_place)
        self._control = control
        self._spin_ns = SPIN_NS[setup.wait]
        self._sleeps = setup.wait != "spin"

    def take(self, responses: NDArray[Any]) -> int:
        """At least one response: spin, then sleep."""
        while not (n := self.ring.take(responses, spin_ns=self._spin_ns)):
            if self._sleeps:
                self.ring.wait()
        return n

    def echo(self, batch: int, in_flight: int, seconds: float) -> tuple[int, float]:
        """Keep so many requests without a response, in whole batches: (pairs, seconds)."""
        ring, push, take = self.ring, self._push, self.take
        requests, responses = np.zeros(batch, ring.request), np.zeros(batch, ring.response)
        most = in_flight - batch
        done = outstanding = 0
        start = time.perf_counter()
        deadline = start + seconds
        while (now := time.perf_counter()) < deadline:
            for _ in range(ROUNDS_PER_CLOCK_READ):
                while outstanding <= most:
                    outstanding += push(requests, batch)
                n = take(responses)
                outstanding -= n
                done += n
        while outstanding:
            outstanding -= take(responses)
        return done, now - start

    def one_way(self, batch: int, seconds: float) -> tuple[int, float]:
        """Send as many requests as there is room for: (requests, seconds)."""
        ring, push, take = self.ring, self._push, self.take
        requests, responses = np.zeros(batch, ring.request), np.zeros(ring.size, ring.response)
        sent = returned = 0
        start = time.perf_counter()
        deadline = start + seconds
        self._control[ONE_WAY] = 1
        while (now := time.perf_counter()) < deadline:
            for _ in range(ROUNDS_PER_CLOCK_READ):
                n = push(requests, batch)
                sent += n
                if n < batch:
                    returned += take(responses)
        while returned < sent:
            returned += take(responses)
        self._control[ONE_WAY] = 0
        return sent, now - start

    def round_trips(self, batch: int, seconds: float) -> NDArray[Any]:
        """One batch at a time: nanoseconds from push to the last response, one value a batch."""
        ring, push, take = self.ring, self._push, self.take
        requests, responses = np.zeros(batch, ring.request), np.zeros(batch, ring.response)
        samples: list[int] = []
        deadline = time.perf_counter_ns() + int(seconds * 1e9)
        before = 0
        while before < deadline:
            before = time.perf_counter_ns()
            outstanding = push(requests, batch)
            while outstanding:
                outstanding -= take(responses)
            samples.append(time.perf_counter_ns() - before)
        return np.array(samples)

    def tell(self, what: int) -> None:
        """Give the back end an order. It looks for one whenever there is nothing to do, so a request wakes it; at STOP
        it may be gone before it answers that."""
        self._control[ORDER] = what
        self.ring.push(np.zeros(1, self.ring.request))

    def both_counters(self) -> dict[str, float]:
        """Both ends' counters, summed. Costs one request."""
        self.tell(COUNT)
        self.take(np.zeros(1, self.ring.response))
        while self._control[ORDER]:
            os.sched_yield()
        theirs = json.loads(bytes(self._control[16:]).rstrip(b"\0"))
        return {name: value + theirs[name] for name, value in counters(self.ring).items()}

    def run(
        self, mode: Mode, batch: int, in_flight: int, seconds: float, round_trip_seconds: float
    ) -> dict[str, float]:
        """Carry out one command: `mode` for `seconds`, and then round trips as well."""
        self._control[8:12] = batch.to_bytes(4, sys.byteorder)
        self._control[MAY_SPIN] = not self._sleeps
        before = self.both_counters()
        trips: list[NDArray[Any]] = []
        if mode == "echo":
            messages, took_s = self.echo(batch, in_flight, seconds)
        elif mode == "oneway":
            messages, took_s = self.one_way(batch, seconds)
        else:
            trips.append(self.round_trips(batch, seconds))
            messages, took_s = batch * len(trips[0]), float(trips[0].sum()) / 1e9
        after = self.both_counters()
        told = {name: after[name] - before[name] for name in after}
        told |= {"messages": messages, "seconds": took_s}
        if round_trip_seconds:
            trips.append(self.round_trips(batch, round_trip_seconds))
        if trips:
            told["round_trip_p50_ns"], told["round_trip_p99_ns"] = np.percentile(trips[0], (50, 99)).tolist()
        self._control[MAY_SPIN] = 0
        return told


def run_front(ring: FrontRing, control: memoryview, setup: PeerSetup) -> None:
    """The front end's conversation with the measuring process."""
    loop = FrontLoop(ring, control, setup)
    for line in sys.stdin:
        print(json.dumps(loop.run(**json.loads(line))), flush=True)
    loop.tell(STOP)


def run_back(ring: BackRing, control: memoryview, setup: PeerSetup) -> None:
    """Answer what comes, at most a batch in one call, and look for orders when nothing comes."""
    requests, responses = np.zeros(ring.size, ring.request), np.zeros(ring.size, ring.response)
    push, spin_ns, half = push_of(ring, in_place=setup.in_place), SPIN_NS[setup.wait], ring.size // 2
    owed = 0
    while control[ORDER] != STOP:
        if control[ORDER] == COUNT:
            told = json.dumps(counters(ring)).encode()
            control[16:] = told.ljust(CONTROL_BYTES - 16, b"\0")
            control[ORDER] = SERVE
        if not control[MAY_SPIN]:
            ring.wait()
        batch = max(1, int.from_bytes(control[8:12], sys.byteorder))
        while n := ring.take(requests, batch, spin_ns=spin_ns):
            if control[ONE_WAY]:
                owed += n
                if owed < half:
                    continue
                hand_back(ring, owed)
                owed = 0
            else:
                push(responses, n)
        hand_back(ring, owed)
        owed = 0


def run_end(setup: PeerSetup, ready: Callable[[], None]) -> None:
    """Be one end, in this thread; calls `ready` when it is made."""
    if setup.cpu is not None:
        os.sched_setaffinity(0, {setup.cpu})
    waiter, port = from_half(Half(*setup.half))
    request, response = _message_type(setup.request_bytes), _message_type(setup.response_bytes)
    ring_pages_bytes = -(-setup.ring_bytes // PAGE_BYTES) * PAGE_BYTES
    with waiter, Mapping(setup.memory_fd, ring_pages_bytes + CONTROL_BYTES) as mapping:
        memory, control = (mapping, 0, setup.ring_bytes), mapping.view[ring_pages_bytes:]
        if setup.role == "front":
            with FrontRing.create(memory, request, response, port=port, fence=setup.fence) as front, control:
                ready()
                run_front(front, control, setup)
        else:
            with BackRing.attach(memory, request, response, port=port, fence=setup.fence) as back, control:
                ready()
                run_back(back, control, setup)


def main() -> None:
    ends = [PeerSetup(**json.loads(argument)) for argument in sys.argv[1:]]
    back = threading.Thread(target=lambda: run_end(ends[1], both.set))
    both = threading.Event()

    def ready() -> None:
        if len(ends) == 2:
            back.start()
            both.wait()
        print("ready", flush=True)

    run_end(ends[0], ready)


if __name__ == "__main__":
    main()
