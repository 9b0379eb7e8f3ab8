# SPDX-License-Identifier: MIT
"""What filters have in common."""

from collections.abc import Sequence

from paravirt.backend.disks.base import Disk


class Filter(Disk):
    """Passes everything on to the disk below, which it owns. It is never served in C: every call comes through here."""

    def __init__(self, below: Disk) -> None:
        self.below = below
        self.size_bytes = below.size_bytes
        self.read_only = below.read_only
        self.sector_size = below.sector_size
        self.physical_sector_size = below.physical_sector_size
        self.can_discard = below.can_discard
        self.can_discard_secure = below.can_discard_secure
        self.discard_granularity_bytes = below.discard_granularity_bytes
        self.discard_alignment_bytes = below.discard_alignment_bytes
        self.removable = below.removable
        self.cdrom = below.cdrom
        self.direct = below.direct

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.below.preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.below.pwritev(buffers, offset)

    def flush(self) -> None:
        self.below.flush()

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        self.below.discard(offset, length, secure)

    def write_zeroes(self, offset: int, length: int) -> None:
        self.below.write_zeroes(offset, length)

    def current_size(self) -> int:
        self.size_bytes = self.below.current_size()
        return self.size_bytes

    def interrupt(self) -> None:
        self.below.interrupt()

    def close(self) -> None:
        self.below.close()
