# SPDX-License-Identifier: MIT
"""The broker's tables, without a socket: each test is a short story of calls and the effects they ask for."""

import errno
from dataclasses import replace

import pytest

from paravirt.hypervisor.arenas import NOTIFY_CLEAR_BYTE, NOTIFY_SEND_EVENT
from paravirt.hypervisor.domains import DomainState
from paravirt.hypervisor.events import VIRQ_DOM_EXC, PortState
from paravirt.hypervisor.rules import (
    DOM0,
    DOMID_FIRST_RESERVED,
    DOMID_SELF,
    DOMID_XEN,
    MAX_SLOTS,
    ClearByte,
    Deliver,
    Disconnect,
    DomainEnded,
    DropArena,
    DropInbox,
    DropMap,
    Limits,
    ReleasePins,
    RingInbox,
    SetGeneration,
)
from paravirt.hypervisor.state import State

from .story import Story, refused

# Domains


def test_domids_count_up_and_names_are_unique() -> None:
    story = Story()
    state = story.state
    assert story.guests == [1, 2]
    assert "guest-1" in refused(errno.EEXIST, lambda: _create(state, "guest-1"))
    for bad in ("", "a b", "a/b", "x" * 64, "é"):
        refused(errno.EINVAL, lambda bad=bad: _create(state, bad))  # type: ignore[misc]
    assert _create(state, "third") == 3


def _create(state: State, name: str) -> int:
    return state.create_domain(name, isolated=False, max_pages=None, uid=None).domid


def test_a_domid_comes_back_last_and_the_numbers_wrap_round() -> None:
    state = State()
    first = _create(state, "first")
    state.end_domain(first)
    assert _create(state, "second") == 2
    state.domains._last = DOMID_FIRST_RESERVED - 2
    assert _create(state, "last") == DOMID_FIRST_RESERVED - 1
    assert _create(state, "wrapped") == 1
    assert _create(state, "past-the-living") == 3


def test_dom0_lives_for_ever() -> None:
    state = State()
    refused(errno.EINVAL, lambda: state.end_domain(DOM0))
    refused(errno.ESRCH, lambda: state.end_domain(7))
    dom0 = state.connect(DOM0)
    refused(errno.EINVAL, lambda: state.shut_down(dom0, 0))


def test_shutdown_raises_dom_exc_once_with_its_reason() -> None:
    story = Story()
    state = story.state
    virq = state.bind_virq(story.dom0, story.waiter[story.dom0], VIRQ_DOM_EXC).port
    refused(errno.EINVAL, lambda: state.shut_down(story.a, 99))
    assert state.shut_down(story.a, 3) == [Deliver(virq.inbox.number, virq.slot)]
    domain = state.domains.find(1)
    assert (domain.state, domain.shutdown_reason) == (DomainState.SHUTDOWN, 3)
    refused(errno.EINVAL, lambda: state.shut_down(story.a, 0))


def test_only_dom0_may_do_what_is_dom0s() -> None:
    story = Story()
    refused(errno.EPERM, lambda: story.state.require_dom0(story.a))
    refused(errno.EPERM, lambda: story.state.register_store(story.a))
    refused(errno.EBUSY, lambda: story.state.bind_virq(story.a, story.waiter[story.a], VIRQ_DOM_EXC))
    port = story.unbound(story.b, DOM0)
    refused(errno.EPERM, lambda: story.state.port_status(story.a, 2, port))
    seen = story.state.port_status(story.dom0, 2, port)
    assert seen is not None
    assert seen.state is PortState.UNBOUND


def test_an_ended_domain_takes_its_connections_along_and_keeps_its_domid_while_mapped() -> None:
    story = Story()
    state = story.state
    arena = state.create_arena(story.a, DOM0, 4, read_only=False)
    mapping, new = state.map_arena(story.dom0, 1, arena.base)
    assert not new
    effects = state.end_domain(1)
    assert effects[0] == DomainEnded(1)
    assert Disconnect(story.a) in effects
    assert DropArena(arena.number) not in effects
    refused(errno.ESRCH, lambda: state.connect(1))
    refused(errno.ESRCH, lambda: state.map_arena(story.dom0, 1, arena.base))
    dying = state.domains.find_any(1)
    assert dying is not None
    assert dying.state is DomainState.DYING
    assert state.usage(dying).pages == 4
    assert _create(state, "guest-1") == 3, "the name is free, the domid is not"
    effects = state.unmap_arena(story.dom0, mapping.number)
    assert effects == [ReleasePins(arena.number, mapping.number, ()), DropMap(mapping.number), DropArena(arena.number)]
    assert state.domains.find_any(1) is None


