# SPDX-License-Identifier: MIT
"""A load on a block device, in C: so many requests in flight, each measured, and what is read checked on request."""

import errno
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np

from paravirt.errors import InvalidRequest, PeerError, TimedOut
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkfront import Slots, slots_of
from paravirt.ring.shared import FrontRing

CData = Any

SECTOR_BYTES: Final = 512
MOST_DEPTH: Final = 4096
SLICE_NS: Final = 20_000_000
PERCENTILES: Final = (50.0, 90.0, 95.0, 99.0, 99.9, 99.99)

Rw = Literal["read", "write", "rw", "randread", "randwrite", "randrw"]
"""fio's words: one block after the other, or at random; "rw": reads and writes mixed."""
RWS: Final[tuple[Rw, ...]] = get_args(Rw)


@dataclass(frozen=True, slots=True)
class LoadJob:
    """What a load does. Of `seconds` and `requests` at least one; whichever comes first ends it."""

    rw: Rw = "randread"
    block_bytes: int = 4096
    """Of a request: whole sectors."""
    depth: int = 32
    """Requests in flight."""
    start: int = 0
    """First byte of the region, a whole sector."""
    n_bytes: int = 1 << 20
    """Of the region; what is no whole block at its end is not used."""
    seconds: float = 0.0
    requests: int = 0
    read_percent: float = 50.0
    """Of a mix."""
    refill: int = 1
    """Requests that are sent together at least, while others are in flight."""
    verify: bool = False
    """Write patterns of place and generation, and check all that is read of them."""
    seed: int = 1
    """Of the places and the patterns."""
    timeout_s: float = 10.0
    """Without an answer."""

    def __post_init__(self) -> None:
        """Raises `InvalidRequest`."""
        if self.rw not in RWS:
            raise InvalidRequest(f"rw is one of {', '.join(RWS)}, not {self.rw!r}")
        for name, value in (("a block", self.block_bytes), ("the start", self.start)):
            if value < 0 or value % SECTOR_BYTES:
                raise InvalidRequest(f"{name} is {value} bytes, no multiple of {SECTOR_BYTES}")
        if not 1 <= self.refill <= self.depth <= MOST_DEPTH:
            raise InvalidRequest(f"{self.refill} requests at once and {self.depth} in flight (1 to {MOST_DEPTH})")
        if not self.block_bytes or self.n_blocks < 1:
            raise InvalidRequest(f"a region of {self.n_bytes} bytes has no block of {self.block_bytes}")
        if self.verify and self.n_blocks < self.depth:
            raise InvalidRequest(f"{self.n_blocks} blocks are too few to verify {self.depth} in flight")
        if self.seconds < 0 or self.requests < 0 or not (self.seconds or self.requests):
            raise InvalidRequest("a load ends after some seconds or after some requests")
        if not 0 <= self.read_percent <= 100 or not 0 < self.seed < 1 << 63 or self.timeout_s <= 0:
            raise InvalidRequest(f"no load is like this: {self!r}")

    @property
    def n_blocks(self) -> int:
        return self.n_bytes // self.block_bytes

    @property
    def read_per_mille(self) -> int:
        """Reads among 1000 requests."""
        return {"read": 1000, "write": 0}.get(self.rw.removeprefix("rand"), round(self.read_percent * 10))


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of requests, ns, each kept to 3 %."""

    n: int
    mean_ns: float
    least_ns: int
    most_ns: int
    percentiles_ns: dict[float, int]
    """Of `PERCENTILES`."""
    buckets: tuple[tuple[int, int], ...]
    """(least time in ns, requests), of those with any."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What came of a load."""

    seconds: float
    """From the first request to the last answer."""
    reads: int
    """Answered well."""
    writes: int
    errors: int
    batches: int
    """Times that requests were sent."""
    cpu_s: float
    """CPU time of the thread that made the load, in C."""
    read_latency: Latency
    write_latency: Latency
    latency: Latency
    """Of both."""
    verified: int
    """Blocks that were read and were as they had been written."""
    unknown: int
    """Blocks that were read and had not been written by this load."""
    wrong: int
    """Sectors that were not as they had been written."""
    first_wrong: str
    """What the first of these was."""

    @property
    def iops(self) -> float:
        return (self.reads + self.writes) / self.seconds if self.seconds > 0 else 0.0


class Histogram:
    """`struct pv_histogram`."""

    def __init__(self) -> None:
        self.core: CData = ffi.new("struct pv_histogram *")

    def add(self, ns: int) -> None:
        lib.pv_histogram_add(self.core, ns)

    def merge(self, other: "Histogram") -> None:
        """Everything of `other`, too."""
        lib.pv_histogram_merge(self.core, other.core)

    def latency(self) -> Latency:
        core = self.core
        counts = np.frombuffer(ffi.buffer(core.buckets), np.uint64)
        return Latency(
            n=core.n,
            mean_ns=core.sum_ns / core.n if core.n else 0.0,
            least_ns=core.least_ns,
            most_ns=core.most_ns,
            percentiles_ns={
                share: lib.pv_histogram_percentile_ns(core, round(share * 10_000)) for share in PERCENTILES
            },
            buckets=tuple((lib.pv_histogram_bucket_ns(int(i)), int(counts[i])) for i in np.flatnonzero(counts)),
        )


