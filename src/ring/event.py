# SPDX-License-Identifier: MIT
"""Event channels, the delivery half: what a thread sleeps on, and the local ends of channels.

A sender sets a bit in an *inbox*, a page shared by one receiving waiter and one sending domain, and writes the
*doorbell* beside it only when the receiver sleeps. Who is bound to whom is the hypervisor's business: it hands inboxes
and bells to the classes here. Semantics: Xen public/event_channel.h.

Pending bits are taken before one looks for work, never after: an event that comes while one works sets the bit again.
"""

import errno
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from paravirt.errors import Closed, InvalidRequest
from paravirt.ring._core import ffi, lib
from paravirt.ring.event_results import NotifyResult as NotifyResult
from paravirt.ring.event_results import PortStatistics as PortStatistics
from paravirt.ring.event_results import WaiterStatistics as WaiterStatistics
from paravirt.ring.event_results import WaitResult as WaitResult
from paravirt.ring.event_results import check_status as check_status
from paravirt.ring.event_results import resume_on_signal as resume_on_signal
from paravirt.ring.event_results import timeout_to_ns as timeout_to_ns
from paravirt.ring.memory import PAGE_BYTES, Mapping, Provider, map_new
from paravirt.ring.waiting import SpinBudget

CData = Any

SLOTS = lib.PV_INBOX_SLOTS
DEFAULT_PRIORITY = 7
LOWEST_PRIORITY = 15


def make_bell(kind: Literal["eventfd", "pipe"] = "eventfd") -> tuple[int, int]:
    """A doorbell: (descriptor to wait on, descriptor to ring), both close-on-exec and nonblocking.

    An eventfd for ends that trust each other; a pipe where the ringing end must not be able to drain it.
    """
    if kind == "pipe":
        return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        return bell, os.dup(bell)
    except OSError:
        os.close(bell)
        raise


def ring_bell(bell_fd: int) -> bool:
    """Wake whoever sleeps on this bell, without blocking; False when nobody can hear it any more."""
    status = lib.pv_bell_ring(bell_fd)
    if status == -errno.EPIPE:
        return False
    check_status(status, "doorbell")
    return True


def init_inbox(mapping: Mapping) -> None:
    """Write magic and version into a zeroed inbox page: its maker does that once."""
    lib.pv_inbox_init(mapping.pointer("struct pv_inbox *"))


class Inbox:
    """A waiter's page and doorbell for one sending domain. Made by `EventWaiter.add_inbox`."""

    def __init__(self, mapping: Mapping, bell_fd: int) -> None:
        if mapping.n_bytes < PAGE_BYTES:
            raise InvalidRequest(f"an inbox is a page of {PAGE_BYTES} bytes, not {mapping.n_bytes}")
        self.mapping = mapping
        self.bell_fd = bell_fd
        self.core: CData = mapping.pointer("struct pv_inbox *")
        self.ports: dict[int, EventPort] = {}
        self.taken: CData = ffi.new("uint32_t[]", SLOTS)

    def __repr__(self) -> str:
        return f"<Inbox bell {self.bell_fd}, {len(self.ports)} ports>"