def test_a_dead_domid_waits_for_xenstored() -> None:
    story = Story()
    state = story.state
    state.register_store(story.dom0)
    refused(errno.EEXIST, lambda: state.register_store(story.dom0))
    for domid in (1, 2):
        state.end_domain(domid)
    assert state.domains.find_any(1) is not None
    state.store_released(1)
    assert state.domains.find_any(1) is None
    state.store_released(1)  # twice is no error
    state.unregister_store()
    assert state.domains.find_any(2) is None, "a store that is gone holds nothing"


def test_store_cannot_release_the_living() -> None:
    story = Story()
    story.state.store_released(1)
    assert story.state.domains.find(1).state is DomainState.RUNNING


# Events


def test_bind_connects_both_and_tells_the_other_side() -> None:
    story = Story()
    state = story.state
    opened = state.alloc_unbound(story.a, story.waiter[story.a], DOM0)
    assert opened.new_inbox
    assert opened.port.number == 1
    before = opened.port.waiter.generation
    bound = state.bind_interdomain(story.dom0, story.waiter[story.dom0], 1, 1)
    theirs, ours = opened.port, bound.port
    assert (theirs.state, theirs.remote_domid, theirs.remote_port) == (PortState.INTERDOMAIN, 0, ours.number)
    assert (ours.state, ours.remote_domid, ours.remote_port) == (PortState.INTERDOMAIN, 1, 1)
    assert theirs.waiter.generation > before
    assert bound.effects == (
        SetGeneration(story.a, theirs.waiter.index, theirs.waiter.generation),
        RingInbox(theirs.inbox.number),
    )
    assert state.send(story.a, 1) == (Deliver(ours.inbox.number, ours.slot),)
    assert state.send(story.dom0, ours.number) == (Deliver(theirs.inbox.number, theirs.slot),)


def test_bind_needs_a_port_that_is_unbound_and_for_the_caller() -> None:
    story = Story()
    state = story.state
    port = story.unbound(story.a, DOM0)

    def bind(connection: int, domid: int, number: int) -> object:
        return state.bind_interdomain(connection, story.waiter[connection], domid, number)

    refused(errno.EINVAL, lambda: bind(story.b, 1, port))  # for Dom0
    refused(errno.EINVAL, lambda: bind(story.dom0, 1, port + 1))  # none
    refused(errno.ESRCH, lambda: bind(story.dom0, 9, port))  # no domain
    assert state.events.count(2) == 0
    assert state.events.count(0) == 0, "a refused bind leaves no trace"
    bind(story.dom0, 1, port)
    refused(errno.EINVAL, lambda: bind(story.dom0, 1, port))  # bound already


def test_close_makes_the_peer_unbound_and_bindable_again() -> None:
    story = Story()
    state = story.state
    theirs, ours = story.bound()
    effects = state.close_port(story.dom0, ours).effects
    port = state.events.find(1, theirs)
    assert (port.state, port.remote_domid) == (PortState.UNBOUND, 0)
    assert SetGeneration(story.a, port.waiter.index, port.waiter.generation) in effects
    assert RingInbox(port.inbox.number) in effects
    assert state.send(story.a, theirs) == (), "dropped silently"
    state.bind_interdomain(story.dom0, story.waiter[story.dom0], 1, theirs)
    assert port.state is PortState.INTERDOMAIN
    refused(errno.EINVAL, lambda: state.close_port(story.dom0, ours + 5))


def test_inboxes_are_one_per_sending_domain_and_go_with_their_last_port() -> None:
    story = Story()
    state = story.state
    first = state.alloc_unbound(story.a, story.waiter[story.a], DOM0)
    second = state.alloc_unbound(story.a, story.waiter[story.a], DOM0)
    other = state.alloc_unbound(story.a, story.waiter[story.a], 2)
    assert (first.new_inbox, second.new_inbox, other.new_inbox) == (True, False, True)
    assert first.port.inbox is second.port.inbox is not other.port.inbox
    assert {first.port.slot, second.port.slot} == {0, 1}
    ended = state.close_port(story.a, first.port.number)
    assert not ended.inbox_gone
    reused = state.alloc_unbound(story.a, story.waiter[story.a], DOM0).port
    assert (reused.slot, reused.number) == (first.port.slot, first.port.number)
    state.close_port(story.a, reused.number)
    ended = state.close_port(story.a, second.port.number)
    assert ended.inbox_gone
    assert ended.effects == (DropInbox(second.port.inbox.number),)
    fresh = state.alloc_unbound(story.a, story.waiter[story.a], DOM0)
    assert fresh.new_inbox
    assert fresh.port.inbox.number != second.port.inbox.number


