# SPDX-License-Identifier: MIT
"""Every operation of the event-channel interface (EVTCHNOP_*, public/event_channel.h), row by row.

A waiter stands in the place of a virtual CPU: it is what an event wakes.

| # | operation | rule | test |
|---|---|---|---|
| 0 | bind_interdomain | unbound, and for the caller | test_tables: test_bind_needs_a_port_... |
| | | the local port is pending at once | test_channels: test_events_go_both_ways_and_the_first_one_is_there_at_once |
| | | -ESRCH, -ENOSPC | test_channels: test_ports_not_meant_...; test_tables: test_bind_when_out_of_ports_... |
| 1 | bind_virq | one a virtual CPU, a domain, the host | test_virqs_are_bound_once_where_they_belong |
| | | only the handler: -EBUSY | test_a_global_virq_is_its_handlers |
| | | -EINVAL, -ENOENT, -EEXIST | test_virqs_that_cannot_be_bound |
| 2 | bind_pirq | there is no hardware | - |
| 3 | close | the peer is unbound, for the closer | test_tables: test_close_makes_the_peer_unbound_and_bindable_again |
| | | pending is cleared | test_what_was_pending_goes_with_its_port |
| 4 | send | peer, self, dropped, else -EINVAL | test_tables: test_bind_connects_both_..., test_virq_binds_once_... |
| 5 | status | every state; -ESRCH, -EINVAL | test_status_of_every_kind_of_port |
| 6 | alloc_unbound | loopback; never port 0 | test_tables: test_loopback_and_ipi, test_bind_connects_both_... |
| | | for another domain | - a port belongs to a process, which asks itself |
| 7 | bind_ipi | -ENOENT | test_virqs_that_cannot_be_bound |
| 8 | bind_vcpu | which kinds; the peer follows; no event is lost | test_a_channel_moves_... |
| 9 | unmask | raised again if pending | ring/test_event: test_masked_events_are_kept_and_wake_nobody |
| 10 | reset | closes all, -EBUSY, -EAGAIN | test_reset_... |
| 11 | init_control, 12 expand_array, 14 reset_cont | other delivery page | - |
| 13 | set_priority | 0 to 15, strict | test_priorities_are_strict |
| | limits | ports of a domain | test_the_last_port_of_a_domain; test_tables: test_a_waiter_has_another_inbox_... |
"""

import errno
import os
import threading

import pytest

from paravirt.errors import AlreadyExists, HypervisorError, InvalidRequest, NotFound, PermissionRefused, ResourceLimit
from paravirt.hypervisor.client import ChannelStatus, EventChannel, Hypervisor, PortState, Virq, Waiter
from paravirt.hypervisor.events import DOMAIN_VIRQS, GLOBAL_VIRQS, RESET_SLICE, VCPU_VIRQS
from paravirt.hypervisor.rules import DOM0, DOMID_SELF, Limits
from paravirt.hypervisor.state import State
from paravirt.ring.event import NotifyResult, WaitResult

from .conftest import World
from .story import Story, refused

DEADLINE_S = 30


def code_of(error: "pytest.ExceptionInfo[HypervisorError]") -> str:
    return error.value.name


# Virtual interrupts


def test_each_virq_is_of_one_kind() -> None:
    assert len(VCPU_VIRQS) + len(DOMAIN_VIRQS) + len(GLOBAL_VIRQS) == len(Virq)
    assert Virq.DOM_EXC in GLOBAL_VIRQS