class EventWaiter:
    """What one thread sleeps on: the inboxes of all domains that may send to it, their doorbells, and a kick.

    One thread waits, adds and removes inboxes and calls `take_pending`; `kick` may come from any thread. A forked child
    gets `Closed`.
    """

    def __init__(self, generation: CData | None = None) -> None:
        """`generation`: `const uint32_t *` of this waiter's word in the bindings page, which must stay mapped."""
        self._core: CData | None = ffi.new("struct pv_waiter *")
        self._inboxes: list[Inbox] = []
        self._budget: SpinBudget | None = None
        self.has_priorities = False
        """Whether a port ever had another priority than the default."""
        check_status(lib.pv_waiter_init(self._core, ffi.NULL if generation is None else generation), "waiter")

    @property
    def core(self) -> CData:
        """`struct pv_waiter *`, valid until `close`."""
        if self._core is None:
            raise Closed("this waiter is closed")
        return self._core

    @property
    def inboxes(self) -> tuple[Inbox, ...]:
        return tuple(self._inboxes)

    def add_inbox(self, mapping: Mapping, bell_fd: int) -> Inbox:
        """Receive from one more domain. Takes ownership of both, also when it fails.

        Raises `PeerError` when the page is not an inbox, `InvalidRequest` while another thread waits here.
        """
        try:
            core = self.core
            inbox = Inbox(mapping, bell_fd)
            check_status(lib.pv_waiter_add(core, inbox.core, bell_fd), "inbox")
        except BaseException:
            mapping.close()
            os.close(bell_fd)
            raise
        self._inboxes.append(inbox)
        return inbox

    def remove_inbox(self, inbox: Inbox) -> None:
        """Unmap it and close its bell. Its ports must be closed before. Raises `InvalidRequest`."""
        core = self.core
        if inbox.ports:
            raise InvalidRequest(f"{inbox} still has open ports")
        check_status(lib.pv_waiter_remove(core, inbox.core, inbox.bell_fd), "inbox")
        self._inboxes.remove(inbox)
        self._release(inbox)

    @staticmethod
    def _release(inbox: Inbox) -> None:
        inbox.mapping.close()
        os.close(inbox.bell_fd)

    def wait(self, port: "EventPort | None" = None, *, spin_ns: int = 0, timeout_s: float | None = None) -> WaitResult:
        """Wait until `port` has an event (which is taken), or, without a port, until any has (nothing is taken).

        Spins for `spin_ns` before it sleeps, with `waiting.LEARNT` as long as pays (see `set_spin`). A signal lets
        Python run its handlers; then the wait goes on. A timeout of 0 never sleeps.
        """
        port_core = ffi.NULL if port is None else port.core
        core = self.core
        status = resume_on_signal(lambda spin, left: lib.pv_wait(core, port_core, spin, left), spin_ns, timeout_s)
        return WaitResult(check_status(status, "waiter"))

    def set_spin(self, max_spin_ns: int, budget: SpinBudget | None = None) -> None:
        """How long waits of the learnt length spin at most, and what all waits on one peer spin together."""
        if max_spin_ns < 0:
            raise InvalidRequest(f"a spin takes 0 or more nanoseconds, not {max_spin_ns}")
        self._budget = budget  # the core points into it
        lib.pv_spin_init(ffi.addressof(self.core, "spin"), max_spin_ns, ffi.NULL if budget is None else budget.core)

    def take_pending(self) -> "list[EventPort]":
        """All ports with an event that is not masked; their events are taken.

        Those of a better `priority` come first; else in slot order of their inboxes.
        """
        self._check_home()
        lib.pv_waiter_run_eois(self.core)
        found = []
        for inbox in self._inboxes:
            n = lib.pv_inbox_take(inbox.core, inbox.taken, SLOTS)
            for slot in ffi.unpack(inbox.taken, n):
                if port := inbox.ports.get(slot):
                    port.count_received()
                    found.append(port)
        if self.has_priorities:
            found.sort(key=lambda port: port.priority)
        return found

    def kick(self) -> None:
        """End the wait that runs now, or else the next one, with `KICKED`. From any thread."""
        lib.pv_waiter_kick(self.core)

    def fileno(self) -> int:
        """A descriptor for a foreign poll loop. From now on every event makes it readable (a system call an event).

        When it is readable: `drain_bells()`, then `take_pending()`.
        """
        core = self.core
        if not core.always_armed:
            check_status(lib.pv_waiter_arm_always(core), "waiter")
        fd: int = core.epoll_fd
        return fd

    def drain_bells(self) -> WaitResult:
        """Make `fileno()` unreadable again: KICKED or STALE when that is what happened, else EVENT."""
        return WaitResult(check_status(lib.pv_waiter_drain(self.core), "waiter"))

    def statistics(self) -> WaiterStatistics:
        """The counters, live."""
        core = self.core
        return WaiterStatistics(sleeps=core.sleeps, wakeups=core.wakeups, unheard=core.unheard)

    def _check_home(self) -> None:
        if not lib.pv_home_is_here(self.core.home):
            raise Closed("this waiter belongs to the parent of this process")

    def close(self) -> None:
        """Close the ports, unmap the inboxes, close all descriptors. The thread that waited must have left."""
        if self._core is None:
            return
        core = self.core
        if core.waiting and lib.pv_home_is_here(core.home):
            raise InvalidRequest("a thread waits on this waiter: kick it and let it leave")
        for inbox in self._inboxes:
            for port in list(inbox.ports.values()):
                port.close()
        lib.pv_waiter_destroy(core)
        for inbox in self._inboxes:
            self._release(inbox)
        self._inboxes.clear()
        self._core = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return "<EventWaiter closed>" if self._core is None else f"<EventWaiter {len(self._inboxes)} inboxes>"


