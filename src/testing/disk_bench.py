# SPDX-License-Identifier: MIT
"""How fast a domain's disk is, measured from inside the domain."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from paravirt.errors import InvalidRequest
from paravirt.frontend.vbd import Disk

Progress = Callable[[float], None]  # gets the share done, 0.0 to 1.0

PROGRESS_S = 0.1


@dataclass(frozen=True, slots=True)
class DiskResult:
    """One measurement. Latencies are those of a whole call: of `depth` requests in flight together."""

    depth: int
    n_bytes: int  # of a request
    requests: int
    seconds: float
    iops: float
    mb_per_s: float  # 10**6 bytes
    p50_us: float
    p99_us: float
    notifications: int  # sent by the frontend: the backend was not looking
    suppressed: int  # saved, because it was
    sleeps: int  # of the frontend
    cpu_s: float  # of this process


def measure_disk(
    disk: Disk,
    *,
    depth: int,
    seconds: float,
    n_bytes: int = 4096,
    write: bool = False,
    seed: int = 1,
    progress: Progress | None = None,
) -> DiskResult:
    """Random reads (or writes) of `n_bytes`, `depth` in flight together, for about `seconds`."""
    places = disk.size_bytes // n_bytes
    if depth < 1 or places < 1:
        raise InvalidRequest(f"cannot keep {depth} requests of {n_bytes} bytes in flight on {disk.size_bytes} bytes")
    call = _call(disk, depth, n_bytes, write, random.Random(seed), places)
    for _ in range(20):
        call()
    before, cpu = disk.statistics(), time.process_time()
    latencies: list[int] = []
    start = now = time.perf_counter_ns()
    end, next_progress = start + int(seconds * 1e9), start
    while now < end:
        call()
        after_call = time.perf_counter_ns()
        latencies.append(after_call - now)
        now = after_call
        if progress is not None and now >= next_progress:
            next_progress = now + int(PROGRESS_S * 1e9)
            progress(min(1.0, (now - start) / (end - start)))
            now = time.perf_counter_ns()
    elapsed, after, cpu = (now - start) / 1e9, disk.statistics(), time.process_time() - cpu
    latencies.sort()
    requests = len(latencies) * depth
    assert before.ring is not None
    assert after.ring is not None
    return DiskResult(
        depth=depth,
        n_bytes=n_bytes,
        requests=requests,
        seconds=elapsed,
        iops=requests / elapsed,
        mb_per_s=requests * n_bytes / elapsed / 1e6,
        p50_us=latencies[len(latencies) // 2] / 1e3,
        p99_us=latencies[len(latencies) * 99 // 100] / 1e3,
        notifications=after.ring.notifications_sent - before.ring.notifications_sent,
        suppressed=after.ring.notifications_suppressed - before.ring.notifications_suppressed,
        sleeps=after.ring.sleeps - before.ring.sleeps,
        cpu_s=cpu,
    )


def _call(
    disk: Disk, depth: int, n_bytes: int, write: bool, chance: random.Random, places: int
) -> Callable[[], object]:
    """One round of requests at random places."""
    data = os.urandom(n_bytes)
    offsets = [chance.randrange(places) * n_bytes for _ in range(65536)]
    position = 0

    def next_offsets() -> list[int]:
        nonlocal position
        if position + depth > len(offsets):
            position = 0
        chosen = offsets[position : position + depth]
        position += depth
        return chosen

    if write:
        return lambda: disk.write_many((offset, data) for offset in next_offsets())
    if depth == 1:
        return lambda: disk.pread(n_bytes, next_offsets()[0])
    return lambda: disk.read_many(next_offsets(), n_bytes)
