# SPDX-License-Identifier: MIT
"""A load on an open disk, made in C on its ring: what `paravirt bench vbd` measures with."""

from collections.abc import Callable

import numpy as np

from paravirt.errors import InvalidRequest, ReadOnly
from paravirt.frontend.vbd import Disk
from paravirt.ring.blkfront import Slots
from paravirt.ring.blkload import Load, LoadJob, LoadResult
from paravirt.ring.shared import FrontRing


def run_load(
    disk: Disk,
    job: LoadJob,
    *,
    generations: "np.ndarray | None" = None,
    progress: Callable[[float], None] | None = None,
) -> LoadResult:
    """Run a load; calls of other threads wait meanwhile. A new backend in the middle of it is only a pause.

    `generations`: an array of `job.n_blocks` numbers of 32 bits, zeroes at first, with which another load of the same
    blocks and seed checks what this one wrote. `progress` is called now and then with the share that is done.

    Raises `InvalidRequest` for a region beyond the disk's end and for requests that the ring has no room for;
    `ReadOnly`; `TimedOut`, `PeerError`, `PeerGone`, `Closed`.
    """
    if job.start + job.n_blocks * job.block_bytes > disk.size_bytes:
        raise InvalidRequest(f"{job.n_bytes} bytes from {job.start} are not on a disk of {disk.size_bytes}")
    if job.block_bytes % disk.sector_size or job.start % disk.sector_size:
        raise InvalidRequest(f"blocks of {job.block_bytes} bytes from {job.start} are no sectors of {disk.sector_size}")
    if job.block_bytes > disk.max_request_bytes:
        raise InvalidRequest(f"the backend takes {disk.max_request_bytes} bytes a request, not {job.block_bytes}")
    if job.read_per_mille < 1000 and disk.read_only:
        raise ReadOnly(f"disk {disk.name} is read-only")
    started: list[Load] = []

    def run(slots: Slots, ring: FrontRing, spin_ns: int) -> bool:
        if not started:
            started.append(Load(slots, job, spin_ns=spin_ns, wait_spin_ns=ring.wait_spin_ns, generations=generations))
        done = started[0].run(ring)
        if progress is not None:
            progress(1.0 if done else started[0].share)
        return done

    disk.queue.alone(run)
    return started[0].result()
