# SPDX-License-Identifier: MIT
"""The machine that is measured on: what it is, how far apart its CPUs are, who else uses it."""

import os
import platform
import resource
import subprocess
import time
from pathlib import Path
from typing import Final, Literal

from paravirt.testing.bench.programs import PEERS, NotHere, Programs

Distance = Literal["same core", "near", "far", "disturbed"]
DISTANCES_NS: Final[tuple[tuple[float, Distance], ...]] = ((65, "same core"), (135, "near"), (340, "far"))
TAG_SECONDS: Final = 0.005


def two_cpus() -> tuple[int, int]:
    """Two CPUs of this process, to pin an end to each. Raises `NotHere` when there is only one."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise NotHere("two CPUs are needed")
    return cpus[0], cpus[1]


def distance_of(cache_line_ns: float) -> Distance:
    """How far apart two CPUs are that hand a cache line to and fro in that time."""
    return next((name for limit_ns, name in DISTANCES_NS if cache_line_ns < limit_ns), "disturbed")


def cache_line_ns(programs: Programs, cpus: tuple[int, int]) -> float:
    """The round trip of a cache line between two CPUs, now. Raises `NotHere` without a C compiler."""
    command = [str(programs.compile("cacheline", [PEERS / "cacheline.c"])), *map(str, cpus), str(TAG_SECONDS)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


class OutsideLoad:
    """CPU time used by others between start and `share`, from /proc/stat and this run's own CPU time."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]  # all but idle and iowait; steal is somebody else's
        own = sum(
            usage.ru_utime + usage.ru_stime
            for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        )
        return busy / os.sysconf("SC_CLK_TCK"), own, time.monotonic()

    def share(self, running_cpu_s: float = 0.0) -> float:
        """Of one CPU. `running_cpu_s`: CPU time of own processes that have not ended yet."""
        busy, own, now = (after - before for before, after in zip(self._start, self._now(), strict=True))
        return max(0.0, busy - own - running_cpu_s) / now


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pin(pid: int, cpu: int) -> None:
    """Keep all threads of a process on one CPU, also those it starts later."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpu})


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    words = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    model = next((value.strip() for key, _, value in words if key.strip() in ("model name", "Processor")), "unknown")
    return {
        "cpu": model,
        "cpus": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": " ".join(Path("/proc/loadavg").read_text().split()[:3]),
    }
