# SPDX-License-Identifier: MIT
"""The hypervisor as a process uses it: domains, event channels, arenas, and the way to xenstore."""

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paravirt.errors import HypervisorError, InvalidRequest, NotFound, PeerError, PermissionRefused
from paravirt.hypervisor.arena import Arena, ArenaStatistics, PageRun
from paravirt.hypervisor.channels import (
    ChannelStatus,
    EventChannel,
    PeerInboxes,
    PortInfo,
    Waiter,
    bindings_word,
    map_bindings,
    status_of,
)
from paravirt.hypervisor.copies import GrantCopier
from paravirt.hypervisor.domains import DomainState, ShutdownReason
from paravirt.hypervisor.events import VIRQ_DOM_EXC, PortState, Virq
from paravirt.hypervisor.foreign import ForeignArena, MappedPages
from paravirt.hypervisor.info import DomainInfo, HypervisorInfo, domain_info
from paravirt.hypervisor.link import Link
from paravirt.hypervisor.messages import MAGIC, NAME_BYTES, NO_UID, VERSION, Op, put_text
from paravirt.hypervisor.own_records import OwnRecords
from paravirt.hypervisor.rules import DOM0, DOMID_SELF
from paravirt.hypervisor.store import StoreRegistration
from paravirt.ring._core import lib
from paravirt.ring.looking import Record, RingLabel

__all__ = [
    "CONSOLE_GREF",
    "DOM0",
    "DOMID_SELF",
    "VIRQ_DOM_EXC",
    "XENSTORE_GREF",
    "Arena",
    "ArenaStatistics",
    "ChannelStatus",
    "DomainInfo",
    "DomainState",
    "EventChannel",
    "ForeignArena",
    "Hypervisor",
    "HypervisorInfo",
    "MappedPages",
    "PageRun",
    "PortInfo",
    "PortState",
    "ShutdownReason",
    "StoreRegistration",
    "Virq",
    "Waiter",
]

CData = Any

CONSOLE_GREF = 0
XENSTORE_GREF = 1


