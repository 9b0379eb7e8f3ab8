# SPDX-License-Identifier: MIT
"""Both halves of the grants against a model of Xen's rules, and against a peer that rewrites entries."""

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.ring.grant import (
    COPY_OP,
    CopyOp,
    Granter,
    GrantFailed,
    GrantStatus,
    Mapper,
    init_maptrack,
    release_pins,
)
from paravirt.ring.memory import PAGE_BYTES, Mapping, create_object

GRANTER, MAPPER = 5, 9
PERMIT, READONLY, READING, WRITING, SUB_PAGE = 1, 4, 8, 16, 256
ENTRY = struct.Struct("<HHI")
PIN = struct.Struct("<HH")


class Chunk:
    """The objects of one arena chunk, and both halves over one mapping of each."""

    def __init__(self, n_pages: int = 4, base: int = 8, *, read_only: bool = False) -> None:
        self.n_pages, self.base = n_pages, base
        self.entries, self.maptrack = (self._new(PAGE_BYTES) for _ in range(2))
        fd = create_object("memfd", n_pages * PAGE_BYTES)
        self.memory = Mapping(fd, n_pages * PAGE_BYTES)
        self.data = Mapping(fd, n_pages * PAGE_BYTES, read_only=read_only)
        os.close(fd)
        init_maptrack(self.maptrack, base, n_pages)
        self.granter = Granter(self.entries, base=base, n_pages=n_pages, peer=MAPPER)
        self.mapper = self.new_mapper(self.maptrack)

    def _new(self, n_bytes: int) -> Mapping:
        fd = create_object("memfd", n_bytes)
        try:
            return Mapping(fd, n_bytes)
        finally:
            os.close(fd)

    def new_mapper(self, maptrack: Mapping) -> Mapper:
        return Mapper(self.entries, self.data, maptrack, base=self.base, n_pages=self.n_pages, domid=MAPPER)

    def entry(self, page: int) -> tuple[int, int, int]:
        flags, domid, frame = ENTRY.unpack_from(self.entries.view, page * ENTRY.size)
        return flags, domid, frame

    def forge(self, page: int, flags: int, domid: int, frame: int) -> None:
        ENTRY.pack_into(self.entries.view, page * ENTRY.size, flags, domid, frame)

    def pins(self, page: int) -> tuple[int, int]:
        readers, writers = PIN.unpack_from(self.maptrack.view, 64 + page * PIN.size)
        return readers, writers

    def close(self) -> None:
        self.granter.close()
        self.mapper.close()
        for mapping in (self.entries, self.maptrack, self.memory, self.data):
            mapping.close()


@contextmanager
def chunk(*args: int, read_only: bool = False) -> Iterator[Chunk]:
    made = Chunk(*args, read_only=read_only)
    try:
        yield made
    finally:
        made.close()


def status_of(call: object) -> GrantStatus:
    try:
        call()  # type: ignore[operator]
    except GrantFailed as error:
        return error.status
    return GrantStatus.OKAY


