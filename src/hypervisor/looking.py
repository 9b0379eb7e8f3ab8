# SPDX-License-Identifier: MIT
"""Looking at live rings: every process shows its own, Dom0 sees all of them.

A process keeps the ends of its rings in statistics objects (c_ext/pv_look.h) that the broker made. `Looker` walks over
those of all processes, pairs the two ends of each ring, and reads the shared half from the arena itself. Whose a record
is, and its process id, come from the broker; everything else in it is what that process says. Nothing here stops or
slows what it looks at, and nothing is counted against anybody.
"""

import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from paravirt.errors import InvalidRequest, NotFound
from paravirt.hypervisor.messages import Op, get_text
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkif_counters import BlkifCounters, counters_of
from paravirt.ring.grant import ENTRY_BYTES, NOTE_BYTES
from paravirt.ring.looking import LookedObject, parse_layout
from paravirt.ring.looking import Wish as Wish
from paravirt.ring.memory import PAGE_BYTES
from paravirt.ring.ring_statistics import RingStatistics, statistics_of

if TYPE_CHECKING:
    from paravirt.hypervisor.client import Hypervisor

CData = Any

_HEADER = struct.Struct("<4I")
BUCKETS_NS: tuple[int, ...] = tuple(lib.pv_look_bucket_ns(bucket) for bucket in range(lib.PV_LOOK_BUCKETS + 1))
"""Where the buckets of a latency histogram begin; the last one is where the last bucket ends."""
WISH_S = 3.0
"""What a tool wants of a record is wanted so long; it says so again in time, and a dead tool need not take it back."""


@dataclass(frozen=True, slots=True)
class Header:
    """The shared indexes of a ring."""

    req_prod: int
    req_event: int
    rsp_prod: int
    rsp_event: int


@dataclass(frozen=True)
class LookedEnd:
    """A copy of one end of a ring, as it stood at `at_ns`. What it says was checked for sense, not for truth."""

    object: int
    record: int
    generation: int
    pid: int
    """Of the process that has it, as the broker knows; 0: not known."""
    domid: int
    at_ns: int
    core: CData
    """`struct pv_look_record *`, private."""

    @property
    def key(self) -> tuple[int, int, int]:
        """Names this end among all that ever were on this host."""
        return self.object, self.record, self.generation

    @property
    def is_front(self) -> bool:
        return bool(self.core.ring.is_front)

    @property
    def size(self) -> int:
        """Entries of the ring."""
        return int(self.core.ring.size)

    @property
    def entry_bytes(self) -> int:
        return int(self.core.ring.entry_bytes)

    @property
    def request_bytes(self) -> int:
        ring = self.core.ring
        return int(ring.out_bytes if ring.is_front else ring.in_bytes)

    @property
    def response_bytes(self) -> int:
        ring = self.core.ring
        return int(ring.in_bytes if ring.is_front else ring.out_bytes)

    @property
    def prod(self) -> int:
        """Next index it produces."""
        return int(self.core.ring.prod)

    @property
    def cons(self) -> int:
        """Next index it consumes."""
        return int(self.core.ring.cons)

    @property
    def outstanding(self) -> int:
        """Requests pushed (front) or taken (back) that have no response yet, of this end's view."""
        n = (self.prod - self.cons if self.is_front else self.cons - self.prod) % 2**32
        return min(n, self.size)

    @property
    def dead(self) -> bool:
        """It found that its peer broke the protocol."""
        return bool(self.core.ring.dead)

    @property
    def port(self) -> int:
        """Its event channel; 0: none."""
        return int(self.core.port)

    @property
    def kind(self) -> str:
        """Class of the device."""
        return _name(self.core.kind)

    @property
    def protocol(self) -> str:
        """Name of the messages' protocol."""
        return _name(self.core.protocol)

    @property
    def device_id(self) -> int:
        return int(self.core.device_id)

    @property
    def queue(self) -> int:
        return int(self.core.queue)

    @property
    def peer_domid(self) -> int:
        """Whose the other end is."""
        return int(self.core.peer_domid)

    @property
    def granter_domid(self) -> int:
        """In whose pages the ring stands."""
        return int(self.core.granter_domid)

    @property
    def refs(self) -> tuple[int, ...]:
        """References of the ring's pages."""
        return tuple(self.core.refs[i] for i in range(self.core.n_refs))

    @property
    def age_s(self) -> float:
        """Since the end was made."""
        return float(max(0, self.at_ns - self.core.created_ns)) / 1e9

    @cached_property
    def statistics(self) -> RingStatistics:
        return statistics_of(self.core.ring, is_front=self.is_front)

    @cached_property
    def latency(self) -> tuple[int, ...]:
        """Messages by latency, in buckets that begin at `BUCKETS_NS`. Front: from push to take of the k-th request and
        response; back: from take to push."""
        return tuple(self.core.latency)

    @cached_property
    def blkif(self) -> BlkifCounters | None:
        """Requests and bytes of an end of a block device's queue; None when it counts none."""
        return counters_of(self.core)

    @property
    def layouts(self) -> "tuple[np.dtype[Any] | None, np.dtype[Any] | None]":
        """Of requests and responses, as far as it says."""
        texts = (bytes(ffi.buffer(field)).split(b"\0", 1)[0] for field in (self.core.request, self.core.response))
        request, response = texts
        return parse_layout(request, self.request_bytes), parse_layout(response, self.response_bytes)

    def age_of(self, index: int) -> tuple[float, float | None]:
        """Seconds since the request at `index` was pushed (front) or taken (back): at least, at most (None: not known).

        Known from stamps: exact to 4 ms for one that found the ring empty, else between two of them.
        """
        bounds = ffi.new("uint64_t[2]")
        lib.pv_look_age(self.core, index % 2**32, self.at_ns, bounds, bounds + 1)
        return bounds[0] / 1e9, None if bounds[1] == 2**64 - 1 else bounds[1] / 1e9


