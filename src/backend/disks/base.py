# SPDX-License-Identifier: MIT
"""What a disk is to a backend."""

import errno
import re
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

from paravirt.errors import InvalidRequest
from paravirt.ring.vbd_engine import DiskKind

SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
SECTOR_SIZES = (512, 4096)
ZEROES = memoryview(bytes(1 << 16))


Transfer = tuple[Sequence[memoryview], int]  # buffers, offset


class Disk(Protocol):
    """Storage a backend serves. Offsets and lengths are in bytes, whole sectors, and inside the disk: the backend has
    checked them.

    A call does all of it or raises `OSError`; the guest then sees an I/O error (of EOPNOTSUPP: that there is no such
    operation) and other requests go on. One thread calls at a time, unless the disk has `many_threads`; but any may
    call `current_size` and `interrupt`.

    Subclass it: what has a value here is optional.
    """

    size_bytes: int  # a multiple of sector_size
    read_only: bool

    sector_size: int = 512  # 512 or 4096
    physical_sector_size: int = 0  # what the storage likes to be written in; 0: sector_size
    can_discard: bool = False
    can_discard_secure: bool = False  # nobody can read the old data afterwards
    discard_granularity_bytes: int = 0  # smaller discards do nothing; 0: sector_size
    discard_alignment_bytes: int = 0  # where the first granule begins
    removable: bool = False
    cdrom: bool = False
    direct: bool = False  # passes the page cache of this machine by
    many_threads: bool = False  # each queue of a frontend may call without waiting for the others
    many_in_flight: bool = False  # `preadv_many` and `pwritev_many` are better than one after the other

    # Two kinds of disk are served in C, a batch in one call, which does not ask the methods to read, write and flush:
    # one that is plain memory says where, one that is a file (its own `preadv` would do just that) has a descriptor.
    memory: memoryview | None = None
    fd: int | None = None
    # One whose other methods, too, do just what the C core does to such a disk says so: see `core_kind`. "memory" is
    # private and mapped anonymously.
    served_as: DiskKind | None = None
    # Of a file: the C core asks it through io_uring, because its calls may wait for something.
    uring: bool = False

    @abstractmethod
    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill all buffers from `offset` on."""

    @abstractmethod
    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all buffers at `offset`."""

    def preadv_many(self, transfers: Sequence[Transfer]) -> list[int]:
        """Several reads, in any order or at once; the errno of each, 0 when it is done."""
        return [_errno_of(self.preadv, *transfer) for transfer in transfers]

    def pwritev_many(self, transfers: Sequence[Transfer]) -> list[int]:
        """Several writes, none of which touches what another does; as `preadv_many`."""
        return [_errno_of(self.pwritev, *transfer) for transfer in transfers]

    @abstractmethod
    def flush(self) -> None:
        """Return when everything written before is on stable storage."""

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        """Forget what is there: it reads as zeroes or as it was, until it is written again."""
        raise OSError(errno.EOPNOTSUPP, "this disk has no discard")

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make it read as zeroes."""
        while length:
            piece = min(length, len(ZEROES))
            self.pwritev([ZEROES[:piece]], offset)
            offset, length = offset + piece, length - piece

    def current_size(self) -> int:
        """Look whether the size has changed, in whole sectors; from now on `size_bytes` is this."""
        return self.size_bytes

    def interrupt(self) -> None:
        """From any thread: a call that is waiting for something that may never come is to fail soon. It is repeated
        until that is so, and means nothing to later calls.
        """

    def close(self) -> None:
        """Free it; harmless when repeated."""


_CORE_METHODS = ("preadv", "pwritev", "flush", "discard", "interrupt")


def core_kind(disk: Disk) -> DiskKind | None:
    """As what the C core can serve a disk without any of its methods; None when they have to be called.

    A subclass that does something of its own in one of them is no longer what its base class said.
    """
    kind = type(disk)
    declares = next((cls for cls in kind.__mro__ if "served_as" in vars(cls)), kind)
    own = any(getattr(kind, name) is not getattr(declares, name, None) for name in _CORE_METHODS)
    return None if own else disk.served_as


def _errno_of(call: Callable[[Sequence[memoryview], int], None], buffers: Sequence[memoryview], offset: int) -> int:
    try:
        call(buffers, offset)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


class Pause:
    """Waiting that `interrupt` can end."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def wait(self, seconds: float) -> None:
        """`OSError` when interrupted meanwhile."""
        self._ended.clear()
        if self._ended.wait(seconds):
            raise OSError(errno.ECANCELED, "the device is being stopped")

    def interrupt(self) -> None:
        """End the wait of another thread, if there is one."""
        self._ended.set()


def parse_size(text: str, what: str, multiple: int = 512) -> int:
    """Bytes of "4096", "64k", "16M", "1G"; a positive multiple of `multiple` or `InvalidRequest` naming `what`."""
    match = re.fullmatch(r"([0-9]{1,15})([kmgt]?)", text.strip().lower(), re.ASCII)
    size = int(match[1]) * SUFFIXES[match[2]] if match else 0
    if size <= 0 or size % multiple:
        unit = "number of bytes" if multiple == 1 else f"multiple of {multiple} bytes"
        raise InvalidRequest(f"{what} {text!r} is not a positive {unit} (such as 64M)")
    return size


def skip(buffers: Sequence[memoryview], n_bytes: int) -> list[memoryview]:
    """`buffers` without their first `n_bytes`."""
    rest = []
    for buffer in buffers:
        if n_bytes < len(buffer):
            rest.append(buffer[n_bytes:])
        n_bytes = max(0, n_bytes - len(buffer))
    return rest


def take(buffers: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """`length` bytes of `buffers` from `start` on."""
    taken = []
    for buffer in skip(buffers, start):
        if length <= 0:
            break
        taken.append(buffer[:length])
        length -= len(taken[-1])
    return taken


def total(buffers: Sequence[memoryview]) -> int:
    return sum(map(len, buffers))


def scatter(data: memoryview, buffers: Sequence[memoryview]) -> None:
    """Copy `data` into `buffers`, which have as many bytes."""
    start = 0
    for buffer in buffers:
        buffer[:] = data[start : start + len(buffer)]
        start += len(buffer)