class Model:
    """What Xen does with one entry table, one mapping domain and v1 entries, written from the rules alone."""

    def __init__(self, n_pages: int, base: int, read_only: bool) -> None:
        self.n_pages, self.base, self.read_only = n_pages, base, read_only
        self.entries = [(0, 0, 0)] * n_pages
        self.granted = [False] * n_pages
        self.pins = [[0, 0] for _ in range(n_pages)]
        self.pinned: dict[int, tuple[int, int]] = {}

    def grant(self, page: int, read_only: bool) -> bool:
        if self.granted[page]:
            return False
        self.granted[page] = True
        self.entries[page] = (PERMIT | (READONLY if read_only else 0), MAPPER, self.base + page)
        return True

    def revoke(self, page: int) -> bool | None:
        if not self.granted[page]:
            return None
        if self.entries[page][0] & (READING | WRITING):
            return False
        self.granted[page] = False
        self.entries[page] = (0, 0, 0)
        return True

    def map(self, page: int, read_only: bool) -> tuple[GrantStatus, int]:
        if not 0 <= page < self.n_pages:
            return GrantStatus.BAD_GNTREF, 0
        if not read_only and self.read_only:
            return GrantStatus.GENERAL_ERROR, 0
        readers, writers = self.pins[page]
        first = not readers and not writers
        flags, domid, frame = self.entries[page]
        if first or (not read_only and not writers):
            if first and (flags & (3 | SUB_PAGE) != PERMIT or domid != MAPPER):
                return GrantStatus.GENERAL_ERROR, 0
            if not read_only and (flags | (0 if first else self.pinned[page][0])) & READONLY:
                return GrantStatus.GENERAL_ERROR, 0
            if first and not 0 <= frame - self.base < self.n_pages:
                return GrantStatus.BAD_PAGE, 0
            if first:
                self.pinned[page] = (flags, frame)
            self.entries[page] = (flags | READING | (0 if read_only else WRITING), domid, frame)
        self.pins[page][0 if read_only else 1] += 1
        return GrantStatus.OKAY, (self.pinned[page][1] - self.base) * PAGE_BYTES

    def unmap(self, page: int, read_only: bool) -> GrantStatus:
        kind = 0 if read_only else 1
        if not 0 <= page < self.n_pages or not self.pins[page][kind]:
            return GrantStatus.BAD_HANDLE
        self.pins[page][kind] -= 1
        flags, domid, frame = self.entries[page]
        if not read_only and not self.pins[page][1]:
            flags &= ~WRITING
        if not any(self.pins[page]):
            flags &= ~READING
        self.entries[page] = (flags, domid, frame)
        return GrantStatus.OKAY

    def copy(self, page: int, offset: int, length: int, to_grant: bool) -> tuple[GrantStatus, int]:
        if not length:
            return GrantStatus.OKAY, 0
        status, at = self.map(page, not to_grant)
        if status is not GrantStatus.OKAY:
            return status, 0
        self.unmap(page, not to_grant)
        return (GrantStatus.BAD_COPY_ARG, 0) if offset + length > PAGE_BYTES else (GrantStatus.OKAY, at)


PAGES = st.integers(-1, 4)
N_PAGES, BASE = 4, 8


