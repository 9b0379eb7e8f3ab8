# SPDX-License-Identifier: MIT
"""The request side of a block frontend: slots, shadow, ring.

Every ring slot owns eleven pages of the arena shared with the backend, so a request's buffers are found by its id,
which is the slot's number. The *shadow* is our private copy of every request in flight: responses are believed only as
far as they match it, and after the backend is replaced the same requests are sent again on the new ring.

Not thread-safe: the disk's lock guards it.
"""

import struct
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np

from paravirt.errors import PeerError
from paravirt.hypervisor.client import Arena, PageRun
from paravirt.protocol.blkif import MAX_REQUEST_BYTES, MAX_SEGMENTS, PAGE_BYTES, SECTOR_BYTES, Operation, Status
from paravirt.ring import blkif
from paravirt.ring.event import WaitResult
from paravirt.ring.shared import FrontRing

_HEADER = struct.Struct("<BBH4xQQ")  # operation, nr_segments, handle, id, sector
_SEGMENT = struct.Struct("<IBB2x")  # gref, first_sect, last_sect
_RESPONSE = struct.Struct("<QBxh4x")  # id, operation, status


class Io:
    """One request of at most 44 KiB: what was asked, and after completion what came of it."""

    __slots__ = ("data", "length", "offset", "operation", "slot", "status")

    def __init__(self, operation: Operation, offset: int, length: int, data: memoryview | None = None) -> None:
        """`offset` and `length` in bytes. `data`: what a write writes, where a read's bytes go (None: keep as
        bytes).
        """
        self.operation = operation
        self.offset = offset
        self.length = length
        self.data: memoryview | bytes | None = data
        self.slot = -1
        self.status: int | None = None  # None until answered


