# SPDX-License-Identifier: MIT
"""The guest of the demonstration: a program that runs inside a domain and sees nothing of the host but its disk.

It prints one JSON object a line: `{"connected": [domid, disk, bytes, uid, pid]}`, `{"progress": [label, share]}`,
`{"read": sha256}`, `{"superblock": {...}}`, `{"wrote": [[offset, sha256], ...]}`, `{"begin": depth}`, `{"result":
{...}}`.
"""

import hashlib
import json
import os
import random
import sys
from dataclasses import asdict
from typing import Any

import click

from paravirt.errors import ParavirtError, PeerGone
from paravirt.frontend.domain import Domain
from paravirt.frontend.load import run_load
from paravirt.frontend.vbd import Disk
from paravirt.ring.blkload import LoadJob
from paravirt.ring.shared import RingStatistics
from paravirt.testing.ext4 import Superblock, parse_superblock

READ_BYTES = 44 * 1024
BLOCK_BYTES = 4096


def tell(**what: Any) -> None:
    """One line to whoever started us."""
    print(json.dumps(what), flush=True)


def read_whole(disk: Disk) -> str:
    """The SHA-256 of the whole disk, read through the ring, with progress."""
    digest = hashlib.sha256()
    size, calls = disk.size_bytes, 16
    for start in range(0, size, READ_BYTES * calls):
        offsets = list(range(start, min(start + READ_BYTES * calls, size), READ_BYTES))
        whole = [offset for offset in offsets if offset + READ_BYTES <= size]
        for data in disk.read_many(whole, READ_BYTES):
            digest.update(data)
        for offset in offsets[len(whole) :]:
            digest.update(disk.pread(size - offset, offset))
        tell(progress=["reading the whole disk", min(1.0, (start + READ_BYTES * calls) / size)])
    return digest.hexdigest()


def write_blocks(disk: Disk, count: int, first_byte: int) -> list[list[Any]]:
    """Write random blocks from `first_byte` on, flush; where, and the SHA-256 of each."""
    chance = random.Random(os.urandom(16))
    first = -(-first_byte // BLOCK_BYTES)
    places = chance.sample(range(first, disk.size_bytes // BLOCK_BYTES), count)
    writes = [(place * BLOCK_BYTES, os.urandom(BLOCK_BYTES)) for place in places]
    disk.write_many(writes)
    disk.flush()
    return [[offset, hashlib.sha256(data).hexdigest()] for offset, data in writes]


def measure(disk: Disk, depths: list[int], seconds: float, n_bytes: int, write: bool) -> None:
    for depth in depths:
        label = f"random {n_bytes // 1024} KiB {'writes' if write else 'reads'}, {depth} in flight"
        tell(begin=depth)
        job = LoadJob(
            rw="randwrite" if write else "randread",
            block_bytes=n_bytes,
            depth=depth,
            n_bytes=disk.size_bytes,
            seconds=seconds,
        )
        before = ring_of(disk)
        done = run_load(disk, job, progress=lambda share, label=label: tell(progress=[label, share]))  # type: ignore[misc]
        after, share = ring_of(disk), done.latency.percentiles_ns
        tell(
            result={
                "depth": depth,
                "n_bytes": n_bytes,
                "seconds": done.seconds,
                "iops": done.iops,
                "mb_per_s": done.iops * n_bytes / 1e6,
                "p50_us": share[50.0] / 1e3,
                "p99_us": share[99.0] / 1e3,
                "notifications": after.notifications_sent - before.notifications_sent,
                "suppressed": after.notifications_suppressed - before.notifications_suppressed,
                "cpu_s": done.cpu_s,
            }
        )


def ring_of(disk: Disk) -> RingStatistics:
    """What has been counted at the ring, which is there as long as the host's backend lives."""
    ring = disk.statistics().ring
    if ring is None:
        raise PeerGone("the backend has gone")
    return ring


@click.command()
@click.option("--disk", "name", default="xvda", show_default=True)
@click.option("--verify", is_flag=True, help="Read all of the disk, tell its SHA-256 and what file system is on it.")
@click.option("--write", "blocks", default=0, help="Write that many random blocks behind the file system.")
@click.option("--depth", "depths", multiple=True, type=int, help="Measure with so many requests in flight.")
@click.option("--seconds", default=2.0, show_default=True, help="For each measurement.")
@click.option("--bytes", "n_bytes", default=4096, show_default=True, help="Of a measured request.")
@click.option("--writes", is_flag=True, help="Measure writes.")
@click.option("--spin-us", default=30.0, show_default=True, help="How long to watch the ring before sleeping.")
def main(
    name: str,
    verify: bool,
    blocks: int,
    depths: tuple[int, ...],
    seconds: float,
    n_bytes: int,
    writes: bool,
    spin_us: float,
) -> None:
    """Find the disk in xenstore, connect, and do what is asked."""
    with Domain.from_environment() as domain, domain.open_disk(name, spin_ns=int(spin_us * 1000)) as disk:
        tell(connected=[domain.domid, name, disk.size_bytes, os.getuid(), os.getpid()])
        superblock: Superblock | None = None
        if verify:
            tell(read=read_whole(disk))
            superblock = parse_superblock(disk.pread(4096, 0))
            tell(superblock=superblock and {**asdict(superblock), "size_bytes": superblock.size_bytes})
        if blocks:
            tell(wrote=write_blocks(disk, blocks, superblock.size_bytes if superblock else 0))
        measure(disk, list(depths), seconds, n_bytes, writes)
        tell(done=True)


if __name__ == "__main__":
    try:
        main(standalone_mode=False)
    except ParavirtError as error:
        print(f"guest: {error}", file=sys.stderr)
        sys.exit(2)
