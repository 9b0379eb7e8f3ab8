# SPDX-License-Identifier: MIT
"""A disk in the backend's own memory: zeroes at first, gone with the backend."""

import mmap
from collections.abc import Sequence

from paravirt.backend.disks.base import parse_size
from paravirt.errors import ResourceLimit


class MemoryDisk:
    """`memory:SIZE`."""

    sector_size = 512
    fd: int | None = None

    def __init__(self, spec: str, read_only: bool) -> None:
        self.size_bytes = parse_size(spec, "size of a memory disk")
        self.read_only = read_only
        try:
            self._mmap = mmap.mmap(-1, self.size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise ResourceLimit(f"no memory for a disk of {self.size_bytes} bytes") from error
        self.memory: memoryview | None = memoryview(self._mmap)

    def _bytes(self) -> memoryview:
        if self.memory is None:
            raise OSError("the memory disk is closed")
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

    def close(self) -> None:
        if self.memory is not None:
            self.memory.release()
            self.memory = None
            self._mmap.close()
