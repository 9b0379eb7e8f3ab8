# SPDX-License-Identifier: MIT
"""Event channels as a process sees them: waiters and ports that know the broker."""

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from paravirt.errors import Closed, HypervisorGone, InvalidRequest, ParavirtError, PeerError
from paravirt.hypervisor.events import PortState
from paravirt.hypervisor.link import Link, Reply
from paravirt.hypervisor.messages import Op
from paravirt.hypervisor.rules import DOMID_SELF
from paravirt.ring._core import ffi, lib
from paravirt.ring.event import EventPort, EventWaiter, Inbox
from paravirt.ring.memory import PAGE_BYTES, Mapping

CData = Any


@dataclass(frozen=True, slots=True)
class ChannelStatus:
    """EVTCHNOP_status."""

    state: PortState
    remote_domid: int
    """UNBOUND: who may bind; INTERDOMAIN: the peer's domain."""
    remote_port: int
    virq: int = field(default=0, compare=False)
    """VIRQ: which one."""
    waiter: int = field(default=0, compare=False)
    """Number of the waiter, which stands for a virtual CPU, in its process."""
    pending: bool = field(default=False, compare=False)
    """It has an event that its owner has not taken yet."""
    masked: bool = field(default=False, compare=False)
    """Its owner takes no event of it now."""
    asleep: bool = field(default=False, compare=False)
    """Its owner sleeps until an event comes."""


@dataclass(frozen=True, slots=True)
class PortInfo:
    """A port of some domain, as Dom0 sees it."""

    domid: int
    port: int
    status: ChannelStatus


def status_of(port: CData) -> ChannelStatus:
    """From the broker's reply."""
    return ChannelStatus(
        PortState(port.state),
        port.remote_domid,
        port.remote_port,
        port.virq,
        port.waiter,
        pending=bool(port.flags & lib.PV_PORT_PENDING),
        masked=bool(port.flags & lib.PV_PORT_MASKED),
        asleep=bool(port.flags & lib.PV_PORT_ASLEEP),
    )


