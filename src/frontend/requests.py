# SPDX-License-Identifier: MIT
"""The request side of a block frontend: callers' requests over the slots of a ring.

Not thread-safe: the disk's lock guards it.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from paravirt.errors import Closed
from paravirt.hypervisor.client import Arena
from paravirt.protocol.blkif import MAX_REQUEST_BYTES, MAX_SEGMENTS, Operation, Status
from paravirt.ring.blkfront import Slots
from paravirt.ring.memory import address_of
from paravirt.ring.shared import FrontRing


class Io:
    """One request of at most 44 KiB: what was asked, and after completion what came of it."""

    __slots__ = ("data", "into", "length", "offset", "operation", "status")

    def __init__(
        self,
        operation: Operation,
        offset: int,
        length: int,
        data: memoryview | None = None,
        into: memoryview | None = None,
    ) -> None:
        """`offset` and `length` in bytes. `data`: what a write writes; `into`: where a read's bytes go, else `data`."""
        self.operation = operation
        self.offset = offset
        self.length = length
        self.data: memoryview | bytes | None = data
        self.into = into
        self.status: int | None = None  # None until answered


class RequestSlots:
    """The requests of one disk, over whatever ring it has at the moment."""

    def __init__(self, arena: Arena, n_slots: int, backend_domid: int) -> None:
        self._arena = arena
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
        """Requests that can be issued now."""
        return self._slots.free

    @property
    def held(self) -> int:
        """Slots out of use because the backend keeps a page of an answered request."""
        return self._slots.held

    @property
    def counters(self) -> Any:
        """C struct with the counts of what was answered."""
        return self._slots.core

    def issue(self, requests: Sequence[Io]) -> None:
        """Send requests, at most `free` of them."""
        if self.ring is None:
            raise Closed("the disk has no ring")
        slots, kept = self._slots, []
        for i, io in enumerate(requests):
            if io.operation is Operation.WRITE and io.data is not None:
                pointer, address = address_of(io.data)
                kept.append(pointer)  # keeps the caller's memory in place until it is copied
                slots.ask(i, io.operation, io.offset, io.length, address)
            else:
                slots.ask(i, io.operation, io.offset, io.length)
        chosen = slots.issue(self.ring, len(requests))
        for i, io in enumerate(requests):
            self._asked[chosen[i]] = io

    def reissue(self) -> int:
        """Send everything in flight once more, oldest first, on the present (new) ring; how many that are.

        Reads and writes of the same blocks thus keep the order in which they were issued.
        """
        if self.ring is None:
            raise Closed("the disk has no ring")
        return self._slots.reissue(self.ring)

    def watch(self, ring: FrontRing, spin_ns: int, timeout_s: float | None) -> int:
        """Take answers, after waiting for one; how many, for `complete`. 0 when the wait ended for another reason.

        The one call to be made *without* the disk's lock, by one thread at a time.
        """
        return self._slots.watch(ring, spin_ns, timeout_s)

    def complete(self, n: int) -> None:
        """Finish the requests of `n` answers taken by `watch`.

        `PeerError` when an answer matches no request of ours; those before it are finished.
        """
        done, error = self._slots.complete(n)
        for slot, status in done:
            io, self._asked[slot] = self._asked[slot], None
            if io is None:
                continue  # its caller has gone
            if status == Status.OKAY and io.operation is Operation.READ:
                start = slot * MAX_REQUEST_BYTES
                if io.into is None:
                    io.data = bytes(self._memory[start : start + io.length])
                else:
                    io.into[:] = self._memory[start : start + io.length]
            io.status = status
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


def split(operation: Operation, offset: int, view: memoryview) -> Iterable[Io]:
    """A transfer of any length between disk and `view`, as requests of at most 44 KiB."""
    for start in range(0, len(view), MAX_REQUEST_BYTES):
        part = view[start : start + MAX_REQUEST_BYTES]
        if operation is Operation.WRITE:
            yield Io(operation, offset + start, len(part), data=part)
        else:
            yield Io(operation, offset + start, len(part), into=part)
