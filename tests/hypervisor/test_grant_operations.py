# SPDX-License-Identifier: MIT
"""Every grant operation of the interface (GNTTABOP_*, public/grant_table.h) and what guests do around them, row by row.

Version 1 entries alone: there is no version 2, so nothing of sub-pages, transitive grants and status frames.

| # | operation | rule | test |
|---|---|---|---|
| 0 | map_grant_ref | order of checks, 4 tries | test_grants: the model, test_a_peer_that_keeps_... |
| | | no maptrack: no_space | test_more_maps_than_..., test_maptrack_pages_are_a_quota |
| | | bad_domain, permission_denied, bad_gntref | test_each_copy_has_a_status_of_its_own |
| 1 | unmap_grant_ref | bad_handle; the last unpin clears the bits | test_grants: the model, test_concurrent_maps_... |
| 2 | setup_table, 6 query_size | the table is the arena | test_arenas: test_quotas_and_the_budget_... |
| 5 | copy | ranges, length 0, page to page | test_each_copy_..., test_copies_..., test_grants: the model |
| 8 | set_version, 9 get_status_frames, 10 get_version | version 1 alone | - |
| 3 dump, 4 transfer, 7 unmap_and_replace, 11 swap, 12 cache_flush | no page changes its owner or frame here | - |
| | status codes | each has its value, none is positive | test_the_status_codes_are_xens |
| | free list, expand, claim, release | GrantPool | test_a_pool_... |
| | free callback | when_free | test_a_callback_... |
| | deferred free, counted by owner | DeferredFrees | test_deferred_..., test_an_arena_says_whose_pages_... |
| | eagain | nothing is paged out: never | - |
| | unmap notify | on unmap, on death | test_arenas: test_unmap_...; test_processes: test_kill_of_a_mapper_... |
| | persistent grants | MappingCache | test_mapping_cache |
"""

import logging
import threading
import time

import pytest

from paravirt.errors import Closed, HypervisorError, InvalidRequest, ResourceLimit
from paravirt.hypervisor.client import XENSTORE_GREF, Hypervisor
from paravirt.hypervisor.copies import GrantCopy, Granted, Local
from paravirt.hypervisor.deferred import LEAK_AFTER_S, TRIES_AT_ONCE, DeferredFrees
from paravirt.hypervisor.pool import GrantPool
from paravirt.hypervisor.rules import Limits
from paravirt.ring.grant import CopyPair, GrantFailed, GrantStatus

from .conftest import World
from .test_grants import chunk

PAGE = 4096


def test_the_status_codes_are_xens() -> None:
    assert {status.name: status.value for status in GrantStatus} == {
        "OKAY": 0,
        "GENERAL_ERROR": -1,
        "BAD_DOMAIN": -2,
        "BAD_GNTREF": -3,
        "BAD_HANDLE": -4,
        "BAD_VIRT_ADDR": -5,
        "BAD_DEV_ADDR": -6,
        "NO_DEVICE_SPACE": -7,
        "PERMISSION_DENIED": -8,
        "BAD_PAGE": -9,
        "BAD_COPY_ARG": -10,
        "ADDRESS_TOO_BIG": -11,
        "EAGAIN": -12,
        "NO_SPACE": -13,
    }


# Maptrack


def test_more_maps_than_were_allowed_have_no_space() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        assert c.mapper.max_grants is None
        c.mapper.max_grants = 3
        for _ in range(3):
            c.mapper.map(gref, read_only=True)
        with pytest.raises(GrantFailed) as info:
            c.mapper.map(2**32 - 1)
        assert info.value.status is GrantStatus.NO_SPACE, "looked at before the reference"
        c.mapper.unmap(gref, read_only=True)
        c.mapper.map(gref, read_only=True)
        c.mapper.max_grants = None
        c.mapper.map(gref, read_only=True)
        for bad in (0, -1, 2**32):
            with pytest.raises(InvalidRequest):
                c.mapper.max_grants = bad


def test_maptrack_pages_are_a_quota(make_world: "object") -> None:
    world: World = make_world(limits=Limits(max_maptrack_pages=3))  # type: ignore[operator]
    guest, other = world.guest("a"), world.guest("b")
    small = [guest.create_arena(other.domid, 4) for _ in range(3)]
    large = guest.create_arena(other.domid, 2000)  # two pages of rows
    mapped = [other.foreign_arena(guest.domid, arena.base) for arena in small[:2]]
    with pytest.raises(ResourceLimit, match="3 pages of maptrack"):
        other.foreign_arena(guest.domid, large.base)
    mapped.append(other.foreign_arena(guest.domid, small[2].base))
    mapped.pop(0).close()
    with pytest.raises(ResourceLimit):
        other.foreign_arena(guest.domid, large.base)
    mapped.pop(0).close()
    other.foreign_arena(guest.domid, large.base)


