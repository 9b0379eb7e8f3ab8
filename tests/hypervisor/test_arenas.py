# SPDX-License-Identifier: MIT
"""Arenas and grants over sockets, with both memory providers."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paravirt.errors import (
    Closed,
    HypervisorError,
    InvalidRequest,
    NotFound,
    PermissionRefused,
    ResourceLimit,
)
from paravirt.hypervisor.client import (
    XENSTORE_GREF,
    DomainState,
)
from paravirt.hypervisor.rules import Limits
from paravirt.ring.event import WaitResult
from paravirt.ring.grant import CopyOp, GrantFailed, GrantStatus

from .conftest import World

MakeWorld = Callable[..., World]
DEADLINE_S = 30


def test_pages_are_shared_granted_and_taken_back(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 32)
    assert arena.provider == world.provider
    run = arena.allocate(3)
    grefs = [arena.grant(run.gref + page) for page in (2, 0, 1)]
    foreign = world.dom0.foreign_arena(1, grefs[0])
    assert world.dom0.foreign_arena(1, grefs[1]) is foreign
    foreign.close()
    pages = foreign.map_pages(grefs)
    for page in range(3):
        run.view[page * 4096] = page + 1
    assert [pages.view[at * 4096] for at in range(3)] == [3, 1, 2]
    pages.view[5] = 99
    assert run.view[2 * 4096 + 5] == 99
    in_order = foreign.map_pages([run.gref, run.gref + 1], read_only=True)
    assert in_order.mapping is foreign.data
    assert in_order.view.readonly
    assert not arena.revoke(run.gref)
    in_order.close()
    pages.close()
    with pytest.raises(Closed):
        _ = pages.view
    assert all(arena.revoke(gref) for gref in grefs)
    foreign.close()
    assert world.dom0.list_domains()[0].maps == 0


def test_a_bad_reference_pins_nothing(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 8)
    run = arena.allocate(2)
    arena.grant(run.gref)
    with world.dom0.foreign_arena(1, arena.base) as foreign:
        with pytest.raises(GrantFailed) as info:
            foreign.map_pages([run.gref, run.gref + 1])
        assert info.value.status is GrantStatus.GENERAL_ERROR
        with pytest.raises(InvalidRequest):
            foreign.map_pages([])
        assert foreign.mapper.statistics().pinned_pages == 0
        assert arena.revoke(run.gref)


def test_memory_made_for_somebody_else_cannot_be_mapped(world: World) -> None:
    guest, other = world.guest("a"), world.guest("b")
    arena = guest.create_arena(0, 8)
    for gref in (arena.base, arena.base + 7):
        with pytest.raises(PermissionRefused):
            other.foreign_arena(guest.domid, gref)
    with pytest.raises(HypervisorError):
        other.foreign_arena(guest.domid, arena.base + 8)
    with pytest.raises(HypervisorError):
        other.foreign_arena(guest.domid, XENSTORE_GREF)
    with pytest.raises(NotFound):
        other.foreign_arena(77, 8)


def test_a_read_only_arena_is_read_only_for_the_peer(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 4, read_only=True)
    run = arena.allocate(1)
    run.view[0] = 42
    arena.grant(run.gref)
    with world.dom0.foreign_arena(1, run.gref) as foreign:
        assert foreign.read_only
        with pytest.raises(GrantFailed):
            foreign.map_pages([run.gref])
        with foreign.map_pages([run.gref], read_only=True) as pages:
            assert pages.view[0] == 42
            assert pages.view.readonly
            with pytest.raises(PermissionRefused):
                pages.set_unmap_notify(clear_byte=0)
        assert foreign.mapper.copy_to([CopyOp(run.gref, 0, 1)], b"x") == [GrantStatus.GENERAL_ERROR]


def test_reserved_pages_are_granted_to_dom0_from_the_start(world: World) -> None:
    guest = world.guest()
    foreign = world.dom0.foreign_arena(1, XENSTORE_GREF)
    page = guest.reserved_page(XENSTORE_GREF)
    assert guest.reserved_page(XENSTORE_GREF) is page
    page.memory.view[7] = 1
    with foreign.map_pages([XENSTORE_GREF]) as pages:
        assert pages.view[7] == 1
    foreign.close()
    with pytest.raises(HypervisorError):
        guest.reserved_page(8)
    page.close()
    assert guest.reserved_page(XENSTORE_GREF).memory.view[7] == 1, "it lives as long as its domain"


def test_a_page_with_a_pin_is_not_used_again_before_it_is_gone(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 4)
    run = arena.allocate(4)
    grefs = [arena.grant(run.gref + page) for page in range(4)]
    foreign = world.dom0.foreign_arena(1, arena.base)
    pages = foreign.map_pages([grefs[1]])
    run.view[:] = b"\xff" * run.n_bytes
    arena.free(run)
    assert (arena.statistics().free_pages, arena.statistics().held_pages) == (3, 1)
    with pytest.raises(ResourceLimit):
        arena.allocate(4)
    with pytest.raises(InvalidRequest):
        arena.free(run)
    small = arena.allocate(2)
    assert small.gref == arena.base + 2
    assert not any(small.view), "zeroed"
    arena.free(small)
    pages.view[0] = 9
    pages.close()
    whole = arena.allocate(4)
    assert not any(whole.view)
    assert arena.statistics().granted_pages == 0
    foreign.close()


def test_unmap_notifications_tell_the_granter(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    theirs = guest.alloc_unbound(waiter, 0)
    backend = world.connect(0)
    ours = backend.bind_interdomain(backend.waiter(), 1, theirs.port)
    theirs.status()
    arena = guest.create_arena(0, 4)
    run = arena.allocate(4)
    grefs = [arena.grant(run.gref + page) for page in (3, 1)]
    run.view[3 * 4096 + 100] = run.view[1 * 4096 + 1] = 1
    foreign = backend.foreign_arena(1, arena.base)
    first, second = foreign.map_pages(grefs), foreign.map_pages(grefs)
    with pytest.raises(InvalidRequest):
        first.set_unmap_notify()
    with pytest.raises(InvalidRequest):
        first.set_unmap_notify(clear_byte=8192)
    with pytest.raises(HypervisorError):
        first.set_unmap_notify(port=ours.port + 1)
    first.set_unmap_notify(port=ours.port, clear_byte=100)
    second.set_unmap_notify(port=ours.port, clear_byte=4097)
    while waiter.wait(theirs, timeout_s=0) is not WaitResult.TIMEOUT:
        pass
    first.close()
    assert waiter.wait(theirs, timeout_s=DEADLINE_S) is WaitResult.EVENT
    assert (run.view[3 * 4096 + 100], run.view[1 * 4096 + 1]) == (0, 1)
    backend.link.close()  # what the kernel does when the process dies
    result = waiter.wait(theirs, timeout_s=DEADLINE_S)
    while result is WaitResult.STALE:
        result = waiter.wait(theirs, timeout_s=DEADLINE_S)
    assert result is WaitResult.EVENT
    assert run.view[1 * 4096 + 1] == 0
    assert arena.revoke(grefs[0]), "the pins of the dead process are gone"


def test_an_arena_outlives_its_owner_while_it_is_mapped(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 4)
    gref = arena.grant(arena.allocate(1).gref)
    foreign = world.dom0.foreign_arena(1, gref)
    world.dom0.destroy_domain(1)
    foreign.data.view[0] = 5
    assert [info.state for info in world.dom0.list_domains(dying=True)] == [DomainState.RUNNING, DomainState.DYING]
    assert world.dom0.create_domain("next").domid == 2
    foreign.close()
    assert [info.domid for info in world.dom0.list_domains(dying=True)] == [0, 2]


def test_quotas_and_the_budget_say_what_is_exhausted(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=100 * 4096, limits=Limits(max_pages=60, max_ports=2, max_connections=2))
    guest = world.guest()
    with pytest.raises(ResourceLimit, match="60 pages"):
        guest.create_arena(0, 61)
    guest.create_arena(0, 60)
    with pytest.raises(ResourceLimit, match="memory budget"):
        world.dom0.create_arena(1, 60)
    assert world.dom0.list_domains()[0].pages == 0
    waiter = guest.waiter()
    for _ in range(2):
        guest.alloc_unbound(waiter, 0)
    with pytest.raises(ResourceLimit, match="2 event channels"):
        guest.alloc_unbound(waiter, 0)
    world.connect(1)
    with pytest.raises(HypervisorError, match="2 connections"):
        world.connect(1)


def resident_pages(address: int) -> int:
    """Of the mapping that begins there."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:08x}-"):
            return next(int(found.split()[1]) // 4 for found in lines if found.startswith("Rss:"))
    raise AssertionError("no such mapping")


def test_pages_take_memory_when_they_are_first_used(world: World) -> None:
    guest = world.connect(world.dom0.create_domain("guest").domid)
    before = len(os.listdir("/proc/self/fd"))
    with guest.create_arena(0, 256) as arena:
        assert len(os.listdir("/proc/self/fd")) == before + 2  # the broker's; what is mapped keeps none
        run = arena.allocate(200)
        assert resident_pages(arena.memory.address) == 0
        run.view[100 * 4096 : 103 * 4096] = b"x" * (3 * 4096)
        assert resident_pages(arena.memory.address) == 3
        arena.free(run)
        again = arena.allocate(250)
        assert again.view == bytes(250 * 4096)
