# SPDX-License-Identifier: MIT
"""A disk in the backend's own memory: zeroes at first, gone with the backend."""

import errno
import mmap
from collections.abc import Sequence
from typing import Self

from paravirt.backend.disks.base import Disk, parse_size
from paravirt.backend.disks.spec import Opening
from paravirt.errors import ResourceLimit


class MemoryDisk(Disk):
    """`memory:SIZE`. What is discarded gives its memory back and reads as zeroes."""

    served_as = "memory"
    can_discard = True
    many_threads = True
    discard_granularity_bytes = mmap.PAGESIZE

    def __init__(self, spec: str, read_only: bool, *, sector_size: int = 512) -> None:
        self.size_bytes = parse_size(spec, "size of a memory disk", sector_size)
        self.sector_size = sector_size
        self.read_only = read_only
        try:
            self._mmap = mmap.mmap(-1, self.size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise ResourceLimit(f"no memory for a disk of {self.size_bytes} bytes") from error
        self.memory = memoryview(self._mmap)

    @classmethod
    def open(cls, opening: Opening) -> Self:
        sector_size = opening.options.sector_size() or 512
        opening.options.end()
        return cls(opening.argument, opening.read_only, sector_size=sector_size)

    def _bytes(self) -> memoryview:
        if self.memory is None:
            raise OSError(errno.EBADF, "the memory disk is closed")
        return self.memory

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        memory = self._bytes()
        for buffer in buffers:
            buffer[:] = memory[offset : offset + len(buffer)]
            offset += len(buffer)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        memory = self._bytes()
        for buffer in buffers:
            memory[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        """Nothing is more stable than this."""

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        if secure:
            super().discard(offset, length, secure)
        self.write_zeroes(offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """Whole pages are given back to the system, which makes zeroes of them; the rest is written."""
        self._bytes()
        end = offset + length
        first, last = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= last:
            super().write_zeroes(offset, length)
            return
        self._mmap.madvise(mmap.MADV_DONTNEED, first, last - first)
        super().write_zeroes(offset, first - offset)
        super().write_zeroes(last, end - last)

    def close(self) -> None:
        if self.memory is not None:
            self.memory.release()
            self.memory = None
            self._mmap.close()
