# SPDX-License-Identifier: MIT
"""The domain's half of a measurement: opens a disk and loads it as it is told, a line of JSON in and one out each.

Arguments: the disk, the CPU to stay on (-1: any), how to wait. First it prints {"bytes": size}; then it takes lines
{"jobs": [a `LoadJob` for each queue]} and answers with what programs that measure print (blk.h), or {"error": text}.
"""

import json
import os
import sys
from dataclasses import replace
from typing import Any

import numpy as np

from paravirt.errors import InvalidRequest, ParavirtError
from paravirt.frontend.domain import Domain
from paravirt.frontend.load import run_load
from paravirt.frontend.vbd import Disk
from paravirt.ring.blkload import LoadJob, LoadResult
from paravirt.ring.waiting import Wait


def main(name: str, cpu: int, wait: Wait) -> None:
    if cpu >= 0:
        os.sched_setaffinity(0, {cpu})
    with Domain.from_environment() as domain, domain.open_disk(name, wait=wait) as disk:
        print(json.dumps({"bytes": disk.size_bytes}), flush=True)
        loads = Loads(disk)
        for line in sys.stdin:
            try:
                told = loads.measure([LoadJob(**job) for job in json.loads(line)["jobs"]])
            except ParavirtError as error:
                told = {"error": str(error)}
            print(json.dumps(told), flush=True)


class Loads:
    """Loads on one disk, and the generations of blocks that were written by those that are verified."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._generations: dict[tuple[int, int, int, int], np.ndarray] = {}

    def measure(self, jobs: list[LoadJob]) -> dict[str, Any]:
        """Run a load, and count what the ring says of it."""
        if len(jobs) != 1:
            raise InvalidRequest(f"{len(jobs)} loads for one queue")
        generations = self._written(jobs[0]) if jobs[0].verify else None
        before = _counted(self._disk)
        result = run_load(self._disk, jobs[0], generations=generations)
        notified, sleeps = (after - earlier for after, earlier in zip(_counted(self._disk), before, strict=True))
        return {**describe(result), "notified": notified, "sleeps": sleeps}

    def _written(self, job: LoadJob) -> np.ndarray:
        """The generations of the job's blocks, which have all been written once."""
        key = (job.start, job.n_blocks, job.block_bytes, job.seed)
        known = self._generations.get(key)
        if known is None:
            self._generations.clear()  # blocks of another size are written over
            known = self._generations[key] = np.zeros(job.n_blocks, np.uint32)
            run_load(self._disk, replace(job, rw="write", seconds=0.0, requests=job.n_blocks), generations=known)
        return known


def describe(result: LoadResult) -> dict[str, Any]:
    """As blk.h prints it, and what only a load of this project knows."""
    latency = result.latency
    return {
        "seconds": result.seconds,
        "reads": result.reads,
        "writes": result.writes,
        "errors": result.errors,
        "front_cpu_s": result.cpu_s,
        "back_cpu_s": None,
        "sum_ns": latency.mean_ns * latency.n,
        "buckets": latency.buckets,
        "verified": result.verified,
        "unknown": result.unknown,
        "wrong": result.wrong,
        "first_wrong": result.first_wrong,
    }


def _counted(disk: Disk) -> tuple[int, int]:
    """(Notifications sent and received, sleeps) so far."""
    ring = disk.statistics().ring
    if ring is None:
        return 0, 0
    return ring.notifications_sent + ring.events, ring.sleeps


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3])  # type: ignore[arg-type]
    except ParavirtError as problem:
        print(json.dumps({"error": str(problem)}), flush=True)
        sys.exit(2)
