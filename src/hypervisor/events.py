# SPDX-License-Identifier: MIT
"""The event-channel table: who is bound to whom. Pure; the semantics and codes are Xen's (event_channel.c)."""

import errno
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

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


class Virq(IntEnum):
    """VIRQ_*, public/xen.h: virtual interrupts. The hypervisor raises DOM_EXC, Dom0 the others."""

    TIMER = 0
    DEBUG = 1
    CONSOLE = 2
    DOM_EXC = 3
    """Some domain shut down or died."""
    TBUF = 4
    DEBUGGER = 6
    XENOPROF = 7
    CON_RING = 8
    PCPU_STATE = 9
    MEM_EVENT = 10
    ARGO = 11
    ENOMEM = 12
    XENPMU = 13


VIRQ_DOM_EXC = Virq.DOM_EXC
VCPU_VIRQS = frozenset({Virq.TIMER, Virq.DEBUG, Virq.XENPMU})
"""One port a waiter, which stands for a virtual CPU here."""
DOMAIN_VIRQS = frozenset({Virq.ARGO})
"""One port a domain."""
GLOBAL_VIRQS = frozenset(Virq) - VCPU_VIRQS - DOMAIN_VIRQS
"""One port on the host, of the domain that handles it: Dom0 if nothing else was said."""
RESET_SLICE = 1024
"""So many ports are closed in one go; then others have their turn."""