def test_virqs_are_bound_once_where_they_belong() -> None:
    story = Story()
    state = story.state
    second = story.new_waiter(story.a)
    for waiter in (story.waiter[story.a], second):
        state.bind_virq(story.a, waiter, Virq.TIMER)
        refused(errno.EEXIST, lambda waiter=waiter: state.bind_virq(story.a, waiter, Virq.TIMER))  # type: ignore[misc]
    state.bind_virq(story.b, story.waiter[story.b], Virq.TIMER)
    state.bind_virq(story.a, second, Virq.ARGO)
    refused(errno.EEXIST, lambda: state.bind_virq(story.a, story.waiter[story.a], Virq.ARGO))
    state.bind_virq(story.b, story.waiter[story.b], Virq.ARGO)
    state.bind_virq(story.dom0, story.waiter[story.dom0], Virq.CONSOLE)
    assert len(state.raise_virq(story.dom0, Virq.TIMER, 1)) == 2
    assert len(state.raise_virq(story.dom0, Virq.TIMER, 2)) == 1
    assert len(state.raise_virq(story.dom0, Virq.ARGO, 1)) == 1
    assert len(state.raise_virq(story.dom0, Virq.CONSOLE, 2)) == 1, "a global one has one receiver"
    assert state.raise_virq(story.dom0, Virq.TIMER, DOM0) == ()
    refused(errno.EPERM, lambda: state.raise_virq(story.a, Virq.TIMER, DOMID_SELF))
    refused(errno.EINVAL, lambda: state.raise_virq(story.dom0, Virq.DOM_EXC, DOM0))
    refused(errno.EINVAL, lambda: state.raise_virq(story.dom0, 5, DOM0))
    refused(errno.ESRCH, lambda: state.raise_virq(story.dom0, Virq.TIMER, 9))


def test_virqs_that_cannot_be_bound() -> None:
    story = Story()
    state, waiter = story.state, story.waiter[story.a]
    for unknown in (5, 14, 16, 2**32 - 1):
        refused(errno.EINVAL, lambda unknown=unknown: state.bind_virq(story.a, waiter, unknown))  # type: ignore[misc]
    refused(errno.ENOENT, lambda: state.bind_virq(story.a, waiter + 1, Virq.TIMER))
    refused(errno.ENOENT, lambda: state.bind_ipi(story.a, waiter + 1))
    refused(errno.EBUSY, lambda: state.bind_virq(story.a, waiter, Virq.DOM_EXC))
    assert state.events.count(1) == 0


def test_a_global_virq_is_its_handlers() -> None:
    story = Story()
    state = story.state
    waiter, guests = story.waiter[story.dom0], story.waiter[story.a]
    refused(errno.EPERM, lambda: state.set_virq_handler(story.a, Virq.CON_RING, 1))
    refused(errno.EINVAL, lambda: state.set_virq_handler(story.dom0, Virq.TIMER, 1))
    refused(errno.ESRCH, lambda: state.set_virq_handler(story.dom0, Virq.CON_RING, 9))
    bound = state.bind_virq(story.dom0, waiter, Virq.CON_RING).port
    refused(errno.EBUSY, lambda: state.set_virq_handler(story.dom0, Virq.CON_RING, 1))
    state.close_port(story.dom0, bound.number)
    state.set_virq_handler(story.dom0, Virq.CON_RING, 1)
    refused(errno.EBUSY, lambda: state.bind_virq(story.dom0, waiter, Virq.CON_RING))
    state.bind_virq(story.a, guests, Virq.CON_RING)
    state.end_domain(1)
    state.bind_virq(story.dom0, waiter, Virq.CON_RING)