class RequestSlots:
    """The slots of one disk, over whatever ring it has at the moment."""

    def __init__(self, arena: Arena, n_slots: int, backend_domid: int) -> None:
        self._pages: PageRun = arena.allocate(n_slots * MAX_SEGMENTS)
        self._memory = self._pages.view
        self._arena = arena
        self._grants = blkif.FrontendGrants(arena.granter, backend_domid)
        self._requests = blkif.new_requests(n_slots)  # the shadow's wire form, by slot
        self._shadow_bytes = blkif.bytes_of(self._requests).data
        self._shadow: list[Io | None] = [None] * n_slots
        self._order: dict[int, None] = {}  # slots in flight, oldest first
        self._free = list(range(n_slots - 1, -1, -1))
        self._held: deque[int] = deque()  # slots whose pages the backend has not let go
        # Arrays, because a ring remembers the addresses of arrays; filled and read through memoryviews.
        self._answers = np.zeros(n_slots * blkif.RESPONSE_BYTES, np.uint8)
        self._answers_view = self._answers.data
        self._batch = np.zeros(n_slots * blkif.REQUEST_BYTES, np.uint8)
        self._batch_view = self._batch.data
        self.ring: FrontRing | None = None

    @property
    def in_flight(self) -> int:
        return len(self._order)

    @property
    def free(self) -> int:
        """Requests that can be issued now."""
        return len(self._free)

    @property
    def held(self) -> int:
        """Slots out of use because the backend keeps a grant of an answered request."""
        return len(self._held)

    def issue(self, requests: list[Io]) -> None:
        """Send requests, at most `free` of them."""
        ring = self.ring
        if ring is None:
            raise PeerError("the disk has no ring")
        size = blkif.REQUEST_BYTES
        for n, io in enumerate(requests):
            slot = self._free.pop()
            at = slot * size
            self._fill(io, slot, at)
            try:
                self._grants.grant(blkif.request_pointer(self._requests, slot), 1)
            except PeerError:
                self._free.append(slot)
                io.slot = -1
                self._push(n)
                raise
            self._batch_view[n * size : (n + 1) * size] = self._shadow_bytes[at : at + size]
            self._shadow[slot] = io
            self._order[slot] = None
        self._push(len(requests))

    def reissue(self) -> int:
        """Send everything in flight once more, oldest first, on the present (new) ring; how many that are.

        The pages are granted still. Reads and writes of the same blocks thus keep the order in which they were issued.
        """
        size = blkif.REQUEST_BYTES
        for n, slot in enumerate(self._order):
            self._batch_view[n * size : (n + 1) * size] = self._shadow_bytes[slot * size : (slot + 1) * size]
        self._push(len(self._order))
        return len(self._order)

    def watch(self, ring: FrontRing, spin_ns: int, timeout_s: float | None) -> int:
        """Take answers, after waiting for one; how many, for `complete`. 0 when the wait ended for another reason.

        The one call to be made *without* the disk's lock, by one thread at a time.
        """
        n = ring.take(self._answers, spin_ns=spin_ns)
        if n == 0 and ring.wait(timeout_s=timeout_s) is WaitResult.EVENT:
            n = ring.take(self._answers)
        return n

    def complete(self, n: int, count: Callable[[Io], None]) -> None:
        """Finish the requests of `n` answers taken by `watch`, and `count` each.

        `PeerError` when an answer matches no request of ours.
        """
        for at in range(0, n * blkif.RESPONSE_BYTES, blkif.RESPONSE_BYTES):
            count(self._complete(*_RESPONSE.unpack_from(self._answers_view, at)))
        if n and self._held:
            self._release_held()

    def abandon(self) -> list[Io]:
        """Forget what is in flight (the disk is closing); the requests that will never be answered."""
        lost = [io for io in self._shadow if io is not None]
        self._shadow = [None] * len(self._shadow)
        self._order.clear()
        return lost

    def _push(self, n: int) -> None:
        assert self.ring is not None
        if n and self.ring.push(self._batch, n) != n:
            raise PeerError("the ring holds fewer requests than it has slots")

    def _fill(self, io: Io, slot: int, at: int) -> None:
        """The wire form of a request, and a write's data into the slot's pages."""
        io.slot = slot
        length = io.length
        n_segments = (length + PAGE_BYTES - 1) // PAGE_BYTES
        _HEADER.pack_into(self._shadow_bytes, at, io.operation, n_segments, 0, slot, io.offset // SECTOR_BYTES)
        gref = self._pages.gref + slot * MAX_SEGMENTS
        at += _HEADER.size
        while length > 0:
            _SEGMENT.pack_into(self._shadow_bytes, at, gref, 0, (min(length, PAGE_BYTES) - 1) // SECTOR_BYTES)
            gref += 1
            at += _SEGMENT.size
            length -= PAGE_BYTES
        if io.operation == Operation.WRITE and io.data is not None:
            start = slot * MAX_REQUEST_BYTES
            self._memory[start : start + io.length] = io.data

    def _complete(self, slot: int, operation: int, status: int) -> Io:
        io = self._shadow[slot] if slot < len(self._shadow) else None
        if io is None:
            raise PeerError(f"the backend answered request {slot}, which is not in flight")
        if operation != io.operation:
            raise PeerError(f"the backend answered a {io.operation.name} with operation {operation}")
        if status not in (Status.OKAY, Status.ERROR, Status.EOPNOTSUPP):
            raise PeerError(f"the backend answered with status {status}")
        if status == Status.OKAY and io.operation == Operation.READ:
            start = slot * MAX_REQUEST_BYTES
            if io.data is None:
                io.data = bytes(self._memory[start : start + io.length])
            else:
                io.data[:] = self._memory[start : start + io.length]  # type: ignore[index]
        self._shadow[slot] = None
        del self._order[slot]
        if self._grants.revoke(blkif.request_pointer(self._requests, slot)):
            self._free.append(slot)
        else:
            # A backend that answers before it lets go of the page could still write into it: not for another use.
            self._held.append(slot)
        io.status = status
        return io

    def _release_held(self) -> None:
        for _ in range(len(self._held)):
            slot = self._held.popleft()
            if self._grants.revoke(blkif.request_pointer(self._requests, slot)):
                self._free.append(slot)
            else:
                self._held.append(slot)

    def close(self) -> None:
        """Give the pages back; the arena keeps those the backend has not let go."""
        self._memory.release()
        self._arena.free(self._pages)


def split(operation: Operation, offset: int, length: int, data: memoryview | None) -> Iterable[Io]:
    """A transfer of any length as requests of at most 44 KiB."""
    for start in range(0, length, MAX_REQUEST_BYTES):
        n = min(MAX_REQUEST_BYTES, length - start)
        yield Io(operation, offset + start, n, None if data is None else data[start : start + n])
