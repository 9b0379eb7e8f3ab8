# SPDX-License-Identifier: MIT
"""Xen's security advisories about event channels and grants, each as a test of what must not happen here.

Those about event channels are in `test_advisories_events`.

| XSA | fault in Xen | here |
|---|---|---|
| 18, 134 | swap_grant_ref with any reference | no swap; test_xsa_18_134_... for what takes references |
| 26, 255, 380, 384, 486, 501, 382 | version 2 status frames | no version 2: test_xsa_255_... refuses its entries |
| 47 | a trace of a refused bind | test_xsa_47_... |
| 73 | lock order between two grant tables | test_xsa_73_... |
| 107, 358, 359, 505 | FIFO control block, array | no FIFO; test_xsa_107_... for events before anybody waits |
| 217, 284 | transfer of a mapped page | no transfer; test_xsa_217_... for the use of a pinned page |
| 218, 236 | bits and pin counts apart, handles put twice | test_xsa_218_... |
| 221, 342 | port numbers out of the table | test_xsa_221_..., test_xsa_342_... |
| 224 | device mappings | no device mappings |
| 226, 318, 411 | statuses of a copy batch that are not written | test_xsa_226_318_411_... |
| 228 | a handle given out twice | test_xsa_228_... |
| 230 | a read-only copy clears the bits of a mapping | test_xsa_230_... |
| 232 | cache_flush | no caches to flush |
| 295 | a peer that holds us with its atomics | test_xsa_295_... |
| 316 | a positive status | test_xsa_316_... |
| 340 | a send to a port that is being made | test_xsa_340_... |
| 343 | reset against everything | test_xsa_343_... |
| 344, 380 | long loops | test_xsa_344_380_... |
| 391 | storms against frontends | ring/test_late_eoi |
| 394 | partial unmap | test_xsa_394_... |
| 448 | zero-size copies | test_xsa_448_... |
| 496 | out of ports in bind_virq | test_xsa_496_... |
| 500 | an entry that changes after it was pinned | test_xsa_500_... |
"""

import errno
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.errors import HypervisorError, ResourceLimit
from paravirt.hypervisor.client import Hypervisor
from paravirt.ring._core import ffi, lib
from paravirt.ring.grant import CopyOp, GrantStatus

from ..ring.support import C_CORE, compile_c, run_c
from .conftest import World
from .test_grants import MAPPER, PERMIT, READING, SUB_PAGE, WRITING, Chunk, chunk, status_of
from .together import DEADLINE_S, run_all

HERE = Path(__file__).parent


def test_xsa_18_134_references_out_of_range_and_of_nobody(world: World) -> None:
    guest = world.guest()
    for gref in (8, 4000, 2**32 - 1):
        with pytest.raises(HypervisorError) as info:
            world.dom0.foreign_arena(guest.domid, gref)
        assert info.value.name == "EINVAL", "before the guest has made anything"
    with chunk() as c:
        for gref in (0, c.base - 1, c.base + c.n_pages, 2**31, 2**32 - 1):
            assert status_of(lambda gref=gref: c.mapper.map(gref)) is GrantStatus.BAD_GNTREF
            assert c.mapper.copy_from([CopyOp(gref, 0, 1)], bytearray(1)) == [GrantStatus.BAD_GNTREF]
            assert status_of(lambda gref=gref: c.mapper.unmap(gref)) is GrantStatus.BAD_HANDLE


@pytest.mark.parametrize("flags", [0, 2, 3, PERMIT | SUB_PAGE, 3 | SUB_PAGE, 0xFFFF])
def test_xsa_255_entries_of_other_kinds_are_refused(flags: int) -> None:
    """Transfers, transitive grants and sub-pages: what version 2 added is nothing here."""
    with chunk() as c:
        c.forge(0, flags, MAPPER, c.base)
        assert status_of(lambda: c.mapper.map(c.base)) is GrantStatus.GENERAL_ERROR
        assert c.mapper.copy_to([CopyOp(c.base, 0, 1)], b"x") == [GrantStatus.GENERAL_ERROR]
        assert c.entry(0) == (flags, MAPPER, c.base)
        assert c.pins(0) == (0, 0)