class GrantMachine(RuleBasedStateMachine):
    """Every call gives what the model gives, and entries, pins and bytes stay equal."""

    @initialize(read_only=st.booleans())
    def start(self, read_only: bool) -> None:
        self.chunk = Chunk(N_PAGES, BASE, read_only=read_only)
        self.model = Model(N_PAGES, BASE, read_only)

    @rule(page=st.integers(0, N_PAGES - 1), read_only=st.booleans())
    def grant(self, page: int, read_only: bool) -> None:
        if self.model.grant(page, read_only):
            assert self.chunk.granter.access(page, read_only=read_only) == BASE + page
        else:
            with pytest.raises(InvalidRequest):
                self.chunk.granter.access(page, read_only=read_only)

    @rule(page=st.integers(0, N_PAGES - 1))
    def revoke(self, page: int) -> None:
        expected = self.model.revoke(page)
        if expected is None:
            with pytest.raises(InvalidRequest):
                self.chunk.granter.revoke(BASE + page)
        else:
            assert self.chunk.granter.revoke(BASE + page) is expected

    @rule(page=PAGES, read_only=st.booleans())
    def map(self, page: int, read_only: bool) -> None:
        expected, offset = self.model.map(page, read_only)
        if expected is GrantStatus.OKAY:
            assert self.chunk.mapper.map(BASE + page, read_only=read_only) == offset
        else:
            assert status_of(lambda: self.chunk.mapper.map(BASE + page, read_only=read_only)) is expected

    @rule(page=PAGES, read_only=st.booleans())
    def unmap(self, page: int, read_only: bool) -> None:
        expected = self.model.unmap(page, read_only)
        assert status_of(lambda: self.chunk.mapper.unmap(BASE + page, read_only=read_only)) is expected

    @rule(
        ops=st.lists(
            st.tuples(PAGES, st.sampled_from([0, 1, 4000, 4095]), st.sampled_from([0, 1, 96, 4096])), max_size=4
        ),
        to_grant=st.booleans(),
    )
    def copy(self, ops: list[tuple[int, int, int]], to_grant: bool) -> None:
        """A batch gives every operation the status it would have had alone."""
        local = bytearray(4 * PAGE_BYTES)
        for i in range(len(local)):
            local[i] = i % 251
        batch, expected, shadow = [], [], bytearray(local)
        memory = bytearray(self.chunk.memory.view)
        for n, (page, offset, length) in enumerate(ops):
            batch.append(CopyOp(BASE + page, offset, length, n * PAGE_BYTES))
            status, at = self.model.copy(page, offset, length, to_grant)
            expected.append(status)
            if status is GrantStatus.OKAY:
                here = slice(n * PAGE_BYTES, n * PAGE_BYTES + length)
                there = slice(at + offset, at + offset + length)
                if to_grant:
                    memory[there] = shadow[here]
                else:
                    shadow[here] = memory[there]
        copy = self.chunk.mapper.copy_to if to_grant else self.chunk.mapper.copy_from
        assert copy(batch, local) == expected
        assert local == shadow
        assert bytes(self.chunk.memory.view) == memory

    @rule(
        page=st.integers(0, N_PAGES - 1),
        flags=st.sampled_from([0, 1, 2, 3, 5, 9, 25, 257, 0xFFFF]),
        domid=st.sampled_from([MAPPER, GRANTER, 0]),
        frame=st.sampled_from([BASE, BASE + 3, BASE - 1, BASE + 4, 0, 2**32 - 1]),
    )
    def forge(self, page: int, flags: int, domid: int, frame: int) -> None:
        """The other side writes whatever it likes into the shared entry."""
        self.chunk.forge(page, flags, domid, frame)
        self.model.entries[page] = (flags, domid, frame)

    @precondition(lambda self: any(any(pins) for pins in self.model.pins))
    @rule()
    def die(self) -> None:
        """The mapping process dies; the broker clears what it had pinned."""
        pinned = [page for page, pins in enumerate(self.model.pins) if any(pins)]
        assert release_pins(self.chunk.entries, N_PAGES, self.chunk.maptrack, []) == len(pinned)
        for page in pinned:
            flags, domid, frame = self.model.entries[page]
            self.model.entries[page] = (flags & ~(READING | WRITING), domid, frame)
            self.model.pins[page] = [0, 0]
        self.chunk.mapper.close()
        self.chunk.mapper = self.chunk.new_mapper(self.chunk.maptrack)

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "chunk"):
            return
        for page in range(N_PAGES):
            assert self.chunk.entry(page) == self.model.entries[page]
            assert self.chunk.pins(page) == tuple(self.model.pins[page])
            in_use = bool(self.model.entries[page][0] & (READING | WRITING))
            assert self.chunk.granter.in_use(BASE + page) is in_use
            assert self.chunk.granter.is_granted(BASE + page) is self.model.granted[page]
        assert self.chunk.granter.statistics().granted == sum(self.model.granted)

    def teardown(self) -> None:
        if hasattr(self, "chunk"):
            self.chunk.close()


TestGrants = GrantMachine.TestCase
TestGrants.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_pinned_reference_keeps_its_frame_whatever_the_entry_says() -> None:
    """XSA-500: an entry that changes after it was pinned changes nothing."""
    with chunk() as c:
        gref = c.granter.access(1)
        c.memory.view[PAGE_BYTES] = 11
        c.memory.view[3 * PAGE_BYTES] = 33
        assert c.mapper.map(gref, read_only=True) == PAGE_BYTES
        c.forge(1, 0, 0, 11)
        local = bytearray(1)
        assert c.mapper.copy_from([CopyOp(gref, 0, 1)], local) == [GrantStatus.OKAY]
        assert local[0] == 11
        assert c.mapper.map(gref, read_only=True) == PAGE_BYTES


