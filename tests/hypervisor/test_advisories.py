# SPDX-License-Identifier: MIT
"""Xen's security advisories about event channels and grants, each as a test of what must not happen here.

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
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.errors import HypervisorError, ParavirtError, ResourceLimit
from paravirt.hypervisor import server
from paravirt.hypervisor.arenas import NOTIFY_SEND_EVENT
from paravirt.hypervisor.client import Hypervisor, PortState, Virq
from paravirt.hypervisor.link import Link
from paravirt.hypervisor.messages import Op
from paravirt.hypervisor.rules import DOM0, DOMID_SELF, Limits
from paravirt.hypervisor.state import State
from paravirt.ring._core import ffi, lib
from paravirt.ring.event import SLOTS, NotifyResult, WaitResult
from paravirt.ring.grant import CopyOp, GrantFailed, GrantStatus

from ..ring.support import C_CORE, compile_c, run_c
from .conftest import World
from .story import Story, refused
from .test_grants import MAPPER, PERMIT, READING, SUB_PAGE, WRITING, Chunk, chunk, status_of

DEADLINE_S = 30
HERE = Path(__file__).parent


def run_all(*calls: Callable[[], None]) -> None:
    """Each in a thread of its own; whatever one raises is raised here."""
    errors: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "stuck"
    if errors:
        raise errors[0]


# Grants


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
        tmp_path / "flip", [HERE / "flip.c", C_CORE / "pv_grant.c"], f"-I{HERE}", '-DPV_ATOMIC_SHIM="flip_shim.h"'
    )
    said = [int(word) for word in run_c([program], timeout=DEADLINE_S).split()]
    assert said == [-1, 4, -1, 4, -errno.EBUSY, 4, 0, 0]


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


# Event channels


def test_xsa_47_a_refused_bind_leaves_no_trace(world: World) -> None:
    guest, other = world.guest("a"), world.guest("b")
    theirs = guest.alloc_unbound(guest.waiter(), 0)
    used = world.dom0.info().used_bytes
    waiter = other.waiter()
    for _ in range(20):
        with pytest.raises(HypervisorError):
            other.bind_interdomain(waiter, guest.domid, theirs.port)
        with pytest.raises(HypervisorError):
            other.bind_virq(waiter, Virq.DOM_EXC)
    assert waiter.inboxes == ()
    assert list(other.list_ports()) == []
    assert world.dom0.info().used_bytes == used
    assert theirs.status().state is PortState.UNBOUND
    assert theirs.notify() is NotifyResult.UNBOUND
    assert world.dom0.bind_interdomain(world.dom0.waiter(), guest.domid, theirs.port).take_pending()


def test_xsa_107_events_before_anybody_waits(world: World) -> None:
    """Sent by the other process, by the broker, or by the bind: each is there at the first look."""
    guest = world.guest()
    for send in (
        lambda ours: ours.notify(),
        lambda ours: _send_by_broker(world.dom0.link, ours.port),
        lambda ours: None,
    ):
        waiter = guest.waiter()
        theirs = guest.alloc_unbound(waiter, 0)
        ours = world.dom0.bind_interdomain(world.dom0.waiter(), guest.domid, theirs.port)
        moved = theirs.move_to(guest.waiter())
        moved.take_pending()
        assert ours.take_pending()
        send(ours)
        assert moved.status().remote_port == ours.port
        theirs_again = moved.move_to(waiter)
        assert waiter.wait(theirs_again, timeout_s=DEADLINE_S) in (WaitResult.EVENT, WaitResult.STALE)


def _send_by_broker(link: Link, port: int) -> None:
    def fill(request: "ffi.CData") -> None:
        request.port.port = port

    link.do(Op.EVTCHN_SEND, fill)


def every_operation(link: Link, number: int, domid: int) -> set[str]:
    """What each operation that takes a port number says to one that is not there."""
    said = set()
    for op in (Op.EVTCHN_CLOSE, Op.EVTCHN_SEND, Op.EVTCHN_STATUS, Op.EVTCHN_BIND, Op.EVTCHN_BIND_VCPU):

        def fill(request: "ffi.CData") -> None:
            request.port.port = request.port.remote_port = number
            request.port.domid = request.port.remote_domid = domid

        try:
            link.do(op, fill)
        except HypervisorError as error:
            said.add(error.name)
        else:
            said.add(op.name)
    return said


def test_xsa_221_any_port_number_is_answered(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    theirs = guest.alloc_unbound(waiter, 0)
    assert waiter.wait(theirs, timeout_s=0) is WaitResult.TIMEOUT, "a poll of a port without a peer"
    limit = guest.info().max_ports
    for number in (0, limit + 1, 4096, 2**17, 2**31, 2**32 - 1):
        assert every_operation(guest.link, number, guest.domid) == {"EINVAL"}
    for number in range(2, 40):
        assert every_operation(guest.link, number, guest.domid) == {"EINVAL", "EVTCHN_STATUS"}, "closed"


def test_xsa_342_slots_and_ports_stay_in_their_tables() -> None:
    inbox = ffi.new("struct pv_inbox[2]")
    port, waiter = ffi.new("struct pv_port *"), ffi.new("struct pv_waiter *")
    assert lib.pv_waiter_init(waiter, ffi.NULL) == 0
    for slot in (SLOTS, SLOTS + 63, 2**31, 2**32 - 1):
        lib.pv_port_init(port, waiter, inbox, slot)
        lib.pv_port_set_peer(port, inbox, slot, -1, 0)
        lib.pv_notify(port)
        lib.pv_port_mask(port)
        lib.pv_port_unmask(port)
        assert lib.pv_inbox_slot_has_event(inbox, slot)
        assert bytes(ffi.buffer(ffi.addressof(inbox[1]))) == bytes(4096), "nothing behind the page was touched"
        assert lib.pv_port_take_pending(port)
    lib.pv_waiter_destroy(waiter)
    state = State(Limits(max_ports=5))
    connection = state.connect(state.create_domain("few", isolated=True, max_pages=None, uid=None).domid)
    index = state.events.create_waiter(connection, 1, 1)[0].index
    ports = [state.alloc_unbound(connection, index, DOM0).port.number for _ in range(5)]
    assert ports == [1, 2, 3, 4, 5]
    refused(errno.ENOSPC, lambda: state.bind_ipi(connection, index))


def test_xsa_382_a_buffer_is_never_overrun() -> None:
    inbox = ffi.new("struct pv_inbox *")
    for word in range(64):
        inbox.pending[word] = 2**64 - 1
    inbox.selector = 2**64 - 1
    found: list[int] = []
    while True:
        slots = ffi.new("uint32_t[8]", [0xFFFFFFFF] * 8)
        n = lib.pv_inbox_take(inbox, slots, 7)
        assert slots[7] == 0xFFFFFFFF
        found += list(slots)[:n]
        if n < 7:
            break
    assert found == list(range(SLOTS))


def test_xsa_340_a_send_to_a_port_that_is_being_made(world: World) -> None:
    guest = world.guest()
    other = world.connect(guest.domid)
    waiter = guest.waiter()
    done = threading.Event()

    def make() -> None:
        for _ in range(60):
            ipi = guest.bind_ipi(waiter)
            _send_by_broker(guest.link, ipi.port)
            assert ipi.take_pending()
            ipi.close()
        done.set()

    def send() -> None:
        while not done.is_set():
            for number in range(1, 4):
                with suppress(HypervisorError):
                    _send_by_broker(other.link, number)

    run_all(make, send)


def test_xsa_343_reset_races_with_everything(world: World) -> None:
    guest = world.guest()
    sibling, backend = world.connect(guest.domid), world.connect(0)
    codes: set[str] = set()
    done = threading.Event()

    def work() -> None:
        waiter, other_waiter = sibling.waiter(), backend.waiter()
        while not done.is_set():
            try:
                theirs = sibling.alloc_unbound(waiter, 0)
                ours = backend.bind_interdomain(other_waiter, guest.domid, theirs.port)
                ours.notify()
                theirs.notify()
                ours.close()
                theirs.close()
            except HypervisorError as error:
                codes.add(error.name)

    def reset() -> None:
        try:
            for _ in range(60):
                try:
                    guest.reset_ports()
                except HypervisorError as error:
                    codes.add(error.name)
        finally:
            done.set()

    run_all(work, reset)
    assert codes <= {"EAGAIN", "EINVAL"}, "EINVAL: the port to bind was closed"
    guest.reset_ports()
    assert list(world.dom0.list_ports(guest.domid)) == []
    assert all(
        info.status.remote_domid != guest.domid or info.status.state is PortState.UNBOUND
        for info in world.dom0.list_ports(0)
    )


def test_xsa_344_380_the_end_of_a_large_process_has_breaks(
    isolated_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "END_SLICE", 10)
    world = isolated_world
    guest, large = world.guest(), world.connect(0)
    waiter, dom0_ports = large.waiter(), 200
    for _ in range(dom0_ports):
        large.alloc_unbound(waiter, guest.domid)
    entered, go = threading.Event(), threading.Event()

    def hold() -> int:
        entered.set()
        assert go.wait(DEADLINE_S)
        return 0

    seen: list[int] = []
    asker = threading.Thread(target=lambda: seen.append(world.dom0.find_domain(0).ports))
    holder = threading.Thread(target=lambda: world.broker._in_loop(hold))
    holder.start()
    assert entered.wait(DEADLINE_S)
    # Both wait for the broker at the same time: the end of the large one, and a question.
    large.link.close()
    asker.start()
    while not _has_request(world):
        pass
    go.set()
    for thread in (holder, asker):
        thread.join(DEADLINE_S)
    assert seen[0] >= dom0_ports - 30, "answered between two slices"
    while world.dom0.find_domain(0).ports:
        pass


def _has_request(world: World) -> bool:
    """Whether the question stands in the broker's socket."""

    session = world.broker._sessions[min(world.broker._sessions)]
    return bool(select.select([session.socket], [], [], 0)[0])


