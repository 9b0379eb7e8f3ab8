# SPDX-License-Identifier: MIT
"""Dom0 looks at everybody's rings, and nobody else can."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paravirt.errors import HypervisorError, InvalidRequest, NotFound, ParavirtError, PermissionRefused
from paravirt.hypervisor.client import EventChannel, Hypervisor, PortState
from paravirt.hypervisor.looking import BUCKETS_NS, Header, Looker, Wish, choose, percentile_ns
from paravirt.hypervisor.messages import Op
from paravirt.hypervisor.rules import Limits
from paravirt.ring._core import lib
from paravirt.ring.event import WaitResult
from paravirt.ring.looking import RingLabel
from paravirt.ring.shared import BackRing, FrontRing

from .conftest import World, settle
from .test_leaks import Held

REQUEST = np.dtype([("id", "<u8"), ("what", "<u4"), ("pad", "<u4")])
RESPONSE = np.dtype([("id", "<u8")])


class Ring:
    """A guest's ring for Dom0, both ends with a record, as drivers have it."""

    def __init__(self, guest: Hypervisor, dom0: Hypervisor, device_id: int = 51712) -> None:
        self.arena = guest.create_arena(dom0.domid, 3)
        pages = self.arena.allocate(2)
        refs = tuple(self.arena.grant(pages.gref + i) for i in range(2))
        self.waiters = guest.waiter(), dom0.waiter()
        self.front_port = guest.alloc_unbound(self.waiters[0], dom0.domid)
        self.back_port = dom0.bind_interdomain(self.waiters[1], guest.domid, self.front_port.port)
        self.front = FrontRing.create(
            pages.view, REQUEST, RESPONSE, port=self.front_port, record=record(guest, refs, self.front_port, device_id)
        )
        self.foreign = dom0.foreign_arena(guest.domid, refs[0])
        self.mapped = self.foreign.map_pages(refs)
        self.back = BackRing.attach(
            self.mapped.view,
            REQUEST,
            RESPONSE,
            port=self.back_port,
            record=record(dom0, refs, self.back_port, device_id, granter=guest.domid),
        )

    def close_back(self) -> None:
        self.back.close()
        self.back_port.close()
        self.mapped.close()
        self.foreign.close()

    def close(self) -> None:
        self.close_back()
        self.front.close()
        self.front_port.close()
        self.arena.close()
        for waiter in self.waiters:
            waiter.close()


def record(
    owner: Hypervisor, refs: tuple[int, ...], port: EventChannel | None, device_id: int, granter: int | None = None
) -> Any:
    granter = owner.domid if granter is None else granter
    number = 0 if port is None else port.port
    return owner.ring_record(RingLabel("vtest", device_id, "test", owner.domid, 0, granter, refs, number))


@pytest.fixture
def looker(world: World) -> Any:
    with Looker(world.dom0) as made:
        yield made


def batch(*ids: int) -> Any:
    made = np.zeros(len(ids), REQUEST)
    made["id"] = ids
    return made


def test_dom0_sees_both_ends_and_the_ring_between(world: World, looker: Looker) -> None:
    guest = world.guest()
    ring = Ring(guest, world.dom0)
    ring.front.push(batch(1, 2, 3))
    ring.back.take_batch(2)
    (seen,) = looker.look()
    assert (seen.name, seen.place) == ("vtest/1/51712", f"1:{ring.arena.base}")
    assert seen.front is not None
    assert seen.back is not None
    assert (seen.front.pid, seen.back.pid) == (os.getpid(), os.getpid())
    assert (seen.front.domid, seen.back.domid) == (1, 0)
    assert (seen.front.prod, seen.front.cons, seen.front.outstanding) == (3, 0, 3)
    assert (seen.back.prod, seen.back.cons, seen.back.outstanding) == (0, 2, 2)
    assert seen.front.statistics == ring.front.statistics()
    assert seen.back.statistics == ring.back.statistics()
    assert seen.end.layouts == (REQUEST, RESPONSE)
    assert (seen.end.size, seen.end.entry_bytes, seen.end.protocol) == (256, 16, "test")
    at_least, at_most = seen.front.age_of(0)
    assert at_most is not None
    assert 0 <= at_least <= at_most
    assert looker.header(seen) == Header(3, 1, 0, 1)
    memory = looker.memory(seen)
    assert len(memory) == 8192
    assert (np.frombuffer(memory, REQUEST, 3, lib.PV_RING_HEADER_BYTES)["id"] == (1, 2, 3)).all()
    ring.close()
    assert looker.look() == []


