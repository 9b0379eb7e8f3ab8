# SPDX-License-Identifier: MIT
"""Copy on write: a disk that is never written, and an overlay file with what was changed."""

import errno
import os
from collections.abc import Iterator, Sequence
from typing import Self

from paravirt.backend.disks import block_device
from paravirt.backend.disks.base import Disk, take, total
from paravirt.backend.disks.file import transfer
from paravirt.backend.disks.filters.base import Filter
from paravirt.backend.disks.filters.overlay import DEFAULT_BLOCK_BYTES, Overlay
from paravirt.backend.disks.spec import Opening
from paravirt.errors import InvalidRequest


class CowFilter(Filter):
    """`cow,overlay=PATH:DISK`: the disk below is opened to read only, the overlay is made where there is none.

    Reads take a block from the overlay if it was ever written. What a guest was told is written outlives the process;
    what it was told is flushed outlives the machine.
    """

    def __init__(self, below: Disk, overlay: Overlay) -> None:
        super().__init__(below)
        self._overlay = overlay
        self._block = overlay.block_bytes
        self.read_only = overlay.read_only
        self.can_discard = not overlay.read_only and block_device.can_punch_holes(overlay.fd, overlay.end)
        self.can_discard_secure = False
        self.discard_granularity_bytes, self.discard_alignment_bytes = self._block, 0

    @classmethod
    def open(cls, opening: Opening) -> Self:
        path = opening.options.text("overlay")
        block = opening.options.size("block", 4096) or DEFAULT_BLOCK_BYTES
        opening.options.end()
        if not path:
            raise InvalidRequest("cow: needs an option overlay, the path of the file that takes the changes")
        below = opening.below(True)
        try:
            return cls(below, Overlay(path, below.size_bytes, block, read_only=opening.read_only))
        except BaseException:
            below.close()
            raise

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        start = offset
        for changed, place, length in self._runs(offset, total(buffers)):
            pieces = take(buffers, place - start, length)
            if changed:
                transfer(os.preadv, self._overlay.fd, pieces, self._overlay.position(place), self._overlay.path)
            else:
                self.below.preadv(pieces, place)

    def _runs(self, offset: int, length: int) -> Iterator[tuple[bool, int, int]]:
        """(whether it is in the overlay, offset, length) of each part that is in one place."""
        end = offset + length
        while offset < end:
            changed = self._overlay.has(offset // self._block)
            stop = offset
            while stop < end and self._overlay.has(stop // self._block) == changed:
                stop = min(end, (stop // self._block + 1) * self._block)
            yield changed, offset, stop - offset
            offset = stop

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._check_writable()
        length = total(buffers)
        head, tail = self._neighbours(offset, length)
        pieces = [piece for piece in (head, *buffers, tail) if piece]
        position = self._overlay.position(offset - len(head))
        for start in range(0, len(pieces), _MAX_PIECES):
            some = pieces[start : start + _MAX_PIECES]
            transfer(os.pwritev, self._overlay.fd, some, position, self._overlay.path)
            position += total(some)
        self._mark(offset, length)

    def _neighbours(self, offset: int, length: int) -> tuple[memoryview, memoryview]:
        """What the disk below has before and behind a write in the blocks that come into the overlay with it."""
        end = offset + length
        first, last = offset // self._block, (end - 1) // self._block
        head = tail = memoryview(b"")
        if not self._overlay.has(first):
            head = self._below(first * self._block, offset)
        if not self._overlay.has(last):
            tail = self._below(end, min((last + 1) * self._block, self.size_bytes))
        return head, tail

    def _below(self, start: int, end: int) -> memoryview:
        data = memoryview(bytearray(end - start))
        if data:
            self.below.preadv([data], start)
        return data

    def _mark(self, offset: int, length: int) -> None:
        for block in range(offset // self._block, (offset + length - 1) // self._block + 1):
            self._overlay.mark(block)

    def flush(self) -> None:
        self._overlay.flush()

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        """Whole blocks become zeroes in the overlay, without space; of the others nothing is forgotten."""
        if secure:
            raise OSError(errno.EOPNOTSUPP, "an overlay has no secure discard")
        self._zero_blocks(-(-offset // self._block), self._whole_until(offset + length))

    def write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        first, last = -(-offset // self._block), self._whole_until(end)
        if not self.can_discard or first >= last:
            Disk.write_zeroes(self, offset, length)
            return
        self._zero_blocks(first, last)
        Disk.write_zeroes(self, offset, first * self._block - offset)
        rest = min(last * self._block, self.size_bytes)
        Disk.write_zeroes(self, rest, end - rest)

    def _whole_until(self, end: int) -> int:
        """The first block that is not wholly before `end`; the last of the disk may be short."""
        return -(-end // self._block) if end == self.size_bytes else end // self._block

    def _zero_blocks(self, first: int, last: int) -> None:
        self._check_writable()
        if first >= last:
            return
        start, end = first * self._block, min(last * self._block, self.size_bytes)
        block_device.punch_hole(self._overlay.fd, self._overlay.position(start), end - start)
        self._mark(start, end - start)

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "the disk is read-only")

    def current_size(self) -> int:
        """Never another: the overlay is made for this size."""
        return self.size_bytes

    def close(self) -> None:
        self._overlay.close()
        super().close()


_MAX_PIECES = 512  # in one pwritev; the system takes 1024