def test_virq_binds_once_and_ports_run_out_without_undoing_others() -> None:
    story = Story(Limits(max_ports=2))
    state = story.state
    waiter = story.waiter[story.dom0]
    refused(errno.EINVAL, lambda: state.bind_virq(story.dom0, waiter, 17))
    virq = state.bind_virq(story.dom0, waiter, VIRQ_DOM_EXC).port
    assert virq.inbox.sender == DOMID_XEN
    refused(errno.EEXIST, lambda: state.bind_virq(story.dom0, waiter, VIRQ_DOM_EXC))
    refused(errno.EINVAL, lambda: state.send(story.dom0, virq.number))
    assert state.events.raise_virq(VIRQ_DOM_EXC) == (Deliver(virq.inbox.number, virq.slot),)
    state.close_port(story.dom0, virq.number)
    assert state.events.raise_virq(VIRQ_DOM_EXC) == ()
    for _ in range(2):
        story.unbound(story.a, DOM0)
    refused(errno.ENOSPC, lambda: story.unbound(story.a, DOM0))
    refused(errno.ENOSPC, lambda: state.bind_ipi(story.a, story.waiter[story.a]))
    assert state.events.count(1) == 2


def test_bind_when_out_of_ports_leaves_the_remote_unbound() -> None:
    story = Story(Limits(max_ports=1))
    port = story.unbound(story.b, 1)
    story.unbound(story.a, DOM0)
    refused(errno.ENOSPC, lambda: story.state.bind_interdomain(story.a, story.waiter[story.a], 2, port))
    assert story.state.events.find(2, port).state is PortState.UNBOUND


def test_loopback_and_ipi() -> None:
    story = Story()
    state = story.state
    port = story.unbound(story.a, DOMID_SELF)
    other = state.bind_interdomain(story.a, story.waiter[story.a], DOMID_SELF, port).port
    assert state.send(story.a, port) == (Deliver(other.inbox.number, other.slot),)
    ipi = state.bind_ipi(story.a, story.waiter[story.a]).port
    assert state.send(story.a, ipi.number) == (Deliver(ipi.inbox.number, ipi.slot),)
    effects = state.disconnect(story.a)
    assert state.events.count(1) == 0
    assert effects[-1] == Disconnect(story.a)


def test_a_port_belongs_to_one_process_of_its_domain() -> None:
    story = Story()
    state = story.state
    port = story.unbound(story.a, DOM0)
    sibling = state.connect(1)
    refused(errno.EINVAL, lambda: state.close_port(sibling, port))
    refused(errno.EINVAL, lambda: state.send(sibling, port))
    seen = state.port_status(sibling, DOMID_SELF, port)
    assert seen is not None
    assert seen.state is PortState.UNBOUND
    state.disconnect(story.a)
    assert state.port_status(sibling, DOMID_SELF, port) is None


def test_a_waiter_has_another_inbox_when_the_slots_of_one_are_taken() -> None:
    state = State(Limits(max_ports=MAX_SLOTS + 10))
    domid = _create(state, "many")
    connection = state.connect(domid)
    waiter = state.events.create_waiter(connection, domid, 1)[0]
    opened = [state.alloc_unbound(connection, waiter.index, DOM0) for _ in range(MAX_SLOTS + 1)]
    assert {each.port.slot for each in opened[:-1]} == set(range(MAX_SLOTS))
    assert [n for n, each in enumerate(opened) if each.new_inbox] == [0, MAX_SLOTS]
    last = opened[-1].port
    assert last.slot == 0
    assert state.close_port(connection, last.number).effects == (DropInbox(last.inbox.number),)
    state.close_port(connection, 7)
    again = state.alloc_unbound(connection, waiter.index, DOM0)
    assert (again.port.slot, again.new_inbox) == (6, False)


def test_waiters_are_counted_and_their_words_never_repeat_a_generation() -> None:
    story = Story(Limits(max_waiters=2))
    state = story.state
    second = story.new_waiter(story.a)
    refused(errno.ENOSPC, lambda: story.new_waiter(story.a))
    seen = state.events.waiter(story.a, second).generation
    state.events.destroy_waiter(state.events.waiter(story.a, second))
    refused(errno.EINVAL, lambda: state.alloc_unbound(story.a, second, DOM0))
    assert story.new_waiter(story.a) == second
    assert state.events.waiter(story.a, second).generation > seen


# Arenas