# Copies


def granted_page(guest: Hypervisor, peer: int, fill: bytes, *, read_only: bool = False) -> tuple[int, memoryview]:
    arena = guest.create_arena(peer, 2)
    run = arena.allocate(1)
    run.view[: len(fill)] = fill
    return arena.grant(run.gref, read_only=read_only), run.view


def test_each_copy_has_a_status_of_its_own(world: World) -> None:
    guest, other = world.guest("a"), world.guest("b")
    gref, page = granted_page(guest, 0, b"hello")
    read_only, _ = granted_page(guest, 0, b"fixed", read_only=True)
    for_another, _ = granted_page(guest, other.domid, b"secret")
    local = bytearray(64)
    here, there = Local(local), Granted(guest.domid, gref)
    cases = [
        (GrantCopy(there, here, 5), GrantStatus.OKAY),
        (GrantCopy(Granted(77, gref), here, 5), GrantStatus.BAD_DOMAIN),
        (GrantCopy(Granted(-1, gref), here, 5), GrantStatus.BAD_DOMAIN),
        (GrantCopy(Granted(guest.domid, 4000), here, 5), GrantStatus.BAD_GNTREF),
        (GrantCopy(Granted(guest.domid, 2**32), here, 5), GrantStatus.BAD_GNTREF),
        (GrantCopy(Granted(guest.domid, for_another), here, 5), GrantStatus.PERMISSION_DENIED),
        (GrantCopy(Granted(guest.domid, gref + 1), here, 5), GrantStatus.GENERAL_ERROR),
        (GrantCopy(Granted(guest.domid, gref + 1, 4096), here, 5), GrantStatus.GENERAL_ERROR),
        (GrantCopy(Granted(guest.domid, gref, 4092), here, 5), GrantStatus.BAD_COPY_ARG),
        (GrantCopy(Granted(guest.domid, gref, -1), here, 5), GrantStatus.BAD_COPY_ARG),
        (GrantCopy(there, here, 4097), GrantStatus.BAD_COPY_ARG),
        (GrantCopy(there, here, -1), GrantStatus.BAD_COPY_ARG),
        (GrantCopy(there, Local(local, 60), 5), GrantStatus.BAD_COPY_ARG),
        (GrantCopy(Granted(77, 2**40, -3), Local(local, -9), 0), GrantStatus.OKAY),
        (GrantCopy(Local(b"HELLO"), there, 5), GrantStatus.OKAY),
        (GrantCopy(Local(b"HELLO"), Granted(guest.domid, read_only), 5), GrantStatus.GENERAL_ERROR),
        (GrantCopy(there, Local(local, 10), 5), GrantStatus.OKAY),
        (GrantCopy(Local(local), Local(local, 20), 5), GrantStatus.OKAY),
        (GrantCopy(Local(local), Local(local, 62), 5), GrantStatus.BAD_COPY_ARG),
        (GrantCopy(there, Granted(guest.domid, gref, 100), 5), GrantStatus.OKAY),
        (GrantCopy(there, Granted(guest.domid, read_only), 5), GrantStatus.GENERAL_ERROR),
        (GrantCopy(there, Granted(guest.domid, gref, 4092), 5), GrantStatus.BAD_COPY_ARG),
    ]
    with world.dom0.grant_copier() as copier:
        assert copier.copy([op for op, _ in cases]) == [status for _, status in cases]
        assert [copier.copy([op])[0] for op, _ in cases] == [status for _, status in cases]
        assert copier.copy([]) == []
        assert "arenas" in repr(copier)
    assert bytes(local[10:15]) == bytes(page[:5]) == bytes(page[100:105]) == b"HELLO"
    assert bytes(local[20:25]) in (b"hello", b"HELLO")
    assert world.dom0.list_domains()[0].maps == 0, "nothing stays mapped"


def test_copies_between_two_guests(world: World) -> None:
    """What a switch does: from the page of one guest to that of another, each pinned once a batch."""
    sender, receiver = world.guest("a"), world.guest("b")
    source, _ = granted_page(sender, 0, bytes(range(256)) * 16)
    target, page = granted_page(receiver, 0, b"")
    ops = [
        GrantCopy(Granted(sender.domid, source, n * 100), Granted(receiver.domid, target, 3900 - n * 100), 100)
        for n in range(40)
    ]
    with world.dom0.grant_copier() as copier:
        assert copier.copy(ops) == [GrantStatus.OKAY] * 40
        statistics = [arena.mapper.statistics() for arena in copier._arenas]
        assert [each.pinned_pages for each in statistics] == [0, 0]
        assert (statistics[1].copies, statistics[1].copied_bytes) == (40, 4000)
    expected = bytes(range(256)) * 16
    assert all(page[3900 - n * 100 : 4000 - n * 100] == expected[n * 100 : n * 100 + 100] for n in range(40))


