# SPDX-License-Identifier: MIT
"""Grants over one arena chunk: the granter's half and the mapper's half.

A chunk is an object of Xen v1 grant entries and an object of data pages that one domain shares with one other.
Reference `base + i` is entry i; the frame number of a page is its reference. Each half decides from private copies, so
a peer that rewrites entries harms only itself. Source: Xen public/grant_table.h.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.ring._core import ffi, lib
from paravirt.ring.batch import Remembered
from paravirt.ring.memory import PAGE_BYTES, Mapping

CData = Any
References = NDArray[np.uint32] | Sequence[int]

ENTRY_BYTES = 8
NOTE_BYTES = 8
MAPTRACK_HEADER_BYTES = 64
PIN_BYTES = 4


class GrantStatus(IntEnum):
    """GNTST_*: what became of one grant operation. Never positive."""

    OKAY = lib.PV_GNTST_OKAY
    GENERAL_ERROR = lib.PV_GNTST_GENERAL_ERROR
    BAD_DOMAIN = lib.PV_GNTST_BAD_DOMAIN
    BAD_GNTREF = lib.PV_GNTST_BAD_GNTREF
    BAD_HANDLE = lib.PV_GNTST_BAD_HANDLE
    BAD_VIRT_ADDR = lib.PV_GNTST_BAD_VIRT_ADDR
    BAD_DEV_ADDR = lib.PV_GNTST_BAD_DEV_ADDR
    NO_DEVICE_SPACE = lib.PV_GNTST_NO_DEVICE_SPACE
    PERMISSION_DENIED = lib.PV_GNTST_PERMISSION_DENIED
    BAD_PAGE = lib.PV_GNTST_BAD_PAGE
    BAD_COPY_ARG = lib.PV_GNTST_BAD_COPY_ARG
    ADDRESS_TOO_BIG = lib.PV_GNTST_ADDRESS_TOO_BIG
    EAGAIN = lib.PV_GNTST_EAGAIN
    NO_SPACE = lib.PV_GNTST_NO_SPACE


class GrantFailed(PeerError):
    """A reference that a peer named could not be mapped, or was not; `status` says why."""

    def __init__(self, action: str, gref: int, status: int) -> None:
        self.status = GrantStatus(status)
        super().__init__(f"cannot {action} grant reference {gref}: {self.status.name}")


@dataclass(frozen=True, slots=True)
class CopyOp:
    """One copy between a granted page and a local buffer.

    `offset` and `length` are bytes in the page (together at most 4096), `local_offset` bytes in the local buffer.
    """

    gref: int
    offset: int
    length: int
    local_offset: int = 0


COPY_OP = np.dtype(
    [("gref", "u4"), ("offset", "u2"), ("length", "u2"), ("local_offset", "u8"), ("status", "i2"), ("pad", "u2", (3,))]
)
"""The fields of a `CopyOp` and, after the copy, its status: an array of these is a batch for `Mapper.copy_array`."""


@dataclass(frozen=True, slots=True)
class CopyPair:
    """One copy between two granted pages; offsets and `length` are bytes in the pages."""

    from_gref: int
    from_offset: int
    to_gref: int
    to_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class GranterStatistics:
    """Counted by one granter since it was made."""

    granted: int
    """References granted now."""
    grants: int
    revokes: int
    busy: int
    """Revokes refused because the peer still used the page."""


@dataclass(frozen=True, slots=True)
class MapperStatistics:
    """Counted by one mapper since it was made."""

    pinned_pages: int
    """References pinned now."""
    maps: int
    unmaps: int
    copies: int
    """Copy operations that succeeded."""
    copied_bytes: int
    failures: int
    """Maps, unmaps and copies with a status other than OKAY."""


def entries_bytes(n_pages: int) -> int:
    """Size in bytes of the object that holds the entries of `n_pages` pages and the notes on them: whole pages."""
    return -(-n_pages * (ENTRY_BYTES + NOTE_BYTES) // PAGE_BYTES) * PAGE_BYTES


def maptrack_bytes(n_pages: int) -> int:
    """Size in bytes of a maptrack object for `n_pages` pages: whole pages."""
    return -(-(MAPTRACK_HEADER_BYTES + n_pages * PIN_BYTES) // PAGE_BYTES) * PAGE_BYTES


def init_maptrack(maptrack: Mapping, base: int, n_pages: int) -> None:
    """The broker: write the header of a new maptrack object."""
    header = maptrack.pointer("struct pv_maptrack *")
    header.magic, header.version = lib.PV_MAPTRACK_MAGIC, lib.PV_SHARED_VERSION
    header.base, header.n_pages = base, n_pages


def release_pins(entries: Mapping, n_pages: int, maptrack: Mapping, others: Sequence[Mapping]) -> int:
    """The broker: clear in `entries` what a process that is gone had pinned, keeping what `others` hold. How many."""
    pins = [other.pointer("struct pv_pin *", MAPTRACK_HEADER_BYTES) for other in others]
    cleared: int = lib.pv_grant_release(
        entries.pointer("struct pv_grant_entry *"),
        n_pages,
        maptrack.pointer("struct pv_pin *", MAPTRACK_HEADER_BYTES),
        ffi.new("struct pv_pin *[]", pins) if pins else ffi.NULL,
        len(pins),
    )
    return cleared


def _batch_of(ops: NDArray[Any]) -> "tuple[CData, int, NDArray[np.int16]]":
    """Address and number of the operations, and the column of their statuses."""
    if ops.dtype != COPY_OP:
        raise InvalidRequest(f"a batch of copies is an array of COPY_OP, not of {ops.dtype}")
    try:
        batch = ffi.from_buffer("struct pv_grant_copy_op[]", ops, require_writable=True)
    except (BufferError, ValueError) as error:
        raise InvalidRequest(f"a batch of copies is a contiguous array of COPY_OP to write to: {error}") from error
    return batch, ops.size, ops["status"]


def _buffer_of(local: NDArray[Any], *, writable: bool) -> tuple[CData, int]:
    buffer = ffi.from_buffer("uint8_t[]", local, require_writable=writable)
    return buffer, len(buffer)


class _Half:
    """What both halves share: the C struct, and an end after which its pointer is not used any more."""

    def __init__(self, core: CData, base: int, n_pages: int) -> None:
        self._core: CData | None = core
        self._pid = os.getpid()
        self.base = base
        self.n_pages = n_pages

    @property
    def core(self) -> CData:
        """The C struct; valid until `close`."""
        if self._core is None or os.getpid() != self._pid:
            raise Closed("these grants are closed, or belong to the parent of this process")
        return self._core

    def close(self) -> None:
        """Forget the memory; the mappings stay the caller's."""
        self._core = None

    def __repr__(self) -> str:
        state = " closed" if self._core is None else ""
        return f"<{type(self).__name__} grefs {self.base}..{self.base + self.n_pages - 1}{state}>"


