# SPDX-License-Identifier: MIT
"""The broker's whole state: domains, connections, events, arenas, and how they end together. Pure.

A connection is a process. What it asks for is checked here against who it is; nothing it says changes that.
"""

import errno
from dataclasses import dataclass, replace

from paravirt.hypervisor.arenas import NOTIFY_CLEAR_BYTE, NOTIFY_SEND_EVENT, Arena, ArenaTable, Map, Notify
from paravirt.hypervisor.domains import Domain, DomainState, DomainTable
from paravirt.hypervisor.events import VIRQ_DOM_EXC, Ended, EventTable, Opened, Port
from paravirt.hypervisor.rules import (
    DOM0,
    DOMID_SELF,
    RESERVED_GREFS,
    Disconnect,
    DomainEnded,
    Effect,
    Limits,
    Refused,
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
        domain.connections.remove(connection)
        del self._connections[connection]
        effects.append(Disconnect(connection))
        self._free_the_dead()
        return effects

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
        return self.events.bind_virq(self.events.waiter(connection, waiter), virq, limits.max_ports)

    def bind_ipi(self, connection: int, waiter: int) -> Opened:
        limits = self.domain_of(connection).limits
        return self.events.bind_ipi(self.events.waiter(connection, waiter), limits.max_ports)

    def close_port(self, connection: int, number: int) -> Ended:
        return self.events.close(self._own_port(connection, number))

    def send(self, connection: int, number: int) -> tuple[Effect, ...]:
        return self.events.send(self._own_port(connection, number))

    def port_status(self, connection: int, domid: int, number: int) -> Port:
        """Raises `Refused` (EPERM for another domain's port, but not for Dom0)."""
        domid = self.resolve(connection, domid)
        if domid != self.domain_of(connection).domid:
            self.require_dom0(connection)
        self.domains.find(domid)
        return self.events.find(domid, number)

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
            return self.arenas.map(connection, arena, self._n_maps(domain), domain.limits), new
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

    # Inside

    def resolve(self, connection: int, domid: int) -> int:
        return self.domain_of(connection).domid if domid == DOMID_SELF else domid

    def _own_port(self, connection: int, number: int) -> Port:
        return self.events.find_own(connection, self.domain_of(connection).domid, number)

    def _n_maps(self, domain: Domain) -> int:
        return sum(self.arenas.n_maps_of(connection) for connection in domain.connections)

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
