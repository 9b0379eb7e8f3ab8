# SPDX-License-Identifier: MIT
"""What is measured of a block device: a `BlockCase`; and one measurement of it: a `BlockSample`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from paravirt.errors import InvalidRequest
from paravirt.ring.blkload import MOST_DEPTH, RWS, LoadJob, Rw
from paravirt.ring.waiting import Wait

MOST_QUEUES: Final = 16


@dataclass(frozen=True, slots=True)
class BlockCase:
    """One measurement's parameters."""

    rw: Rw = "randread"
    block_bytes: int = 4096
    depth: int = 32
    """Requests in flight, in each queue."""
    n_bytes: int = 64 << 20
    """Of the region, from the disk's first byte on."""
    queues: int = 1
    read_percent: float = 50.0
    """Of a mix."""
    wait: Wait = "adaptive"
    """How both ends wait. Peers spin, and where it is "sleep" their clients sleep."""

    def __post_init__(self) -> None:
        """Raises `InvalidRequest` for what cannot be measured."""
        if self.rw not in RWS:
            raise InvalidRequest(f"rw is one of {', '.join(RWS)}, not {self.rw!r}")
        if not 1 <= self.queues <= MOST_QUEUES or not 1 <= self.depth <= MOST_DEPTH:
            raise InvalidRequest(
                f"1 to {MOST_QUEUES} queues have 1 to {MOST_DEPTH} requests in flight each, "
                f"not {self.queues} with {self.depth}"
            )
        if self.block_bytes < 1:
            raise InvalidRequest(f"a request moves some bytes, not {self.block_bytes}")
        if self.wait not in ("adaptive", "spin", "sleep"):
            raise InvalidRequest(f"a wait is adaptive, spin or sleep, not {self.wait!r}")
        self.job(1.0)

    @property
    def writes(self) -> bool:
        """Something is written."""
        return self.rw not in ("read", "randread")

    @property
    def queue_bytes(self) -> int:
        """Of the region that one queue has for itself: whole blocks."""
        return self.n_bytes // self.queues // self.block_bytes * self.block_bytes

    def job(self, seconds: float, *, queue: int = 0, verify: bool = False, seed: int = 1) -> LoadJob:
        """The load of one queue."""
        return LoadJob(
            rw=self.rw,
            block_bytes=self.block_bytes,
            depth=self.depth,
            start=queue * self.queue_bytes,
            n_bytes=self.queue_bytes,
            seconds=seconds,
            read_percent=self.read_percent,
            verify=verify,
            seed=seed + queue,
        )

    def arguments(self, target: str, cpus: tuple[int, int], seconds: float) -> list[str]:
        """The command line of a measuring program (blk.h) behind its name."""
        words = ("rand" if self.rw.startswith("rand") else "seq", self.job(seconds).read_per_mille, self.block_bytes)
        more = (self.depth, self.n_bytes, seconds, *cpus, "sleep" if self.wait == "sleep" else "spin")
        return [target, *map(str, words), *map(str, more)]


@dataclass(frozen=True, slots=True)
class BlockSample:
    """One measurement."""

    iops: float
    mb_per_s: float
    """10**6 bytes."""
    mean_ns: float
    """Of a request, from when it is sent until its answer is seen, as all times."""
    p50_ns: float
    p90_ns: float
    p99_ns: float
    p999_ns: float
    front_cpu_us: float
    """User and system time for each request, µs; so it is CPU seconds a million requests, too."""
    back_cpu_us: float | None
    """The same of the backend's process, or of the server; None where that is not in sight."""
    notified: float | None = None
    """Notifications for each request, that either end sent to the other; counted of this project's own disks."""
    sleeps: float | None = None
    """Times for each request that the frontend slept."""
    buckets: tuple[tuple[int, int], ...] = ()
    """(least time in ns, requests)."""

    @property
    def cpu_us(self) -> float | None:
        """Of both sides, for each request."""
        return None if self.back_cpu_us is None else self.front_cpu_us + self.back_cpu_us


def percentile_ns(buckets: Iterable[tuple[int, int]], share: float) -> float:
    """The time that a share (0 to 1) of all requests do not exceed, to 3 %: the middle of its bucket."""
    counted = sorted(buckets)
    wanted, seen, ns = share * sum(n for _, n in counted), 0, 0
    for ns, n in counted:  # noqa: B007
        seen += n
        if seen >= wanted:
            break
    return ns * (1 + 1 / 64) if ns >= 64 else float(ns)


def merge(samples: Iterable[BlockSample]) -> tuple[tuple[int, int], ...]:
    """The buckets of all samples together."""
    counts: dict[int, int] = {}
    for sample in samples:
        for ns, n in sample.buckets:
            counts[ns] = counts.get(ns, 0) + n
    return tuple(sorted(counts.items()))


def sample_of(
    told: dict[str, Any],
    block_bytes: int,
    back_cpu_s: float | None,
    notified: int | None = None,
    sleeps: int | None = None,
) -> BlockSample:
    """What a measuring program prints, as a sample; `back_cpu_s` counts where it does not know that itself."""
    buckets = tuple((int(ns), int(n)) for ns, n in told["buckets"])
    done, seconds = told["reads"] + told["writes"], told["seconds"]
    each = max(1, done)
    back = told["back_cpu_s"] if told["back_cpu_s"] is not None else back_cpu_s
    return BlockSample(
        iops=done / seconds if seconds else 0.0,
        mb_per_s=done * block_bytes / seconds / 1e6 if seconds else 0.0,
        mean_ns=told["sum_ns"] / each,
        p50_ns=percentile_ns(buckets, 0.5),
        p90_ns=percentile_ns(buckets, 0.9),
        p99_ns=percentile_ns(buckets, 0.99),
        p999_ns=percentile_ns(buckets, 0.999),
        front_cpu_us=told["front_cpu_s"] / each * 1e6,
        back_cpu_us=None if back is None else back / each * 1e6,
        notified=None if notified is None else notified / each,
        sleeps=None if sleeps is None else sleeps / each,
        buckets=buckets,
    )
