# SPDX-License-Identifier: MIT
"""A raw image in a file or a block device."""

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable, Sequence
from typing import Literal, Self, cast, get_args

from paravirt.backend.disks import block_device
from paravirt.backend.disks.base import SECTOR_SIZES, Disk, scatter, skip, total
from paravirt.backend.disks.spec import Opening
from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, PermissionRefused
from paravirt.ring.memory import address_of
from paravirt.ring.vbd_engine import DiskKind

# struct flock on Linux: type, whence, start, length, pid (0 for locks of an open file description).
_FLOCK = struct.Struct("hhqqi4x")

Io = Literal["auto", "uring", "sync"]

Call = Callable[[int, Sequence[memoryview], int], int]


class FileDisk(Disk):
    """`file:PATH`, locked for as long as it is open.

    The lock is one of the *open file description* that all I/O goes through: the kernel holds it until the last
    in-flight write of a killed process is done, so whoever gets the lock cannot be overtaken by an older write. Writers
    exclude everybody, readers exclude writers.
    """

    served_as: DiskKind | None = "file"
    many_threads = True

    def __init__(
        self,
        spec: str,
        read_only: bool,
        *,
        direct: bool = False,
        sector_size: int | None = None,
        removable: bool = False,
        cdrom: bool = False,
        secure_discard: bool = False,
        io: Io = "auto",
    ) -> None:
        """`sector_size`: None for that of the device, or 512 for a file. A cdrom is removable and read-only.
        `secure_discard`: the device can do it, of which Linux does not tell. `io`: how the engine in C asks it: by
        blocking calls, through io_uring, or as the file says that it may wait.
        """
        self._path = spec
        self.read_only = read_only or cdrom
        self.direct, self.removable, self.cdrom = direct, removable or cdrom, cdrom
        fd = open_image(spec, self.read_only, direct=direct)
        try:
            self._is_device = _is_block_device(fd, spec)
            self._take_sizes(fd, sector_size)
            self._take_discard(fd, secure_discard)
            self.uring = io == "uring" or (io == "auto" and may_wait(fd, self.sector_size))
            lock(fd, spec, self.read_only)
        except BaseException:
            os.close(fd)
            raise
        self._fd: int | None = fd
        # What a guest asks for lies on whole sectors in its pages, too: as O_DIRECT wants it.
        self.fd = fd
        if self._is_device:
            self.served_as = "device"

    @classmethod
    def open(cls, opening: Opening) -> Self:
        options = opening.options
        direct, sector_size = options.flag("direct"), options.sector_size()
        removable, cdrom = options.flag("removable"), options.flag("cdrom")
        secure_discard = options.flag("secure-discard")
        io: Io = "auto"
        if wanted := options.choice("io", *get_args(Io)):
            io = cast(Io, wanted)
        options.end()
        return cls(
            opening.argument,
            opening.read_only,
            direct=direct,
            sector_size=sector_size,
            removable=removable,
            cdrom=cdrom,
            secure_discard=secure_discard,
            io=io,
        )

    def _take_sizes(self, fd: int, sector_size: int | None) -> None:
        least = physical = 512
        if self._is_device:
            least, physical = block_device.sector_sizes(fd)
        if self.direct:
            least = max(least, _direct_sector(fd, self._path))
        self.sector_size = least if sector_size is None else sector_size
        self.physical_sector_size = max(physical, self.sector_size)
        if self.sector_size not in SECTOR_SIZES or self.sector_size < least:
            raise InvalidRequest(f"image {self._path} has sectors of {least} bytes, not of {self.sector_size}")
        self.size_bytes = _size(fd, self._path, self.sector_size)

    def _take_discard(self, fd: int, secure: bool) -> None:
        if secure and not self._is_device:
            raise InvalidRequest(f"image {self._path} is a file, which has no secure discard")
        if self.read_only:
            return
        if self._is_device:
            self.discard_granularity_bytes, self.discard_alignment_bytes = block_device.discard_limits(fd)
            self.can_discard = self.discard_granularity_bytes > 0
            self.can_discard_secure = secure and self.can_discard
        else:
            self.can_discard = block_device.can_punch_holes(fd, self.size_bytes)
            self.discard_granularity_bytes = os.fstatvfs(fd).f_frsize

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        fd = self._opened()
        if self._is_aligned(buffers):
            transfer(os.preadv, fd, buffers, offset, self._path)
            return
        with mmap.mmap(-1, total(buffers)) as aligned, memoryview(aligned) as view:
            transfer(os.preadv, fd, [view], offset, self._path)
            scatter(view, buffers)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        fd = self._opened()
        if self._is_aligned(buffers):
            transfer(os.pwritev, fd, buffers, offset, self._path)
            return
        with mmap.mmap(-1, total(buffers)) as aligned, memoryview(aligned) as view:
            view[:] = b"".join(buffers)
            transfer(os.pwritev, fd, [view], offset, self._path)

    def _is_aligned(self, buffers: Sequence[memoryview]) -> bool:
        """Whether the file can take them as they are: what passes the page cache by has to lie on sectors."""
        return not self.direct or not any(
            (address_of(buffer)[1] | len(buffer)) % self.sector_size for buffer in buffers if buffer
        )

    def flush(self) -> None:
        os.fdatasync(self._opened())

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        """The space of a file is given back, and it reads as zeroes; a block device does as it does."""
        fd = self._opened()
        if self._is_device:
            block_device.discard(fd, offset, length, secure)
        elif secure:
            raise OSError(errno.EOPNOTSUPP, "a file has no secure discard")
        else:
            block_device.punch_hole(fd, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        fd = self._opened()
        try:
            (block_device.zero_out if self._is_device else block_device.zero_range)(fd, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):
                raise
            super().write_zeroes(offset, length)

    def current_size(self) -> int:
        self.size_bytes = os.lseek(self._opened(), 0, os.SEEK_END) // self.sector_size * self.sector_size
        return self.size_bytes

    def _opened(self) -> int:
        if self._fd is None:
            raise OSError(errno.EBADF, f"image {self._path} is closed")
        return self._fd

    def close(self) -> None:
        fd, self._fd, self.fd = self._fd, None, None
        if fd is not None:
            os.close(fd)


def transfer(call: Call, fd: int, buffers: Sequence[memoryview], offset: int, name: str) -> None:
    """All of a preadv or pwritev, or `OSError`."""
    done, wanted = 0, total(buffers)
    while done < wanted:
        # More than one round is rare: a signal or a limit cut the call short.
        step = call(fd, skip(buffers, done) if done else buffers, offset + done)
        if step == 0:
            raise OSError(
                errno.EIO, f"{name} ends before byte {offset + wanted}: it is shorter than when it was opened"
            )
        done += step


def open_image(path: str, read_only: bool, *, direct: bool = False) -> int:
    """A descriptor of an image; the errors name it."""
    # O_NONBLOCK: opening a fifo or a tape must not hang; it means nothing to files and disks.
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | (os.O_DIRECT if direct else 0))
    except FileNotFoundError:
        raise NotFound(f"image {path} does not exist") from None
    except IsADirectoryError:
        raise InvalidRequest(f"image {path} is a directory") from None
    except PermissionError:
        raise PermissionRefused(f"no rights to {'read' if read_only else 'read and write'} image {path}") from None
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"image {path!r} cannot be opened: {getattr(error, 'strerror', None) or error}") from None