class Granter(_Half):
    """The domain that owns the pages of a chunk. Any thread may call; for one reference one at a time."""

    def __init__(self, entries: Mapping, *, base: int, n_pages: int, peer: int) -> None:
        """`entries` stays the caller's and must outlive this; `peer` is the domid the pages are granted to.

        Where there is room behind the entries, each grant has a note there of its time.
        """
        if entries.n_bytes < n_pages * ENTRY_BYTES:
            raise InvalidRequest(f"{entries.n_bytes} bytes hold no {n_pages} grant entries")
        self._granted = ffi.new("struct pv_grant_private[]", n_pages)
        core = ffi.new("struct pv_granter *")
        core.entries, core.granted = entries.pointer("struct pv_grant_entry *"), self._granted
        core.base, core.n_pages = base, n_pages
        if entries.n_bytes >= n_pages * (ENTRY_BYTES + NOTE_BYTES):
            core.notes = entries.pointer("struct pv_grant_note *", n_pages * ENTRY_BYTES)
        self.peer = peer
        super().__init__(core, base, n_pages)

    def access(self, page: int, *, read_only: bool = False) -> int:
        """Grant page number `page` (0 to n_pages - 1) of the chunk to the peer; returns its reference.

        Raises `InvalidRequest` when there is no such page or it is granted already.
        """
        gref = self.base + page
        if not 0 <= page < self.n_pages or lib.pv_grant_access(self.core, gref, self.peer, gref, read_only):
            raise InvalidRequest(f"page {page} of {self.n_pages} does not exist or is granted already")
        return gref

    def revoke(self, gref: int) -> bool:
        """Take a page back. False while the peer still uses it: then the page must not be used for anything else.

        Raises `InvalidRequest` when `gref` is not granted.
        """
        result = -1
        if self.base <= gref < self.base + self.n_pages:
            result = lib.pv_grant_revoke(self.core, gref)
            if result in (0, -errno.EBUSY):
                return result == 0
        raise InvalidRequest(f"grant reference {gref} is not granted")

    def access_many(self, pages: "References", *, read_only: bool = False) -> "NDArray[np.uint32]":
        """Grant many pages in one call; their references. Raises as `access`, and then none of them is granted."""
        grefs = _references(pages) + np.uint32(self.base)
        pointer = ffi.from_buffer("uint32_t[]", grefs)
        done = lib.pv_grant_access_many(self.core, pointer, len(grefs), self.peer, read_only)
        if done < len(grefs):
            lib.pv_grant_revoke_many(self.core, pointer, done)
            raise InvalidRequest(f"page {pages[done]} of {self.n_pages} does not exist or is granted already")
        return grefs

    def revoke_many(self, grefs: "References") -> "NDArray[np.uint32]":
        """Take many pages back in one call; those that the peer still uses, which stay granted.

        Raises `InvalidRequest` when one of them was not granted; the others are taken back.
        """
        left = _references(grefs).copy()
        kept = lib.pv_grant_revoke_many(self.core, ffi.from_buffer("uint32_t[]", left), len(left))
        for gref in left[:kept].tolist():
            if not self.is_granted(gref):
                raise InvalidRequest(f"grant reference {gref} is not granted")
        return left[:kept]

    def is_granted(self, gref: int) -> bool:
        """Whether we granted the page and have not taken it back."""
        index = gref - self.base
        return 0 <= index < self.n_pages and bool(self.core.granted[index].flags)

    def in_use(self, gref: int) -> bool:
        """Whether the peer says it reads or writes the page now. A hint: the peer writes these bits."""
        if not self.base <= gref < self.base + self.n_pages:
            raise InvalidRequest(f"grant reference {gref} is not in {self!r}")
        return bool(lib.pv_grant_in_use(self.core, gref) > 0)

    def statistics(self) -> GranterStatistics:
        """The counters, live."""
        core = self.core
        grants, revokes = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        lib.pv_grant_counts(core, grants, revokes)
        return GranterStatistics(grants[0] - revokes[0], grants[0], revokes[0], core.busy)


