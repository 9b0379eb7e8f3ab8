# SPDX-License-Identifier: MIT
"""The event-channel table: who is bound to whom. Pure; the semantics and codes are Xen's (event_channel.c)."""

import errno
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

from paravirt.hypervisor.rules import (
    DOM0,
    DOMID_XEN,
    MAX_SLOTS,
    Deliver,
    DropInbox,
    Effect,
    Refused,
    RingInbox,
    SetGeneration,
)

VIRQ_DOM_EXC = 3
GLOBAL_VIRQS = frozenset({VIRQ_DOM_EXC})


class Numbers:
    """Numbers from `start` up; the lowest that was given back is taken first."""

    def __init__(self, start: int) -> None:
        self._next = start
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def give_back(self, number: int) -> None:
        heapq.heappush(self._free, number)


class PortState(IntEnum):
    """EVTCHNSTAT_*."""

    CLOSED = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    VIRQ = 4
    IPI = 5


@dataclass(slots=True)
class Inbox:
    """A page and doorbell for the events that one domain sends to one waiter; each port has a slot in it."""

    number: int
    sender: int
    free_slots: Numbers = field(default_factory=lambda: Numbers(0))
    used: int = 0
    """Slots that have a port."""


@dataclass(slots=True)
class Waiter:
    """What one thread of a process sleeps on."""

    connection: int
    index: int
    domid: int
    generation: int
    inboxes: dict[int, Inbox] = field(default_factory=dict)
    """By the sender's domid."""
    ports: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Port:
    domid: int
    number: int
    waiter: Waiter
    inbox: Inbox
    slot: int
    state: PortState
    remote_domid: int = 0
    remote_port: int = 0
    virq: int = 0
    changed: int = 0
    """Generation of the waiter when the binding changed last."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A new port; `new_inbox`: its inbox is new as well."""

    port: Port
    new_inbox: bool
    effects: tuple[Effect, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """`inbox_gone`: the inbox of the closed port is not used any more."""

    inbox_gone: bool
    effects: tuple[Effect, ...]


class EventTable:
    """All waiters, inboxes and ports. Domains and permissions are checked by the caller."""

    def __init__(self) -> None:
        self._ports: dict[int, dict[int, Port]] = {}
        self._free_ports: dict[int, Numbers] = {}
        self._waiters: dict[int, dict[int, Waiter]] = {}
        self._virqs: dict[int, Port] = {}
        self._last_inbox = 0
        self._last_generation = 0

    # Looking

    def count(self, domid: int) -> int:
        """How many ports a domain has."""
        return len(self._ports.get(domid, ()))

    def find(self, domid: int, number: int) -> Port:
        """Raises `Refused` (EINVAL) for a port that is closed."""
        port = self._ports.get(domid, {}).get(number)
        if port is None:
            raise Refused(errno.EINVAL, f"domain {domid} has no event channel {number}")
        return port

    def find_own(self, connection: int, domid: int, number: int) -> Port:
        """A port that belongs to this connection. Raises `Refused` (EINVAL)."""
        port = self.find(domid, number)
        if port.waiter.connection != connection:
            raise Refused(errno.EINVAL, f"event channel {number} belongs to another process of domain {domid}")
        return port

    def peer(self, port: Port) -> Port | None:
        """Where a send on `port` goes."""
        if port.state is PortState.IPI:
            return port
        if port.state is PortState.INTERDOMAIN:
            return self._ports[port.remote_domid][port.remote_port]
        return None

    def waiter(self, connection: int, index: int) -> Waiter:
        """Raises `Refused` (EINVAL)."""
        waiter = self._waiters.get(connection, {}).get(index)
        if waiter is None:
            raise Refused(errno.EINVAL, f"there is no waiter {index}")
        return waiter

    def waiters_of(self, connection: int) -> list[Waiter]:
        return list(self._waiters.get(connection, {}).values())

    # Waiters

    def create_waiter(self, connection: int, domid: int, max_waiters: int) -> tuple[Waiter, tuple[Effect, ...]]:
        """Raises `Refused` (ENOSPC)."""
        waiters = self._waiters.setdefault(connection, {})
        index = next((i for i in range(max_waiters) if i not in waiters), None)
        if index is None:
            raise Refused(errno.ENOSPC, f"a process may have {max_waiters} waiters")
        waiter = Waiter(connection, index, domid, self._next_generation())
        waiters[index] = waiter
        return waiter, (SetGeneration(connection, index, waiter.generation),)

    def destroy_waiter(self, waiter: Waiter) -> list[Effect]:
        """Close its ports and forget it."""
        effects: list[Effect] = []
        for number in sorted(waiter.ports):
            effects += self.close(self._ports[waiter.domid][number]).effects
        del self._waiters[waiter.connection][waiter.index]
        return effects

    # Ports

    def alloc_unbound(self, waiter: Waiter, remote_domid: int, max_ports: int) -> Opened:
        """A port that `remote_domid` may bind. Raises `Refused` (ENOSPC)."""
        return self._open(waiter, remote_domid, PortState.UNBOUND, max_ports)

    def bind_interdomain(self, waiter: Waiter, remote_domid: int, remote_port: int, max_ports: int) -> Opened:
        """Connect to a port that is unbound and reserved for us. Raises `Refused` (EINVAL, ENOSPC)."""
        remote = self.find(remote_domid, remote_port)
        if remote.state is not PortState.UNBOUND or remote.remote_domid != waiter.domid:
            raise Refused(
                errno.EINVAL, f"event channel {remote_port} of domain {remote_domid} is not reserved for this domain"
            )
        opened = self._open(waiter, remote_domid, PortState.INTERDOMAIN, max_ports)
        opened.port.remote_port = remote_port
        remote.state, remote.remote_port = PortState.INTERDOMAIN, opened.port.number
        return Opened(opened.port, opened.new_inbox, tuple(self._rebound(remote)))

    def bind_virq(self, waiter: Waiter, virq: int, max_ports: int) -> Opened:
        """A port for a virtual interrupt. Raises `Refused` (EINVAL unknown, EBUSY not Dom0, EEXIST bound, ENOSPC)."""
        if virq not in GLOBAL_VIRQS:
            raise Refused(errno.EINVAL, f"there is no virtual interrupt {virq}")
        if waiter.domid != DOM0:
            raise Refused(errno.EBUSY, f"virtual interrupt {virq} is for Dom0")
        if virq in self._virqs:
            raise Refused(errno.EEXIST, f"virtual interrupt {virq} is bound already")
        opened = self._open(waiter, DOMID_XEN, PortState.VIRQ, max_ports)
        opened.port.virq = virq
        self._virqs[virq] = opened.port
        return opened

    def bind_ipi(self, waiter: Waiter, max_ports: int) -> Opened:
        """A port that sends to itself. Raises `Refused` (ENOSPC)."""
        opened = self._open(waiter, waiter.domid, PortState.IPI, max_ports)
        opened.port.remote_port = opened.port.number
        return opened

    def close(self, port: Port) -> Ended:
        """Free a port; its peer becomes unbound, reserved for the domain of the closer."""
        effects: list[Effect] = []
        peer = self.peer(port)
        if port.state is PortState.VIRQ:
            del self._virqs[port.virq]
        elif peer is not None and peer is not port:
            peer.state, peer.remote_port = PortState.UNBOUND, 0
            effects += self._rebound(peer)
        del self._ports[port.domid][port.number]
        port.state = PortState.CLOSED
        port.waiter.ports.remove(port.number)
        self._free_ports[port.domid].give_back(port.number)
        port.inbox.free_slots.give_back(port.slot)
        port.inbox.used -= 1
        inbox_gone = not port.inbox.used
        if inbox_gone:
            del port.waiter.inboxes[port.inbox.sender]
            effects.append(DropInbox(port.inbox.number))
        return Ended(inbox_gone, tuple(effects))

    def forget_connection(self, connection: int) -> None:
        """It ended; its waiters are destroyed."""
        self._waiters.pop(connection, None)

    def forget_domain(self, domid: int) -> None:
        """A domid is free again."""
        self._ports.pop(domid, None)
        self._free_ports.pop(domid, None)

    def send(self, port: Port) -> tuple[Effect, ...]:
        """Unbound: dropped silently. Raises `Refused` (EINVAL) for a virtual interrupt."""
        if port.state is PortState.VIRQ:
            raise Refused(errno.EINVAL, f"event channel {port.number} is a virtual interrupt")
        peer = self.peer(port)
        return (Deliver(peer.inbox.number, peer.slot),) if peer else ()

    def raise_virq(self, virq: int) -> tuple[Effect, ...]:
        port = self._virqs.get(virq)
        return (Deliver(port.inbox.number, port.slot),) if port else ()

    # Inside

    def _next_generation(self) -> int:
        self._last_generation += 1
        return self._last_generation

    def _rebound(self, port: Port) -> Iterator[Effect]:
        """The binding of `port` changed by another's doing: its process must hear of it."""
        waiter = port.waiter
        waiter.generation = port.changed = self._next_generation()
        yield SetGeneration(waiter.connection, waiter.index, waiter.generation)
        yield RingInbox(port.inbox.number)

    def _open(self, waiter: Waiter, remote_domid: int, state: PortState, max_ports: int) -> Opened:
        ports = self._ports.setdefault(waiter.domid, {})
        inbox = waiter.inboxes.get(remote_domid)
        if len(ports) >= max_ports:
            raise Refused(errno.ENOSPC, f"domain {waiter.domid} may have {max_ports} event channels")
        if inbox and inbox.used == MAX_SLOTS:
            raise Refused(errno.ENOSPC, f"a waiter may have {MAX_SLOTS} event channels from one domain")
        new_inbox = inbox is None
        if inbox is None:
            self._last_inbox += 1
            inbox = waiter.inboxes[remote_domid] = Inbox(self._last_inbox, remote_domid)
        slot = inbox.free_slots.take()
        number = self._free_ports.setdefault(waiter.domid, Numbers(1)).take()
        port = Port(waiter.domid, number, waiter, inbox, slot, state, remote_domid, changed=waiter.generation)
        ports[number] = port
        inbox.used += 1
        waiter.ports.add(number)
        return Opened(port, new_inbox)