def _is_block_device(fd: int, path: str) -> bool:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise InvalidRequest(f"image {path} is a directory")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise InvalidRequest(f"image {path} is neither a file nor a block device")
    return stat.S_ISBLK(mode)


def _size(fd: int, path: str, sector_size: int) -> int:
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0 or size % sector_size:
        raise InvalidRequest(f"image {path} has {size} bytes, not a positive multiple of {sector_size}")
    return size


def _direct_sector(fd: int, path: str) -> int:
    """The least that can be read past the page cache: it is tried, as no call says so of every file system."""
    with mmap.mmap(-1, 8192) as pages, memoryview(pages) as view:
        for size in SECTOR_SIZES:
            try:
                os.preadv(fd, [view[size : 2 * size]], size)
                return size
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise InvalidRequest(f"image {path} cannot be read: {error.strerror}") from None
    raise InvalidRequest(f"image {path} cannot be opened with direct=1: its file system does not do that")


def may_wait(fd: int, sector_size: int) -> bool:
    """Whether reads can wait for something, by the file's own word: where a read that must not wait is refused there is
    nothing to wait for (tmpfs), and io_uring would only hand each read to a thread of the kernel's.
    """
    with mmap.mmap(-1, sector_size) as page, memoryview(page) as view:
        try:
            os.preadv(fd, [view], 0, os.RWF_NOWAIT)
        except OSError as error:
            return error.errno == errno.EAGAIN
    return True


def lock(fd: int, path: str, read_only: bool) -> None:
    """Take the lock of this open file description, or `AlreadyExists`."""
    wanted = _FLOCK.pack(fcntl.F_RDLCK if read_only else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise AlreadyExists(f"image {path} is already in use") from None
        raise InvalidRequest(f"image {path} cannot be locked: {error.strerror}") from None
