# SPDX-License-Identifier: MIT
"""A disk that keeps nothing: writes vanish. Measures the path without the storage."""

from collections.abc import Sequence
from typing import Self

from paravirt.backend.disks.base import ZEROES, Disk, parse_size
from paravirt.backend.disks.spec import Opening
from paravirt.ring.vbd_engine import DiskKind


class NullDisk(Disk):
    """`null:SIZE`. Reads leave the buffers as they are; with `read_zeroes` they are zeroes."""

    served_as: DiskKind | None = "null"
    can_discard = True
    many_threads = True

    def __init__(self, spec: str, read_only: bool, *, sector_size: int = 512, read_zeroes: bool = False) -> None:
        self.size_bytes = parse_size(spec, "size of a null disk", sector_size)
        self.sector_size = sector_size
        self.read_only = read_only
        self._read_zeroes = read_zeroes
        if read_zeroes:
            self.served_as = "zero"

    @classmethod
    def open(cls, opening: Opening) -> Self:
        sector_size = opening.options.sector_size() or 512
        read_zeroes = opening.options.flag("read-zeroes")
        opening.options.end()
        return cls(opening.argument, opening.read_only, sector_size=sector_size, read_zeroes=read_zeroes)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        for buffer in buffers if self._read_zeroes else ():
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
