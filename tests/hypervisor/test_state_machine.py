# SPDX-License-Identifier: MIT
"""Any sequence of operations, by anybody, keeps the tables consistent and their effects carried out at most once."""

from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from paravirt.hypervisor.arenas import NOTIFY_CLEAR_BYTE, NOTIFY_SEND_EVENT
from paravirt.hypervisor.domains import DomainState
from paravirt.hypervisor.events import PortState
from paravirt.hypervisor.rules import (
    DOM0,
    ClearByte,
    Deliver,
    Disconnect,
    DropArena,
    DropInbox,
    DropMap,
    Effect,
    Limits,
    Refused,
    ReleasePins,
    RingInbox,
    SetGeneration,
)
from paravirt.hypervisor.state import State

LIMITS = Limits(max_pages=40, max_arenas=4, max_ports=6, max_maps=4, max_connections=3, max_waiters=2, max_notifies=2)
SMALL = st.integers(0, 12)


class Objects:
    """What the broker would hold, as plain sets: every effect must fit it."""

    def __init__(self) -> None:
        self.connections: set[int] = set()
        self.inboxes: set[int] = set()
        self.arenas: set[int] = set()
        self.maps: set[int] = set()
        self.words: dict[tuple[int, int], int] = {}

    def carry_out(self, effects: "list[Effect] | tuple[Effect, ...]") -> None:
        for effect in effects:
            match effect:
                case SetGeneration(connection, waiter, generation):
                    assert connection in self.connections
                    assert generation > self.words.get((connection, waiter), 0), "a word never goes back"
                    self.words[connection, waiter] = generation
                case RingInbox(inbox) | Deliver(inbox, _):
                    assert inbox in self.inboxes
                case DropInbox(inbox):
                    self.inboxes.remove(inbox)
                case ReleasePins(arena, number, others):
                    assert arena in self.arenas
                    assert {number, *others} <= self.maps
                    assert number not in others
                case ClearByte(arena, _):
                    assert arena in self.arenas
                case DropMap(number):
                    self.maps.remove(number)
                case DropArena(arena):
                    self.arenas.remove(arena)
                case Disconnect(connection):
                    self.connections.remove(connection)


