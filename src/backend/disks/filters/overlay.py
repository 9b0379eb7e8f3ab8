# SPDX-License-Identifier: MIT
"""The file of a copy-on-write disk: a header, which blocks it has, and the blocks.

    0         header (one sector), then nothing up to 4096
    4096      the working map: a bit for each block, set after the block was written
    ...       the stable map: the working map as it was when everything in it was flushed
    ...       the blocks, each where it is on the disk; those never written are holes

Both maps are whole pages. A process that is killed loses nothing: what it wrote to the file, maps too, is the system's.
A machine that stops may keep the working map and lose blocks it speaks of. So the header names the boot it was written
in; in another one the stable map counts, and what was not flushed is as if it had never been written. A bit is never
cleared, so a stable map of which only a part reached the disk is right as well.
"""

import logging
import os
import struct
import tempfile
import zlib
from pathlib import Path

from paravirt.backend.disks.file import lock, open_image, transfer
from paravirt.errors import InvalidRequest, NotFound, ResourceLimit

log = logging.getLogger(__name__)

MAGIC = b"paravirt overlay"
VERSION = 1
DEFAULT_BLOCK_BYTES = 64 << 10
MAX_BLOCK_BYTES = 16 << 20
PAGE = 4096
NO_BOOT = bytes(36)
_HEADER = struct.Struct("<16sIIQ36s")  # magic, version, bytes of a block, bytes of the disk, boot
_CHECK = struct.Struct("<I")  # CRC-32 of the header