class Mapper(_Half):
    """The domain that uses the pages of a chunk. Any thread may call."""

    def __init__(
        self, entries: Mapping, data: Mapping, maptrack: Mapping, *, base: int, n_pages: int, domid: int
    ) -> None:
        """The mappings stay the caller's and must outlive this; `domid` is our own, which entries must name.

        `PeerError` when the maptrack is none, of another version or of another chunk.
        """
        enough = entries.n_bytes >= n_pages * ENTRY_BYTES and data.n_bytes >= n_pages * PAGE_BYTES
        if not enough or maptrack.n_bytes < MAPTRACK_HEADER_BYTES + n_pages * PIN_BYTES:
            raise InvalidRequest(f"these objects are too small for a chunk of {n_pages} pages")
        header = maptrack.pointer("struct pv_maptrack *")
        expected = (lib.PV_MAPTRACK_MAGIC, lib.PV_SHARED_VERSION, base, n_pages)
        if (header.magic, header.version, header.base, header.n_pages) != expected:
            raise PeerError(f"the magic, version or range of the maptrack is not that of a chunk of {n_pages} pages")
        self._pinned = ffi.new("struct pv_pinned[]", n_pages)
        core = ffi.new("struct pv_mapper *")
        core.entries, core.data = entries.pointer("struct pv_grant_entry *"), data.pointer()
        core.pins, core.pinned = maptrack.pointer("struct pv_pin *", MAPTRACK_HEADER_BYTES), self._pinned
        core.base, core.n_pages, core.self, core.read_only = base, n_pages, domid, data.read_only
        self._batches: Remembered[tuple[CData, int, NDArray[np.int16]]] = Remembered()
        self._sources: Remembered[tuple[CData, int]] = Remembered()
        self._targets: Remembered[tuple[CData, int]] = Remembered()
        super().__init__(core, base, n_pages)

    def close(self) -> None:
        super().close()
        for remembered in (self._batches, self._sources, self._targets):
            remembered.forget()

    def map(self, gref: int, *, read_only: bool = False) -> int:
        """Pin a reference; returns the byte offset of its page in the data. Raises `GrantFailed`."""
        offset = ffi.new("uint64_t *")
        if status := lib.pv_grant_map(self.core, _gref(gref), read_only, offset):
            raise GrantFailed("map", gref, status)
        return int(offset[0])

    def unmap(self, gref: int, *, read_only: bool = False) -> None:
        """Undo one `map` made with the same `read_only`. Raises `GrantFailed` (BAD_HANDLE) when there was none."""
        if status := lib.pv_grant_unmap(self.core, _gref(gref), read_only):
            raise GrantFailed("unmap", gref, status)

    def copy_from(self, ops: Sequence[CopyOp], local: bytearray | memoryview) -> list[GrantStatus]:
        """Read granted pages into `local`; the status of each operation, none of which raises."""
        return self._copy(ops, local, to_grant=False)

    def copy_to(self, ops: Sequence[CopyOp], local: bytes | bytearray | memoryview) -> list[GrantStatus]:
        """Write from `local` into granted pages; the status of each operation, none of which raises."""
        return self._copy(ops, local, to_grant=True)

    def _copy(self, ops: Sequence[CopyOp], local: Any, *, to_grant: bool) -> list[GrantStatus]:
        batch = ffi.new("struct pv_grant_copy_op[]", len(ops))
        for slot, op in zip(batch, ops, strict=True):
            slot.gref, slot.local_offset = _gref(op.gref), _within(op.local_offset, 2**64, "local offset")
            slot.offset, slot.length = _within(op.offset, 2**16, "offset"), _within(op.length, 2**16, "length")
        with ffi.from_buffer("uint8_t[]", local, require_writable=not to_grant) as buffer:
            start = ffi.cast("uint8_t *", buffer)
            lib.pv_grant_copy(self.core, batch, len(ops), start, len(buffer), to_grant)
        return [GrantStatus(slot.status) for slot in batch]

    def copy_array(self, ops: NDArray[Any], local: Any, *, to_grant: bool) -> "NDArray[np.int16]":
        """Like `copy_from` (`to_grant`: `copy_to`) for an array of `COPY_OP`, in one call whatever its length.

        The statuses, which are a column of `ops`. Raises `InvalidRequest` for another array. The addresses of the last
        arrays are remembered, and the arrays with them until `close`: it pays to fill the same ones anew, and to have
        `local` as an array, too.
        """
        core = self.core
        batch, n, statuses = self._batches.get(ops) or self._batches.remember(ops, _batch_of(ops))
        if isinstance(local, np.ndarray):
            buffers = self._sources if to_grant else self._targets
            pointer, n_bytes = buffers.get(local) or buffers.remember(local, _buffer_of(local, writable=not to_grant))
            lib.pv_grant_copy(core, batch, n, pointer, n_bytes, to_grant)
        else:
            with ffi.from_buffer("uint8_t[]", local, require_writable=not to_grant) as buffer:
                lib.pv_grant_copy(core, batch, n, buffer, len(buffer), to_grant)
        return statuses

    def copy_between(self, ops: Sequence[CopyPair], to: "Mapper") -> list[GrantStatus]:
        """Copy from pages mapped here to pages of another mapper, or of this one; the status of each operation."""
        batch = ffi.new("struct pv_grant_copy_pair[]", len(ops))
        for slot, op in zip(batch, ops, strict=True):
            slot.from_gref, slot.to_gref = _gref(op.from_gref), _gref(op.to_gref)
            slot.from_offset = _within(op.from_offset, 2**16, "offset")
            slot.to_offset = _within(op.to_offset, 2**16, "offset")
            slot.length = _within(op.length, 2**16, "length")
        lib.pv_grant_copy_between(self.core, to.core, batch, len(ops))
        return [GrantStatus(slot.status) for slot in batch]

    @property
    def max_grants(self) -> int | None:
        """How many maps may stand at a time, the same reference as often as it is mapped; more have NO_SPACE.

        None: only the broker's quota limits them.
        """
        return self.core.max_handles or None

    @max_grants.setter
    def max_grants(self, n: int | None) -> None:
        if n is not None and not 0 < n < 2**32:
            raise InvalidRequest(f"{n} grants cannot be a limit")
        self.core.max_handles = n or 0

    def statistics(self) -> MapperStatistics:
        """The counters, live."""
        core = self.core
        return MapperStatistics(
            core.pinned_pages, core.maps, core.unmaps, core.copies, core.copied_bytes, core.failures
        )


def _references(numbers: "References") -> "NDArray[np.uint32]":
    """Raises `InvalidRequest` for numbers that are none."""
    if isinstance(numbers, np.ndarray):
        if numbers.dtype == np.uint32:
            return np.ascontiguousarray(numbers)
        numbers = numbers.tolist()
    try:
        return np.array(numbers, np.uint32)
    except (OverflowError, ValueError, TypeError) as error:
        raise InvalidRequest(f"not pages or references: {error}") from None


def _within(value: int, limit: int, name: str) -> int:
    if not 0 <= value < limit:
        raise InvalidRequest(f"{name} {value} is out of range")
    return value


def _gref(gref: int) -> int:
    return _within(gref, 2**32, "grant reference")