def _name(field: CData) -> str:
    """What is shown on terminals: printable, and no separator of ours."""
    return "".join(c if c.isprintable() and c not in " /:" else "?" for c in get_text(field))


def _makes_sense(core: CData) -> bool:
    ring = core.ring
    size, entry = ring.size, ring.entry_bytes
    return bool(
        0 < size <= lib.PV_RING_MAX_BYTES
        and size & (size - 1) == 0
        and core.n_refs
        and size * entry + lib.PV_RING_HEADER_BYTES <= core.n_refs * PAGE_BYTES
        and 0 < ring.out_bytes <= entry
        and 0 < ring.in_bytes <= entry
    )


@dataclass(frozen=True)
class LiveRing:
    """A ring with those of its ends that can be seen."""

    front: LookedEnd | None
    back: LookedEnd | None

    @property
    def end(self) -> LookedEnd:
        """One that is there; Dom0's if there are both, whose label can be believed."""
        end = self.back or self.front
        assert end is not None
        return end

    @property
    def ends(self) -> dict[str, LookedEnd]:
        """Those that are there, by "front" and "back"."""
        pairs = (("front", self.front), ("back", self.back))
        return {name: end for name, end in pairs if end is not None}

    @property
    def domid(self) -> int:
        """Of the frontend."""
        return self.end.granter_domid

    @property
    def refs(self) -> tuple[int, ...]:
        return self.end.refs

    @property
    def name(self) -> str:
        """Class, domain and number of its device: vbd/1/51712, with /q1 for a queue but the first."""
        end = self.end
        queue = f"/q{end.queue}" if end.queue else ""
        return f"{end.kind or 'ring'}/{self.domid}/{end.device_id}{queue}"

    @property
    def place(self) -> str:
        """Domain and reference of its first page: 1:8. No two live rings have the same."""
        return f"{self.domid}:{self.refs[0]}"

    def succeeds(self, other: "LiveRing") -> bool:
        """Whether it is that ring, or the one that its device had made in its place."""
        return (self.name, self.end.protocol) == (other.name, other.end.protocol)

    def is_named(self, text: str) -> bool:
        """Whether a user means it by `text`: of several rings of a queue one is meant with its part, vif/1/0/ctrl."""
        part = self.end.protocol.rpartition("-")[2]
        names = (self.name, f"{self.name}/q{self.end.queue}")
        return text in (*names, self.place, *(f"{name}/{part}" for name in names))


