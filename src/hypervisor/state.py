# SPDX-License-Identifier: MIT
"""The broker's whole state: domains, connections, events, arenas, and how they end together. Pure.

A connection is a process. What it asks for is checked here against who it is; nothing it says changes that.
"""

import errno
from dataclasses import dataclass, replace

from paravirt.hypervisor.arenas import NOTIFY_CLEAR_BYTE, NOTIFY_SEND_EVENT, Arena, ArenaTable, Map, Notify
from paravirt.hypervisor.domains import Domain, DomainState, DomainTable
from paravirt.hypervisor.events import VIRQ_DOM_EXC, Ended, EventTable, Opened, Port, Virq, Waiter
from paravirt.hypervisor.looks import LookTable
from paravirt.hypervisor.rules import (
    DOM0,
    DOMID_SELF,
    RESERVED_GREFS,
    Deliver,
    Disconnect,
    DomainEnded,
    Effect,
    Limits,
    Refused,
    RingInbox,
)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a domain holds now."""

    pages: int
    arenas: int
    ports: int
    maps: int
    connections: int


class State:
    """One call an operation. Each raises `Refused` with Xen's code and changes nothing then."""

    def __init__(self, limits: Limits | None = None) -> None:
        """`limits`: of each domain but Dom0."""
        self.limits = limits or Limits()
        self.domains = DomainTable()
        self.events = EventTable()
        self.arenas = ArenaTable()
        self.looks = LookTable()
        self._connections: dict[int, Domain] = {}
        self._last_connection = 0
        self.store_link: int | None = None
        """The connection that registered as xenstored."""

    # Connections

    @property
    def n_connections(self) -> int:
        return len(self._connections)

    def connect(self, domid: int) -> int:
        """A new connection of a process of that domain. Raises `Refused` (ESRCH, ENOSPC)."""
        domain = self.domains.find(domid)
        if len(domain.connections) >= domain.limits.max_connections:
            raise Refused(errno.ENOSPC, f"domain {domid} may have {domain.limits.max_connections} connections")
        self._last_connection += 1
        self._connections[self._last_connection] = domain
        domain.connections.add(self._last_connection)
        return self._last_connection

    def disconnect(self, connection: int) -> list[Effect]:
        """A process went away: pins are cleared, unmap notifications run, then its ports close and its arenas end."""
        domain = self._connections[connection]
        effects: list[Effect] = []
        for mapping in self.arenas.maps_of(connection):
            effects += self._unmap(mapping)
        for waiter in self.events.waiters_of(connection):
            effects += self.events.destroy_waiter(waiter)
        for arena in self.arenas.arenas_of(domain.domid):
            if arena.connection == connection and not arena.ended:
                effects += self.arenas.end(arena)
        self.arenas.forget_connection(connection)
        self.events.forget_connection(connection)
        effects += self.looks.forget_connection(connection)
        domain.connections.remove(connection)
        del self._connections[connection]
        effects.append(Disconnect(connection))
        self._free_the_dead()
        return effects

    def disconnect_some(self, connection: int, limit: int) -> tuple[list[Effect], bool]:
        """A part of `disconnect`, of at most `limit` mappings and ports; whether it was the last one."""
        effects: list[Effect] = []
        for mapping in self.arenas.maps_of(connection)[:limit]:
            effects += self._unmap(mapping)
            limit -= 1
        if not self.arenas.n_maps_of(connection):
            effects += self.events.close_some(connection, limit)
        if self.arenas.n_maps_of(connection) or any(waiter.ports for waiter in self.events.waiters_of(connection)):
            return effects, False
        return effects + self.disconnect(connection), True

    def domain_of(self, connection: int) -> Domain:
        return self._connections[connection]

    def usage(self, domain: Domain) -> Usage:
        return Usage(
            self.arenas.pages(domain.domid),
            self.arenas.count(domain.domid),
            self.events.count(domain.domid),
            self._n_maps(domain),
            len(domain.connections),
        )

    # Domains

    def require_dom0(self, connection: int) -> None:
        """Raises `Refused` (EPERM)."""
        if self.domain_of(connection).domid != DOM0:
            raise Refused(errno.EPERM, "only Dom0 may do this")

    def create_domain(self, name: str, *, isolated: bool, max_pages: int | None, uid: int | None) -> Domain:
        limits = self.limits
        if max_pages is not None:
            limits = replace(limits, max_pages=max_pages)
        return self.domains.create(name, limits, isolated=isolated, uid=uid)

    def end_domain(self, domid: int) -> list[Effect]:
        """Destroyed, or its init process died. Raises `Refused` (ESRCH, EINVAL for Dom0)."""
        domain = self.domains.find(domid)
        if domid == DOM0:
            raise Refused(errno.EINVAL, "Dom0 cannot be destroyed")
        domain.state = DomainState.DYING
        domain.store_holds = self.store_link is not None
        self.events.domain_ended(domid)
        effects: list[Effect] = [DomainEnded(domid)]
        for connection in sorted(domain.connections):
            effects += self.disconnect(connection)
        for arena in self.arenas.arenas_of(domid):
            if not arena.ended:
                effects += self.arenas.end(arena)
        effects += self.events.raise_virq(VIRQ_DOM_EXC)
        self._free_the_dead()
        return effects

    def shut_down(self, connection: int, reason: int) -> list[Effect]:
        """The caller's domain asks to end."""
        self.domains.shut_down(self.domain_of(connection).domid, reason)
        return list(self.events.raise_virq(VIRQ_DOM_EXC))

    def register_store(self, connection: int) -> None:
        """Raises `Refused` (EPERM, EEXIST)."""
        self.require_dom0(connection)
        if self.store_link is not None:
            raise Refused(errno.EEXIST, "there is a xenstored already")
        self.store_link = connection

    def unregister_store(self) -> None:
        """xenstored went away: it holds no domid any more."""
        self.store_link = None
        for domain in self.domains.all():
            domain.store_holds = False
        self._free_the_dead()

    def store_released(self, domid: int) -> None:
        """xenstored has forgotten a dead domain. A domid it does not hold is no error."""
        domain = self.domains.find_any(domid)
        if domain is not None and domain.state is DomainState.DYING:
            domain.store_holds = False
            self._free_the_dead()

    # Events

    def alloc_unbound(self, connection: int, waiter: int, remote_domid: int) -> Opened:
        domain = self.domain_of(connection)
        remote = self.domains.find(self.resolve(connection, remote_domid))
        return self.events.alloc_unbound(self.events.waiter(connection, waiter), remote.domid, domain.limits.max_ports)

    def bind_interdomain(self, connection: int, waiter: int, remote_domid: int, remote_port: int) -> Opened:
        domain = self.domain_of(connection)
        remote = self.domains.find(self.resolve(connection, remote_domid))
        return self.events.bind_interdomain(
            self.events.waiter(connection, waiter), remote.domid, remote_port, domain.limits.max_ports
        )

    def bind_virq(self, connection: int, waiter: int, virq: int) -> Opened:
        limits = self.domain_of(connection).limits
        return self.events.bind_virq(self._vcpu(connection, waiter), virq, limits.max_ports)

    def bind_ipi(self, connection: int, waiter: int) -> Opened:
        limits = self.domain_of(connection).limits
        return self.events.bind_ipi(self._vcpu(connection, waiter), limits.max_ports)

    def bind_vcpu(self, connection: int, number: int, waiter: int, inbox: int = 0) -> tuple[Opened, bool]:
        port = self._own_port(connection, number, inbox)
        return self.events.bind_vcpu(port, self._vcpu(connection, waiter))

    def _vcpu(self, connection: int, waiter: int) -> Waiter:
        """A waiter in the place of a virtual CPU. Raises `Refused` (ENOENT)."""
        try:
            return self.events.waiter(connection, waiter)
        except Refused as refusal:
            raise Refused(errno.ENOENT, str(refusal)) from refusal

    def raise_virq(self, connection: int, virq: int, domid: int) -> tuple[Effect, ...]:
        """Dom0 raises a virtual interrupt; of domain `domid`, if it is not global. Raises `Refused` (EPERM, EINVAL)."""
        self.require_dom0(connection)
        if virq not in Virq.__members__.values() or virq == VIRQ_DOM_EXC:
            raise Refused(errno.EINVAL, f"virtual interrupt {virq} is not for Dom0 to raise")
        return self.events.raise_virq(virq, self.domains.find(self.resolve(connection, domid)).domid)

    def set_virq_handler(self, connection: int, virq: int, domid: int) -> None:
        self.require_dom0(connection)
        self.events.set_virq_handler(virq, self.domains.find(self.resolve(connection, domid)).domid)

    def reset_ports(self, connection: int, domid: int, start: int) -> tuple[int, list[Effect]]:
        """Close all ports of a domain, a slice a call; where to go on, 0 when done (then some may be new: look).

        Raises `Refused` (EPERM another domain's, but not for Dom0; ESRCH; EBUSY; EINVAL).
        """
        return self.events.reset(connection, self._own_or_dom0(connection, domid), start)

    def close_port(self, connection: int, number: int, inbox: int = 0) -> Ended:
        return self.events.close(self._own_port(connection, number, inbox))

    def send(self, connection: int, number: int) -> tuple[Effect, ...]:
        return self.events.send(self._own_port(connection, number))

    def kick(self, connection: int, domid: int, number: int) -> tuple[Effect, ...]:
        """Dom0 wakes the owner of any port, whatever its inbox says of it. Raises `Refused` (EPERM, ESRCH, EINVAL)."""
        self.require_dom0(connection)
        port = self.events.find(self.domains.find(self.resolve(connection, domid)).domid, number)
        return Deliver(port.inbox.number, port.slot), RingInbox(port.inbox.number)

    def port_status(self, connection: int, domid: int, number: int, inbox: int = 0) -> Port | None:
        """None: closed, or another one than that of `inbox`, the one its owner knows.

        Raises `Refused` (EPERM another domain's, but not for Dom0; ESRCH; EINVAL no domain has such a port).
        """
        domid = self._own_or_dom0(connection, domid)
        if not 0 < number <= self.domains.find(domid).limits.max_ports:
            raise Refused(errno.EINVAL, f"event channels of domain {domid} do not have the number {number}")
        try:
            port = self.events.find(domid, number)
        except Refused:
            return None
        return port if inbox in (0, port.inbox.number) else None

    def next_port(self, connection: int, domid: int, number: int) -> Port | None:
        """The open port with the lowest number not below `number`. Raises `Refused` (EPERM, ESRCH)."""
        return self.events.next_port(self._own_or_dom0(connection, domid), number)

    def _own_or_dom0(self, connection: int, domid: int) -> int:
        domid = self.resolve(connection, domid)
        if domid != self.domain_of(connection).domid:
            self.require_dom0(connection)
        return self.domains.find(domid).domid

    # Arenas

    def create_arena(self, connection: int, peer: int, n_pages: int, *, read_only: bool) -> Arena:
        domain = self.domain_of(connection)
        peer = self.domains.find(self.resolve(connection, peer)).domid
        return self.arenas.create(domain.domid, connection, peer, n_pages, domain.limits, read_only=read_only)

    def reserve_page(self, domain: Domain, gref: int) -> tuple[Arena, bool]:
        return self.arenas.reserve(domain.domid, gref, domain.limits)

    def end_arena(self, connection: int, base: int) -> list[Effect]:
        """Raises `Refused` (EINVAL) for one that this process has not made."""
        arena = self.arenas.find(self.domain_of(connection).domid, base)
        if arena is None or arena.connection != connection or arena.base != base:
            raise Refused(errno.EINVAL, f"this process has no arena at {base}")
        return self.arenas.end(arena)

    def abandon_arena(self, arena: Arena) -> None:
        """There was no memory for it."""
        self.arenas.end(arena)

    def map_arena(self, connection: int, granter: int, gref: int) -> tuple[Map, bool]:
        """Map the arena that has this reference; whether the arena is a reserved page that has to be made first.

        Raises `Refused` (ESRCH, EINVAL no such reference, EPERM not for the caller, EEXIST, ENOSPC).
        """
        domain = self.domain_of(connection)
        owner = self.domains.find(self.resolve(connection, granter))
        new = False
        if domain.domid == DOM0 and gref < RESERVED_GREFS:
            arena, new = self.reserve_page(owner, gref)
        elif (found := self.arenas.find(owner.domid, gref)) is None:
            raise Refused(errno.EINVAL, f"domain {owner.domid} has no arena with reference {gref}")
        elif found.peer != domain.domid:
            raise Refused(errno.EPERM, f"reference {gref} of domain {owner.domid} is not for this domain")
        else:
            arena = found
        try:
            held = self._n_maps(domain), self._maptrack_pages(domain)
            return self.arenas.map(connection, arena, *held, domain.limits), new
        except Refused:
            if new:
                self.abandon_arena(arena)
            raise

    def unmap_arena(self, connection: int, number: int) -> list[Effect]:
        effects = self._unmap(self.arenas.find_map(connection, number))
        self._free_the_dead()
        return effects

    def set_notify(self, connection: int, number: int, *, actions: int, gref: int, offset_bytes: int, port: int) -> int:
        mapping = self.arenas.find_map(connection, number)
        if actions & NOTIFY_SEND_EVENT:
            self._own_port(connection, port)
        limits = self.domain_of(connection).limits
        return self.arenas.set_notify(mapping, actions, gref, offset_bytes, port, limits)

    def run_notify(self, connection: int, number: int, notify: int) -> list[Effect]:
        mapping = self.arenas.find_map(connection, number)
        return self._run(mapping, self.arenas.take_notify(mapping, notify))

    # Looking

    def create_look(self, connection: int) -> int:
        """A statistics object for the caller. Raises `Refused` (ENOSPC)."""
        return self.looks.create(connection, self.domain_of(connection).limits)

    def next_look(self, connection: int, number: int) -> tuple[int, int] | None:
        """Dom0 walks: the object with the lowest number not below `number`, and its connection."""
        self.require_dom0(connection)
        return self.looks.next(number)

    def next_arena(self, connection: int, domid: int, gref: int) -> Arena | None:
        """Dom0 walks: the arena that has this reference, else the next higher one, ended ones too.

        Raises `Refused` (EPERM, ESRCH).
        """
        self.require_dom0(connection)
        owner = self.resolve(connection, domid)
        if self.domains.find_any(owner) is None:
            raise Refused(errno.ESRCH, f"there is no domain {owner}")
        arenas = (arena for arena in self.arenas.arenas_of(owner) if arena.base + arena.n_pages > gref)
        return min(arenas, key=lambda arena: (arena.base, arena.ended), default=None)

    # Inside

    def resolve(self, connection: int, domid: int) -> int:
        return self.domain_of(connection).domid if domid == DOMID_SELF else domid

    def _own_port(self, connection: int, number: int, inbox: int = 0) -> Port:
        return self.events.find_own(connection, self.domain_of(connection).domid, number, inbox)

    def _n_maps(self, domain: Domain) -> int:
        return sum(self.arenas.n_maps_of(connection) for connection in domain.connections)

    def _maptrack_pages(self, domain: Domain) -> int:
        return sum(self.arenas.maptrack_pages_of(connection) for connection in domain.connections)

    def _run(self, mapping: Map, notify: Notify) -> list[Effect]:
        effects: list[Effect] = []
        if notify.actions & NOTIFY_CLEAR_BYTE:
            effects.append(self.arenas.clear_byte(mapping.arena, notify))
        if notify.actions & NOTIFY_SEND_EVENT:
            try:
                effects += self.send(mapping.connection, notify.port)
            except Refused:
                pass  # the port was closed since: there is nobody to tell
        return effects

    def _unmap(self, mapping: Map) -> list[Effect]:
        effects = [self.arenas.release_pins(mapping)]
        for notify in mapping.notifies.values():
            effects += self._run(mapping, notify)
        return effects + self.arenas.unmap(mapping)

    def _free_the_dead(self) -> None:
        """Domids whose memory nobody maps any more and which xenstored has forgotten."""
        for domain in self.domains.all():
            if domain.state is DomainState.DYING and not domain.store_holds and not self.arenas.count(domain.domid):
                self.events.forget_domain(domain.domid)
                self.arenas.forget_domain(domain.domid)
                self.domains.free(domain.domid)