def test_references_start_at_8_and_are_not_used_again() -> None:
    story = Story()
    state = story.state
    first = state.create_arena(story.a, DOM0, 10, read_only=False)
    second = state.create_arena(story.a, 2, 5, read_only=True)
    assert (first.base, second.base) == (8, 18)
    assert state.end_arena(story.a, 8) == [DropArena(first.number)]
    assert state.create_arena(story.a, DOM0, 10, read_only=False).base == 23
    refused(errno.EINVAL, lambda: state.map_arena(story.dom0, 1, 8))
    state.arenas._last_gref[1] = 2**32 - 3
    assert state.create_arena(story.a, DOM0, 4, read_only=False).base == 8, "the numbers ran out: a gap is found"


def test_an_arena_is_mapped_by_its_peer_alone_and_once_a_process() -> None:
    story = Story()
    state = story.state
    arena = state.create_arena(story.a, DOM0, 10, read_only=False)
    refused(errno.EPERM, lambda: state.map_arena(story.b, 1, arena.base))
    refused(errno.EPERM, lambda: state.map_arena(story.a, DOMID_SELF, arena.base))
    refused(errno.EINVAL, lambda: state.map_arena(story.dom0, 1, arena.base + 10))
    refused(errno.EINVAL, lambda: state.map_arena(story.b, 1, 1))  # a reserved page is for Dom0
    mapping, _ = state.map_arena(story.dom0, 1, arena.base + 9)
    refused(errno.EEXIST, lambda: state.map_arena(story.dom0, 1, arena.base))
    sibling = state.connect(DOM0)
    second, _ = state.map_arena(sibling, 1, arena.base)
    refused(errno.EINVAL, lambda: state.unmap_arena(sibling, mapping.number))
    assert state.disconnect(sibling) == [
        ReleasePins(arena.number, second.number, (mapping.number,)),
        DropMap(second.number),
        Disconnect(sibling),
    ]


def test_reserved_pages_are_made_by_whoever_comes_first() -> None:
    story = Story()
    state = story.state
    mapping, new = state.map_arena(story.dom0, 1, 1)
    assert new
    assert (mapping.arena.base, mapping.arena.n_pages, mapping.arena.peer) == (1, 1, DOM0)
    assert state.reserve_page(state.domains.find(1), 1) == (mapping.arena, False)
    refused(errno.EINVAL, lambda: state.reserve_page(state.domains.find(1), 8))
    refused(errno.EINVAL, lambda: state.end_arena(story.a, 1))  # it lives as long as its domain
    state.disconnect(story.a)
    assert state.arenas.find(1, 1) is mapping.arena


def test_a_refused_map_leaves_no_reserved_page_behind() -> None:
    story = Story()
    state = story.state
    domain = state.domain_of(story.dom0)
    domain.limits = replace(domain.limits, max_maps=0)
    refused(errno.ENOSPC, lambda: state.map_arena(story.dom0, 1, 0))
    assert state.arenas.count(1) == 0


@pytest.mark.parametrize(("limit", "pages"), [(Limits(max_pages=9), 5), (Limits(max_arenas=1), 1)])
def test_arena_quotas_count_what_peers_still_map(limit: Limits, pages: int) -> None:
    story = Story(limit)
    state = story.state
    arena = state.create_arena(story.a, DOM0, pages, read_only=False)
    mapping, _ = state.map_arena(story.dom0, 1, arena.base)
    state.end_arena(story.a, arena.base)
    refused(errno.ENOSPC, lambda: state.create_arena(story.a, DOM0, pages, read_only=False))
    state.unmap_arena(story.dom0, mapping.number)
    state.create_arena(story.a, DOM0, pages, read_only=False)
    refused(errno.EINVAL, lambda: state.create_arena(story.a, DOM0, 0, read_only=False))


def test_other_quotas() -> None:
    story = Story(Limits(max_connections=2, max_maps=1, max_notifies=1))
    state = story.state
    state.connect(1)
    refused(errno.ENOSPC, lambda: state.connect(1))
    arenas = [state.create_arena(story.b, 1, 1, read_only=False) for _ in range(2)]
    mapping, _ = state.map_arena(story.a, 2, arenas[0].base)
    refused(errno.ENOSPC, lambda: state.map_arena(story.a, 2, arenas[1].base))

    def notify() -> int:
        return state.set_notify(
            story.a, mapping.number, actions=NOTIFY_CLEAR_BYTE, gref=arenas[0].base, offset_bytes=0, port=0
        )

    notify()
    refused(errno.ENOSPC, notify)


def test_max_pages_of_one_domain() -> None:
    state = State(Limits(max_pages=100))
    domain = state.create_domain("small", isolated=False, max_pages=3, uid=None)
    connection = state.connect(domain.domid)
    refused(errno.ENOSPC, lambda: state.create_arena(connection, DOM0, 4, read_only=False))
    assert (domain.limits.max_pages, domain.limits.max_ports) == (3, Limits().max_ports)