def test_a_ring_is_named_by_its_device_or_its_place(world: World, looker: Looker) -> None:
    guest = world.guest()
    rings = [Ring(guest, world.dom0, device_id) for device_id in (0, 1)]
    for name in ("vtest/1/1", "vtest/1/1/q0", f"1:{rings[1].arena.base}"):
        assert looker.find(name).refs[0] == rings[1].arena.base
    with pytest.raises(NotFound, match=r"no ring 'vtest/1/2'; there are: vtest/1/0 \(1:\d+\), vtest/1/1"):
        looker.find("vtest/1/2")
    with pytest.raises(NotFound, match="there are: none"):
        choose([], "x")
    again = Ring(guest, world.dom0, 1)
    with pytest.raises(InvalidRequest, match="names 2 rings"):
        looker.find("vtest/1/1")
    for ring in (*rings, again):
        ring.close()


def test_a_process_that_ended_is_not_seen(world: World, looker: Looker) -> None:
    guest = world.guest()
    ring = Ring(guest, world.dom0)
    (seen,) = looker.look()
    assert seen.front is not None
    guest.close()
    settle(world, connections=1)
    (left,) = looker.look()
    assert left.front is None
    assert left.back is not None
    with pytest.raises(NotFound):
        looker.want(seen.front, Wish.LATENCY)
    ring.close_back()


def test_a_domain_cannot_pretend_to_have_an_end_of_anothers_ring(world: World, looker: Looker) -> None:
    guest, liar = world.guest(), world.guest("liar")
    ring = Ring(guest, world.dom0)
    memory = np.zeros(1024, np.uint64)
    base = ring.arena.base
    record_of = [record(liar, (base,), None, 51712, granter=guest.domid) for _ in range(2)]
    false_front = FrontRing.create(memory, REQUEST, RESPONSE, record=record_of[0])
    false_back = BackRing.attach(memory, REQUEST, RESPONSE, record=record_of[1])
    (seen,) = looker.look()
    assert seen.front is not None
    assert seen.back is not None
    assert (seen.front.domid, seen.back.domid) == (guest.domid, 0)
    ring.close_back()
    (seen,) = looker.look()
    assert seen.back is None
    false_front.close()
    false_back.close()
    ring.front.close()


def test_records_that_make_no_sense_are_left_out(world: World, looker: Looker) -> None:
    ring = Ring(world.guest(), world.dom0)
    core = ring.front.core
    for field, value in {"size": 3, "entry_bytes": 2**31, "out_bytes": 0, "in_bytes": 17}.items():
        before = getattr(core, field)
        setattr(core, field, value)
        (seen,) = looker.look()
        assert seen.front is None, field
        setattr(core, field, before)
    core.size = 0
    assert looker.look()[0].front is None
    core.size = 256
    ring.close()


# Waking


def test_a_kick_wakes_an_end_whose_notification_was_lost(world: World, looker: Looker) -> None:
    ring = Ring(world.guest(), world.dom0)
    (seen,) = looker.look()
    assert seen.back is not None
    ring.back_port.take_pending()
    assert not ring.back.final_check()
    ring.front.push_quietly(batch(1))
    assert ring.back_port.waiter.wait(timeout_s=0) is WaitResult.TIMEOUT
    looker.kick(seen.back)
    assert ring.back_port.waiter.wait(timeout_s=10) is WaitResult.EVENT
    assert ring.back.wait(timeout_s=10) is WaitResult.EVENT
    ring.close()


def test_what_cannot_be_kicked(world: World, looker: Looker) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 2)
    pages = arena.allocate(1)
    front = FrontRing.create(pages.view, REQUEST, RESPONSE, record=record(guest, (pages.gref,), None, 0))
    (seen,) = looker.look()
    assert seen.front is not None
    with pytest.raises(InvalidRequest, match="no event channel"):
        looker.kick(seen.front)
    for port, domid, kind in ((77, 1, HypervisorError), (1, 99, NotFound)):
        with pytest.raises(kind):
            world.dom0.kick_port(port, domid)
    front.close()


def test_pending_and_masked_ports_are_told(world: World) -> None:
    guest = world.guest()
    theirs = guest.alloc_unbound(guest.waiter(), 0)
    ours = world.dom0.bind_interdomain(world.dom0.waiter(), 1, theirs.port)

    def bits() -> tuple[bool, bool]:
        (info,) = world.dom0.list_ports(1)
        assert info.status.state is PortState.INTERDOMAIN
        assert world.dom0.port_status(theirs.port, 1).pending == info.status.pending
        return info.status.pending, info.status.masked

    assert bits() == (False, False)
    theirs.mask()
    ours.notify()
    assert bits() == (True, True)
    theirs.unmask()
    theirs.take_pending()
    assert bits() == (False, False)


# Rights and limits


