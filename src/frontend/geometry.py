# SPDX-License-Identifier: MIT
"""What a block device is: its size, its sectors, what its backend has offered."""

from paravirt.errors import Closed, InvalidRequest, ReadOnly
from paravirt.protocol.blkif import SECTOR_BYTES
from paravirt.protocol.vbd import VbdOffer


class Geometry:
    """The part of a `Disk` that only looks at the present offer. Raises `Closed`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._offer: VbdOffer | None = None
        self._max_bytes = 0  # of one request
        self._closed = False

    @property
    def _geometry(self) -> VbdOffer:
        if self._offer is None or self._closed:
            raise Closed(f"disk {self.name} is closed")
        return self._offer

    @property
    def size_bytes(self) -> int:
        """Of the whole disk."""
        return self._geometry.sectors * SECTOR_BYTES

    @property
    def sector_size(self) -> int:
        """Bytes; every offset and length is a multiple of it."""
        return self._geometry.sector_size

    @property
    def read_only(self) -> bool:
        """Writes raise `ReadOnly`."""
        return self._geometry.read_only

    @property
    def physical_sector_size(self) -> int:
        """Bytes that the storage writes at once; a hint."""
        return self._geometry.physical_sector_size

    @property
    def removable(self) -> bool:
        """The medium can be taken out."""
        return self._geometry.removable

    @property
    def cdrom(self) -> bool:
        """It is to be taken for a CD-ROM."""
        return self._geometry.cdrom

    @property
    def can_flush(self) -> bool:
        """`flush` does something; otherwise what is answered is as durable as it gets."""
        return self._geometry.flush or self._geometry.barrier

    @property
    def can_barrier(self) -> bool:
        """`pwrite` takes `barrier`."""
        return self._geometry.barrier

    @property
    def can_discard(self) -> bool:
        """There is `discard`."""
        return self._geometry.discard

    @property
    def can_discard_secure(self) -> bool:
        """`discard` takes `secure`."""
        return self._geometry.discard_secure

    @property
    def discard_granularity(self) -> int:
        """Bytes; smaller discards may do nothing."""
        return self._geometry.discard_granularity

    @property
    def discard_alignment(self) -> int:
        """Bytes; where the first granule begins."""
        return self._geometry.discard_alignment

    @property
    def max_request_bytes(self) -> int:
        """Longer transfers are several requests."""
        return self._max_bytes

    @property
    def is_closed(self) -> bool:
        """`close` was called."""
        return self._closed

    def _check(self, offset: int, n_bytes: int) -> None:
        geometry = self._geometry
        size = geometry.sectors * SECTOR_BYTES
        if n_bytes <= 0 or offset < 0 or offset + n_bytes > size:
            raise InvalidRequest(f"{n_bytes} bytes at {offset} are not inside disk {self.name} of {size} bytes")
        if (offset | n_bytes) & (geometry.sector_size - 1):
            raise InvalidRequest(f"{n_bytes} bytes at {offset} are not whole sectors of {geometry.sector_size} bytes")

    def _check_writable(self) -> None:
        if self._geometry.read_only:
            raise ReadOnly(f"disk {self.name} is read-only")