def test_a_page_copied_onto_itself() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        c.memory.view[:10] = b"0123456789"
        assert c.mapper.copy_between([CopyPair(gref, 0, gref, 2, 8)], c.mapper) == [GrantStatus.OKAY]
        assert bytes(c.memory.view[:10]) == b"0101234567"
        assert c.mapper.statistics().pinned_pages == 0
        assert c.granter.revoke(gref)


def test_copies_from_the_xenstore_page_of_a_guest_that_has_not_asked_for_it(world: World) -> None:
    guest = world.guest()
    with world.dom0.grant_copier() as copier:
        op = GrantCopy(Granted(guest.domid, XENSTORE_GREF), Local(bytearray(10)), 10)
        assert copier.copy([op]) == [GrantStatus.OKAY]


# Deferred frees


class Peer:
    """Pages that somebody uses, and a clock."""

    def __init__(self) -> None:
        self.uses: set[int] = set()
        self.now_s = 1000.0
        self.tried: list[int] = []

    def take_back(self, page: int) -> bool:
        self.tried.append(page)
        return page not in self.uses


def test_deferred_frees_come_back_when_the_peer_lets_go() -> None:
    peer = Peer()
    deferred = DeferredFrees("domain 7", peer.take_back, lambda: peer.now_s)
    peer.uses = {1, 3}
    assert [deferred.free(page, "disk") for page in range(4)] == [True, False, True, False]
    assert (len(deferred), deferred.deferrals, deferred.held_by_owner()) == (2, 2, {"disk": 2})
    assert deferred.retry() == []
    peer.uses = {1}
    assert deferred.retry() == [3]
    peer.uses = set()
    assert deferred.retry() == [1]
    assert (len(deferred), deferred.deferrals, deferred.held_by_owner()) == (0, 2, {})


def test_deferred_frees_are_tried_in_turn_and_a_few_at_once() -> None:
    peer = Peer()
    deferred = DeferredFrees("domain 7", peer.take_back, lambda: peer.now_s)
    peer.uses = set(range(25))
    for page in range(25):
        deferred.free(page, "net")
    peer.tried.clear()
    for _ in range(5):
        deferred.retry()
    assert peer.tried == [n % 25 for n in range(5 * TRIES_AT_ONCE)]
    peer.tried.clear()
    assert deferred.retry_all() == []
    assert len(peer.tried) == 25


def test_deferred_frees_that_take_too_long_are_leaks_of_their_owner(caplog: pytest.LogCaptureFixture) -> None:
    peer = Peer()
    deferred = DeferredFrees("domain 7", peer.take_back, lambda: peer.now_s)
    peer.uses = {1, 2, 3}
    deferred.free(1, "disk a")
    peer.now_s += 1
    deferred.free(2, "disk a")
    deferred.free(3, "disk b")
    peer.now_s += LEAK_AFTER_S - 1
    with caplog.at_level(logging.WARNING):
        deferred.retry()
        assert deferred.leaked_by_owner() == {"disk a": 1}
        peer.now_s += 1
        deferred.retry()
        deferred.retry()
    assert deferred.leaked_by_owner() == {"disk a": 2, "disk b": 1}
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "1 pages of disk a are still used by domain 7",
        "1 pages of disk a are still used by domain 7",
        "1 pages of disk b are still used by domain 7",
    ], "each page is told of once"
    peer.uses = {1}
    assert deferred.retry() == [2, 3]
    assert deferred.leaked_by_owner() == {"disk a": 1}


def test_an_arena_says_whose_pages_the_peer_keeps(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 16)
    first, second = arena.allocate(4, owner="xvda"), arena.allocate(2, owner="xvdb")
    grefs = [arena.grant(run.gref + n) for run in (first, second) for n in range(run.n_pages)]
    foreign = world.dom0.foreign_arena(guest.domid, arena.base)
    pages = foreign.map_pages([grefs[0], grefs[1], grefs[4]])
    assert arena.statistics().used_by_owner == {"xvda": 4, "xvdb": 2}
    assert (arena.free(first), arena.free(second)) == (2, 1)
    statistics = arena.statistics()
    assert statistics.held_by_owner == {"xvda": 2, "xvdb": 1}
    assert (statistics.held_pages, statistics.deferrals, statistics.leaked_pages) == (3, 3, 0)
    assert statistics.used_by_owner == {}
    for _ in range(13):
        arena.allocate(1)
    with pytest.raises(ResourceLimit):
        arena.allocate(1)
    pages.close()
    for _ in range(3):
        arena.allocate(1)
    assert arena.statistics().held_by_owner == {}
    foreign.close()


