# SPDX-License-Identifier: MIT
"""What the broker answers: one function an operation, from a request to a reply and the descriptors beside it.

The tables decide, the resources are made or handed out, and whatever could not be made is undone in the tables.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from paravirt.errors import PeerError, ResourceLimit
from paravirt.hypervisor.arenas import Arena
from paravirt.hypervisor.domains import Domain
from paravirt.hypervisor.events import Opened, Port, PortState
from paravirt.hypervisor.messages import (
    MAGIC,
    NO_UID,
    VERSION,
    Op,
    get_text,
    make_failure,
    new_message,
    put_text,
)
from paravirt.hypervisor.resources import Resources
from paravirt.hypervisor.rules import DOM0, DOMID_XEN, MAX_WAITERS, Refused
from paravirt.hypervisor.state import State
from paravirt.ring._core import lib

CData = Any


class Shell(Protocol):
    """What operations need of the process around them. Each raises `ResourceLimit` or `Refused`."""

    def domain_created(self, domain: Domain) -> None:
        """Listen for its processes."""

    def domain_socket(self, domid: int) -> int:
        """A connected socket labelled with the domain, which is the caller's."""

    def watch_process(self, domid: int, pidfd: int, *, init: bool) -> None:
        """Kill this process when the domain ends; if it is `init`, also the other way round. Takes the descriptor."""

    def pid_of(self, connection: int) -> int:
        """Process id at the other end of a connection, as it was when it greeted; 0 when that is not known."""

    def open_store_link(self, connection: int) -> int:
        """The other end of the link to xenstored, which is the caller's."""

    def store_socket(self, domid: int) -> int:
        """A socket whose other end xenstored got, which is the caller's."""


@dataclass(slots=True)
class Answer:
    """A reply; `lent` descriptors stay the broker's, `given` ones are closed once they are sent."""

    message: CData
    lent: list[int] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    received: list[int] = field(default_factory=list)
    """What came beside the request; a handler that keeps one removes it."""

    @property
    def fds(self) -> list[int]:
        return self.lent + self.given

    def fail(self, code: int, text: str) -> None:
        """Answer with a refusal instead of whatever was prepared."""
        self.close()
        make_failure(self.message, code, text)

    def keep(self) -> None:
        """It cannot be sent now, and what was lent may be gone by then. Raises `OSError`."""
        while self.lent:
            self.given.insert(0, os.dup(self.lent[-1]))
            self.lent.pop()

    def close(self) -> None:
        """It was sent, or never will be."""
        for fd in self.given:
            os.close(fd)
        self.lent, self.given = [], []


Handler = Callable[["Operations", int, CData, Answer], None]
_TAKES_FD = frozenset({Op.DOMAIN_SET_INIT, Op.DOMAIN_ADD_PROCESS})