class Hypervisor:
    """This process' connection to the broker. Thread-safe; a context manager; a forked child gets `Closed`.

    Ports, waiters, arenas and mappings belong to the connection and end with it. Calls raise `HypervisorGone` once the
    broker died; what is mapped goes on, and `close` of everything still works.
    """

    def __init__(self, connected: socket.socket) -> None:
        """Over a connected socket, which is owned. Raises `HypervisorGone`, `PeerError`."""
        self.link = Link(connected)
        self.peer_inboxes = PeerInboxes()
        self._lock = threading.Lock()
        self._waiters: dict[Waiter, None] = {}
        self._arenas: dict[Arena, None] = {}
        self._reserved: dict[int, Arena] = {}
        self._foreign: list[ForeignArena] = []
        self._mapping_lock = threading.Lock()
        self._registrations: dict[StoreRegistration, None] = {}
        self._records = OwnRecords(self.link)
        try:
            with self.link.call(Op.HELLO, _fill_hello) as reply:
                hello = reply.message.hello
                if hello.magic != MAGIC or hello.version != VERSION:
                    raise PeerError("the hypervisor does not speak our protocol")
                self.domid: int = hello.domid
                self.isolated = bool(hello.isolated)
                bindings_fd = reply.take_fd()
            try:
                self._bindings = map_bindings(bindings_fd)
            finally:
                os.close(bindings_fd)
        except BaseException:
            self.link.close()
            raise

    @classmethod
    def connect(cls, path: str | os.PathLike[str]) -> Self:
        """To a listening socket. Raises `NotFound` when no hypervisor runs there, `PermissionRefused`."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connected.connect(os.fspath(path))
        except OSError as error:
            connected.close()
            if isinstance(error, PermissionError):
                raise PermissionRefused(f"no right to connect to {path}") from error
            if isinstance(error, FileNotFoundError | ConnectionRefusedError):
                raise NotFound(f"no hypervisor runs at {path}") from error
            raise InvalidRequest(f"cannot connect to {path}: {error}") from error
        return cls(connected)

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Over a connected socket, whose descriptor is taken."""
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise InvalidRequest(f"descriptor {fd} is no socket")
        os.set_inheritable(fd, False)
        return cls(socket.socket(fileno=fd))

    @classmethod
    def from_environment(cls) -> Self:
        """In a process of a domain: over $PARAVIRT_FD, which is taken out of the environment, else $PARAVIRT_SOCKET.

        Raises `NotFound` outside of a domain.
        """
        fd, path = os.environ.pop("PARAVIRT_FD", ""), Path(os.environ.get("PARAVIRT_SOCKET", ""))
        if fd.isdigit():
            with suppress(OSError, InvalidRequest):
                return cls.from_fd(int(fd))
        if path.is_absolute():
            return cls.connect(path)
        raise NotFound("this process is in no domain: it has no connection in $PARAVIRT_FD or $PARAVIRT_SOCKET")

    def info(self) -> HypervisorInfo:
        """Ask the broker about itself and the limits of the own domain."""
        with self.link.call(Op.INFO) as reply:
            info = reply.message.info
            return HypervisorInfo(
                provider="posix" if info.posix else "memfd",
                budget_bytes=info.budget_bytes,
                used_bytes=info.used_bytes,
                max_pages=info.max_pages,
                max_ports=info.max_ports,
                max_arenas=info.max_arenas,
                max_maps=info.max_maps,
                max_connections=info.max_connections,
                domains=info.domains,
                connections=info.connections,
                has_store=bool(info.store),
            )

    @property
    def identity(self) -> str:
        """Tells this run of the broker from every other one on this machine since it was started."""
        return self.link.identity()

    # Domains

    def create_domain(
        self, name: str, *, isolated: bool = True, max_pages: int | None = None, uid: int | None = None
    ) -> DomainInfo:
        """Dom0. `uid`: owner of its listening socket. Raises `AlreadyExists`, `InvalidRequest` for a bad name."""
        if len(name.encode()) >= NAME_BYTES:
            raise InvalidRequest(f"the domain name {name!r} is longer than {NAME_BYTES - 1} bytes")
        if max_pages is not None and max_pages < 1:
            raise InvalidRequest(f"max_pages is {max_pages}, not at least 1")

        def fill(request: CData) -> None:
            put_text(request.domain.name, name)
            request.domain.isolated, request.domain.max_pages = isolated, max_pages or 0
            request.domain.uid = NO_UID if uid is None else uid

        with self.link.call(Op.DOMAIN_CREATE, fill) as reply:
            return domain_info(reply.message.domain)

    def destroy_domain(self, domid: int) -> None:
        """Dom0. Its connections are closed at once. Raises `NotFound`."""
        self.link.do(Op.DOMAIN_DESTROY, _fill_domid(domid))

    def list_domains(self, *, dying: bool = False) -> list[DomainInfo]:
        """Dom0. By domid, Dom0 first; `dying`: also those that ended but are still mapped somewhere."""
        return [info for info in self._all_domains() if dying or info.state is not DomainState.DYING]

    def find_domain(self, domid: int) -> DomainInfo:
        """Dom0. One domain, also one that ended but is still mapped somewhere. Raises `NotFound`."""
        with self.link.call(Op.DOMAIN_INFO, _fill_domid(domid)) as reply:
            info = domain_info(reply.message.domain)
        if info.domid != domid:  # the broker gives the next one
            raise NotFound(f"there is no domain {domid}")
        return info

    def _all_domains(self) -> Iterator[DomainInfo]:
        domid = 0
        with suppress(NotFound):
            while True:
                with self.link.call(Op.DOMAIN_INFO, _fill_domid(domid)) as reply:
                    info = domain_info(reply.message.domain)
                yield info
                domid = info.domid + 1

    def set_init(self, domid: int, pidfd: int) -> None:
        """Dom0. The domain ends when this process does; the descriptor stays the caller's."""
        self.link.do(Op.DOMAIN_SET_INIT, _fill_domid(domid), send_fd=pidfd)

    def add_process(self, domid: int, pidfd: int) -> None:
        """Dom0. This process is killed when the domain ends; the descriptor stays the caller's."""
        self.link.do(Op.DOMAIN_ADD_PROCESS, _fill_domid(domid), send_fd=pidfd)

    def domain_socket(self, domid: int) -> int:
        """Dom0. A connected socket labelled with the domain, for a process of it; the descriptor is the caller's."""
        with self.link.call(Op.DOMAIN_CONNECT, _fill_domid(domid)) as reply:
            return reply.take_fd()

    def shutdown(self, reason: ShutdownReason = ShutdownReason.POWEROFF) -> None:
        """This domain asks to end: Dom0 is told, and does the rest."""

        def fill(request: CData) -> None:
            request.domain.shutdown_reason = reason

        self.link.do(Op.DOMAIN_SHUTDOWN, fill)

    # Event channels

    def waiter(self) -> Waiter:
        """What one thread sleeps on."""
        waiter = Waiter(self)
        with self._lock:
            self._waiters[waiter] = None
        return waiter

    def alloc_unbound(self, waiter: Waiter, remote: int) -> EventChannel:
        """A port that domain `remote` may bind. Raises `NotFound`, `ResourceLimit`."""

        def fill(request: CData) -> None:
            request.port.remote_domid = remote

        return waiter.open(Op.EVTCHN_ALLOC_UNBOUND, fill)

    def bind_interdomain(self, waiter: Waiter, remote: int, remote_port: int) -> EventChannel:
        """Connect to a port that domain `remote` has allocated for us; our end is pending then.

        Raises `HypervisorError` (EINVAL: not unbound, or not for us), `NotFound`, `ResourceLimit`.
        """

        def fill(request: CData) -> None:
            request.port.remote_domid, request.port.remote_port = remote, remote_port

        channel = waiter.open(Op.EVTCHN_BIND, fill)
        channel.set_pending()
        return channel

    def bind_virq(self, waiter: Waiter, virq: int = VIRQ_DOM_EXC) -> EventChannel:
        """A `Virq`: one of a virtual CPU once a waiter, one of a domain once, a global one once by its handler (Dom0).

        Raises `HypervisorError` (EINVAL unknown, EBUSY another domain handles it), `AlreadyExists`, `ResourceLimit`.
        """

        def fill(request: CData) -> None:
            request.port.virq = virq

        return waiter.open(Op.EVTCHN_BIND_VIRQ, fill)

    def bind_ipi(self, waiter: Waiter) -> EventChannel:
        """A port that sends to itself."""
        return waiter.open(Op.EVTCHN_BIND_IPI, lambda request: None)

    def raise_virq(self, virq: int, domid: int = DOM0) -> None:
        """Dom0. Dropped silently where it is not bound; `domid`: whose, of one that is not global.

        Raises `HypervisorError` (EINVAL unknown, or DOM_EXC, which the hypervisor raises).
        """
        self.link.do(Op.VIRQ_RAISE, _fill_virq(virq, domid))

    def set_virq_handler(self, virq: int, domid: int) -> None:
        """Dom0. The domain that may bind a global virtual interrupt, until it ends (XEN_DOMCTL_set_virq_handler).

        Raises `HypervisorError` (EINVAL not a global one, EBUSY bound), `NotFound`.
        """
        self.link.do(Op.VIRQ_HANDLER, _fill_virq(virq, domid))

    def reset_ports(self, domid: int = DOMID_SELF) -> None:
        """Close all event channels of a domain, of all its processes (EVTCHNOP_reset): our own, or for Dom0 any.

        Raises `HypervisorError` (EBUSY: somebody is at it; EAGAIN: some were opened meanwhile), `PermissionRefused`.
        """
        start = 0
        while True:
            with self.link.call(Op.EVTCHN_RESET, _fill_port(domid, start)) as reply:
                start = reply.message.port.port
            if not start:
                return

    def port_status(self, port: int, domid: int = DOMID_SELF) -> ChannelStatus:
        """A port of our own domain, whichever of its processes has it, or for Dom0 of any domain.

        Raises `HypervisorError` (EINVAL: no port can have this number), `NotFound`, `PermissionRefused`.
        """
        with self.link.call(Op.EVTCHN_STATUS, _fill_port(domid, port)) as reply:
            return status_of(reply.message.port)

    def port_state(self, port: int) -> PortState:
        """State of a port of our own domain, whichever of its processes has it; CLOSED when none has."""
        try:
            return self.port_status(port).state
        except HypervisorError as error:
            if error.code != errno.EINVAL:
                raise
            return PortState.CLOSED

    def list_ports(self, domid: int = DOMID_SELF) -> Iterator[PortInfo]:
        """The open ports of our own domain, or for Dom0 of any, by number. Raises `NotFound`, `PermissionRefused`."""
        number = 1
        while True:
            with self.link.call(Op.EVTCHN_NEXT, _fill_port(domid, number)) as reply:
                port = reply.message.port
                info = PortInfo(port.domid, port.port, status_of(port))
            if not info.port:
                return
            yield info
            number = info.port + 1

    def kick_port(self, port: int, domid: int = DOMID_SELF) -> None:
        """Dom0. Wake whose port it is, as if its peer had sent. Raises `HypervisorError`, `NotFound`."""
        self.link.do(Op.EVTCHN_KICK, _fill_port(domid, port))

    def generation_word(self, index: int) -> CData:
        """`const uint32_t *` of a waiter in the bindings page."""
        return bindings_word(self._bindings, index)

    # Arenas

    def create_arena(self, peer: int, pages: int, *, read_only: bool = False) -> Arena:
        """Memory shared with domain `peer` (which may only read it if `read_only`).

        Raises `NotFound`, `ResourceLimit` for a quota, the memory budget, or no memory.
        """

        def fill(request: CData) -> None:
            request.arena.domid, request.arena.n_pages = peer, pages
            request.arena.flags = lib.PV_ARENA_READ_ONLY if read_only else 0

        if not 0 < pages < 2**32:
            raise InvalidRequest(f"an arena cannot have {pages} pages")
        with self.link.call(Op.ARENA_CREATE, fill) as reply:
            return self._adopt_arena(Arena(self.link, reply, peer, self._forget_arena))

    def reserved_page(self, kind: int) -> Arena:
        """Our own page for Dom0 with a reserved reference (`CONSOLE_GREF`, `XENSTORE_GREF`), granted already."""
        with self._mapping_lock:
            if kind in self._reserved:
                return self._reserved[kind]

            def fill(request: CData) -> None:
                request.arena.gref = kind

            with self.link.call(Op.ARENA_RESERVED, fill) as reply:
                arena = self._adopt_arena(Arena(self.link, reply, DOM0, self._forget_arena))
            self._reserved[kind] = arena
            return arena

    def _adopt_arena(self, arena: Arena) -> Arena:
        with self._lock:
            self._arenas[arena] = None
        return arena

    def foreign_arena(self, granter: int, gref: int) -> ForeignArena:
        """The arena of domain `granter` that has this reference, mapped once for all who ask; `close` when done.

        Raises `NotFound`, `HypervisorError` (EINVAL no such reference), `PermissionRefused` when it is not for us.
        """
        with self._mapping_lock:
            for arena in self._foreign:
                if arena.holds(granter, gref) and arena.use():
                    return arena

            def fill(request: CData) -> None:
                request.arena.domid, request.arena.gref = granter, gref

            with self.link.call(Op.ARENA_MAP, fill) as reply:
                made = ForeignArena(self.link, reply, self.domid, self._forget_foreign)
            self._foreign.append(made)
            return made

    def grant_copier(self) -> GrantCopier:
        """For copies to and from pages that other domains have granted to us, in batches."""
        return GrantCopier(self.foreign_arena)

    # Looking (the other side is `looking.Looker`)

    def ring_record(self, label: RingLabel) -> Record | None:
        """A place where Dom0 can see an end of a ring; None, and the ring is as good without, if there is none."""
        return self._records.claim(label)

    # Store

    def store_connection(self) -> socket.socket:
        """A stream socket to xenstored, labelled with our domid. Raises `NotFound` when there is no xenstored."""
        with self.link.call(Op.STORE_CONNECT) as reply:
            return socket.socket(fileno=reply.take_fd())

    def register_store(self) -> StoreRegistration:
        """Dom0: be xenstored. Raises `AlreadyExists`."""
        with self.link.call(Op.STORE_REGISTER) as reply:
            registration = StoreRegistration(reply.take_fd(), self._forget_registration)
        with self._lock:
            self._registrations[registration] = None
        return registration

    # End

    def forget(self, owned: Waiter) -> None:
        with self._lock:
            self._waiters.pop(owned, None)

    def _forget_arena(self, arena: Arena) -> None:
        with self._lock:
            self._arenas.pop(arena, None)
            self._reserved = {kind: kept for kind, kept in self._reserved.items() if kept is not arena}

    def _forget_foreign(self, arena: ForeignArena) -> None:
        with self._lock:
            if arena in self._foreign:
                self._foreign.remove(arena)

    def _forget_registration(self, registration: StoreRegistration) -> None:
        with self._lock:
            self._registrations.pop(registration, None)

    def close(self) -> None:
        """Close everything of this connection. Nobody may wait or be inside a call. Harmless when repeated."""
        with self._lock:
            owned: list[Waiter | StoreRegistration] = [*self._waiters, *self._registrations]
            arenas, foreign = list(self._arenas), list(self._foreign)
        for each in owned:
            each.close()
        self._records.close()
        self.link.close()  # the broker ends the rest
        for arena in arenas:
            arena.close()
        for mapped in foreign:
            mapped.abandon()
        self._bindings.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Hypervisor of domain {self.domid}{' closed' if self.link.closed else ''}>"


def _fill_hello(request: CData) -> None:
    request.hello.magic, request.hello.version = MAGIC, VERSION


def _fill_domid(domid: int) -> Callable[[CData], None]:
    def fill(request: CData) -> None:
        request.domain.domid = domid

    return fill


def _fill_port(domid: int, port: int) -> Callable[[CData], None]:
    def fill(request: CData) -> None:
        request.port.domid, request.port.port = domid, port

    return fill


def _fill_virq(virq: int, domid: int) -> Callable[[CData], None]:
    def fill(request: CData) -> None:
        request.port.virq, request.port.domid = virq, domid

    return fill
