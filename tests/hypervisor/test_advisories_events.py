# SPDX-License-Identifier: MIT
"""Xen's security advisories about event channels; the table stands in `test_advisories.py`."""

import errno
import select
import threading
from contextlib import suppress

import pytest

from paravirt.errors import HypervisorError, ParavirtError
from paravirt.hypervisor import server
from paravirt.hypervisor.arenas import NOTIFY_SEND_EVENT
from paravirt.hypervisor.client import PortState, Virq
from paravirt.hypervisor.link import Link
from paravirt.hypervisor.messages import Op
from paravirt.hypervisor.rules import DOM0, DOMID_SELF, Limits
from paravirt.hypervisor.state import State
from paravirt.ring._core import ffi, lib
from paravirt.ring.event import SLOTS, NotifyResult, WaitResult
from paravirt.ring.grant import GrantFailed

from .conftest import World
from .story import Story, refused
from .test_grants import chunk
from .together import DEADLINE_S, run_all


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
