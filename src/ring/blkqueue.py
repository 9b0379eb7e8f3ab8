# SPDX-License-Identifier: MIT
"""What callers ask of a block frontend, in C: transfers of many pieces over the slots of a ring.

A transfer is what one caller waits for as a whole; the C core cuts it into requests, merges neighbours, copies, and
says when all of it is answered. One call issues a batch and one completes it, whatever its length.
"""

import errno
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import InvalidRequest, ParavirtError, PeerError
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkfront import Slots
from paravirt.ring.blkif import bytes_of
from paravirt.ring.event import WaitResult
from paravirt.ring.memory import PAGE_BYTES, pinned
from paravirt.ring.shared import FrontRing

CData = Any

_PIECE = struct.Struct("<QQQIIII")  # struct pv_blkfront_ask
_SHARES_PER_SLOT = 8
RUN_REQUESTS = 4096
"""Answers after which `TransferQueue.run` comes back, so that nobody is kept waiting for the lock."""

ANSWERED: int = lib.PV_BLKQUEUE_ANSWERED
IN_FLIGHT: int = lib.PV_BLKQUEUE_IN_FLIGHT
FAILED: int = lib.PV_BLKQUEUE_FAILED
LATER: int = lib.PV_BLKQUEUE_LATER

read_now, write_now = lib.pv_blkqueue_read, lib.pv_blkqueue_write
"""The short ways, called for every single read or write: as the C functions."""


class PagesKept(PeerError):
    """Nothing is in flight, and nothing can be sent, until the backend lets go of pages that it has no use for."""


class Transfer:
    """Pieces of a disk and of memory, read or written as a whole. The memory stays in place as long as this lives."""

    __slots__ = ("_bytes", "core", "kept", "n", "pieces")

    def __init__(self, n: int) -> None:
        """Room for `n` pieces, to be `put`, or for `fill`."""
        self.n = n
        self.pieces: CData = ffi.new("struct pv_blkfront_ask[]", n)
        self.core: CData = ffi.new("struct pv_blkqueue_io *")
        self.core.pieces, self.core.n_pieces = self.pieces, n
        self.kept: list[Any] = []  # what keeps memory in place
        self._bytes: Any = None

    def put(self, i: int, operation: int, offset: int, length: int, data: int = 0, flag: int = 0) -> None:
        """Piece `i`: bytes on the disk, an address, a discard's flag. Checked by the caller."""
        if self._bytes is None:
            self._bytes = bytes_of(self.pieces).data
        _PIECE.pack_into(self._bytes, i * _PIECE.size, offset, data, length, operation, flag, 0, 0)

    @property
    def done(self) -> bool:
        """All of it is answered, or it was forgotten."""
        return bool(self.core.done)

    @property
    def failure(self) -> tuple[int, int, int, int] | None:
        """(status, operation, offset, length) of the first request of it that failed."""
        core = self.core
        if not core.status:
            return None
        return core.status, core.failed_operation, core.failed_offset, core.failed_length


