# SPDX-License-Identifier: MIT
"""Reads on ahead where somebody reads one piece after the other."""

from collections.abc import Sequence
from typing import Self

from paravirt.backend.disks.base import Disk, scatter, total
from paravirt.backend.disks.filters.base import Filter
from paravirt.backend.disks.spec import Opening

DEFAULT_WINDOW_BYTES = 256 << 10
MAX_WINDOW_BYTES = 64 << 20


class ReadaheadFilter(Filter):
    """`readahead,window=256k:DISK`: a read that begins where the one before it ended reads the whole window, and those
    after it are answered from memory. For disks where a call is dear (a network), not where it is cheap.

    What is written, discarded or zeroed in the window is forgotten: reads never see anything older. That holds as long
    as nobody else writes to the disk below.
    """

    def __init__(self, below: Disk, window_bytes: int = DEFAULT_WINDOW_BYTES) -> None:
        super().__init__(below)
        self._window = memoryview(bytearray(max(window_bytes, below.sector_size)))
        self._start = self._end = 0  # on the disk, of what the window has
        self._next = -1  # where a sequential read would begin
        self._size = below.size_bytes  # as it was at the last read

    @classmethod
    def open(cls, opening: Opening) -> Self:
        window = opening.options.size("window", 4096) or DEFAULT_WINDOW_BYTES
        if window > MAX_WINDOW_BYTES:
            raise opening.options.wrong("window", str(window), f"at most {MAX_WINDOW_BYTES}")
        opening.options.end()
        return cls(opening.below(opening.read_only), window)

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        length, size = total(buffers), self.size_bytes
        if size != self._size:
            self._size = size
            self._start = self._end = 0  # what is behind an end that has moved is another
        sequential, self._next = offset == self._next, offset + length
        if not self._has(offset, length) and not (sequential and self._fill(offset, length)):
            self.below.preadv(buffers, offset)
            return
        first = offset - self._start
        scatter(self._window[first : first + length], buffers)

    def _has(self, offset: int, length: int) -> bool:
        return self._start <= offset and offset + length <= self._end

    def _fill(self, offset: int, length: int) -> bool:
        """Read a window from `offset` on, if that is more than what is wanted."""
        n_bytes = min(len(self._window), self.size_bytes - offset)
        if n_bytes <= length:
            return False
        self._start = self._end = 0
        try:
            self.below.preadv([self._window[:n_bytes]], offset)
        except OSError:
            return False  # perhaps only what nobody asked for is bad
        self._start, self._end = offset, offset + n_bytes
        return True

    def _forget(self, offset: int, length: int) -> None:
        if offset < self._end and offset + length > self._start:
            self._start = self._end = 0

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._forget(offset, total(buffers))
        super().pwritev(buffers, offset)

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        self._forget(offset, length)
        super().discard(offset, length, secure)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._forget(offset, length)
        super().write_zeroes(offset, length)
