# SPDX-License-Identifier: MIT
"""A raw image in a file or a block device."""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Sequence

from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, PermissionRefused

# struct flock on Linux: type, whence, start, length, pid (0 for locks of an open file description).
_FLOCK = struct.Struct("hhqqi4x")


class FileDisk:
    """`file:PATH`, locked for as long as it is open.

    The lock is one of the *open file description* that all I/O goes through: the kernel holds it until the last
    in-flight write of a killed process is done, so whoever gets the lock cannot be overtaken by an older write. Writers
    exclude everybody, readers exclude writers.
    """

    sector_size = 512
    memory: memoryview | None = None

    def __init__(self, spec: str, read_only: bool) -> None:
        self._path = spec
        self.read_only = read_only
        fd = _open(spec, read_only)
        try:
            self.size_bytes = _size(fd, spec)
            _lock(fd, spec, read_only)
        except BaseException:
            os.close(fd)
            raise
        self.fd: int | None = fd

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._all(os.preadv, buffers, offset, "reads as shorter than it was when it was opened")

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._all(os.pwritev, buffers, offset, "takes no more data")

    def _all(
        self,
        call: Callable[[int, Sequence[memoryview], int], int],
        buffers: Sequence[memoryview],
        offset: int,
        short: str,
    ) -> None:
        fd, wanted = self._opened(), sum(map(len, buffers))
        done = call(fd, buffers, offset)
        while done < wanted:
            # Rare: a signal or a limit cut the call short. Zero bytes is the end of a file that shrank.
            rest = _skip(buffers, done)
            step = call(fd, rest, offset + done)
            if step == 0:
                raise OSError(errno.EIO, f"image {self._path} {short}")
            done += step

    def flush(self) -> None:
        os.fdatasync(self._opened())

    def _opened(self) -> int:
        if self.fd is None:
            raise OSError(errno.EBADF, f"image {self._path} is closed")
        return self.fd

    def close(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


def _skip(buffers: Sequence[memoryview], n_bytes: int) -> list[memoryview]:
    rest = []
    for buffer in buffers:
        if n_bytes < len(buffer):
            rest.append(buffer[n_bytes:])
        n_bytes = max(0, n_bytes - len(buffer))
    return rest


def _open(path: str, read_only: bool) -> int:
    # O_NONBLOCK: opening a fifo or a tape must not hang; it means nothing to files and disks.
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        raise NotFound(f"image {path} does not exist") from None
    except IsADirectoryError:
        raise InvalidRequest(f"image {path} is a directory") from None
    except PermissionError:
        raise PermissionRefused(f"no rights to {'read' if read_only else 'read and write'} image {path}") from None
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"image {path!r} cannot be opened: {getattr(error, 'strerror', None) or error}") from None


def _size(fd: int, path: str) -> int:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise InvalidRequest(f"image {path} is a directory")
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise InvalidRequest(f"image {path} is neither a file nor a block device")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0 or size % 512:
        raise InvalidRequest(f"image {path} has {size} bytes, not a positive multiple of 512")
    return size


def _lock(fd: int, path: str, read_only: bool) -> None:
    wanted = _FLOCK.pack(fcntl.F_RDLCK if read_only else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise AlreadyExists(f"image {path} is already in use") from None
        raise InvalidRequest(f"image {path} cannot be locked: {error.strerror}") from None