def test_xsa_73_two_domains_grant_to_each_other_under_load(world: World) -> None:
    one, two = world.guest("a"), world.guest("b")

    def user(own: Hypervisor, peer: Hypervisor, theirs: int) -> None:
        for _ in range(10):
            with peer.foreign_arena(own.domid, theirs) as foreign, foreign.map_pages([theirs]) as pages:
                pages.view[0] ^= 1

    arenas = [one.create_arena(two.domid, 4), two.create_arena(one.domid, 4)]
    runs = [arena.allocate(1) for arena in arenas]
    grefs = [arena.grant(run.gref) for arena, run in zip(arenas, runs, strict=True)]
    between = [one.foreign_arena(two.domid, grefs[1]), two.foreign_arena(one.domid, grefs[0])]

    def copy(first: int, second: int) -> None:
        ops = [CopyOp(grefs[second], 0, 4096)] * 4
        for _ in range(200):
            assert between[first].mapper.copy_from(ops, bytearray(4096)) == [GrantStatus.OKAY] * 4

    others = [world.connect(guest.domid) for guest in (one, two)]
    run_all(
        lambda: user(one, others[1], grefs[0]),
        lambda: user(two, others[0], grefs[1]),
        lambda: copy(0, 1),
        lambda: copy(1, 0),
    )


def test_xsa_217_a_pinned_page_goes_to_no_other_use(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 2)
    run = arena.allocate(2)
    gref = arena.grant(run.gref)
    foreign = world.dom0.foreign_arena(guest.domid, gref)
    pages = foreign.map_pages([gref])
    assert arena.free(run) == 1
    assert arena.allocate(1).gref != gref
    with pytest.raises(ResourceLimit):
        arena.allocate(1)
    pages.close()
    assert arena.allocate(1).gref == gref
    foreign.close()


def test_xsa_218_bits_go_exactly_with_the_last_pin() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        wrong: list[str] = []

        def work(read_only: bool) -> None:
            for _ in range(2000):
                c.mapper.map(gref, read_only=read_only)
                if not c.entry(0)[0] & (READING if read_only else WRITING):
                    wrong.append("a bit is missing")
                c.mapper.unmap(gref, read_only=read_only)

        run_all(*(lambda n=n: work(n % 2 == 0) for n in range(4)))  # type: ignore[misc]
        assert not wrong
        assert (c.entry(0), c.pins(0)) == ((PERMIT, MAPPER, c.base), (0, 0))
        for read_only in (False, True):
            assert status_of(lambda ro=read_only: c.mapper.unmap(gref, read_only=ro)) is GrantStatus.BAD_HANDLE


