# SPDX-License-Identifier: MIT
"""What a block device is: its size, its sectors, what its backend has offered."""

from dataclasses import replace

from paravirt.errors import Closed, InvalidRequest, ReadOnly
from paravirt.protocol.blkif import SECTOR_BYTES, Operation
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
    def has_flush(self) -> bool:
        """The backend takes flushes; otherwise an empty barrier does it, where there is one."""
        return self._geometry.flush

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

    def check(self, offset: int, n_bytes: int) -> None:
        """Whether these are whole sectors inside the disk. Raises `InvalidRequest`, `Closed`."""
        geometry = self._geometry
        size = geometry.sectors * SECTOR_BYTES
        if n_bytes <= 0 or offset < 0 or offset + n_bytes > size:
            raise InvalidRequest(f"{n_bytes} bytes at {offset} are not inside disk {self.name} of {size} bytes")
        if (offset | n_bytes) & (geometry.sector_size - 1):
            raise InvalidRequest(f"{n_bytes} bytes at {offset} are not whole sectors of {geometry.sector_size} bytes")

    def check_writable(self) -> None:
        """Raises `ReadOnly`."""
        if self._geometry.read_only:
            raise ReadOnly(f"disk {self.name} is read-only")

    def check_barrier(self) -> None:
        """Raises `InvalidRequest` where there is none."""
        if not self._geometry.barrier:
            raise InvalidRequest(f"the backend of disk {self.name} has no barriers")

    def check_discard(self, *, secure: bool) -> None:
        """Raises `InvalidRequest` where there is none, or none after which nobody can read the old bytes."""
        if not self._geometry.discard or (secure and not self._geometry.discard_secure):
            raise InvalidRequest(f"the backend of disk {self.name} has no {'secure ' if secure else ''}discard")

    def forget_feature(self, operation: int) -> None:
        """The backend has answered that it does not have it, whatever it has offered."""
        if self._offer is None:
            return
        if operation == Operation.FLUSH_DISKCACHE:
            self._offer = replace(self._offer, flush=False)
        elif operation == Operation.WRITE_BARRIER:
            self._offer = replace(self._offer, barrier=False)
        elif operation == Operation.DISCARD:
            self._offer = replace(self._offer, discard=False, discard_secure=False)