def test_a_read_only_grant_stays_read_only_when_the_flag_goes_while_pinned() -> None:
    with chunk() as c:
        gref = c.granter.access(0, read_only=True)
        c.mapper.map(gref, read_only=True)
        flags, domid, frame = c.entry(0)
        c.forge(0, flags & ~READONLY, domid, frame)
        assert status_of(lambda: c.mapper.map(gref)) is GrantStatus.GENERAL_ERROR


def test_length_0_looks_at_nothing_and_ranges_are_checked() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        ops = [CopyOp(2**32 - 1, 65535, 0, 2**63), CopyOp(gref, 4096, 1), CopyOp(gref, 0, 4096, 1), CopyOp(77, 4096, 1)]
        assert c.mapper.copy_to(ops, bytes(4096)) == [
            GrantStatus.OKAY,
            GrantStatus.BAD_COPY_ARG,
            GrantStatus.BAD_COPY_ARG,
            GrantStatus.BAD_GNTREF,
        ]
        assert c.entry(0) == (PERMIT, MAPPER, c.base)
        for bad in (CopyOp(-1, 0, 1), CopyOp(gref, -1, 1), CopyOp(gref, 0, 65536), CopyOp(gref, 0, 1, -1)):
            with pytest.raises(InvalidRequest):
                c.mapper.copy_to([bad], b"x")


def test_many_pages_in_one_call() -> None:
    with chunk() as c:
        grefs = c.granter.access_many(np.array([2, 0, 3], np.uint32))
        assert grefs.tolist() == [c.base + 2, c.base, c.base + 3]
        assert [c.entry(page)[0] for page in range(4)] == [PERMIT, 0, PERMIT, PERMIT]
        c.mapper.map(c.base)
        assert c.granter.revoke_many(grefs).tolist() == [c.base], "the peer still uses it"
        assert [c.granter.is_granted(c.base + page) for page in range(4)] == [True, False, False, False]
        c.mapper.unmap(c.base)
        assert not len(c.granter.revoke_many([c.base]))
        assert c.granter.statistics().granted == 0
        c.granter.access_many([1], read_only=True)
        assert c.entry(1)[0] == PERMIT | READONLY


@pytest.mark.parametrize("pages", [[0, 1, 4], [0, 1, 0], [0, 3], [0, -1], [2**32]])
def test_many_pages_are_granted_together_or_not_at_all(pages: list[int]) -> None:
    with chunk() as c:
        c.granter.access(3)
        with pytest.raises(InvalidRequest):
            c.granter.access_many(pages)
        assert [c.granter.is_granted(c.base + page) for page in range(4)] == [False, False, False, True]


def test_revoking_what_is_not_granted() -> None:
    with chunk() as c:
        grefs = c.granter.access_many([0, 1])
        for wrong in (c.base + 2, c.base + 4, 0, -1, 2**32):
            with pytest.raises(InvalidRequest):
                c.granter.revoke_many([*grefs.tolist(), wrong])
            c.granter.revoke_many(grefs) if c.granter.is_granted(c.base) else None
            grefs = c.granter.access_many([0, 1])