class EventPort:
    """One local end of a channel: a slot in the waiter's inbox to receive, and the peer's inbox and bell to send.

    A new port is not masked, and an event that came before it was made is pending. Any thread may notify, mask and
    unmask.
    """

    def __init__(self, waiter: EventWaiter, inbox: Inbox | None, slot: int) -> None:
        """`inbox` None: an end that only sends. Raises `InvalidRequest` for a slot out of range or taken."""
        if not 0 <= slot < SLOTS:
            raise InvalidRequest(f"slot {slot} is not within 0-{SLOTS - 1}")
        if inbox is not None and slot in inbox.ports:
            raise InvalidRequest(f"slot {slot} is taken by {inbox.ports[slot]}")
        self.waiter = waiter
        self.inbox = inbox
        self.slot = slot
        self.on_stale: Callable[[], None] | None = None
        """Called by a sender whose binding changed: asks the hypervisor and calls `set_peer`."""
        self._priority = DEFAULT_PRIORITY
        self._peer: tuple[Mapping, int] | None = None
        self._peer_lock = threading.Lock()
        self._core: CData | None = ffi.new("struct pv_port *")
        lib.pv_port_init(self._core, waiter.core, ffi.NULL if inbox is None else inbox.core, slot)
        if inbox is not None:
            inbox.ports[slot] = self
            self.unmask()

    @property
    def core(self) -> CData:
        """`struct pv_port *`, valid until `close`."""
        if self._core is None:
            raise Closed("this event channel is closed")
        return self._core

    @property
    def bound(self) -> bool:
        """Whether there is a peer, as far as was last heard."""
        return self._peer is not None

    def set_peer(self, mapping: Mapping | None, slot: int, bell_fd: int, generation: int) -> None:
        """Where to send from now on, as the hypervisor said under `generation`; `mapping` None: unbound.

        Takes ownership of both, and lets go of the former ones when no sender uses them any more. `bell_fd` -1: no
        bell. Raises `PeerError` when the page is not an inbox.
        """
        tx = ffi.NULL
        try:
            core = self.core
            if mapping is not None:
                tx = mapping.pointer("struct pv_inbox *")
                check_status(lib.pv_inbox_check(tx), "the peer's inbox")
        except BaseException:
            self._let_go((mapping, bell_fd) if mapping else None)
            raise
        with self._peer_lock:
            lib.pv_port_set_peer(core, tx, slot, bell_fd, generation)
            former, self._peer = self._peer, (mapping, bell_fd) if mapping else None
        self._let_go(former)

    def _let_go(self, peer: tuple[Mapping, int] | None) -> None:
        if peer is not None:
            peer[0].close()
            if peer[1] >= 0:
                os.close(peer[1])

    def notify(self) -> NotifyResult:
        """Send. Never blocks. Where the binding changed, `on_stale` is asked for the new one first."""
        status = lib.pv_notify(self.core)
        if status == lib.PV_NOTIFY_STALE:
            return self.notify_stale()
        return NotifyResult(check_status(status, "event channel"))

    def notify_stale(self) -> NotifyResult:
        """The slow path of a send that was stale: learn the new binding, then send by it whatever happened since."""
        if self.on_stale is None:
            return NotifyResult.STALE
        self.on_stale()
        return NotifyResult(check_status(lib.pv_notify_learnt(self.core), "event channel"))

    def set_pending(self) -> None:
        """Raise the event at this end, as a bind does."""
        lib.pv_port_set_pending(self.core)

    def take_pending(self) -> bool:
        """Whether there was an event, masked or not; it is taken. Look for work after this, not before.

        Late EOI: none before `eoi` has ended the last one.
        """
        return bool(lib.pv_port_take_pending(self.core))

    def mask(self) -> None:
        """Events are kept, and nobody is woken for them."""
        lib.pv_port_mask(self.core)

    def unmask(self) -> bool:
        """Deliver events again; True when one is pending."""
        return bool(lib.pv_port_unmask(self.core))

    @property
    def priority(self) -> int:
        """0 (first) to 15 (last) among what `EventWaiter.take_pending` finds at once."""
        return self._priority

    @priority.setter
    def priority(self, priority: int) -> None:
        """Raises `InvalidRequest` out of range (EVTCHNOP_set_priority)."""
        if not 0 <= priority <= LOWEST_PRIORITY:
            raise InvalidRequest(f"a priority is 0 to {LOWEST_PRIORITY}, not {priority}")
        self._priority = priority
        self.waiter.has_priorities |= priority != DEFAULT_PRIORITY

    def late_eoi(self, *, spurious_threshold: int = lib.PV_SPURIOUS_THRESHOLD) -> None:
        """From now on: every event that is taken masks the port until `eoi`. For peers that may storm us.

        Events without work of a row are unmasked later and later, up to a second, once there were more than
        `spurious_threshold`: such a peer costs a wake-up a second. The numbers are those of Linux (xen_irq_lateeoi).
        """
        if not 0 <= spurious_threshold < 2**32:
            raise InvalidRequest(f"a threshold of {spurious_threshold} events")
        lib.pv_port_late_eoi(self.core, spurious_threshold)

    def eoi(self, *, spurious: bool = False) -> float:
        """End the event that was taken last; `spurious`: there was no work for it. By how many seconds it was delayed.

        From any thread. Raises `InvalidRequest` when no event is to be ended.
        """
        delay_ns = lib.pv_port_eoi(self.core, spurious)
        if delay_ns == -errno.EINVAL:
            raise InvalidRequest(f"{self!r} has no event to be ended")
        return check_status(delay_ns, "event channel") / 1e9

    def count_received(self) -> None:
        """An event of this port was taken through its inbox."""
        if self._core is not None:
            lib.pv_port_delivered(self._core)

    def statistics(self) -> PortStatistics:
        """The counters, live."""
        core = self.core
        return PortStatistics(
            sent=core.sent,
            rang=core.rang,
            merged=core.merged,
            dropped=core.dropped,
            received=core.received,
            spurious=core.spurious,
            eoi_delayed_ns=core.eoi_delayed_ns,
        )

    def close(self) -> None:
        """Free the slot and let go of the peer's inbox. Nobody may be inside a call on this port."""
        if self._core is None:
            return
        if lib.pv_home_is_here(self._core.home):
            self.mask()
            lib.pv_port_discard(self._core)
            with suppress(Closed):
                self.set_peer(None, 0, -1, self._core.generation_seen)
            lib.pv_port_close(self._core)
        self._core = None
        if self.inbox is not None:
            self.inbox.ports.pop(self.slot, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._core is None else "bound" if self.bound else "unbound"
        return f"<{type(self).__name__} slot {self.slot} {state}>"


class Half(NamedTuple):
    """One end of a channel that was made without a hypervisor: descriptors, to be used by one process.

    Inherited by a fork, or passed to a new process (`pass_fds=half`) which is told their numbers.
    """

    rx_memory_fd: int
    tx_memory_fd: int
    rx_bell_fd: int
    tx_bell_fd: int

    def close(self) -> None:
        """Give up this end, in a process that uses the other one."""
        for fd in self:
            os.close(fd)


def make_pair(bell: Literal["eventfd", "pipe"] = "eventfd", provider: Provider = "memfd") -> tuple[Half, Half]:
    """Both ends of one channel between two processes (or threads), for tests and benchmarks."""
    memory = [map_new(provider, PAGE_BYTES) for _ in range(2)]
    for _, mapping in memory:
        init_inbox(mapping)
        mapping.close()
    (first_memory, _), (second_memory, _) = memory
    (first_wait, first_ring), (second_wait, second_ring) = make_bell(bell), make_bell(bell)
    return (
        Half(first_memory, second_memory, first_wait, second_ring),
        Half(os.dup(second_memory), os.dup(first_memory), second_wait, first_ring),
    )


def from_half(half: Half, slot: int = 0) -> tuple[EventWaiter, EventPort]:
    """Open one end; takes ownership of its descriptors. Closing the waiter closes everything."""
    waiter = EventWaiter()
    inbox = waiter.add_inbox(Mapping(half.rx_memory_fd, PAGE_BYTES), half.rx_bell_fd)
    port = EventPort(waiter, inbox, slot)
    port.set_peer(Mapping(half.tx_memory_fd, PAGE_BYTES), slot, half.tx_bell_fd, 0)
    os.close(half.rx_memory_fd)
    os.close(half.tx_memory_fd)
    return waiter, port