def test_xsa_380_maps_are_released_in_slices() -> None:
    state = State()
    dom0 = state.connect(DOM0)
    guest = state.create_domain("guest", isolated=False, max_pages=None, uid=None).domid
    connection = state.connect(guest)
    waiter = state.events.create_waiter(dom0, DOM0, 1)[0].index
    port = state.alloc_unbound(dom0, waiter, guest).port.number
    for _ in range(100):
        arena = state.create_arena(connection, DOM0, 1, read_only=False)
        mapping, _ = state.map_arena(dom0, guest, arena.base)
        state.set_notify(dom0, mapping.number, actions=NOTIFY_SEND_EVENT, gref=0, offset_bytes=0, port=port)
    rounds, done = 0, False
    while not done:
        before = state.arenas.n_maps_of(dom0)
        _, done = state.disconnect_some(dom0, 7)
        rounds += 1
        assert before - state.arenas.n_maps_of(dom0) <= 7
        assert done or state.events.count(DOM0) == 1 or not state.arenas.n_maps_of(dom0), "maps before ports"
    assert rounds == 15
    assert state.n_connections == 1


def test_xsa_496_out_of_ports_changes_nobody_elses_state() -> None:
    story = Story(Limits(max_ports=2))
    state = story.state
    kept = state.bind_virq(story.a, story.waiter[story.a], Virq.ARGO).port
    story.unbound(story.a, DOM0)
    before = len(state.events._virqs), dict(state.events._ports[1])
    for virq in (Virq.TIMER, Virq.ARGO):
        code = errno.EEXIST if virq is Virq.ARGO else errno.ENOSPC
        refused(code, lambda virq=virq: state.bind_virq(story.a, story.waiter[story.a], virq))  # type: ignore[misc]
    assert before == (len(state.events._virqs), state.events._ports[1])
    assert len(state.raise_virq(story.dom0, Virq.ARGO, 1)) == 1
    state.close_port(story.a, kept.number)
    assert state.bind_virq(story.a, story.waiter[story.a], Virq.TIMER).port.number == kept.number
    assert state.port_status(story.a, DOMID_SELF, 2) is not None


def test_every_refusal_is_an_error_of_ours(world: World) -> None:
    """None of the above comes as another exception, which would be a defect."""
    guest = world.guest()
    for call in (lambda: guest.port_status(0), lambda: guest.reset_ports(0), lambda: guest.foreign_arena(0, 9)):
        with pytest.raises(ParavirtError):
            call()
    with pytest.raises(GrantFailed), chunk() as c:
        c.mapper.map(1)
