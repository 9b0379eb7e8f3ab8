# SPDX-License-Identifier: MIT
"""A disk that keeps nothing: reads are zeroes, writes vanish. Measures the path without the storage."""

from collections.abc import Sequence
from typing import Self

from paravirt.backend.disks.base import ZEROES, Disk, parse_size
from paravirt.backend.disks.spec import Opening


class NullDisk(Disk):
    """`null:SIZE`."""

    can_discard = True

    def __init__(self, spec: str, read_only: bool, *, sector_size: int = 512) -> None:
        self.size_bytes = parse_size(spec, "size of a null disk", sector_size)
        self.sector_size = sector_size
        self.read_only = read_only

    @classmethod
    def open(cls, opening: Opening) -> Self:
        sector_size = opening.options.sector_size() or 512
        opening.options.end()
        return cls(opening.argument, opening.read_only, sector_size=sector_size)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        for buffer in buffers:
            for start in range(0, len(buffer), len(ZEROES)):
                piece = buffer[start : start + len(ZEROES)]
                piece[:] = ZEROES[: len(piece)]

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Gone."""

    def flush(self) -> None:
        """Nothing to keep."""

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        """Gone already, securely."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """They are there."""
