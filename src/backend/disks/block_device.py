# SPDX-License-Identifier: MIT
"""What Linux says of block devices, and what only it can do to files: making holes and zeroes.

Sources: linux/fs.h, linux/falloc.h, Documentation/ABI/stable/sysfs-block.
"""

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

BLKDISCARD = 0x1277
BLKSECDISCARD = 0x127D
BLKZEROOUT = 0x127F
BLKSSZGET = 0x1268
BLKPBSZGET = 0x127B
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10
_RANGE = struct.Struct("QQ")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which Python's `os` has not. `OSError` as from the system."""
    while _libc.fallocate(fd, mode, offset, length):
        if (error := ctypes.get_errno()) != errno.EINTR:
            raise OSError(error, os.strerror(error))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the space of a part of a file, which then reads as zeroes."""
    fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)


def can_punch_holes(fd: int, size: int) -> bool:
    """Whether the file system makes holes: asked behind the end of the file, where there is nothing to lose."""
    try:
        punch_hole(fd, size, 4096)
    except OSError:
        return False
    return True


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make a part of a file zeroes and keep its space where the file system can, else as a hole."""
    try:
        fallocate(fd, ZERO_RANGE | KEEP_SIZE, offset, length)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        punch_hole(fd, offset, length)


def discard(fd: int, offset: int, length: int, secure: bool) -> None:
    """Of a block device."""
    fcntl.ioctl(fd, BLKSECDISCARD if secure else BLKDISCARD, _RANGE.pack(offset, length))


def zero_out(fd: int, offset: int, length: int) -> None:
    """Of a block device, which writes zeroes if it knows no better way."""
    fcntl.ioctl(fd, BLKZEROOUT, _RANGE.pack(offset, length))


def sector_sizes(fd: int) -> tuple[int, int]:
    """Logical and physical sector size of a block device in bytes."""
    return _int(fd, BLKSSZGET), _int(fd, BLKPBSZGET)


def _int(fd: int, request: int) -> int:
    value: int = struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0]
    return value


def discard_limits(fd: int) -> tuple[int, int]:
    """Granularity and alignment of a block device's discards in bytes; granularity 0: it has none."""
    number = os.fstat(fd).st_rdev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    queue = next((queue for queue in (device / "queue", device.parent / "queue") if queue.is_dir()), None)
    if queue is None or not _sysfs(queue / "discard_max_bytes"):
        return 0, 0
    return _sysfs(queue / "discard_granularity"), _sysfs(device / "discard_alignment")


def _sysfs(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