@pytest.mark.parametrize("to_grant", [False, True])
def test_a_long_array_of_copies_with_bad_ones_between(to_grant: bool) -> None:
    """More than the core pins together, each page more than once, every kind of failure among them."""
    n = 100
    with chunk() as c:
        grefs = c.granter.access_many(range(3))
        for page in range(3):
            c.memory.view[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = bytes([page + 1]) * PAGE_BYTES
        ops = np.zeros(n, COPY_OP)
        ops["gref"], ops["length"] = np.resize(grefs, n), 16
        ops["offset"] = ops["local_offset"] = np.arange(n) * 16
        ops["gref"][10::20] = c.base + 3
        ops["offset"][15::20] = PAGE_BYTES - 8
        ops["length"][17::20] = 0
        local = bytearray(b"\xff" * n * 16)
        statuses = c.mapper.copy_array(ops, local, to_grant=to_grant)
        for i, status in enumerate(statuses.tolist()):
            page, place = i % 3, slice(i * 16, i * 16 + 16)
            bad = {10: GrantStatus.GENERAL_ERROR, 15: GrantStatus.BAD_COPY_ARG}.get(i % 20)
            assert status == (bad or GrantStatus.OKAY)
            copied = c.memory.view[page * PAGE_BYTES :][place] if to_grant else local[place]
            moved = bad is None and i % 20 != 17
            before = bytes([page + 1]) if to_grant else b"\xff"
            after = b"\xff" if to_grant else bytes([page + 1])
            assert bytes(copied) == (after if moved else before) * 16
        assert c.mapper.statistics().pinned_pages == 0
        assert [c.pins(page) for page in range(3)] == [(0, 0)] * 3
        assert not len(c.granter.revoke_many(grefs))
        statistics = c.mapper.statistics()
        assert (statistics.copies, statistics.failures, statistics.copied_bytes) == (90, 10, 85 * 16)


def test_copies_of_another_array_are_refused() -> None:
    with chunk() as c:
        ops, read_only = np.zeros(4, COPY_OP), np.zeros(4, COPY_OP)
        read_only.flags.writeable = False
        for wrong in (np.zeros(4), ops[::2], read_only):
            with pytest.raises(InvalidRequest, match="COPY_OP"):
                c.mapper.copy_array(wrong, bytearray(8), to_grant=False)
        with pytest.raises((BufferError, ValueError)):
            c.mapper.copy_array(ops, bytes(8), to_grant=False)


def test_pins_of_one_reference_do_not_overflow() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        for _ in range(65535):
            c.mapper.map(gref, read_only=True)
        assert status_of(lambda: c.mapper.map(gref, read_only=True)) is GrantStatus.GENERAL_ERROR
        assert c.pins(0) == (65535, 0)


def test_statistics_count_what_happened() -> None:
    with chunk() as c:
        grefs = [c.granter.access(page) for page in range(3)]
        c.mapper.map(grefs[0])
        c.mapper.map(grefs[0], read_only=True)
        c.mapper.map(grefs[1])
        assert not c.granter.revoke(grefs[0])
        assert c.granter.revoke(grefs[2])
        c.mapper.unmap(grefs[1])
        status_of(lambda: c.mapper.unmap(grefs[1]))
        status_of(lambda: c.mapper.map(grefs[2]))
        c.mapper.copy_to([CopyOp(grefs[1], 0, 100), CopyOp(grefs[2], 0, 7)], bytes(100))
        granter, mapper = c.granter.statistics(), c.mapper.statistics()
        assert (granter.granted, granter.grants, granter.revokes, granter.busy) == (2, 3, 1, 1)
        assert (mapper.pinned_pages, mapper.maps, mapper.unmaps, mapper.failures) == (1, 3, 1, 3)
        assert (mapper.copies, mapper.copied_bytes) == (1, 100)


def test_concurrent_maps_and_unmaps_leave_no_bit_behind() -> None:
    """XSA-218: reading and writing are cleared exactly when the last pin goes."""
    with chunk() as c:
        gref = c.granter.access(2)
        failures = []

        def work(read_only: bool) -> None:
            for _ in range(3000):
                c.mapper.map(gref, read_only=read_only)
                if not c.granter.in_use(gref) or c.granter.revoke(gref):
                    failures.append("revoked while pinned")
                c.mapper.unmap(gref, read_only=read_only)

        threads = [threading.Thread(target=work, args=(n % 2 == 0,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert c.entry(2) == (PERMIT, MAPPER, c.base + 2)
        assert c.mapper.statistics().maps == 12000
        assert c.granter.revoke(gref)


def test_a_peer_that_keeps_changing_an_entry_holds_nobody() -> None:
    """XSA-295: at most four tries. Another process flips the whole entry for as long as we use it."""
    with chunk() as c:
        ready, stop = os.pipe(), os.pipe()
        fd = create_object("memfd", PAGE_BYTES)
        entries = Mapping(fd, PAGE_BYTES)
        child = os.fork()
        if child == 0:
            os.close(stop[1])
            _flip_until(fd, ready[1], stop[0], c.base)
        mapper = Mapper(entries, c.data, c.maptrack, base=c.base, n_pages=c.n_pages, domid=MAPPER)
        granter = Granter(entries, base=c.base, n_pages=c.n_pages, peer=MAPPER)
        gref = granter.access(0)
        os.read(ready[0], 1)
        seen = set()
        for _ in range(20000):
            status = status_of(lambda: mapper.map(gref))
            seen.add(status)
            if status is GrantStatus.OKAY:
                mapper.unmap(gref)
            mapper.copy_from([CopyOp(gref, 0, 1)], bytearray(1))
        while granter.is_granted(gref):
            granter.revoke(gref)
        os.close(stop[1])
        assert os.waitpid(child, 0)[1] == 0
        for end in (*ready, stop[0], fd):
            os.close(end)
        assert seen <= {GrantStatus.OKAY, GrantStatus.GENERAL_ERROR, GrantStatus.BAD_PAGE}
        assert mapper.statistics().pinned_pages == 0
        entries.close()


def _flip_until(fd: int, ready_fd: int, stop_fd: int, base: int) -> None:
    os.set_blocking(stop_fd, False)
    entries = Mapping(fd, PAGE_BYTES)
    words = entries.view.cast("Q")
    honest = ENTRY.pack(PERMIT, MAPPER, base)
    values = [int.from_bytes(honest, "little"), int.from_bytes(ENTRY.pack(PERMIT, MAPPER, base + 1), "little"), 0]
    os.write(ready_fd, b"r")
    while True:
        try:
            os._exit(0 if os.read(stop_fd, 1) == b"" else 1)
        except BlockingIOError:
            for _ in range(1000):
                for value in values:
                    words[0] = value


def test_the_broker_keeps_what_another_process_of_the_domain_holds() -> None:
    with chunk() as c:
        other_track = c._new(PAGE_BYTES)
        init_maptrack(other_track, c.base, c.n_pages)
        other = c.new_mapper(other_track)
        grefs = [c.granter.access(page) for page in range(3)]
        for gref in grefs:
            c.mapper.map(gref)
        other.map(grefs[0], read_only=True)
        other.map(grefs[1])
        assert release_pins(c.entries, c.n_pages, c.maptrack, [other_track]) == 3
        assert [c.entry(page)[0] for page in range(3)] == [PERMIT | READING, PERMIT | READING | WRITING, PERMIT]
        assert [c.granter.revoke(gref) for gref in grefs] == [False, False, True]
        other_track.close()


def test_a_page_that_is_no_maptrack_of_this_chunk_is_refused() -> None:
    with chunk() as c:
        with c._new(PAGE_BYTES) as page:
            with pytest.raises(PeerError, match="magic"):
                c.new_mapper(page)
            init_maptrack(page, c.base + 1, c.n_pages)
            with pytest.raises(PeerError, match="range"):
                c.new_mapper(page)


def test_closed_halves_say_so() -> None:
    with chunk() as c:
        c.mapper.close()
        c.granter.close()
        for call in (lambda: c.mapper.map(8), lambda: c.granter.access(0), c.mapper.statistics, c.granter.statistics):
            with pytest.raises(Closed):
                call()
    small = create_object("memfd", PAGE_BYTES)
    with Mapping(small, PAGE_BYTES) as mapping, pytest.raises(InvalidRequest):
        Granter(mapping, base=8, n_pages=513, peer=1)
    os.close(small)


def test_a_granters_references_are_its_own() -> None:
    with chunk() as c:
        for bad in (-1, c.n_pages):
            with pytest.raises(InvalidRequest):
                c.granter.access(bad)
        for call in (c.granter.revoke, c.granter.in_use):
            for gref in (0, c.base - 1, c.base + c.n_pages, 2**32 + c.base):
                with pytest.raises(InvalidRequest):
                    call(gref)
        assert "8..11" in repr(c.granter)
