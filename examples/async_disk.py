# SPDX-License-Identifier: MIT
"""A small key-value store on a block device, for an event loop: `python examples/async_disk.py`.

Each key has a sector by its hash. A thousand writers and readers are tasks; the disk sends what they ask for in one
turn of the loop together. Then the same sectors are read once more, as a batch, into memory that the backend fills.
"""

import asyncio
import zlib

import numpy as np

import paravirt
from paravirt.frontend.vbd import Disk

SECTOR = 512
KEYS = 1000


def place(disk: Disk, key: str) -> int:
    """Where a key's value stands: good enough for an example, whose keys do not collide."""
    return zlib.crc32(key.encode()) % (disk.size_bytes // SECTOR) * SECTOR


async def put(disk: Disk, key: str, value: str) -> None:
    """Done when it is on the disk; durable after the next flush."""
    await disk.aio.pwrite(f"{key}={value}".encode().ljust(SECTOR, b"\0"), place(disk, key))


async def get(disk: Disk, key: str) -> str:
    """Raises `KeyError`."""
    found, _, value = (await disk.aio.pread(SECTOR, place(disk, key))).rstrip(b"\0").decode().partition("=")
    if found != key:
        raise KeyError(key)
    return value


async def use(disk: Disk) -> None:
    keys = [f"key {i}" for i in range(KEYS)]
    await asyncio.gather(*(put(disk, key, key.upper()) for key in keys))
    await disk.aio.flush()
    values = await asyncio.gather(*(get(disk, key) for key in keys))
    assert values == [key.upper() for key in keys]
    with disk.buffers(SECTOR, KEYS) as buffers:
        await disk.aio.read_batch(np.array([place(disk, key) for key in keys]), SECTOR, buffers.array)
        assert all(bytes(row).startswith(key.encode()) for row, key in zip(buffers.array, keys, strict=True))
    counts = disk.statistics()
    assert counts.ring is not None
    print(f"{counts.reads} reads and {counts.writes} writes in {counts.ring.batches} batches,")
    print(f"{counts.direct_bytes} of {counts.read_bytes + counts.written_bytes} bytes were not copied")


def main() -> None:
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "1G", driver="memory")
        with domain.open_disk("xvda", buffer_bytes=1 << 20) as disk:
            asyncio.run(use(disk))


if __name__ == "__main__":
    main()
