# SPDX-License-Identifier: MIT
"""Single messages through our ring from Python, between two processes that spin.

Run as: python -m benchmarks.single_messages oneway|pingpong CPU CPU SECONDS. Prints messages a second, put one after
the other into a buffer and iterated over at the other end; or the median nanoseconds of an `exchange`.
"""

import os
import sys
import time
from statistics import median

import numpy as np

from paravirt.ring.buffered import BufferedMessages
from paravirt.ring.memory import PAGE_BYTES, Mapping, create_object
from paravirt.ring.shared import BackRing, FrontRing
from paravirt.ring.waiting import offer_fence
from paravirt.testing.bench.peers.runner import Report, in_child, wait_for

REQUEST, RESPONSE = (np.dtype([("bytes", np.uint8, (n_bytes,))]) for n_bytes in (112, 16))
PAGES = 4
ROUNDS_PER_CLOCK_READ = 256
STOP = 255
END_S = 2.0
SPIN_NS = 50_000_000


def put_many(ring: FrontRing, seconds: float) -> float:
    """One way: when it began."""
    messages = BufferedMessages(ring, one_way=True)
    put, message = messages.put, bytes(REQUEST.itemsize)
    start = time.perf_counter()
    deadline = start + seconds
    while time.perf_counter() < deadline:
        for _ in range(ROUNDS_PER_CLOCK_READ):
            put(message)
    put(bytes([STOP]) * REQUEST.itemsize)
    messages.flush()
    return start


def iterate(ring: BackRing) -> dict[str, float]:
    """Look at each: how many, and when the last came."""
    count = 0
    for message in BufferedMessages(ring, one_way=True):
        if message[0] == STOP:
            break
        count += 1
    return {"count": count, "ended": time.perf_counter()}


def exchange_many(ring: FrontRing, seconds: float) -> float:
    """One request at a time: the median of the nanoseconds to its response."""
    request, response, clock = np.zeros(1, REQUEST), np.zeros(1, RESPONSE), time.perf_counter_ns
    exchange, samples, now = ring.exchange, [], clock()
    deadline = now + int(seconds * 1e9)
    while now < deadline:
        before = clock()
        exchange(request, response, spin_ns=SPIN_NS)
        now = clock()
        samples.append(now - before)
    request["bytes"] = STOP
    exchange(request, response, spin_ns=SPIN_NS)
    return median(samples)


def answer(ring: BackRing) -> dict[str, float]:
    request, response = np.zeros(1, REQUEST), np.zeros(1, RESPONSE)
    first = memoryview(request).cast("B")
    while first[0] != STOP:
        while not ring.take(request, spin_ns=SPIN_NS):
            pass
        ring.push(response)
    return {}


def main() -> None:
    mode, cpus, seconds = sys.argv[1], list(map(int, sys.argv[2:4])), float(sys.argv[4])
    memory_fd, report = create_object("memfd", PAGES * PAGE_BYTES), Report()
    fence = "host" if offer_fence("host") else "full"
    with Mapping(memory_fd, PAGES * PAGE_BYTES) as mapping:
        with FrontRing.create(mapping, REQUEST, RESPONSE, fence=fence, wait="spin") as ring:

            def back() -> None:
                os.sched_setaffinity(0, {cpus[1]})
                offer_fence(fence)
                with Mapping(memory_fd, PAGES * PAGE_BYTES) as mine:
                    with BackRing.attach(mine, REQUEST, RESPONSE, fence=fence, wait="spin") as ring:
                        report.write({})
                        report.write(iterate(ring) if mode == "oneway" else answer(ring))

            pid = in_child(back)
            os.sched_setaffinity(0, {cpus[0]})
            report.only_read()
            report.read()
            if mode == "oneway":
                start = put_many(ring, seconds)
                told = report.read()
                print(told["count"] / (told["ended"] - start))
            else:
                print(exchange_many(ring, seconds))
            wait_for(pid, END_S)  # its CPU time is this run's


if __name__ == "__main__":
    main()