class Numbers:
    """Numbers from `start` up; the lowest that was given back is taken first."""

    def __init__(self, start: int) -> None:
        self._next = start
        self._free: list[int] = []

    @property
    def end(self) -> int:
        """Above all that were ever given out."""
        return self._next

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
    inboxes: dict[int, list[Inbox]] = field(default_factory=dict)
    """By the sender's domid; more than one where it has more ports than slots."""
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
        self._virqs: dict[tuple[int, ...], Port] = {}
        self._handlers: dict[int, int] = {}
        self._resetting: dict[int, int] = {}
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

    def next_port(self, domid: int, number: int) -> Port | None:
        """The open port with the lowest number not below this one."""
        return next(self._ports_from(domid, number), None)

    def _ports_from(self, domid: int, number: int) -> Iterator[Port]:
        """Open ports in the order of their numbers."""
        if domid in self._free_ports:
            ports = self._ports[domid]
            yield from (ports[n] for n in range(number, self._free_ports[domid].end) if n in ports)

    def find_own(self, connection: int, domid: int, number: int, inbox: int = 0) -> Port:
        """A port that belongs to this connection. Raises `Refused` (EINVAL).

        `inbox`: the one its owner knows, if not 0: a number that was closed by a reset may be another port by now.
        """
        port = self.find(domid, number)
        if inbox not in (0, port.inbox.number):
            raise Refused(errno.EINVAL, f"event channel {number} of domain {domid} is another one by now")
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
        """A port for a virtual interrupt.

        Raises `Refused` (EINVAL unknown, EBUSY another domain handles it, EEXIST bound, ENOSPC).
        """
        if virq not in Virq.__members__.values():
            raise Refused(errno.EINVAL, f"there is no virtual interrupt {virq}")
        if virq in GLOBAL_VIRQS and self.virq_handler(virq) != waiter.domid:
            raise Refused(errno.EBUSY, f"virtual interrupt {virq} is for domain {self.virq_handler(virq)}")
        if _virq_key(virq, waiter) in self._virqs:
            raise Refused(errno.EEXIST, f"virtual interrupt {virq} is bound already")
        opened = self._open(waiter, DOMID_XEN, PortState.VIRQ, max_ports)
        opened.port.virq = virq
        self._virqs[_virq_key(virq, waiter)] = opened.port
        return opened

    def virq_handler(self, virq: int) -> int:
        """The domain that may bind a global virtual interrupt."""
        return self._handlers.get(virq, DOM0)

    def set_virq_handler(self, virq: int, domid: int) -> None:
        """Let a domain handle a global virtual interrupt. Raises `Refused` (EINVAL not a global one, EBUSY bound)."""
        if virq not in GLOBAL_VIRQS:
            raise Refused(errno.EINVAL, f"{virq} is no global virtual interrupt")
        if (virq,) in self._virqs and self.virq_handler(virq) != domid:
            raise Refused(errno.EBUSY, f"virtual interrupt {virq} is bound by domain {self.virq_handler(virq)}")
        self._handlers[virq] = domid

    def bind_ipi(self, waiter: Waiter, max_ports: int) -> Opened:
        """A port that sends to itself. Raises `Refused` (ENOSPC)."""
        opened = self._open(waiter, waiter.domid, PortState.IPI, max_ports)
        opened.port.remote_port = opened.port.number
        return opened

    def bind_vcpu(self, port: Port, waiter: Waiter) -> tuple[Opened, bool]:
        """Move a port to another waiter of its process; whether its former inbox is not used any more.

        Raises `Refused` (EINVAL for an IPI and for a virtual interrupt of a virtual CPU).
        """
        if port.state is PortState.IPI or (port.state is PortState.VIRQ and port.virq in VCPU_VIRQS):
            raise Refused(errno.EINVAL, f"event channel {port.number} stays where it is")
        effects = self._leave(port)
        former = port.inbox
        port.waiter.ports.remove(port.number)
        new_inbox = self._enter(port, waiter, former.sender)
        port.changed = waiter.generation
        peer = self.peer(port)
        if peer is not None and peer is not port:
            effects += self._rebound(peer)
        return Opened(port, new_inbox, tuple(effects)), not former.used

    def close(self, port: Port) -> Ended:
        """Free a port; its peer becomes unbound, reserved for the domain of the closer."""
        effects: list[Effect] = []
        peer = self.peer(port)
        if port.state is PortState.VIRQ:
            del self._virqs[_virq_key(port.virq, port.waiter)]
        elif peer is not None and peer is not port:
            peer.state, peer.remote_port = PortState.UNBOUND, 0
            effects += self._rebound(peer)
        del self._ports[port.domid][port.number]
        port.state = PortState.CLOSED
        port.waiter.ports.remove(port.number)
        self._free_ports[port.domid].give_back(port.number)
        effects += self._leave(port)
        return Ended(not port.inbox.used, tuple(effects))

    def reset(self, connection: int, domid: int, start: int) -> tuple[int, list[Effect]]:
        """Close ports of a domain from number `start` up, `RESET_SLICE` at most; where to go on, 0 when done.

        Raises `Refused` (EBUSY another one is at it; EINVAL to go on with one that was not begun).
        """
        if self._resetting.get(domid, connection) != connection:
            raise Refused(errno.EBUSY, f"the event channels of domain {domid} are being reset")
        if start and domid not in self._resetting:
            raise Refused(errno.EINVAL, f"no reset of domain {domid} has begun")
        ports = list(islice(self._ports_from(domid, start), RESET_SLICE))
        effects: list[Effect] = []
        for port in ports:
            effects += [*self._rebound(port), *self.close(port).effects]
        if len(ports) == RESET_SLICE:
            self._resetting[domid] = connection
            return ports[-1].number + 1, effects
        self._resetting.pop(domid, None)
        return 0, effects

    def close_some(self, connection: int, limit: int) -> list[Effect]:
        """Close up to `limit` ports of a connection that has ended."""
        effects: list[Effect] = []
        for waiter in self.waiters_of(connection):
            for number in list(islice(waiter.ports, max(0, limit))):
                effects += self.close(self._ports[waiter.domid][number]).effects
                limit -= 1
        return effects

    def forget_connection(self, connection: int) -> None:
        """It ended; its waiters are destroyed."""
        self._waiters.pop(connection, None)
        self._resetting = {domid: by for domid, by in self._resetting.items() if by != connection}

    def forget_domain(self, domid: int) -> None:
        """A domid is free again."""
        self._ports.pop(domid, None)
        self._free_ports.pop(domid, None)

    def domain_ended(self, domid: int) -> None:
        """What it handled is Dom0's again."""
        self._handlers = {virq: handler for virq, handler in self._handlers.items() if handler != domid}
        self._resetting.pop(domid, None)

    def send(self, port: Port) -> tuple[Effect, ...]:
        """Unbound: dropped silently. Raises `Refused` (EINVAL) for a virtual interrupt."""
        if port.state is PortState.VIRQ:
            raise Refused(errno.EINVAL, f"event channel {port.number} is a virtual interrupt")
        peer = self.peer(port)
        return (Deliver(peer.inbox.number, peer.slot),) if peer else ()

    def raise_virq(self, virq: int, domid: int = DOM0) -> tuple[Effect, ...]:
        """A virtual interrupt that nobody has bound is dropped silently. `domid`: whose, for one that is not global."""
        key = (virq,) if virq in GLOBAL_VIRQS else (virq, domid)
        ports = [port for bound, port in self._virqs.items() if bound[:2] == key]
        return tuple(Deliver(port.inbox.number, port.slot) for port in ports)

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
        if len(ports) >= max_ports:
            raise Refused(errno.ENOSPC, f"domain {waiter.domid} may have {max_ports} event channels")
        number = self._free_ports.setdefault(waiter.domid, Numbers(1)).take()
        port = Port(waiter.domid, number, waiter, Inbox(0, 0), 0, state, remote_domid, changed=waiter.generation)
        ports[number] = port
        return Opened(port, self._enter(port, waiter, remote_domid))

    def _enter(self, port: Port, waiter: Waiter, sender: int) -> bool:
        """Give a port its place in an inbox; whether that is new."""
        inboxes = waiter.inboxes.setdefault(sender, [])
        inbox = next((inbox for inbox in inboxes if inbox.used < MAX_SLOTS), None)
        new_inbox = inbox is None
        if inbox is None:
            self._last_inbox += 1
            inbox = Inbox(self._last_inbox, sender)
            inboxes.append(inbox)
        port.waiter, port.inbox, port.slot = waiter, inbox, inbox.free_slots.take()
        inbox.used += 1
        waiter.ports.add(port.number)
        return new_inbox

    @staticmethod
    def _leave(port: Port) -> list[Effect]:
        """Give back its place; the inbox goes with its last port."""
        inbox, inboxes = port.inbox, port.waiter.inboxes
        inbox.free_slots.give_back(port.slot)
        inbox.used -= 1
        if inbox.used:
            return []
        inboxes[inbox.sender].remove(inbox)
        if not inboxes[inbox.sender]:
            del inboxes[inbox.sender]
        return [DropInbox(inbox.number)]


def _virq_key(virq: int, waiter: Waiter) -> tuple[int, ...]:
    """What has at most one port for this virtual interrupt."""
    if virq in GLOBAL_VIRQS:
        return (virq,)
    if virq in DOMAIN_VIRQS:
        return virq, waiter.domid
    return virq, waiter.domid, waiter.connection, waiter.index