class Load:
    """One run of a load. While it runs, frontend and ring are its own."""

    def __init__(
        self,
        slots: Slots,
        job: LoadJob,
        *,
        spin_ns: int,
        wait_spin_ns: int,
        generations: "np.ndarray | None" = None,
        slice_ns: int = SLICE_NS,
    ) -> None:
        """`spin_ns`, `wait_spin_ns`: of `take` and `wait` of the ring. `generations`: of another load of the same
        blocks and seed, which goes on with what that one has written. `slice_ns`: how long a `run` takes. Raises
        `InvalidRequest`.
        """
        front = slots.core
        if slots_of(job.block_bytes) > front.n_slots:
            raise InvalidRequest(f"the ring has no room for a request of {job.block_bytes} bytes")
        self.generations = (
            np.zeros(job.n_blocks if job.verify else 0, np.uint32) if generations is None else generations
        )
        if job.verify and (self.generations.dtype != np.uint32 or self.generations.shape != (job.n_blocks,)):
            raise InvalidRequest(f"generations of {self.generations.shape} blocks for {job.n_blocks}")
        self._slots, self._read, self._write = slots, Histogram(), Histogram()
        depth = job.depth
        n_bytes = job.block_bytes * (depth if job.verify else 1)
        self._kept = {
            "asks": ffi.new("struct pv_blkfront_ask[]", depth),
            "in_asks": ffi.new("struct pv_blkload_slot[]", depth),
            "chosen": ffi.new("uint32_t[]", depth),
            "responses": ffi.new("struct pv_blkif_response[]", depth),
            "answers": ffi.new("struct pv_blkfront_answer[]", depth),
            "in_slots": ffi.new("struct pv_blkload_slot[]", front.n_slots),
            "data": ffi.new("uint8_t[]", n_bytes),
            "read": ffi.new("uint8_t[]", job.block_bytes),
            "generations": ffi.from_buffer("uint32_t[]", self.generations),
            "read_latency": self._read.core,
            "write_latency": self._write.core,
        }
        self.core: CData = ffi.new("struct pv_blkload *", self._kept)
        core = self.core
        core.start, core.n_blocks, core.block_bytes = job.start, job.n_blocks, job.block_bytes
        core.depth, core.refill, core.read_per_mille = depth, job.refill, job.read_per_mille
        core.is_random, core.verify, core.seed = job.rw.startswith("rand"), job.verify, job.seed
        core.max_requests, core.length_ns = job.requests, round(job.seconds * 1e9)
        core.spin_ns, core.wait_spin_ns, core.timeout_ns = spin_ns, wait_spin_ns, round(job.timeout_s * 1e9)
        core.slice_ns = slice_ns
        status = lib.pv_blkload_begin(core, front)
        if status:
            raise InvalidRequest(f"no disk can be loaded like this: {job!r}")

    def run(self, ring: FrontRing) -> bool:
        """For a while; whether it is done: all is answered. Otherwise requests are in flight, for the next `run`, on
        this ring or on another one where they were sent again.

        Raises `PeerError`, also when the backend keeps the pages of answered requests; `Closed`; `TimedOut`.
        """
        result = lib.pv_blkload_run(self.core, self._slots.core, ring.core)
        if result == lib.PV_BLKLOAD_WRONG:
            raise self._slots.wrong()
        if result == -errno.ETIMEDOUT:
            raise TimedOut("the backend did not answer in time")
        if result == -errno.EBUSY:
            raise PeerError("the backend keeps the pages of answered requests")
        if result < 0 or result >> 32:
            ring.settle_push(result)
        return bool(result == lib.PV_BLKLOAD_DONE)

    @property
    def share(self) -> float:
        """How much of it is done: 0 to 1."""
        core = self.core
        of_time = (core.answered_ns - core.start_ns) / core.length_ns if core.length_ns else 0.0
        of_requests = (core.issued - core.in_flight) / core.max_requests if core.max_requests else 0.0
        return min(1.0, max(0.0, of_time, of_requests))

    def result(self) -> LoadResult:
        core, both = self.core, Histogram()
        both.merge(self._read)
        both.merge(self._write)
        return LoadResult(
            seconds=max(0, core.answered_ns - core.start_ns) / 1e9,
            reads=core.reads,
            writes=core.writes,
            errors=core.errors,
            batches=core.batches,
            cpu_s=core.cpu_ns / 1e9,
            read_latency=self._read.latency(),
            write_latency=self._write.latency(),
            latency=both.latency(),
            verified=core.verified,
            unknown=core.unknown,
            wrong=core.wrong,
            first_wrong=_say(core.first_wrong) if core.wrong else "",
        )


def _say(wrong: CData) -> str:
    """A `struct pv_pattern_mismatch`."""
    found = f"generation {wrong.found_generation} of byte {wrong.found_offset}"
    return f"byte {wrong.offset}: {found} instead of generation {wrong.generation}"