def test_virqs_reach_guests_whatever_their_doorbell(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    timer = guest.bind_virq(waiter, Virq.TIMER)
    assert timer.status().virq == Virq.TIMER
    with pytest.raises(HypervisorError) as info:
        guest.bind_virq(waiter, Virq.DOM_EXC)
    assert code_of(info) == "EBUSY"
    with pytest.raises(AlreadyExists):
        guest.bind_virq(waiter, Virq.TIMER)
    with pytest.raises(PermissionRefused):
        guest.raise_virq(Virq.TIMER)
    world.dom0.raise_virq(Virq.TIMER, guest.domid)
    assert waiter.wait(timer, timeout_s=DEADLINE_S) is WaitResult.EVENT
    assert timer.notify() is NotifyResult.UNBOUND, "nobody sends on a virtual interrupt"
    kind = os.readlink(f"/proc/self/fd/{waiter.inboxes[0].bell_fd}")
    assert ("pipe" in kind) is world.isolated, "an isolated guest holds nothing that could block the hypervisor"
    world.dom0.set_virq_handler(Virq.CONSOLE, guest.domid)
    console = guest.bind_virq(waiter, Virq.CONSOLE)
    world.dom0.raise_virq(Virq.CONSOLE)
    assert waiter.take_pending() == [console]


# Status


def test_status_of_every_kind_of_port(world: World) -> None:
    guest, dom0 = world.guest(), world.dom0
    waiter = guest.waiter()
    unbound = guest.alloc_unbound(waiter, 0)
    bound = guest.alloc_unbound(waiter, 0)
    ours = dom0.bind_interdomain(dom0.waiter(), guest.domid, bound.port)
    virq, ipi = guest.bind_virq(waiter, Virq.DEBUG), guest.bind_ipi(waiter)
    expected = [
        ChannelStatus(PortState.UNBOUND, 0, 0),
        ChannelStatus(PortState.INTERDOMAIN, 0, ours.port),
        ChannelStatus(PortState.VIRQ, 0x7FF2, 0),
        ChannelStatus(PortState.IPI, guest.domid, ipi.port),
    ]
    channels = [unbound, bound, virq, ipi]
    assert [channel.port for channel in channels] == [1, 2, 3, 4]
    for asker, domid in ((guest, DOMID_SELF), (dom0, guest.domid)):
        assert [asker.port_status(channel.port, domid) for channel in channels] == expected
        assert [info.status for info in asker.list_ports(domid)] == expected
        assert asker.port_status(5, domid) == ChannelStatus(PortState.CLOSED, 0, 0)
    virq.close()
    assert [info.port for info in dom0.list_ports(guest.domid)] == [1, 2, 4]
    for number in (0, Limits().max_ports + 1, 2**32 - 1):
        with pytest.raises(HypervisorError) as info:
            guest.port_status(number)
        assert code_of(info) == "EINVAL"
        assert guest.port_state(number) is PortState.CLOSED
    for ask in (lambda: guest.port_status(1, 0), lambda: list(guest.list_ports(0))):
        with pytest.raises(PermissionRefused):
            ask()
    for ask in (lambda: dom0.port_status(1, 9), lambda: list(dom0.list_ports(9))):
        with pytest.raises(NotFound):
            ask()


def test_what_was_pending_goes_with_its_port(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    kept = guest.alloc_unbound(waiter, DOMID_SELF)
    other = guest.bind_interdomain(waiter, DOMID_SELF, kept.port)
    kept.notify()
    slot = other.slot
    other.close()
    again = guest.alloc_unbound(waiter, DOMID_SELF)
    assert (again.slot, again.take_pending()) == (slot, False)
    kept.take_pending()
    assert waiter.take_pending() == []


# Moving


def pair(world: World, guest: Hypervisor) -> tuple[Waiter, EventChannel, Waiter, EventChannel]:
    """A channel between a guest and Dom0, quiet."""
    theirs_waiter, ours_waiter = guest.waiter(), world.dom0.waiter()
    theirs = guest.alloc_unbound(theirs_waiter, 0)
    ours = world.dom0.bind_interdomain(ours_waiter, guest.domid, theirs.port)
    ours.take_pending()
    theirs.status()
    while theirs_waiter.wait(timeout_s=0) is not WaitResult.TIMEOUT:
        pass
    return theirs_waiter, theirs, ours_waiter, ours


def test_a_channel_moves_to_another_waiter_and_its_peer_follows(world: World) -> None:
    guest = world.guest()
    first, theirs, ours_waiter, ours = pair(world, guest)
    second = guest.waiter()
    ours.notify()
    moved = theirs.move_to(second)
    assert moved.port == theirs.port
    assert second.take_pending() == [moved], "what was pending, and what is on its way"
    assert first.inboxes == ()
    for _ in range(3):
        assert ours.notify() in (NotifyResult.SUPPRESSED, NotifyResult.RANG)
        assert second.wait(moved, timeout_s=DEADLINE_S) is WaitResult.EVENT
    moved.notify()
    assert ours_waiter.wait(ours, timeout_s=DEADLINE_S) in (WaitResult.EVENT, WaitResult.STALE)
    assert moved.status().state is PortState.INTERDOMAIN
    assert moved.status().waiter == second.index
    with pytest.raises(InvalidRequest):
        moved.move_to(ours_waiter)
    moved.close()
    assert second.inboxes == ()


def test_a_channel_moves_while_its_peer_sends(world: World) -> None:
    """None of the sends that were answered by an event is lost: each round trip comes to its end."""
    guest = world.guest()
    first, theirs, _, ours = pair(world, guest)
    waiters = [first, guest.waiter()]
    seen = threading.Semaphore(0)

    def send() -> None:
        for _ in range(200):
            ours.notify()
            assert seen.acquire(timeout=DEADLINE_S)

    thread = threading.Thread(target=send)
    thread.start()
    channel, n = theirs, 0
    while n < 200:
        waiter = waiters[n % 2]
        if n and channel.waiter is not waiter:
            channel = channel.move_to(waiter)
            channel.take_pending()  # the move raises it; the sender below may have been before or after
            n += 1
            seen.release()
            continue
        if channel.waiter.wait(channel, timeout_s=DEADLINE_S) is WaitResult.EVENT:
            n += 1
            seen.release()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_what_cannot_move() -> None:
    story = Story()
    state = story.state
    second = story.new_waiter(story.a)
    for opened in (
        state.bind_ipi(story.a, story.waiter[story.a]),
        state.bind_virq(story.a, story.waiter[story.a], Virq.TIMER),
    ):
        number = opened.port.number
        refused(errno.EINVAL, lambda number=number: state.bind_vcpu(story.a, number, second))  # type: ignore[misc]
    argo = state.bind_virq(story.a, story.waiter[story.a], Virq.ARGO).port
    refused(errno.ENOENT, lambda: state.bind_vcpu(story.a, argo.number, 9))
    refused(errno.EINVAL, lambda: state.bind_vcpu(story.a, argo.number, second, argo.inbox.number + 1))
    refused(errno.EINVAL, lambda: state.bind_vcpu(story.b, argo.number, story.waiter[story.b]))
    opened, inbox_gone = state.bind_vcpu(story.a, argo.number, second)
    assert (opened.new_inbox, inbox_gone) == (True, False)
    assert argo.waiter.index == second
    refused(errno.EEXIST, lambda: state.bind_virq(story.a, second, Virq.ARGO))


# Reset


def test_reset_closes_all_channels_of_all_processes(world: World) -> None:
    guest = world.guest()
    sibling = world.connect(guest.domid)
    waiter, theirs, ours_waiter, ours = pair(world, guest)
    elsewhere = sibling.alloc_unbound(sibling.waiter(), 0)
    guest.reset_ports()
    assert list(guest.list_ports()) == []
    assert waiter.wait(theirs, timeout_s=DEADLINE_S) is WaitResult.STALE
    assert theirs.status() == elsewhere.status() == ChannelStatus(PortState.CLOSED, 0, 0)
    assert theirs.notify() is NotifyResult.UNBOUND
    assert ours.status() == ChannelStatus(PortState.UNBOUND, guest.domid, 0)
    again = guest.alloc_unbound(waiter, 0)
    assert again.port == theirs.port
    theirs.close()
    assert again.status().state is PortState.UNBOUND, "the old end does not close what has its number now"
    assert world.dom0.bind_interdomain(ours_waiter, guest.domid, again.port).take_pending()
    world.dom0.reset_ports(guest.domid)
    assert again.status().state is PortState.CLOSED
    with pytest.raises(PermissionRefused):
        guest.reset_ports(0)
    with pytest.raises(NotFound):
        world.dom0.reset_ports(9)
    again.close()
    elsewhere.close()
    assert waiter.inboxes == ()


def full_state() -> tuple[State, int, int, int]:
    """A domain with more ports than a reset closes in one go: (state, two of its connections, waiter)."""
    state = State(Limits(max_ports=2 * RESET_SLICE))
    domid = state.create_domain("many", isolated=False, max_pages=None, uid=None).domid
    first, second = state.connect(domid), state.connect(domid)
    waiter = state.events.create_waiter(first, domid, 1)[0].index
    for _ in range(RESET_SLICE + 10):
        state.alloc_unbound(first, waiter, DOM0)
    return state, first, second, waiter


def test_reset_lets_others_have_their_turn() -> None:
    state, first, second, waiter = full_state()
    start, effects = state.reset_ports(first, DOMID_SELF, 0)
    assert start == RESET_SLICE + 1
    assert len(effects) <= 3 * RESET_SLICE
    assert state.events.count(1) == 10
    refused(errno.EBUSY, lambda: state.reset_ports(second, DOMID_SELF, 0))
    state.alloc_unbound(first, waiter, DOM0)
    assert state.reset_ports(first, DOMID_SELF, start)[0] == 0
    assert state.events.count(1) == 1, "opened meanwhile: the broker says EAGAIN"
    refused(errno.EINVAL, lambda: state.reset_ports(first, DOMID_SELF, start))
    assert state.reset_ports(second, DOMID_SELF, 0)[0] == 0
    assert state.events.count(1) == 0


def test_reset_whose_process_dies_blocks_nobody() -> None:
    state, first, second, _ = full_state()
    state.reset_ports(second, DOMID_SELF, 0)
    refused(errno.EBUSY, lambda: state.reset_ports(first, DOMID_SELF, 0))
    state.disconnect(second)
    assert state.reset_ports(first, DOMID_SELF, 0)[0] == 0


def test_reset_while_others_open_is_eagain_or_complete(world: World) -> None:
    guest = world.guest()
    sibling = world.connect(guest.domid)
    waiter = sibling.waiter()
    refusals = set()
    for _ in range(30):
        channels = [sibling.alloc_unbound(waiter, 0) for _ in range(3)]
        thread = threading.Thread(target=lambda: [sibling.alloc_unbound(waiter, 0) for _ in range(3)])
        thread.start()
        try:
            guest.reset_ports()
        except HypervisorError as error:
            refusals.add(error.name)
        thread.join()
        for channel in channels:
            assert channel.status().state is PortState.CLOSED
            channel.close()
        guest.reset_ports()
        assert list(guest.list_ports()) == []
    assert refusals <= {"EAGAIN"}


# Priorities and limits


def test_priorities_are_strict(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    channels = [guest.bind_ipi(waiter) for _ in range(6)]
    assert [channel.priority for channel in channels] == [7] * 6
    for channel, priority in zip(channels, (7, 15, 0, 7, 0, 3), strict=True):
        channel.priority = priority
        channel.notify()
    assert waiter.take_pending() == [channels[n] for n in (2, 4, 5, 0, 3, 1)]
    for bad in (-1, 16):
        with pytest.raises(InvalidRequest, match="priority"):
            channels[0].priority = bad
    assert channels[0].priority == 7


def test_the_last_port_of_a_domain(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    limit = guest.info().max_ports
    for _ in range(limit):
        last = guest.alloc_unbound(waiter, 0)
    assert last.port == limit
    with pytest.raises(ResourceLimit):
        guest.alloc_unbound(waiter, 0)
    with pytest.raises(ResourceLimit):
        guest.bind_virq(waiter, Virq.TIMER)
    last.close()
    assert guest.bind_virq(waiter, Virq.TIMER).port == limit
    waiter.close()
    assert list(guest.list_ports()) == []


def test_ten_thousand_ports_of_one_waiter() -> None:
    """They share three inboxes and their descriptors; Dom0 waits for all at once, and nobody is woken for nothing."""
    state = State()
    dom0 = state.connect(DOM0)
    waiter = state.events.create_waiter(dom0, DOM0, 1)[0]
    opened = [state.alloc_unbound(dom0, waiter.index, DOM0) for _ in range(10_000)]
    assert sum(each.new_inbox for each in opened) == 3
    assert len({(each.port.inbox.number, each.port.slot) for each in opened}) == 10_000


def test_many_ports_of_two_processes(world: World) -> None:
    """More than the slots of an inbox, over sockets: every event reaches its own port."""
    waiter, n = world.dom0.waiter(), 4200
    before = len(os.listdir("/proc/self/fd"))
    receivers = [world.dom0.bind_ipi(waiter) for _ in range(n)]
    assert len(waiter.inboxes) == 2
    assert len(os.listdir("/proc/self/fd")) <= before + 20
    assert waiter.wait(timeout_s=0) is WaitResult.TIMEOUT
    for number in (n - 1, 0, 4096, 17):
        receivers[number].notify()
    assert waiter.wait(timeout_s=0) is WaitResult.EVENT
    assert waiter.take_pending() == [receivers[number] for number in (0, 17, 4096, n - 1)]
    waiter.close()