@pytest.mark.parametrize("to_grant", [False, True])
def test_xsa_226_318_411_every_copy_of_a_batch_has_a_status(to_grant: bool) -> None:
    """Whichever one fails, and whatever stood in its status before."""
    with chunk() as c:
        grefs = [c.granter.access(page) for page in range(3)]
        bad = [(2**32 - 1, 0), (c.base + 3, 0), (grefs[0], 4090)]
        for broken in itertools.product(range(6), range(len(bad))):
            batch = ffi.new("struct pv_grant_copy_op[]", 6)
            for n, op in enumerate(batch):
                op.gref, op.length, op.status = grefs[n // 2], 16, 77
            batch[broken[0]].gref, batch[broken[0]].offset = bad[broken[1]]
            lib.pv_grant_copy(c.mapper.core, batch, 6, ffi.new("uint8_t[]", 4096), 4096, to_grant)
            statuses = [op.status for op in batch]
            assert [n for n, status in enumerate(statuses) if status] == [broken[0]]
            assert statuses[broken[0]] == (-3, -1, -10)[broken[1]]
        assert c.mapper.statistics().pinned_pages == 0
        assert all(c.granter.revoke(gref) for gref in grefs)


def test_xsa_228_no_handle_is_given_out_twice(world: World) -> None:
    guest = world.guest()
    arenas = [guest.create_arena(0, 1) for _ in range(4)]
    processes = [world.connect(0) for _ in range(4)]
    numbers: list[int] = []

    def map_and_unmap(process: Hypervisor) -> None:
        for n in range(40):
            with process.foreign_arena(guest.domid, arenas[n % 4].base) as foreign:
                numbers.append(foreign.number)

    run_all(*(lambda process=process: map_and_unmap(process) for process in processes))  # type: ignore[misc]
    assert len(numbers) == len(set(numbers)) == 160


def test_xsa_230_a_copy_leaves_the_bits_of_a_mapping() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        for read_only, bits in ((True, READING), (False, READING | WRITING)):
            c.mapper.map(gref, read_only=read_only)
            for _ in range(2):
                assert c.mapper.copy_from([CopyOp(gref, 0, 8)], bytearray(8)) == [GrantStatus.OKAY]
                assert c.entry(0)[0] == PERMIT | bits
            assert c.mapper.copy_to([CopyOp(gref, 0, 8)], bytes(8)) == [GrantStatus.OKAY]
            assert c.entry(0)[0] == PERMIT | bits
            assert not c.granter.revoke(gref)
            c.mapper.unmap(gref, read_only=read_only)
        assert c.granter.revoke(gref)


def test_xsa_295_a_peer_that_changes_an_entry_for_ever_has_four_tries(tmp_path: Path) -> None:
    program = compile_c(
        tmp_path / "flip",
        [HERE / "flip.c", C_CORE / "pv_grant.c", C_CORE / "pv_grant_copy.c"],
        f"-I{HERE}",
        '-DPV_ATOMIC_SHIM="flip_shim.h"',
    )
    said = [int(word) for word in run_c([program], timeout=DEADLINE_S).split()]
    assert said == [-1, 4, -1, 5, -errno.EBUSY, 4, 0, 0], "a copy tries once with its part before"


@settings(max_examples=100, deadline=None)
@given(
    entries=st.lists(st.tuples(*(st.integers(0, limit) for limit in (0xFFFF, 0xFFFF, 2**32 - 1))), max_size=4),
    ops=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 65535), st.integers(0, 65535)), max_size=6),
)
def test_xsa_316_no_status_is_positive(entries: list[tuple[int, int, int]], ops: list[tuple[int, int, int]]) -> None:
    with chunk() as c:
        for page, entry in enumerate(entries):
            c.forge(page, *entry)
        batch = [CopyOp(c.base + gref % 5, offset, length) for gref, offset, length in ops]
        statuses = c.mapper.copy_from(batch, bytearray(4096)) + c.mapper.copy_to(batch, bytes(4096))
        statuses += [status_of(lambda page=page: c.mapper.map(c.base + page)) for page in range(5)]
        assert all(status <= 0 for status in statuses)


def test_xsa_394_an_unmap_of_another_kind_keeps_the_mapping() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        c.mapper.map(gref, read_only=True)
        assert status_of(lambda: c.mapper.unmap(gref)) is GrantStatus.BAD_HANDLE
        assert (c.entry(0)[0], c.pins(0)) == (PERMIT | READING, (1, 0))
        c.mapper.map(gref)
        c.mapper.unmap(gref)
        assert (c.entry(0)[0], c.pins(0)) == (PERMIT | READING, (1, 0)), "the reader stays"
        c.mapper.map(gref)
        c.mapper.unmap(gref, read_only=True)
        assert (c.entry(0)[0], c.pins(0)) == (PERMIT | READING | WRITING, (0, 1)), "the writer reads, too"
        assert not c.granter.revoke(gref)


def test_xsa_448_a_copy_of_nothing_looks_at_nothing() -> None:
    with chunk() as c:
        ops = [CopyOp(gref, 65535, 0, 2**63) for gref in (0, c.base, 2**32 - 1)]
        for copy in (c.mapper.copy_from, c.mapper.copy_to):
            assert copy(ops, bytearray(0)) == [GrantStatus.OKAY] * 3
        assert c.entry(0) == (0, 0, 0)
        assert c.mapper.statistics().failures == 0


def test_xsa_500_what_is_pinned_is_what_was_checked() -> None:
    """A second use of a pinned reference goes by the frame and the rights of the first."""

    def story(c: Chunk, gref: int, forged: tuple[int, int, int]) -> None:
        c.mapper.map(gref, read_only=True)
        c.forge(0, *forged)
        local = bytearray(1)
        assert c.mapper.map(gref, read_only=True) == 0
        assert c.mapper.copy_from([CopyOp(gref, 0, 1)], local) == [GrantStatus.OKAY]
        assert local == b"a"

    for forged in ((PERMIT, MAPPER, 9), (0, 0, 0), (3 | SUB_PAGE, 0, 2**32 - 1), (PERMIT, MAPPER, 2**32 - 1)):
        with chunk() as c:
            c.memory.view[0], c.memory.view[4096] = ord("a"), ord("b")
            story(c, c.granter.access(0), forged)
