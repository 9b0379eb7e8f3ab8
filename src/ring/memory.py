# SPDX-License-Identifier: MIT
"""Shared memory objects and mappings of them.

Two providers make the same thing, a descriptor of zeroed memory of a fixed size:

* `posix`: POSIX shared memory under a random name, made exclusively with mode 0600, unlinked at once and then sized
  with `posix_fallocate`, so that a full /dev/shm is an error here and not a SIGBUS later. The default inside one trust
  domain.
* `memfd`: a memfd sealed against shrinking and growing, for peers that are not trusted: a holder of a POSIX descriptor
  could truncate the object under everybody's feet. It stands in no file system that could be full, so its pages come
  into being when they are first touched and are charged to whoever touches them: a large one takes its maker no time.
"""

import errno
import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
import posix_ipc

from paravirt.errors import Closed, InvalidRequest, ResourceLimit
from paravirt.ring._core import ffi, lib

PAGE_BYTES = 4096

Provider = Literal["posix", "memfd"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)

CData = Any

_mapped: "weakref.WeakSet[Mapping]" = weakref.WeakSet()
_inherited: list[mmap.mmap] = []


def _keep_inherited() -> None:
    """A forked child has the mmap objects and not the memory: freeing one would unmap whatever stands there by then."""
    _inherited.extend(mapping._mmap for mapping in _mapped)


os.register_at_fork(after_in_child=_keep_inherited)

_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h; Python's fcntl names it from 3.13 on


