# SPDX-License-Identifier: MIT
"""The request side of a block frontend: callers' requests over the slots of a ring.

Not thread-safe: the disk's lock guards it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from paravirt.errors import Closed
from paravirt.hypervisor.client import Arena
from paravirt.protocol.blkif import (
    INDIRECT_PAGE_SEGMENTS,
    MAX_INDIRECT_SEGMENTS,
    MAX_REQUEST_BYTES,
    MAX_SEGMENTS,
    PAGE_BYTES,
    Operation,
    Status,
)
from paravirt.ring.blkfront import Slots, slots_of
from paravirt.ring.memory import address_of
from paravirt.ring.shared import FrontRing


class Io:
    """One request: what was asked, and after completion what came of it."""

    __slots__ = ("data", "flag", "into", "length", "offset", "operation", "status")

    def __init__(
        self,
        operation: Operation,
        offset: int,
        length: int,
        data: memoryview | None = None,
        into: memoryview | None = None,
        flag: int = 0,
    ) -> None:
        """`offset` and `length` in bytes. `data`: what a write writes; `into`: where a read's bytes go, else `data`,
        which is for at most 44 KiB; `flag`: of a discard.
        """
        self.operation = operation
        self.offset = offset
        self.length = length
        self.data: memoryview | bytes | None = data
        self.into = into
        self.flag = flag
        self.status: int | None = None  # None until answered


class RequestSlots:
    """The requests of one disk, over whatever ring it has at the moment."""

    def __init__(self, arena: Arena, n_slots: int, backend_domid: int) -> None:
        self._arena = arena
        self.n_slots = n_slots
        self._pages = arena.allocate(n_slots * MAX_SEGMENTS)
        self._memory = self._pages.view
        self._slots = Slots(arena.granter, self._pages.pointer(), self._pages.gref, n_slots, backend_domid)
        self._asked: list[Io | None] = [None] * n_slots  # by slot
        self.ring: FrontRing | None = None

    @property
    def in_flight(self) -> int:
        return self._slots.in_flight

    @property
    def free(self) -> int:
        """Slots that can be used now."""
        return self._slots.free

    def reclaim(self) -> int:
        """`free`, after another look at what is `held`."""
        return self._slots.reclaim()

    @property
    def held(self) -> int:
        """Slots out of use because the backend keeps a page of an answered request."""
        return self._slots.held

    @property
    def counters(self) -> Any:
        """C struct with the counts of what was answered."""
        return self._slots.core

    def issue(self, requests: Sequence[Io]) -> None:
        """Send requests, which take at most `free` slots."""
        ring, kept = self._connected(), [self._ask(i, io) for i, io in enumerate(requests)]
        chosen = self._slots.issue(ring, len(requests))
        del kept
        for i, io in enumerate(requests):
            self._asked[chosen[i]] = io

    def exchange(self, io: Io, spin_ns: int) -> None:
        """With nothing in flight: send one request and spin a while for its answer; it is finished or in flight
        then.
        """
        ring, kept = self._connected(), self._ask(0, io)
        slot, status = self._slots.exchange(ring, spin_ns)
        del kept
        if status is None:
            self._asked[slot] = io
        else:
            self._finish(io, slot, status)

    def _connected(self) -> FrontRing:
        if self.ring is None:
            raise Closed("the disk has no ring")
        return self.ring

    def _ask(self, i: int, io: Io) -> object:
        """Prepare the `i`th request; what must be kept until it is issued, so that a write's data stays in place."""
        if io.data is None:
            self._slots.ask(i, io.operation, io.offset, io.length, flag=io.flag)
            return None
        pointer, address = address_of(io.data)
        self._slots.ask(i, io.operation, io.offset, io.length, address)
        return pointer

    def _finish(self, io: Io, slot: int, status: int) -> None:
        if status == Status.OKAY and io.operation is Operation.READ:
            start = slot * MAX_REQUEST_BYTES
            if io.into is None:
                io.data = self._memory[start : start + io.length].tobytes()
            elif io.length > MAX_REQUEST_BYTES:
                self._slots.gather(slot, address_of(io.into)[0], io.length)
            else:
                io.into[:] = self._memory[start : start + io.length]
        io.status = status

    def reissue(self) -> int:
        """Send everything in flight once more, oldest first, on the present (new) ring; how many that are.

        Reads and writes of the same blocks thus keep the order in which they were issued.
        """
        return self._slots.reissue(self._connected())

    def watch(self, ring: FrontRing, spin_ns: int, timeout_s: float | None) -> None:
        """Take answers for `complete`, after waiting for one; none when the wait ended for another reason.

        The one call to be made *without* the disk's lock, by one thread at a time.
        """
        self._slots.watch(ring, spin_ns, timeout_s)

    @property
    def taken(self) -> int:
        """Answers that `watch` took and `complete` has not seen yet."""
        return self._slots.taken

    def complete(self) -> None:
        """Finish the requests whose answers `watch` took.

        `PeerError` when an answer matches no request of ours; those before it are finished.
        """
        done, error = self._slots.complete()
        for slot, status in done:
            io, self._asked[slot] = self._asked[slot], None
            if io is not None:  # else its caller has gone
                self._finish(io, slot, status)
        if error is not None:
            raise error

    def forget(self, requests: Iterable[Io]) -> None:
        """Their callers have gone: what is answered later goes nowhere."""
        gone = set(map(id, requests))
        self._asked = [None if id(io) in gone else io for io in self._asked]

    def close(self) -> None:
        """Give the pages back; the arena keeps those the backend has not let go."""
        self._memory.release()
        self._arena.free(self._pages)


def split(operation: Operation, offset: int, view: memoryview, max_bytes: int) -> Iterable[Io]:
    """A transfer of any length between disk and `view`, as requests of at most `max_bytes`.

    Of a write with a barrier the last one has it, and is small: it waits for the others.
    """
    end = len(view)
    if operation is Operation.WRITE_BARRIER:
        tail = min(end, MAX_REQUEST_BYTES)
        yield from split(Operation.WRITE, offset, view[: end - tail], max_bytes)
        yield Io(operation, offset + end - tail, tail, data=view[end - tail :])
        return
    for start in range(0, end, max_bytes):
        part = view[start : start + max_bytes]
        if operation is Operation.WRITE:
            yield Io(operation, offset + start, len(part), data=part)
        else:
            yield Io(operation, offset + start, len(part), into=part)


def max_request_bytes(n_slots: int, max_indirect_segments: int) -> int:
    """The most one request moves: what the backend takes, but no more than a quarter of the slots, so that the next
    ones are under way while it is served.
    """
    pages = n_slots // 4 * MAX_SEGMENTS
    segments = min(max_indirect_segments, MAX_INDIRECT_SEGMENTS, pages - -(-pages // INDIRECT_PAGE_SEGMENTS))
    return max(segments, MAX_SEGMENTS) * PAGE_BYTES


def slots_needed(n_bytes: int) -> int:
    """Slots of a request that moves so many bytes."""
    return 1 if n_bytes <= MAX_REQUEST_BYTES else slots_of(n_bytes)