class Operations:
    """Answers requests of all connections."""

    def __init__(self, state: State, resources: Resources, shell: Shell) -> None:
        self._state = state
        self._resources = resources
        self._shell = shell

    def answer(self, connection: int, request: CData, received: list[int]) -> Answer:
        """Carry out one request; a descriptor it keeps is removed from `received`, the others stay the caller's.

        Raises `PeerError` for what no honest client sends: the connection is to be closed.
        """
        op = request.header.op
        handler = _HANDLERS.get(op)
        if handler is None:
            raise PeerError(f"unknown operation {op}")
        if len(received) != (1 if op in _TAKES_FD else 0):
            raise PeerError(f"{len(received)} descriptors beside a request for {Op(op).name}")
        answer = Answer(new_message(op, request.header.seq), received=received)
        try:
            handler(self, connection, request, answer)
        except Refused as refusal:
            answer.fail(refusal.code, str(refusal))
        except ResourceLimit as limit:
            answer.fail(errno.ENOMEM, str(limit))
        answer.message.header.n_fds = len(answer.fds)
        return answer

    # Connection

    def _hello(self, connection: int, request: CData, answer: Answer) -> None:
        if request.hello.magic != MAGIC or request.hello.version != VERSION:
            raise PeerError(f"a greeting with magic {request.hello.magic:#x} version {request.hello.version}")
        answer.lent = [self._resources.make_bindings(connection)]
        domain = self._state.domain_of(connection)
        hello = answer.message.hello
        hello.magic, hello.version, hello.domid, hello.isolated = MAGIC, VERSION, domain.domid, domain.isolated

    def _info(self, connection: int, request: CData, answer: Answer) -> None:
        state, resources, info = self._state, self._resources, answer.message.info
        info.budget_bytes, info.used_bytes = resources.budget_bytes, resources.used_bytes
        limits = state.domain_of(connection).limits
        info.max_pages, info.max_ports, info.max_arenas = limits.max_pages, limits.max_ports, limits.max_arenas
        info.max_maps, info.max_connections = limits.max_maps, limits.max_connections
        info.domains, info.connections = len(state.domains), state.n_connections
        info.posix, info.store = resources.provider == "posix", state.store_link is not None

    # Domains

    def _domain_create(self, connection: int, request: CData, answer: Answer) -> None:
        self._state.require_dom0(connection)
        wanted = request.domain
        domain = self._state.create_domain(
            get_text(wanted.name),
            isolated=bool(wanted.isolated),
            max_pages=wanted.max_pages or None,
            uid=None if wanted.uid == NO_UID else wanted.uid,
        )
        try:
            self._shell.domain_created(domain)
        except (ResourceLimit, Refused):
            self._resources.carry_out(self._state.end_domain(domain.domid))
            raise
        self._fill_domain(answer.message.domain, domain)

    def _domain_destroy(self, connection: int, request: CData, answer: Answer) -> None:
        self._state.require_dom0(connection)
        self._resources.carry_out(self._state.end_domain(request.domain.domid))

    def _domain_info(self, connection: int, request: CData, answer: Answer) -> None:
        self._state.require_dom0(connection)
        self._fill_domain(answer.message.domain, self._state.domains.from_domid(request.domain.domid))

    def _domain_process(self, connection: int, request: CData, answer: Answer) -> None:
        self._state.require_dom0(connection)
        domain = self._state.domains.find(request.domain.domid)
        if domain.domid == DOM0:
            raise Refused(errno.EINVAL, "Dom0's processes are not watched")
        self._shell.watch_process(domain.domid, answer.received[0], init=request.header.op == Op.DOMAIN_SET_INIT)
        answer.received.clear()

    def _domain_connect(self, connection: int, request: CData, answer: Answer) -> None:
        self._state.require_dom0(connection)
        answer.given = [self._shell.domain_socket(request.domain.domid)]

    def _domain_shutdown(self, connection: int, request: CData, answer: Answer) -> None:
        self._resources.carry_out(self._state.shut_down(connection, request.domain.shutdown_reason))

    def _fill_domain(self, reply: CData, domain: Domain) -> None:
        usage = self._state.usage(domain)
        reply.domid, reply.state, reply.isolated = domain.domid, domain.state, domain.isolated
        reply.shutdown_reason = domain.shutdown_reason
        reply.uid = NO_UID if domain.uid is None else domain.uid
        reply.pages, reply.arenas, reply.ports = usage.pages, usage.arenas, usage.ports
        reply.maps, reply.connections, reply.max_pages = usage.maps, usage.connections, domain.limits.max_pages
        put_text(reply.name, domain.name)

    # Events

    def _waiter_create(self, connection: int, request: CData, answer: Answer) -> None:
        domain = self._state.domain_of(connection)
        waiter, effects = self._state.events.create_waiter(
            connection, domain.domid, min(domain.limits.max_waiters, MAX_WAITERS)
        )
        self._resources.carry_out(effects)
        answer.message.port.waiter, answer.message.port.generation = waiter.index, waiter.generation % 2**32

    def _waiter_destroy(self, connection: int, request: CData, answer: Answer) -> None:
        waiter = self._state.events.waiter(connection, request.port.waiter)
        self._resources.carry_out(self._state.events.destroy_waiter(waiter))

    def _alloc_unbound(self, connection: int, request: CData, answer: Answer) -> None:
        wanted = request.port
        self._open(answer, self._state.alloc_unbound(connection, wanted.waiter, wanted.remote_domid))

    def _bind(self, connection: int, request: CData, answer: Answer) -> None:
        wanted = request.port
        opened = self._state.bind_interdomain(connection, wanted.waiter, wanted.remote_domid, wanted.remote_port)
        self._open(answer, opened)

    def _bind_virq(self, connection: int, request: CData, answer: Answer) -> None:
        self._open(answer, self._state.bind_virq(connection, request.port.waiter, request.port.virq))

    def _bind_ipi(self, connection: int, request: CData, answer: Answer) -> None:
        self._open(answer, self._state.bind_ipi(connection, request.port.waiter))

    def _open(self, answer: Answer, opened: Opened) -> None:
        """Answer with a new port, whose inbox is made if it is new."""
        port = opened.port
        if opened.new_inbox:
            try:
                self._resources.make_inbox(port.inbox.number, trusted=self._trusted(port))
            except ResourceLimit:
                # The peer may have seen the binding: it hears of both changes.
                self._resources.carry_out((*opened.effects, *self._state.events.close(port).effects))
                raise
            answer.message.port.flags |= lib.PV_PORT_NEW_INBOX
            answer.lent += self._resources.receiver_fds(port.inbox.number)
        self._resources.carry_out(opened.effects)
        self._fill_port(answer.message.port, port)
        self._add_peer(answer, port)

    def _trusted(self, port: Port) -> bool:
        """Whether the two domains of a port are one trust domain. The hypervisor trusts Dom0's."""
        receiver = self._state.domains.find(port.domid)
        if port.inbox.sender == DOMID_XEN:
            return not receiver.isolated
        sender = self._state.domains.find(port.inbox.sender)
        return not receiver.isolated and not sender.isolated

    def _bind_vcpu(self, connection: int, request: CData, answer: Answer) -> None:
        asked = request.port
        opened, inbox_gone = self._state.bind_vcpu(connection, asked.port, asked.waiter, asked.inbox)
        self._open(answer, opened)
        answer.message.port.flags |= lib.PV_PORT_INBOX_GONE if inbox_gone else 0

    def _evtchn_close(self, connection: int, request: CData, answer: Answer) -> None:
        ended = self._state.close_port(connection, request.port.port, request.port.inbox)
        self._resources.carry_out(ended.effects)
        answer.message.port.flags = lib.PV_PORT_INBOX_GONE if ended.inbox_gone else 0

    def _evtchn_send(self, connection: int, request: CData, answer: Answer) -> None:
        self._resources.carry_out(self._state.send(connection, request.port.port))

    def _evtchn_status(self, connection: int, request: CData, answer: Answer) -> None:
        asked = request.port
        port = self._state.port_status(connection, asked.domid, asked.port, asked.inbox)
        if port is None:
            answer.message.port.domid = self._state.resolve(connection, asked.domid)
            answer.message.port.port, answer.message.port.generation = asked.port, asked.generation
            return
        self._fill_port(answer.message.port, port)
        self._add_bits(answer.message.port, port)
        now = port.waiter.generation
        if port.waiter.connection == connection and (now - asked.generation) % 2**32 > (now - port.changed) % 2**32:
            self._add_peer(answer, port)

    def _evtchn_next(self, connection: int, request: CData, answer: Answer) -> None:
        port = self._state.next_port(connection, request.port.domid, request.port.port)
        if port is not None:
            self._fill_port(answer.message.port, port)
            self._add_bits(answer.message.port, port)

    def _evtchn_kick(self, connection: int, request: CData, answer: Answer) -> None:
        self._resources.carry_out(self._state.kick(connection, request.port.domid, request.port.port))

    def _add_bits(self, reply: CData, port: Port) -> None:
        pending, masked, asleep = self._resources.slot_bits(port.inbox.number, port.slot)
        reply.flags |= (lib.PV_PORT_PENDING if pending else 0) | (lib.PV_PORT_MASKED if masked else 0)
        reply.flags |= lib.PV_PORT_ASLEEP if asleep else 0

    def _evtchn_reset(self, connection: int, request: CData, answer: Answer) -> None:
        asked = request.port
        answer.message.port.port, effects = self._state.reset_ports(connection, asked.domid, asked.port)
        self._resources.carry_out(effects)
        domid = self._state.resolve(connection, asked.domid)
        if not answer.message.port.port and self._state.events.count(domid):
            raise Refused(errno.EAGAIN, f"domain {domid} has opened event channels meanwhile")

    def _virq_raise(self, connection: int, request: CData, answer: Answer) -> None:
        self._resources.carry_out(self._state.raise_virq(connection, request.port.virq, request.port.domid))

    def _virq_handler(self, connection: int, request: CData, answer: Answer) -> None:
        self._state.set_virq_handler(connection, request.port.virq, request.port.domid)

    def _fill_port(self, reply: CData, port: Port) -> None:
        reply.domid, reply.remote_domid, reply.port = port.domid, port.remote_domid, port.number
        reply.remote_port, reply.state, reply.virq = port.remote_port, port.state, port.virq
        reply.waiter, reply.inbox, reply.slot = port.waiter.index, port.inbox.number, port.slot
        reply.generation = port.waiter.generation % 2**32

    def _add_peer(self, answer: Answer, port: Port) -> None:
        """Where a send on this port goes."""
        peer = self._state.events.peer(port)
        if peer is None or port.state is PortState.VIRQ:
            return
        answer.lent += self._resources.sender_fds(peer.inbox.number)
        answer.message.port.flags |= lib.PV_PORT_PEER
        answer.message.port.peer_slot, answer.message.port.peer_inbox = peer.slot, peer.inbox.number

    # Arenas

    def _arena_create(self, connection: int, request: CData, answer: Answer) -> None:
        wanted = request.arena
        read_only = bool(wanted.flags & lib.PV_ARENA_READ_ONLY)
        arena = self._state.create_arena(connection, wanted.domid, wanted.n_pages, read_only=read_only)
        self._make_arena(arena)
        self._lend_arena(answer, arena)

    def _arena_destroy(self, connection: int, request: CData, answer: Answer) -> None:
        self._resources.carry_out(self._state.end_arena(connection, request.arena.gref))

    def _arena_reserved(self, connection: int, request: CData, answer: Answer) -> None:
        arena, new = self._state.reserve_page(self._state.domain_of(connection), request.arena.gref)
        if new:
            self._make_arena(arena)
        self._lend_arena(answer, arena)

    def _make_arena(self, arena: Arena) -> None:
        isolated = any(self._state.domains.find(domid).isolated for domid in (arena.owner, arena.peer))
        try:
            self._resources.make_arena(arena, isolated=isolated)
        except ResourceLimit:
            self._state.abandon_arena(arena)
            raise

    def _lend_arena(self, answer: Answer, arena: Arena) -> None:
        self._fill_arena(answer.message.arena, arena)
        answer.lent = self._resources.owner_fds(arena.number)

    def _arena_map(self, connection: int, request: CData, answer: Answer) -> None:
        mapping, new = self._state.map_arena(connection, request.arena.domid, request.arena.gref)
        arena = mapping.arena
        try:
            if new:
                self._resources.make_arena(arena, isolated=self._state.domains.find(arena.owner).isolated)
            answer.given = [self._resources.peer_data_fd(arena)]
            answer.given.append(self._resources.make_maptrack(mapping))
        except ResourceLimit:
            self._resources.carry_out(self._state.unmap_arena(connection, mapping.number))
            if new:
                self._resources.carry_out(self._state.arenas.end(arena))
            raise
        answer.lent = [self._resources.entries_fd(arena.number)]
        self._fill_arena(answer.message.arena, arena)
        answer.message.arena.map = mapping.number

    def _arena_unmap(self, connection: int, request: CData, answer: Answer) -> None:
        self._resources.carry_out(self._state.unmap_arena(connection, request.arena.map))

    def _fill_arena(self, reply: CData, arena: Arena) -> None:
        posix = self._resources.is_posix(arena.number)
        reply.domid, reply.gref, reply.n_pages = arena.owner, arena.base, arena.n_pages
        reply.flags = (lib.PV_ARENA_READ_ONLY if arena.read_only else 0) | (lib.PV_ARENA_POSIX if posix else 0)

    def _notify_set(self, connection: int, request: CData, answer: Answer) -> None:
        wanted = request.notify
        answer.message.notify.id = self._state.set_notify(
            connection,
            wanted.map,
            actions=wanted.actions,
            gref=wanted.gref,
            offset_bytes=wanted.offset,
            port=wanted.port,
        )

    def _notify_run(self, connection: int, request: CData, answer: Answer) -> None:
        self._resources.carry_out(self._state.run_notify(connection, request.notify.map, request.notify.id))

    # Looking

    def _look_create(self, connection: int, request: CData, answer: Answer) -> None:
        number = self._state.create_look(connection)
        try:
            self._resources.make_look(number)
        except ResourceLimit:
            self._state.looks.abandon(number)
            raise
        self._lend_look(answer, number, connection)

    def _look_next(self, connection: int, request: CData, answer: Answer) -> None:
        found = self._state.next_look(connection, request.look.object)
        if found is not None:
            self._lend_look(answer, *found)

    def _lend_look(self, answer: Answer, number: int, connection: int) -> None:
        look = answer.message.look
        look.object, look.pid = number, self._shell.pid_of(connection)
        look.domid = self._state.domain_of(connection).domid
        answer.lent = [self._resources.look_fd(number)]

    def _arena_look(self, connection: int, request: CData, answer: Answer) -> None:
        arena = self._state.next_arena(connection, request.arena.domid, request.arena.gref)
        if arena is None:
            return
        answer.given = self._resources.look_fds(arena.number)
        reply = answer.message.arena
        self._fill_arena(reply, arena)
        reply.flags |= lib.PV_ARENA_ENDED if arena.ended else 0
        reply.peer_domid, reply.n_maps = arena.peer, len(arena.maps)
        reply.pid = 0 if arena.connection is None else self._shell.pid_of(arena.connection)

    # Store

    def _store_register(self, connection: int, request: CData, answer: Answer) -> None:
        self._state.register_store(connection)
        try:
            answer.given = [self._shell.open_store_link(connection)]
        except ResourceLimit:
            self._state.unregister_store()
            raise

    def _store_connect(self, connection: int, request: CData, answer: Answer) -> None:
        if self._state.store_link is None:
            raise Refused(errno.ENOENT, "no xenstored has registered with this hypervisor")
        answer.given = [self._shell.store_socket(self._state.domain_of(connection).domid)]


