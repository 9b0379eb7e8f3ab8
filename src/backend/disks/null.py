# SPDX-License-Identifier: MIT
"""A disk that keeps nothing: reads are zeroes, writes vanish. Measures the path without the storage."""

from collections.abc import Sequence

from paravirt.backend.disks.base import parse_size

ZEROES = bytes(1 << 16)


class NullDisk:
    """`null:SIZE`."""

    sector_size = 512
    fd: int | None = None
    memory: memoryview | None = None

    def __init__(self, spec: str, read_only: bool) -> None:
        self.size_bytes = parse_size(spec, "size of a null disk")
        self.read_only = read_only

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        for buffer in buffers:
            buffer[:] = ZEROES[: len(buffer)]

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Gone."""

    def flush(self) -> None:
        """Nothing to keep."""

    def close(self) -> None:
        """Nothing to free."""