# Ends


def test_a_dead_mapper_clears_pins_then_notifies_then_closes_its_ports() -> None:
    story = Story()
    state = story.state
    theirs, ours = story.bound()
    peer = state.events.find(1, theirs)
    arena = state.create_arena(story.a, DOM0, 4, read_only=False)
    mapping, _ = state.map_arena(story.dom0, 1, arena.base)
    state.set_notify(
        story.dom0,
        mapping.number,
        actions=NOTIFY_CLEAR_BYTE | NOTIFY_SEND_EVENT,
        gref=arena.base + 2,
        offset_bytes=5,
        port=ours,
    )
    effects = state.disconnect(story.dom0)
    own_inbox = effects[-2]
    assert isinstance(own_inbox, DropInbox)
    assert effects == [
        ReleasePins(arena.number, mapping.number, ()),
        ClearByte(arena.number, 2 * 4096 + 5),
        Deliver(peer.inbox.number, peer.slot),
        DropMap(mapping.number),
        SetGeneration(story.a, peer.waiter.index, peer.waiter.generation),
        RingInbox(peer.inbox.number),
        own_inbox,
        Disconnect(story.dom0),
    ]
    assert peer.state is PortState.UNBOUND


def test_unmap_notifications_are_checked_and_run_once() -> None:
    story = Story()
    state = story.state
    _, ours = story.bound()
    arena = state.create_arena(story.a, DOM0, 4, read_only=False)
    read_only = state.create_arena(story.a, DOM0, 1, read_only=True)
    mapping, _ = state.map_arena(story.dom0, 1, arena.base)
    second, _ = state.map_arena(story.dom0, 1, read_only.base)

    def notify(number: int, actions: int, gref: int, offset: int, port: int) -> int:
        return state.set_notify(story.dom0, number, actions=actions, gref=gref, offset_bytes=offset, port=port)

    refused(errno.EINVAL, lambda: notify(mapping.number, 0, arena.base, 0, 0))
    refused(errno.EINVAL, lambda: notify(mapping.number, 4, arena.base, 0, 0))
    refused(errno.EINVAL, lambda: notify(mapping.number, NOTIFY_CLEAR_BYTE, arena.base + 4, 0, 0))
    refused(errno.EINVAL, lambda: notify(mapping.number, NOTIFY_CLEAR_BYTE, arena.base, 4096, 0))
    refused(errno.EINVAL, lambda: notify(mapping.number, NOTIFY_SEND_EVENT, 0, 0, ours + 1))
    refused(errno.EPERM, lambda: notify(second.number, NOTIFY_CLEAR_BYTE, read_only.base, 0, 0))
    refused(errno.EINVAL, lambda: notify(99, NOTIFY_SEND_EVENT, 0, 0, ours))
    number = notify(mapping.number, NOTIFY_SEND_EVENT, 0, 0, ours)
    assert len(state.run_notify(story.dom0, mapping.number, number)) == 1
    refused(errno.EINVAL, lambda: state.run_notify(story.dom0, mapping.number, number))
    number = notify(mapping.number, NOTIFY_SEND_EVENT, 0, 0, ours)
    state.close_port(story.dom0, ours)
    assert state.run_notify(story.dom0, mapping.number, number) == [], "the port is gone: nobody to tell"


def test_a_processs_arenas_end_with_it_and_stay_while_mapped() -> None:
    story = Story()
    state = story.state
    arena = state.create_arena(story.a, DOM0, 4, read_only=False)
    mapping, _ = state.map_arena(story.dom0, 1, arena.base)
    state.disconnect(story.a)
    assert state.arenas.find(1, arena.base) is None
    assert state.arenas.count(1) == 1
    state.unmap_arena(story.dom0, mapping.number)
    assert state.arenas.count(1) == 0
    assert state.domains.find(1).state is DomainState.RUNNING, "the end of a socket is no end of a domain"


def test_both_ends_dying_leaves_nothing() -> None:
    story = Story()
    state = story.state
    story.bound()
    for owner, peer in ((story.a, 2), (story.b, 1)):
        arena = state.create_arena(owner, peer, 2, read_only=False)
        state.map_arena(story.b if owner == story.a else story.a, state.domain_of(owner).domid, arena.base)
    state.end_domain(1)
    assert state.domains.find_any(1) is not None, "guest 2 maps it"
    state.end_domain(2)
    assert len(state.domains) == 1
    assert state.events._ports.keys() <= {0}
    assert not state.arenas._arenas
    assert not any(state.arenas._maps.values())