class TransferQueue:
    """The transfers of one ring at a time, over its slots. The owner's lock guards it, but for `watch`."""

    def __init__(self, slots: Slots, n_slots: int, *, merge: bool = True) -> None:
        self.slots = slots
        n_shares = n_slots * _SHARES_PER_SLOT
        self._arrays = {
            "shares": ffi.new("struct pv_blkqueue_share[]", n_shares),
            "first_share": ffi.new("uint32_t[]", n_slots),
            "run_of_slot": ffi.new("uint32_t[]", n_slots),
            "responses": ffi.new("struct pv_blkif_response[]", n_slots),
            "answers": ffi.new("struct pv_blkfront_answer[]", n_slots),
        }
        self.core: CData = ffi.new("struct pv_blkqueue *")
        self.core.front, self.core.n_shares, self.core.merge = slots.core, n_shares, merge
        self.core.sector_bytes = 512
        for name, array in self._arrays.items():
            setattr(self.core, name, array)
        lib.pv_blkqueue_init(self.core)

    def set_disk(self, n_bytes: int, sector_bytes: int, max_bytes: int) -> None:
        """Size of the disk, of its sectors, and the most of one request."""
        self.core.disk_bytes, self.core.sector_bytes, self.core.max_bytes = n_bytes, sector_bytes, max_bytes

    def set_arena(self, address: int, n_pages: int, first_gref: int) -> None:
        """Where buffers can be."""
        self._arrays["run_of_page"] = ffi.new("uint32_t[]", n_pages)
        self._arrays["in_flight"] = ffi.new("uint32_t[]", n_pages + 1)
        self.core.run_of_page, self.core.in_flight = self._arrays["run_of_page"], self._arrays["in_flight"]
        self.core.buffers_start, self.core.buffers_gref = address, first_gref
        self.core.buffers_pages = n_pages

    def set_buffer(self, first_page: int, n_pages: int, number: int) -> None:
        """These pages of the arena are a buffer, by a number of 1 or more; 0: not any more."""
        lib.pv_blkqueue_set_buffer(self.core, first_page, n_pages, number)

    def buffer_in_flight(self, number: int) -> int:
        """Requests that are reading or writing a buffer."""
        n: int = self.core.in_flight[number]
        return n

    def fill(
        self, transfer: Transfer, operation: int, offsets: NDArray[np.int64], n_bytes: int, address: int
    ) -> int | None:
        """Pieces of `n_bytes` at each offset, their memory side by side from `address` on. The first offset that is
        outside of the disk or between sectors; None when all are right.
        """
        pointer = ffi.from_buffer("int64_t[]", offsets)
        right = lib.pv_blkqueue_fill(self.core, transfer.pieces, pointer, transfer.n, address, n_bytes, operation)
        return None if right == transfer.n else int(offsets[right])

    def submit(self, transfer: Transfer, number: int = 0) -> None:
        """Put it behind those that wait; the caller keeps it until it is done.

        With a `number` it comes out of `next_done` then.
        """
        transfer.core.number, transfer.core.announce = number, number != 0
        lib.pv_blkqueue_submit(self.core, transfer.core)

    def issue(self, ring: FrontRing) -> None:
        """Send what waits, as far as there is room. Raises `PagesKept`, `PeerError`."""
        if self.core.first:
            self._settle(ring, lib.pv_blkqueue_issue(self.core, ring.core))

    def run(self, ring: FrontRing, transfer: Transfer, spin_ns: int) -> None:
        """Send, spin for answers and complete them until `transfer` is done or nothing comes for that long.

        Raises `PagesKept`, `PeerError`.
        """
        self._settle(ring, lib.pv_blkqueue_run(self.core, ring.core, transfer.core, spin_ns, RUN_REQUESTS))

    def take(self, ring: FrontRing, spin_ns: int = 0) -> int:
        """Take what is answered, for `complete`; how many."""
        n = lib.pv_blkqueue_take(self.core, ring.core, spin_ns)
        return self._settle(ring, n)

    def watch(self, ring: FrontRing, spin_ns: int, timeout_s: float | None) -> None:
        """`take`, after waiting for an answer; none when the wait ended for another reason.

        To be called *without* the lock, by one thread at a time. What was taken counts also when a signal handler
        raises.
        """
        if not self.take(ring, spin_ns) and ring.wait(timeout_s=timeout_s) is WaitResult.EVENT:
            self.take(ring)

    @property
    def taken(self) -> int:
        """Answers for `complete`."""
        n: int = self.core.n_taken
        return n

    def complete(self) -> None:
        """Finish what `take` has taken. `PeerError` when an answer matches no request; those before it are finished."""
        if self.core.n_taken and not lib.pv_blkqueue_complete(self.core):
            raise self.slots.wrong()

    def adopt(self, slot: int, transfer: Transfer) -> None:
        """Wait for the request in a slot, which the short way has left in flight, as a transfer of one piece."""
        lib.pv_blkqueue_adopt(self.core, slot, transfer.core)

    def forget(self, transfer: Transfer) -> None:
        """Nothing is written to its memory from now on, but into buffers."""
        lib.pv_blkqueue_forget(self.core, transfer.core)

    def next_done(self) -> int:
        """The number of another transfer that is done; 0: there is none."""
        number: int = lib.pv_blkqueue_next_done(self.core)
        return number

    def settle(self, ring: FrontRing, status: int) -> None:
        """What is left to do after `read_now` or `write_now`: the slow way to notify; or an error."""
        self._settle(ring, status)

    def _settle(self, ring: FrontRing, status: int) -> int:
        if 0 <= status <= 0xFFFFFFFF:
            return status
        if status == -errno.EBADMSG:
            raise self.slots.wrong()
        if status == -errno.EBUSY:
            raise PagesKept(f"the backend keeps the pages of {self.slots.held} answered requests")
        if status in (-errno.EINVAL, -errno.ENOSPC):
            raise ParavirtError(f"a request could not be sent: {errno.errorcode[-status]}")
        return ring.settle_push(status)


def address_in(buffer: Any, *, writable: bool = False) -> tuple[CData, int, int]:
    """A C pointer to all bytes of a buffer (bytes, memoryview, numpy array ...), which keeps it in place as long as the
    pointer lives; its address; its length in bytes. Raises `InvalidRequest` when it is not contiguous or not writable.
    """
    try:
        pointer = pinned(buffer, writable=writable)
    except (BufferError, ValueError, TypeError) as error:
        raise InvalidRequest(f"not a contiguous {'writable ' if writable else ''}buffer: {error}") from error
    return pointer, int(ffi.cast("uintptr_t", pointer)), len(pointer)


def place_cell() -> CData:
    """Where `read_now` and `write_now` say where."""
    return ffi.new("int64_t *")


def pages_of(n_bytes: int) -> int:
    """Pages that hold so many bytes."""
    return -(-n_bytes // PAGE_BYTES)