class LookedArena:
    """An arena, to read only. Everything is read with system calls: a domain can shrink some of these objects under a
    mapping."""

    def __init__(self, message: CData, entries_fd: int, data_fd: int) -> None:
        """Takes the descriptors."""
        self.domid: int = message.domid
        self.peer_domid: int = message.peer_domid
        self.base: int = message.gref
        self.n_pages: int = message.n_pages
        self.read_only = bool(message.flags & lib.PV_ARENA_READ_ONLY)
        self.posix = bool(message.flags & lib.PV_ARENA_POSIX)
        self.ended = bool(message.flags & lib.PV_ARENA_ENDED)
        self.n_maps: int = message.n_maps
        """Processes of the peer that map it."""
        self.pid: int = message.pid
        """Of the process that made it; 0: not known, or a reserved page."""
        self._entries_fd, self._data_fd = entries_fd, data_fd

    def entries(self) -> bytes:
        """All grant entries as they are now: `struct pv_grant_entry` each, of reference `base` and up."""
        return _read(self._entries_fd, self.n_pages * ENTRY_BYTES, 0)

    def notes(self) -> bytes:
        """The notes on them: `struct pv_grant_note` each."""
        return _read(self._entries_fd, self.n_pages * NOTE_BYTES, self.n_pages * ENTRY_BYTES)

    def holds(self, gref: int) -> bool:
        """Whether a reference of its domain is in this arena."""
        return self.base <= gref < self.base + self.n_pages

    def read(self, gref: int, n_bytes: int = PAGE_BYTES, offset_bytes: int = 0) -> bytes:
        """From the page of a reference on. Raises `InvalidRequest` outside of the arena."""
        start = (gref - self.base) * PAGE_BYTES + offset_bytes
        if not 0 <= start <= self.n_pages * PAGE_BYTES - n_bytes:
            raise InvalidRequest(f"reference {gref} is not in the arena {self!r}")
        return _read(self._data_fd, n_bytes, start)

    def read_pages(self, refs: Sequence[int]) -> bytes:
        """Whole pages, side by side in this order: the memory of a ring."""
        return b"".join(self.read(gref) for gref in refs)

    def close(self) -> None:
        """Harmless when repeated."""
        fds, self._entries_fd, self._data_fd = (self._entries_fd, self._data_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LookedArena of domain {self.domid}, grefs {self.base}..{self.base + self.n_pages - 1}>"


def _read(fd: int, n_bytes: int, offset_bytes: int) -> bytes:
    """What a domain has cut off is zeros."""
    return os.pread(fd, n_bytes, offset_bytes).ljust(n_bytes, b"\0")


@dataclass(slots=True)
class _Seen:
    looked: LookedObject
    domid: int
    pid: int


class Looker:
    """Dom0's view of all live rings of a host. Not thread-safe; a context manager.

    Descriptors and mappings of objects are kept from one look to the next, until their process is gone.
    """

    def __init__(self, hypervisor: "Hypervisor") -> None:
        """Over Dom0's connection, which stays the caller's."""
        self._hypervisor = hypervisor
        self._seen: dict[int, _Seen] = {}

    @property
    def hypervisor(self) -> "Hypervisor":
        """Dom0's connection."""
        return self._hypervisor

    def look(self) -> list[LiveRing]:
        """All rings now, by name. Raises `PermissionRefused` unless this is Dom0, `HypervisorGone`."""
        self._walk()
        fronts: dict[tuple[int, int], LookedEnd] = {}
        backs: dict[tuple[int, int], LookedEnd] = {}
        for end in self._ends():
            if end.is_front and end.granter_domid == end.domid:
                fronts.setdefault((end.granter_domid, end.refs[0]), end)
            elif not end.is_front:
                backs.setdefault((end.granter_domid, end.refs[0]), end)
        rings = [LiveRing(fronts.get(place), self._true_back(place, backs)) for place in {**fronts, **backs}]
        return sorted((ring for ring in rings if ring.ends), key=_order)

    def _true_back(self, place: tuple[int, int], backs: dict[tuple[int, int], LookedEnd]) -> LookedEnd | None:
        """The back end at a place, unless its domain only says so: the arena must have been made for it."""
        end = backs.get(place)
        if end is None or end.domid == 0:
            return end
        with suppress(NotFound), self.arena(*place) as arena:
            return end if arena.peer_domid == end.domid else None
        return None

    def find(self, name: str) -> LiveRing:
        """The ring that a user named. Raises `NotFound`, which says what there is, `InvalidRequest` for several."""
        return choose(self.look(), name)

    def object(self, number: int) -> LookedObject:
        """A statistics object of the last look, which keeps it open. Raises `NotFound` when its process is gone."""
        if number not in self._seen:
            raise NotFound("the process of this ring is gone")
        return self._seen[number].looked

    def want(self, end: LookedEnd, what: Wish) -> None:
        """Want something of an end for the next `WISH_S`."""
        self.object(end.object).want(end.record, what, time.monotonic_ns() + int(WISH_S * 1e9))

    def header(self, ring: LiveRing) -> Header:
        """The shared indexes now. Raises `NotFound` when the ring is gone."""
        with self.arena(ring.domid, ring.refs[0]) as arena:
            return Header(*_HEADER.unpack(arena.read(ring.refs[0], _HEADER.size)))

    def memory(self, ring: LiveRing) -> bytes:
        """The shared memory of a ring, header and entries, copied while its ends go on."""
        with self.arena(ring.domid, ring.refs[0]) as arena:
            return arena.read_pages(ring.refs)

    def kick(self, end: LookedEnd) -> None:
        """Wake an end, as if its peer had notified it. Raises `InvalidRequest` when it has no event channel."""
        if not end.port:
            raise InvalidRequest("this end of the ring has no event channel: it never sleeps")
        self._hypervisor.kick_port(end.port, end.domid)

    def arena(self, domid: int, gref: int) -> LookedArena:
        """The arena of a domain that has this reference; the caller closes it. Raises `NotFound`."""
        found = self._next_arena(domid, gref)
        if found is not None and found.base <= gref:
            return found
        if found is not None:
            found.close()
        raise NotFound(f"domain {domid} has no arena with reference {gref}")

    def arenas(self, domid: int) -> Iterator[LookedArena]:
        """All arenas of a domain by reference, those too that only a peer still maps. Each is closed after its turn."""
        gref = 0
        while gref < 2**32 and (found := self._next_arena(domid, gref)) is not None:
            with found:
                yield found
            gref = found.base + found.n_pages

    def _next_arena(self, domid: int, gref: int) -> LookedArena | None:
        def fill(request: CData) -> None:
            request.arena.domid, request.arena.gref = domid, gref

        with self._hypervisor.link.call(Op.ARENA_LOOK, fill) as reply:
            if not reply.message.arena.n_pages:
                return None
            return LookedArena(reply.message.arena, *reply.take_fds(2))

    # Inside

    def _walk(self) -> None:
        """Take up new objects, let go of those whose process is gone."""
        found, number = set(), 1
        while True:

            def fill(request: CData, number: int = number) -> None:
                request.look.object = number

            with self._hypervisor.link.call(Op.LOOK_NEXT, fill) as reply:
                look = reply.message.look
                if not look.object:
                    break
                found.add(look.object)
                if look.object not in self._seen:
                    self._seen[look.object] = _Seen(LookedObject(reply.take_fd()), look.domid, look.pid)
                number = look.object + 1
        for gone in set(self._seen) - found:
            self._seen.pop(gone).looked.close()

    def _ends(self) -> Iterator[LookedEnd]:
        for number, seen in self._seen.items():
            for record in seen.looked.live():
                core, now_ns = seen.looked.copy(record), time.monotonic_ns()
                if core is not None and _makes_sense(core):
                    yield LookedEnd(number, record, core.generation, seen.pid, seen.domid, now_ns, core)

    def close(self) -> None:
        """Harmless when repeated."""
        for seen in self._seen.values():
            seen.looked.close()
        self._seen.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _order(ring: LiveRing) -> tuple[Any, ...]:
    return ring.end.kind, ring.domid, ring.end.device_id, ring.end.queue, ring.refs


def choose(rings: Sequence[LiveRing], name: str) -> LiveRing:
    """The one ring that `name` names. Raises `NotFound`, which says what there is, `InvalidRequest` for several."""
    named = [ring for ring in rings if ring.is_named(name)]
    if len(named) > 1:
        raise InvalidRequest(f"{name!r} names {len(named)} rings: {', '.join(ring.place for ring in named)}")
    if named:
        return named[0]
    there = ", ".join(f"{ring.name} ({ring.place})" for ring in rings[:20]) or "none"
    raise NotFound(f"there is no ring {name!r}; there are: {there}")


def percentile_ns(latency: Sequence[int], share: float) -> int | None:
    """Upper bound of the bucket in which the `share` (0 to 1) of all messages lies; None when there are none."""
    total, so_far = sum(latency), 0
    for bucket, n in enumerate(latency):
        so_far += n
        if n and so_far >= total * share:
            return BUCKETS_NS[bucket + 1]
    return None