class BrokerMachine(RuleBasedStateMachine):
    """Dom0 and guests do anything, mostly nonsense."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State(LIMITS)
        self.objects = Objects()
        self.names = 0
        self._connect(DOM0)

    def _connect(self, domid: int) -> None:
        self.objects.connections.add(self.state.connect(domid))

    def _pick(self, number: int) -> int:
        """Some connection that lives."""
        return sorted(self.objects.connections)[number % len(self.objects.connections)]

    @rule(domid=st.integers(0, 4))
    def connect(self, domid: int) -> None:
        if domid != DOM0 or len(self.objects.connections) < 6:
            with suppress(Refused):
                self._connect(domid)

    @rule(who=SMALL)
    def disconnect(self, who: int) -> None:
        connection = self._pick(who)
        if connection != 1:
            self.objects.carry_out(self.state.disconnect(connection))

    @rule()
    def create_domain(self) -> None:
        self.names += 1
        domain = self.state.create_domain(f"d{self.names}", isolated=False, max_pages=None, uid=None)
        self._connect(domain.domid)

    @rule(domid=st.integers(0, 4))
    def end_domain(self, domid: int) -> None:
        with suppress(Refused):
            self.objects.carry_out(self.state.end_domain(domid))

    @rule(who=SMALL, reason=st.integers(0, 6))
    def shut_down(self, who: int, reason: int) -> None:
        with suppress(Refused):
            self.objects.carry_out(self.state.shut_down(self._pick(who), reason))

    @rule(who=SMALL)
    def create_waiter(self, who: int) -> None:
        connection = self._pick(who)
        domain = self.state.domain_of(connection)
        with suppress(Refused):
            _, effects = self.state.events.create_waiter(connection, domain.domid, domain.limits.max_waiters)
            self.objects.carry_out(effects)

    @rule(who=SMALL, waiter=st.integers(0, 2))
    def destroy_waiter(self, who: int, waiter: int) -> None:
        with suppress(Refused):
            found = self.state.events.waiter(self._pick(who), waiter)
            self.objects.carry_out(self.state.events.destroy_waiter(found))

    @rule(who=SMALL, waiter=st.integers(0, 2), kind=st.integers(0, 3), remote=st.integers(0, 4), port=st.integers(0, 6))
    def open_port(self, who: int, waiter: int, kind: int, remote: int, port: int) -> None:
        connection = self._pick(who)
        with suppress(Refused):
            opened = (
                self.state.alloc_unbound(connection, waiter, remote)
                if kind == 0
                else self.state.bind_interdomain(connection, waiter, remote, port)
                if kind == 1
                else self.state.bind_virq(connection, waiter, (0, 3, 8, 11)[port % 4])
                if kind == 2
                else self.state.bind_ipi(connection, waiter)
            )
            if opened.new_inbox:
                assert opened.port.inbox.number not in self.objects.inboxes
                self.objects.inboxes.add(opened.port.inbox.number)
            self.objects.carry_out(opened.effects)

    @rule(who=SMALL, port=st.integers(0, 6))
    def close_port(self, who: int, port: int) -> None:
        with suppress(Refused):
            self.objects.carry_out(self.state.close_port(self._pick(who), port).effects)

    @rule(who=SMALL, port=st.integers(0, 6), waiter=st.integers(0, 2))
    def bind_vcpu(self, who: int, port: int, waiter: int) -> None:
        with suppress(Refused):
            opened, inbox_gone = self.state.bind_vcpu(self._pick(who), port, waiter)
            before = set(self.objects.inboxes)
            if opened.new_inbox:
                self.objects.inboxes.add(opened.port.inbox.number)
            self.objects.carry_out(opened.effects)
            assert inbox_gone == bool(before - self.objects.inboxes)

    @rule(who=SMALL, domid=st.integers(0, 4), start=st.sampled_from([0, 0, 0, 3]))
    def reset_ports(self, who: int, domid: int, start: int) -> None:
        with suppress(Refused):
            next_start, effects = self.state.reset_ports(self._pick(who), domid, start)
            self.objects.carry_out(effects)
            assert next_start == 0
            if start == 0:
                assert self.state.events.count(domid) == 0

    @rule(who=SMALL, virq=st.integers(0, 14), domid=st.integers(0, 4), handler=st.booleans())
    def virq(self, who: int, virq: int, domid: int, handler: bool) -> None:
        with suppress(Refused):
            if handler:
                self.state.set_virq_handler(self._pick(who), virq, domid)
            else:
                self.objects.carry_out(self.state.raise_virq(self._pick(who), virq, domid))

    @rule(who=SMALL, limit=st.integers(1, 3))
    def disconnect_slowly(self, who: int, limit: int) -> None:
        connection, done = self._pick(who), False
        while connection != 1 and not done:
            effects, done = self.state.disconnect_some(connection, limit)
            self.objects.carry_out(effects)

    @rule(who=SMALL, port=st.integers(0, 6))
    def send(self, who: int, port: int) -> None:
        with suppress(Refused):
            self.objects.carry_out(self.state.send(self._pick(who), port))

    @rule(who=SMALL, peer=st.integers(0, 4), pages=st.integers(0, 12), read_only=st.booleans())
    def create_arena(self, who: int, peer: int, pages: int, read_only: bool) -> None:
        with suppress(Refused):
            self.objects.arenas.add(self.state.create_arena(self._pick(who), peer, pages, read_only=read_only).number)

    @rule(who=SMALL, base=st.integers(0, 60))
    def end_arena(self, who: int, base: int) -> None:
        with suppress(Refused):
            self.objects.carry_out(self.state.end_arena(self._pick(who), base))

    @rule(who=SMALL, granter=st.integers(0, 4), gref=st.integers(0, 60))
    def map_arena(self, who: int, granter: int, gref: int) -> None:
        connection = self._pick(who)
        with suppress(Refused):
            mapping, new = self.state.map_arena(connection, granter, gref)
            assert mapping.arena.peer == self.state.domain_of(connection).domid
            assert new == (mapping.arena.number not in self.objects.arenas)
            self.objects.arenas.add(mapping.arena.number)
            self.objects.maps.add(mapping.number)

    @rule(who=SMALL, number=st.integers(0, 20))
    def unmap_arena(self, who: int, number: int) -> None:
        with suppress(Refused):
            self.objects.carry_out(self.state.unmap_arena(self._pick(who), number))

    @rule(
        who=SMALL, number=st.integers(0, 20), actions=st.integers(0, 3), gref=st.integers(0, 60), port=st.integers(0, 6)
    )
    def set_notify(self, who: int, number: int, actions: int, gref: int, port: int) -> None:
        assert NOTIFY_CLEAR_BYTE | NOTIFY_SEND_EVENT == 3
        with suppress(Refused):
            self.state.set_notify(self._pick(who), number, actions=actions, gref=gref, offset_bytes=7, port=port)

    @rule(who=SMALL, number=st.integers(0, 20), notify=st.integers(0, 3))
    def run_notify(self, who: int, number: int, notify: int) -> None:
        with suppress(Refused):
            self.objects.carry_out(self.state.run_notify(self._pick(who), number, notify))

    @rule(who=SMALL)
    def register_store(self, who: int) -> None:
        with suppress(Refused):
            self.state.register_store(self._pick(who))

    @rule()
    def unregister_store(self) -> None:
        self.state.unregister_store()

    @rule(domid=st.integers(0, 6))
    def store_released(self, domid: int) -> None:
        self.state.store_released(domid)

    @invariant()
    def bindings_are_mutual(self) -> None:
        for ports in self.state.events._ports.values():
            for port in ports.values():
                assert port.inbox.number in self.objects.inboxes
                if port.state is PortState.INTERDOMAIN:
                    peer = self.state.events._ports[port.remote_domid][port.remote_port]
                    assert peer.state is PortState.INTERDOMAIN
                    assert (peer.remote_domid, peer.remote_port) == (port.domid, port.number)

    @invariant()
    def objects_belong_to_somebody(self) -> None:
        state = self.state
        used = {port.inbox.number for ports in state.events._ports.values() for port in ports.values()}
        assert used == self.objects.inboxes
        assert set(state.arenas._arenas) == self.objects.arenas
        assert {number for maps in state.arenas._maps.values() for number in maps} == self.objects.maps
        assert set(state._connections) == self.objects.connections
        for domain in state.domains.all():
            usage = state.usage(domain)
            if domain.domid != DOM0:
                assert usage.pages <= LIMITS.max_pages
                assert usage.arenas <= LIMITS.max_arenas
                assert usage.ports <= LIMITS.max_ports
                assert usage.maps <= LIMITS.max_maps
                assert usage.connections <= LIMITS.max_connections
            if domain.state is DomainState.DYING:
                assert domain.store_holds or usage.arenas, "nothing holds this domid any more"
                assert (usage.ports, usage.maps, usage.connections) == (0, 0, 0)

    def teardown(self) -> None:
        """When everybody has gone nothing is left but Dom0's own reserved pages."""
        self.state.unregister_store()
        for connection in sorted(self.objects.connections):
            self.objects.carry_out(self.state.disconnect(connection))
        for domain in self.state.domains.all():
            if domain.domid != DOM0 and domain.state is not DomainState.DYING:
                self.objects.carry_out(self.state.end_domain(domain.domid))
        assert len(self.state.domains) == 1
        reserved = self.state.arenas.arenas_of(DOM0)
        assert all(arena.connection is None for arena in reserved)
        held = self.objects
        assert (held.connections, held.inboxes, held.maps) == (set(), set(), set())
        assert held.arenas == {arena.number for arena in reserved}


TestBrokerMachine = BrokerMachine.TestCase
TestBrokerMachine.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


def test_the_fake_objects_notice_a_wrong_effect() -> None:
    with pytest.raises(KeyError):
        Objects().carry_out([DropInbox(1)])