@pytest.mark.parametrize("op", [Op.LOOK_NEXT, Op.ARENA_LOOK, Op.EVTCHN_KICK])
def test_only_dom0_may_look(world: World, op: Op) -> None:
    guest = world.guest()
    with pytest.raises(PermissionRefused, match="only Dom0"):
        guest.link.do(op)
    with Looker(guest) as looker, pytest.raises(PermissionRefused):
        looker.look()


def test_arenas_can_only_be_read(world: World, looker: Looker) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 3, read_only=True)
    run = arena.allocate(1)
    run.view[:4] = b"look"
    gref = arena.grant(run.gref, read_only=True)
    before = world.dom0.info().used_bytes
    with looker.arena(1, gref) as seen:
        assert (seen.domid, seen.peer_domid, seen.base, seen.n_pages) == (1, 0, arena.base, 3)
        assert (seen.read_only, seen.ended, seen.n_maps, seen.pid) == (True, False, 0, os.getpid())
        assert seen.read(gref, 4) == b"look"
        entries = np.frombuffer(seen.entries(), [("flags", "<u2"), ("domid", "<u2"), ("frame", "<u4")])
        assert entries[gref - seen.base].tolist() == (lib.PV_GTF_PERMIT_ACCESS | lib.PV_GTF_READONLY, 0, gref)
        for fd in (seen._entries_fd, seen._data_fd):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
        for n_bytes, offset in ((1, -1 - (gref - seen.base) * 4096), (4096 * 3 + 1, 0)):
            with pytest.raises(InvalidRequest):
                seen.read(gref, n_bytes, offset)
    assert world.dom0.info().used_bytes == before
    with pytest.raises(NotFound):
        looker.arena(1, 0)
    with pytest.raises(NotFound):
        looker.arena(7, 8)


def test_all_arenas_are_walked_those_too_that_only_a_peer_maps(world: World, looker: Looker) -> None:
    guest = world.guest()
    arenas = [guest.create_arena(0, n) for n in (1, 2, 3)]
    run = arenas[1].allocate(1)
    with world.dom0.foreign_arena(1, arenas[1].grant(run.gref)):
        bases = [arena.base for arena in arenas]
        arenas[1].close()
        found = [(arena.base, arena.n_pages, arena.ended, arena.n_maps) for arena in looker.arenas(1)]
    sizes = zip(bases, (1, 2, 3), strict=True)
    assert found == [(base, n, n == 2, n == 2) for base, n in sizes]


def test_the_budget_and_the_quota(make_world: Callable[..., World]) -> None:
    world = make_world(limits=Limits(max_looks=2))
    guest, before = world.guest(), world.dom0.info().used_bytes
    n = lib.PV_LOOK_RECORDS
    claimed = [record(guest, (8,), None, i) for i in range(2 * n + 1)]
    assert [i for i, each in enumerate(claimed) if each is None] == [2 * n]
    assert world.dom0.info().used_bytes == before + 2 * lib.PV_LOOK_BYTES
    with pytest.raises(ParavirtError, match="2 statistics objects"):
        guest.link.do(Op.LOOK_CREATE)
    claimed[0].end()
    assert record(guest, (8,), None, 1) is not None
    guest.close()
    settle(world, connections=1)
    assert world.dom0.info().used_bytes <= before


def test_without_memory_drivers_go_on_without(make_world: Callable[..., World]) -> None:
    world = make_world(budget_bytes=8 * lib.PV_LOOK_BYTES)  # which has made bindings pages already
    guest, before = world.guest(), world.dom0.info().used_bytes
    assert record(guest, (8,), None, 0) is None
    assert world.dom0.info().used_bytes == before
    world.broker.stop()
    assert record(guest, (8,), None, 0) is None


def test_looking_leaves_nothing_behind(world: World) -> None:
    guest = world.guest()

    def life() -> None:
        ring = Ring(guest, world.dom0)
        with Looker(world.dom0) as looker:
            for _ in range(3):
                (seen,) = looker.look()
                looker.header(seen)
                assert seen.front is not None
                looked = looker.object(seen.front.object)
                looked.open_log()
                assert looked.read_log() is None
        ring.close()

    life()
    before, used = Held.now(), world.dom0.info().used_bytes
    for _ in range(20):
        life()
    assert (Held.now(), world.dom0.info().used_bytes) == (before, used)


def test_percentiles_are_upper_bounds() -> None:
    latency = [0] * lib.PV_LOOK_BUCKETS
    assert percentile_ns(latency, 0.5) is None
    latency[4], latency[10] = 99, 1
    assert percentile_ns(latency, 0.5) == percentile_ns(latency, 0.99) == BUCKETS_NS[5]
    assert percentile_ns(latency, 0.999) == percentile_ns(latency, 1.0) == BUCKETS_NS[11]