class Overlay:
    """An open overlay, locked; writable ones exclude everybody else."""

    def __init__(self, path: str, size_bytes: int, block_bytes: int = DEFAULT_BLOCK_BYTES, *, read_only: bool) -> None:
        """`size_bytes`: of the disk below. `block_bytes` counts where the file is made here."""
        if not _is_block_size(block_bytes):
            raise InvalidRequest(f"block of {block_bytes} bytes is not a power of two from 4k to 16M")
        self.path = path
        self.read_only = read_only
        self.size_bytes = size_bytes
        if not read_only and not os.path.lexists(path):
            _create(path, size_bytes, block_bytes)
        self.fd = _open(path, read_only)
        try:
            lock(self.fd, path, read_only)
            self.block_bytes, boot = self._read_header()
            self._map_bytes = map_bytes(size_bytes, self.block_bytes)
            self.end = _data_start(size_bytes, self.block_bytes) + size_bytes
            if os.fstat(self.fd).st_size != self.end:
                raise InvalidRequest(
                    f"overlay {path} is damaged: it has {os.fstat(self.fd).st_size} bytes, not {self.end}"
                )
            self._load(boot != boot_id() or boot == NO_BOOT)
        except BaseException:
            os.close(self.fd)
            raise
        self._closed = False

    def _read_header(self) -> tuple[int, bytes]:
        """Bytes of a block, and the boot it was last written in."""
        raw = os.pread(self.fd, _HEADER.size + _CHECK.size, 0)
        if raw[: len(MAGIC)] != MAGIC:
            raise InvalidRequest(f"{self.path} is not an overlay")
        if len(raw) < _HEADER.size + _CHECK.size or _CHECK.pack(zlib.crc32(raw[: _HEADER.size])) != raw[_HEADER.size :]:
            raise InvalidRequest(f"overlay {self.path} is damaged: its header does not add up")
        _, version, block_bytes, size_bytes, boot = _HEADER.unpack_from(raw)
        if version != VERSION:
            raise InvalidRequest(f"overlay {self.path} is of version {version}, not {VERSION}")
        if size_bytes != self.size_bytes:
            raise InvalidRequest(
                f"overlay {self.path} is for a disk of {size_bytes} bytes, not for this one of {self.size_bytes}"
            )
        if not _is_block_size(block_bytes):
            raise InvalidRequest(f"overlay {self.path} is damaged: it has blocks of {block_bytes} bytes")
        return block_bytes, boot

    def _load(self, stopped: bool) -> None:
        """Take the map that counts. `stopped`: the machine has, since the overlay was written; then that is made so."""
        working, stable = (bytearray(self._map_bytes) for _ in range(2))
        for content, position in ((working, PAGE), (stable, PAGE + self._map_bytes)):
            transfer(os.preadv, self.fd, [memoryview(content)], position, self.path)
        if stopped and working != stable:
            log.warning("overlay %s: the machine has stopped; what was not flushed is left out", self.path)
        if stopped and not self.read_only:
            transfer(os.pwritev, self.fd, [memoryview(stable)], PAGE, self.path)
            os.fsync(self.fd)
            _write_header(self.fd, self.size_bytes, self.block_bytes)
        self._map = stable if stopped else working
        pages = range(0, self._map_bytes, PAGE)
        self._unstable = {page for page in pages if self._map[page : page + PAGE] != stable[page : page + PAGE]}

    def has(self, block: int) -> bool:
        """Whether the block is here, not below."""
        return bool(self._map[block // 8] >> block % 8 & 1)

    def mark(self, block: int) -> None:
        """The block is here from now on; its data has been written."""
        place = block // 8
        byte = self._map[place] | 1 << block % 8
        if byte != self._map[place]:
            os.pwrite(self.fd, bytes([byte]), PAGE + place)
            self._map[place] = byte
            self._unstable.add(place // PAGE * PAGE)

    def position(self, offset: int) -> int:
        """Where in the file a byte of the disk is."""
        return PAGE + 2 * self._map_bytes + offset

    def flush(self) -> None:
        """Blocks first, then the map that says they are there."""
        if self.read_only:
            return
        os.fdatasync(self.fd)
        if self._unstable:
            for page in self._unstable:
                content = memoryview(self._map)[page : page + PAGE]
                transfer(os.pwritev, self.fd, [content], PAGE + self._map_bytes + page, self.path)
            os.fdatasync(self.fd)
            self._unstable.clear()

    def close(self) -> None:
        """Harmless when repeated. Does not flush."""
        if not self._closed:
            self._closed = True
            os.close(self.fd)


def _is_block_size(n_bytes: int) -> bool:
    return PAGE <= n_bytes <= MAX_BLOCK_BYTES and not n_bytes & (n_bytes - 1)


def map_bytes(size_bytes: int, block_bytes: int) -> int:
    """Of one map, in whole pages."""
    n_blocks = -(-size_bytes // block_bytes)
    return -(-n_blocks // (8 * PAGE)) * PAGE


def boot_id() -> bytes:
    """36 characters that are others after each start of the machine; `NO_BOOT` if it does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        boot = b""
    return boot if len(boot) == len(NO_BOOT) else NO_BOOT


def _data_start(size_bytes: int, block_bytes: int) -> int:
    return PAGE + 2 * map_bytes(size_bytes, block_bytes)


def _open(path: str, read_only: bool) -> int:
    try:
        return open_image(path, read_only)
    except NotFound:
        raise NotFound(f"overlay {path} does not exist") from None


def _create(path: str, size_bytes: int, block_bytes: int) -> None:
    """Whole or not at all: under another name until it is complete."""
    directory, name = os.path.split(os.path.abspath(path))
    try:
        fd, new = tempfile.mkstemp(".new", f"{name}.", directory)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"overlay {path!r} cannot be made: {getattr(error, 'strerror', None) or error}") from None
    try:
        start = _data_start(size_bytes, block_bytes)
        # The maps have their space from the start: what has found room for a block must not fail to say so.
        os.posix_fallocate(fd, 0, start)
        os.ftruncate(fd, start + size_bytes)
        _write_header(fd, size_bytes, block_bytes)
        os.link(new, path)
        _sync_directory(directory)
    except FileExistsError:
        pass  # somebody else has just made one
    except OSError as error:
        raise ResourceLimit(f"overlay {path} cannot be made: {error.strerror}") from None
    finally:
        os.close(fd)
        os.unlink(new)


def _sync_directory(directory: str) -> None:
    """What is flushed to a file is lost if the file's name is."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_header(fd: int, size_bytes: int, block_bytes: int) -> None:
    raw = _HEADER.pack(MAGIC, VERSION, block_bytes, size_bytes, boot_id())
    os.pwrite(fd, raw + _CHECK.pack(zlib.crc32(raw)), 0)
    os.fsync(fd)