_HANDLERS: dict[int, Handler] = {
    Op.HELLO: Operations._hello,
    Op.INFO: Operations._info,
    Op.DOMAIN_CREATE: Operations._domain_create,
    Op.DOMAIN_DESTROY: Operations._domain_destroy,
    Op.DOMAIN_INFO: Operations._domain_info,
    Op.DOMAIN_SET_INIT: Operations._domain_process,
    Op.DOMAIN_ADD_PROCESS: Operations._domain_process,
    Op.DOMAIN_CONNECT: Operations._domain_connect,
    Op.DOMAIN_SHUTDOWN: Operations._domain_shutdown,
    Op.WAITER_CREATE: Operations._waiter_create,
    Op.WAITER_DESTROY: Operations._waiter_destroy,
    Op.EVTCHN_ALLOC_UNBOUND: Operations._alloc_unbound,
    Op.EVTCHN_BIND: Operations._bind,
    Op.EVTCHN_BIND_VIRQ: Operations._bind_virq,
    Op.EVTCHN_BIND_IPI: Operations._bind_ipi,
    Op.EVTCHN_CLOSE: Operations._evtchn_close,
    Op.EVTCHN_SEND: Operations._evtchn_send,
    Op.EVTCHN_STATUS: Operations._evtchn_status,
    Op.EVTCHN_RESET: Operations._evtchn_reset,
    Op.EVTCHN_BIND_VCPU: Operations._bind_vcpu,
    Op.EVTCHN_NEXT: Operations._evtchn_next,
    Op.VIRQ_RAISE: Operations._virq_raise,
    Op.VIRQ_HANDLER: Operations._virq_handler,
    Op.ARENA_CREATE: Operations._arena_create,
    Op.ARENA_DESTROY: Operations._arena_destroy,
    Op.ARENA_RESERVED: Operations._arena_reserved,
    Op.ARENA_MAP: Operations._arena_map,
    Op.ARENA_UNMAP: Operations._arena_unmap,
    Op.NOTIFY_SET: Operations._notify_set,
    Op.NOTIFY_RUN: Operations._notify_run,
    Op.LOOK_CREATE: Operations._look_create,
    Op.LOOK_NEXT: Operations._look_next,
    Op.ARENA_LOOK: Operations._arena_look,
    Op.EVTCHN_KICK: Operations._evtchn_kick,
    Op.STORE_REGISTER: Operations._store_register,
    Op.STORE_CONNECT: Operations._store_connect,
}