class PeerInboxes:
    """Inboxes of peers, shared by the ports that send to them: a page and a doorbell each, however many ports."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Mapping, int]] = {}
        self._uses: dict[int, int] = {}
        self._numbers: dict[Mapping, int] = {}

    def take(self, number: int, page_fd: int, bell_fd: int) -> tuple[Mapping, int]:
        """One more use; takes ownership of both descriptors."""
        with self._lock:
            unused = [page_fd, bell_fd]
            try:
                if number not in self._held:
                    mapping = Mapping(page_fd, PAGE_BYTES)
                    self._held[number] = (mapping, bell_fd)
                    self._numbers[mapping] = number
                    self._uses[number] = 0
                    unused.remove(bell_fd)
            finally:
                for fd in unused:
                    os.close(fd)
            self._uses[number] += 1
            return self._held[number]

    def release(self, mapping: Mapping) -> None:
        """One use less; the last one closes both."""
        with self._lock:
            number = self._numbers[mapping]
            self._uses[number] -= 1
            if self._uses[number]:
                return
            held, bell_fd = self._held.pop(number)
            del self._uses[number], self._numbers[held]
        held.close()
        os.close(bell_fd)


class Connection(Protocol):
    """What waiters and ports need of the `Hypervisor` they belong to."""

    link: Link
    peer_inboxes: PeerInboxes

    def generation_word(self, index: int) -> CData:
        """`const uint32_t *` of a waiter in the bindings page."""

    def forget(self, owned: "Waiter") -> None:
        """It is closed."""


class Waiter(EventWaiter):
    """An `EventWaiter` that the broker knows. Its channels are opened, closed and waited for by one thread."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.lock = threading.RLock()
        """Held while a channel is opened, closed or looked up, here and at the broker."""
        self._by_number: dict[int, Inbox] = {}
        self._unused: list[Inbox] = []
        with connection.link.call(Op.WAITER_CREATE) as reply:
            self.index: int = reply.message.port.waiter
        try:
            super().__init__(connection.generation_word(self.index))
        except BaseException:
            connection.link.do_quietly(Op.WAITER_DESTROY, self._fill)
            raise

    def _fill(self, request: CData) -> None:
        request.port.waiter = self.index

    def open(self, op: Op, fill: Callable[[CData], None]) -> "EventChannel":
        """Ask the broker for a port of this waiter."""
        return self.open_with_flags(op, fill)[0]

    def open_with_flags(self, op: Op, fill: Callable[[CData], None]) -> "tuple[EventChannel, int]":
        """The same, and the flags of the reply."""

        def fill_all(request: CData) -> None:
            self._fill(request)
            fill(request)

        with self.lock:
            self._check_at_rest()
            self._drop_unused()
            with self.connection.link.call(op, fill_all) as reply:
                try:
                    return EventChannel(self, self._inbox(reply), reply), reply.message.port.flags
                except BaseException:
                    number = reply.message.port.port
                    self.connection.link.do_quietly(Op.EVTCHN_CLOSE, lambda request: _fill_port(request, number))
                    raise

    def _inbox(self, reply: Reply) -> Inbox:
        port = reply.message.port
        if port.flags & lib.PV_PORT_NEW_INBOX:
            page_fd, bell_fd = reply.take_fds(2)
            try:
                page = Mapping(page_fd, PAGE_BYTES)
            except BaseException:
                os.close(bell_fd)
                raise
            finally:
                os.close(page_fd)
            self._by_number[port.inbox] = self.add_inbox(page, bell_fd)
        return self._by_number[port.inbox]

    def drop_inbox(self, inbox: Inbox) -> None:
        """The broker has no use for it any more. While another thread waits here it stays until the next change."""
        self._by_number = {number: kept for number, kept in self._by_number.items() if kept is not inbox}
        self._unused.append(inbox)
        self._drop_unused()

    def _check_at_rest(self) -> None:
        if self.core.waiting and lib.pv_home_is_here(self.core.home):
            raise InvalidRequest("another thread waits on this waiter: kick it and let it do this")

    def _drop_unused(self) -> None:
        while self._unused:
            try:
                self.remove_inbox(self._unused[-1])
            except (InvalidRequest, Closed):
                return
            self._unused.pop()

    def close(self) -> None:
        """Close its channels and give it back to the broker. The thread that waited must have left."""
        with self.lock:
            if self._core is None:
                return
            self._check_at_rest()
            for inbox in self.inboxes:
                for port in list(inbox.ports.values()):
                    port.close()
            super().close()
            self.connection.link.do_quietly(Op.WAITER_DESTROY, self._fill)
            self.connection.forget(self)