def create_object(provider: Provider, n_bytes: int, *, sealable: bool = False) -> int:
    """A close-on-exec descriptor of `n_bytes` of zeroed shared memory that has no name.

    `sealable`: `seal_writes` may be used on it later. Raises `ResourceLimit` when the memory is not there.
    """
    if n_bytes <= 0 or n_bytes % PAGE_BYTES:
        raise InvalidRequest(f"size of a shared object must be a positive multiple of {PAGE_BYTES}, not {n_bytes}")
    if provider == "posix":
        shared = posix_ipc.SharedMemory(f"/paravirt-{secrets.token_hex(12)}", posix_ipc.O_CREX, mode=0o600)
        shared.unlink()
        fd: int = shared.fd
        os.set_inheritable(fd, False)
    elif provider == "memfd":
        fd = os.memfd_create("paravirt", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        raise InvalidRequest(f"unknown memory provider {provider!r}; there are {', '.join(PROVIDERS)}")
    try:
        if provider == "posix":
            os.posix_fallocate(fd, 0, n_bytes)
        else:
            os.ftruncate(fd, n_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | (0 if sealable else fcntl.F_SEAL_SEAL)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            os.fchmod(fd, 0o600)
    except OSError as error:
        os.close(fd)
        raise ResourceLimit(f"{n_bytes} bytes of shared memory are not available: {error.strerror}") from error
    return fd


def seal_writes(fd: int) -> None:
    """From now on a sealable memfd can be mapped and opened only to read; writable mappings that are there stay."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)


def _refused(n_bytes: int, error: OSError) -> Exception:
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ResourceLimit(f"{n_bytes} bytes of shared memory cannot be mapped: {error.strerror}")
    return error


class Mapping:
    """Shared memory mapped into this process; not inherited by forked children.

    `view` is a memoryview of the mapping: as long as it or a slice of it lives, the pages stay mapped. Raw pointers
    from `pointer` do not keep anything alive: whoever takes one keeps the `Mapping` open for as long.
    """

    def __init__(self, fd: int, n_bytes: int, *, offset_bytes: int = 0, read_only: bool = False) -> None:
        """Map `n_bytes` of `fd` from `offset_bytes`; the descriptor stays the caller's. Raises `ResourceLimit`."""
        if offset_bytes + n_bytes > os.fstat(fd).st_size:
            raise ValueError(f"{n_bytes} bytes from {offset_bytes} on are more than the object has")
        self._reserve(n_bytes, read_only)
        self._fill(0, n_bytes, fd, offset_bytes)

    @classmethod
    def from_pages(cls, fd: int, offsets_bytes: Sequence[int], *, read_only: bool = False) -> Self:
        """Map pages of `fd` that stand at any offsets, side by side in the order given."""
        mapping = cls.__new__(cls)
        mapping._reserve(len(offsets_bytes) * PAGE_BYTES, read_only)
        for i, offset_bytes in enumerate(offsets_bytes):
            mapping._fill(i * PAGE_BYTES, PAGE_BYTES, fd, offset_bytes)
        return mapping

    def _reserve(self, n_bytes: int, read_only: bool) -> None:
        """A place for `_fill`, by a mapping of nothing: Python's mappings of a descriptor keep a copy of it."""
        protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
        try:
            place = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, protection)
        except OSError as error:
            raise _refused(n_bytes, error) from error
        self._adopt(place, n_bytes, read_only)

    def _fill(self, start: int, n_bytes: int, fd: int, offset_bytes: int) -> None:
        address = ffi.cast("void *", self.address + start)
        if status := lib.pv_map_pages(address, n_bytes, fd, offset_bytes, self.read_only):
            self.close()
            raise _refused(n_bytes, OSError(-status, os.strerror(-status)))

    def _adopt(self, mapped: mmap.mmap, n_bytes: int, read_only: bool) -> None:
        self._mmap = mapped
        self._mmap.madvise(mmap.MADV_DONTFORK)
        self._pid = os.getpid()
        self._view: memoryview | None = memoryview(self._mmap)
        self.n_bytes = n_bytes
        self.read_only = read_only
        with ffi.from_buffer("uint8_t[]", self._mmap) as start:
            self.address = int(ffi.cast("uintptr_t", start))
        _mapped.add(self)

    @property
    def view(self) -> memoryview:
        """All bytes of the mapping."""
        if self._view is None or os.getpid() != self._pid:
            raise Closed("this shared memory is closed, or was mapped by the parent of this process")
        return self._view

    def pointer(self, c_type: str = "uint8_t *", offset_bytes: int = 0) -> CData:
        """A C pointer into the mapping. It does not keep the mapping alive."""
        if self._view is None or os.getpid() != self._pid:
            raise Closed("this shared memory is closed, or was mapped by the parent of this process")
        return ffi.cast(c_type, self.address + offset_bytes)

    @property
    def closed(self) -> bool:
        """`close` was called."""
        return self._view is None

    def close(self) -> None:
        """Unmap. If slices of `view` are still held the pages stay mapped until those go."""
        if self._view is None:
            return
        view, self._view = self._view, None
        if os.getpid() != self._pid:
            return
        try:
            view.release()
            self._mmap.close()
        except BufferError:
            pass  # a caller still holds a slice: the mmap goes with the last of them

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._view is None else f"{self.n_bytes} bytes at {self.address:#x}"
        return f"<Mapping {state}{' read-only' if self.read_only else ''}>"


def map_new(provider: Provider, n_bytes: int) -> tuple[int, Mapping]:
    """A new object and a mapping of it: (descriptor, mapping)."""
    fd = create_object(provider, n_bytes)
    try:
        return fd, Mapping(fd, n_bytes)
    except BaseException:
        os.close(fd)
        raise


def pinned(buffer: Any, c_type: str = "uint8_t[]", *, writable: bool = False) -> CData:
    """A C pointer to a buffer, which keeps it in place as long as the pointer lives.

    Pythons before 3.12.3 crash when their garbage collector takes a memoryview apart while somebody holds its buffer.
    It does not look into arrays, so one stands between. Raises `BufferError`, `ValueError` or `TypeError` for a buffer
    that is not contiguous or not `writable`.
    """
    if isinstance(buffer, memoryview):
        buffer = np.asarray(buffer)
    return ffi.from_buffer(c_type, buffer, require_writable=writable)


def address_of(buffer: bytes | bytearray | memoryview) -> tuple[CData, int]:
    """A C pointer to a buffer, which keeps it in place as long as the pointer lives, and its address."""
    pointer = pinned(buffer, "char[]")
    return pointer, int(ffi.cast("uintptr_t", pointer))
