# SPDX-License-Identifier: MIT
"""Just enough of ext4 to say what is on a disk: its superblock.

Source: Documentation/filesystems/ext4/super.rst of Linux.
"""

import struct
from dataclasses import dataclass

SUPERBLOCK_OFFSET = 1024
SUPERBLOCK_BYTES = 1024
MAGIC = 0xEF53
INCOMPAT_64BIT = 0x80


@dataclass(frozen=True, slots=True)
class Superblock:
    volume_name: str
    block_bytes: int
    blocks: int
    free_blocks: int
    inodes: int

    @property
    def size_bytes(self) -> int:
        """Of the file system; the disk may be larger."""
        return self.block_bytes * self.blocks


def parse_superblock(disk_start: bytes) -> Superblock | None:
    """The superblock in the first 2048 bytes of a disk; None when there is no ext file system."""
    raw = disk_start[SUPERBLOCK_OFFSET : SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES]
    if len(raw) < SUPERBLOCK_BYTES or struct.unpack_from("<H", raw, 0x38)[0] != MAGIC:
        return None
    inodes, blocks, _, free, _, _, log_block = struct.unpack_from("<7I", raw, 0)
    if log_block > 6:
        return None
    if struct.unpack_from("<I", raw, 0x60)[0] & INCOMPAT_64BIT:
        high_blocks, _, high_free = struct.unpack_from("<3I", raw, 0x150)
        blocks |= high_blocks << 32
        free |= high_free << 32
    name = raw[0x78:0x88].split(b"\0")[0].decode("utf-8", "replace")
    return Superblock(name, 1024 << log_block, blocks, free, inodes)