class EventChannel(EventPort):
    """One end of a channel. `port` is its number; a binding that changed is learnt when it is used."""

    def __init__(self, waiter: Waiter, inbox: Inbox, reply: Reply) -> None:
        """From the broker's reply; made by `Hypervisor`."""
        self._connection = waiter.connection
        self._lock = waiter.lock
        super().__init__(waiter, inbox, reply.message.port.slot)
        self.port: int = reply.message.port.port
        self.inbox_number: int = reply.message.port.inbox
        self.remote: tuple[int, int] | None = None
        """(domid, port) of the peer, as far as was last heard."""
        self.on_stale = self.refresh
        try:
            self._learn(reply)
        except BaseException:
            super().close()
            raise

    def status(self) -> ChannelStatus:
        """What the broker says now; what it says is used from then on. Raises `HypervisorGone`.

        CLOSED after a reset of the domain's channels: then nothing is sent or received here any more.
        """
        with self._lock:
            known = self.core.generation_seen

            def fill(request: CData) -> None:
                self._fill(request)
                request.port.domid, request.port.generation = DOMID_SELF, known

            with self._connection.link.call(Op.EVTCHN_STATUS, fill) as reply:
                self._learn(reply)
                return status_of(reply.message.port)

    def refresh(self) -> None:
        """Learn the present binding. Without a broker the last one stands: running channels go on."""
        try:
            self.status()
        except (HypervisorGone, Closed):
            with self._lock:
                self.core.generation_seen = self.core.generation[0]

    def _learn(self, reply: Reply) -> None:
        port = reply.message.port
        bound = port.state in (PortState.INTERDOMAIN, PortState.IPI)
        if port.flags & lib.PV_PORT_PEER:
            page_fd, bell_fd = reply.take_fds(2)
            mapping, shared_bell_fd = self._connection.peer_inboxes.take(port.peer_inbox, page_fd, bell_fd)
            self.set_peer(mapping, port.peer_slot, shared_bell_fd, port.generation)
        elif not bound:
            # A reset port is of no waiter any more: its word has moved on, and every send asks and is dropped.
            self.set_peer(None, 0, -1, port.generation)
        else:
            self.core.generation_seen = port.generation
        self.remote = (port.remote_domid, port.remote_port) if bound else None

    def _let_go(self, peer: tuple[Mapping, int] | None) -> None:
        if peer is not None:
            self._connection.peer_inboxes.release(peer[0])

    def close(self) -> None:
        """Free the port: the peer becomes unbound, reserved for our domain. Nobody may be inside a call on it."""
        with self._lock:
            if self._core is None:
                return
            super().close()
            inbox_gone = False
            with contextlib.suppress(ParavirtError):
                with self._connection.link.call(Op.EVTCHN_CLOSE, self._fill) as reply:
                    inbox_gone = bool(reply.message.port.flags & lib.PV_PORT_INBOX_GONE)
            self._forget_inbox(inbox_gone)

    def move_to(self, waiter: Waiter) -> "EventChannel":
        """Have its events delivered to another waiter of this process (EVTCHNOP_bind_vcpu); this object is closed.

        The new one is pending then, so that no event is lost. Raises `HypervisorError` (EINVAL) for an IPI and for a
        virtual interrupt of a virtual CPU, `InvalidRequest` for a waiter of another connection.
        """
        if waiter.connection is not self._connection:
            raise InvalidRequest("a channel stays with its connection")
        inbox_gone = False

        def fill(request: CData) -> None:
            index = request.port.waiter
            self._fill(request)
            request.port.waiter = index

        with self._lock:
            moved, flags = waiter.open_with_flags(Op.EVTCHN_BIND_VCPU, fill)
            inbox_gone = bool(flags & lib.PV_PORT_INBOX_GONE)
            super().close()
            self._forget_inbox(inbox_gone)
        moved.set_pending()
        return moved

    def _forget_inbox(self, gone: bool) -> None:
        """Of a port that is closed here; `gone`: the broker says so. One that was reset had its end told to nobody."""
        if self.inbox is not None and isinstance(self.waiter, Waiter) and (gone or not self.inbox.ports):
            self.waiter.drop_inbox(self.inbox)

    def _fill(self, request: CData) -> None:
        request.port.port, request.port.inbox = self.port, self.inbox_number

    def __repr__(self) -> str:
        state = "closed" if self._core is None else f"bound to {self.remote}" if self.remote else "unbound"
        return f"<EventChannel {self.port} {state}>"


def _fill_port(request: CData, number: int) -> None:
    request.port.port = number


def map_bindings(fd: int) -> Mapping:
    """A connection's bindings page, which only the broker writes. `PeerError` when it is none of our version."""
    bindings = Mapping(fd, PAGE_BYTES, read_only=True)
    page = bindings.pointer("struct pv_bindings *")
    if (page.magic, page.version) != (lib.PV_BINDINGS_MAGIC, lib.PV_SHARED_VERSION):
        bindings.close()
        raise PeerError("the magic or version of the bindings page is not ours")
    return bindings


def bindings_word(bindings: Mapping, index: int) -> CData:
    """`const uint32_t *` of a waiter's word in the bindings page."""
    page = bindings.pointer("struct pv_bindings *")
    return ffi.addressof(page.generation, index)