def test_a_callback_waits_for_free_pages(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 4)
    called: list[int] = []
    arena.when_free(4, lambda: called.append(0))
    assert called == [0], "at once"
    runs = [arena.allocate(1) for _ in range(4)]
    for n in (1, 2, 4):
        arena.when_free(n, lambda n=n: called.append(n))  # type: ignore[misc]
    gref = arena.grant(runs[3].gref)
    foreign = world.dom0.foreign_arena(guest.domid, arena.base)
    pages = foreign.map_pages([gref])
    arena.free(runs[0])
    assert called == [0, 1]
    for run in runs[1:]:
        arena.free(run)
    assert called == [0, 1, 2], "one is still used"
    pages.close()
    deadline = time.monotonic() + 20
    while called != [0, 1, 2, 4]:  # by itself: nobody allocates, frees or asks
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not arena._looking, "nobody waits, nobody looks"
    arena.when_free(5, lambda: called.append(5))
    foreign.close()
    arena.close()
    with pytest.raises(Closed):
        arena.when_free(1, lambda: None)
    assert called == [0, 1, 2, 4]


# Pools


def test_a_pool_is_its_owners_alone(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 10)
    with pytest.raises(ResourceLimit):
        GrantPool(arena, 11)
    assert arena.statistics().free_pages == 10, "a refused pool leaves nothing behind"
    with GrantPool(arena, 6, owner="net") as pool:
        arena.allocate(4)
        with pytest.raises(ResourceLimit):
            arena.allocate(1)
        runs = [pool.claim() for _ in range(6)]
        with pytest.raises(ResourceLimit, match="all 6 pages"):
            pool.claim()
        assert all(arena.granter.is_granted(run.gref) for run in runs)
        runs[0].view[0] = 9
        assert pool.release(runs[0])
        assert not arena.granter.is_granted(runs[0].gref)
        with pytest.raises(InvalidRequest):
            pool.release(runs[0])
        assert pool.claim(zero=False).view[0] == 9
        pool.release(runs[0])
        assert pool.claim().view[0] == 0
        assert "6 of 6" in repr(pool)
        assert arena.statistics().used_by_owner["net"] == 6
    assert arena.statistics().free_pages == 6
    for call in (pool.claim, lambda: pool.release(runs[1])):
        with pytest.raises(Closed):
            call()
    pool.close()
    with pytest.raises(InvalidRequest):
        GrantPool(arena, 0)


def test_a_pool_waits_for_the_peer(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 4)
    pool = GrantPool(arena, 2)
    run = pool.claim()
    foreign = world.dom0.foreign_arena(guest.domid, run.gref)
    pages = foreign.map_pages([run.gref])
    assert not pool.release(run)
    assert (pool.free_pages, pool.held_pages) == (1, 1)
    other = pool.claim(read_only=True)
    with pytest.raises(ResourceLimit, match="1 by domain 0"):
        pool.claim()
    with pytest.raises(GrantFailed):
        foreign.map_pages([other.gref])
    pages.close()
    assert pool.claim().gref == run.gref
    pages = foreign.map_pages([run.gref])
    pool.close()
    assert (arena.statistics().free_pages, arena.statistics().held_by_owner) == (3, {"pool": 1})
    pages.close()
    assert arena.statistics().free_pages == 4
    foreign.close()


def test_a_pool_and_many_threads(world: World) -> None:
    guest = world.guest()
    pool = GrantPool(guest.create_arena(0, 8), 4)
    failures: list[BaseException] = []
    using: set[int] = set()

    def work() -> None:
        try:
            for _ in range(200):
                try:
                    run = pool.claim()
                except ResourceLimit:
                    continue
                assert run.gref not in using
                using.add(run.gref)
                using.remove(run.gref)
                pool.release(run)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert pool.free_pages == 4


def test_refusals_of_the_broker_have_grant_statuses(make_world: "object") -> None:
    world: World = make_world(limits=Limits(max_maps=1))  # type: ignore[operator]
    guest, other = world.guest("a"), world.guest("b")
    pages = [granted_page(guest, other.domid, b"x")[0] for _ in range(2)]
    with other.grant_copier() as copier:
        ops = [GrantCopy(Granted(guest.domid, gref), Local(bytearray(1)), 1) for gref in pages]
        assert copier.copy(ops) == [GrantStatus.OKAY, GrantStatus.NO_SPACE]
    with pytest.raises(HypervisorError):
        other.foreign_arena(guest.domid, 9999)
