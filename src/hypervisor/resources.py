# SPDX-License-Identifier: MIT
"""What the broker's tables stand for: memory objects, doorbells, maptracks. Carries out the effects.

Nothing here is believed from a domain: shared pages are written, or their bits cleared, never trusted.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from paravirt.errors import ResourceLimit
from paravirt.hypervisor.arenas import Arena, Map
from paravirt.hypervisor.rules import (
    ClearByte,
    Deliver,
    Disconnect,
    DomainEnded,
    DropArena,
    DropInbox,
    DropLook,
    DropMap,
    Effect,
    ReleasePins,
    RingInbox,
    SetGeneration,
)
from paravirt.ring._core import ffi, lib
from paravirt.ring.event import init_inbox, make_bell, ring_bell
from paravirt.ring.grant import entries_bytes, init_maptrack, maptrack_bytes, release_pins
from paravirt.ring.memory import PAGE_BYTES, Mapping, Provider, create_object, map_new, seal_writes

log = logging.getLogger(__name__)

LOOKS_LEFT = 8
"""Statistics objects for which there must be memory before another one is made."""


def available_bytes() -> int:
    """Memory the kernel could hand out now (MemAvailable)."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _reopen(fd: int, flags: int) -> int:
    """The same object under an open file description of its own, whose flags no holder of `fd` can change."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


@dataclass(slots=True)
class _Inbox:
    page_fd: int
    wait_fd: int
    """For the receiver."""
    ring_fd: int
    """For senders."""
    own_ring_fd: int
    """The broker's. Never shared with a domain that is not trusted, so nobody can make it block."""

    def close(self) -> None:
        for fd in {self.page_fd, self.wait_fd, self.ring_fd, self.own_ring_fd}:
            os.close(fd)


@dataclass(slots=True)
class _Arena:
    provider: Provider
    entries_fd: int
    data_fd: int
    entries: Mapping
    n_pages: int
    n_bytes: int
    writes_sealed: bool = False

    def close(self) -> None:
        self.entries.close()
        os.close(self.entries_fd)
        os.close(self.data_fd)


@dataclass(slots=True)
class _Bindings:
    fd: int
    mapping: Mapping


@dataclass(slots=True)
class _Maptrack:
    mapping: Mapping
    n_bytes: int


class Resources:
    """All objects the broker holds, by the numbers of the tables. Not thread-safe: the broker's thread owns it."""

    def __init__(
        self,
        *,
        provider: Provider,
        budget_bytes: int,
        disconnect: Callable[[int], None],
        domain_ended: Callable[[int], None],
    ) -> None:
        """`provider`: between domains that are not isolated. The callbacks carry out the effects of those names."""
        self.provider = provider
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._disconnect = disconnect
        self._domain_ended = domain_ended
        self._inboxes: dict[int, _Inbox] = {}
        self._arenas: dict[int, _Arena] = {}
        self._maptracks: dict[int, _Maptrack] = {}
        self._bindings: dict[int, _Bindings] = {}
        self._looks: dict[int, int] = {}

    # Making. Each raises `ResourceLimit` and leaves nothing behind then.

    def make_bindings(self, connection: int) -> int:
        """The bindings page of a new connection; the broker's descriptor of it."""
        fd, mapping = self._create_mapped("memfd", PAGE_BYTES, sealable=True)
        seal_writes(fd)
        page = mapping.pointer("struct pv_bindings *")
        page.magic, page.version = lib.PV_BINDINGS_MAGIC, lib.PV_SHARED_VERSION
        self._bindings[connection] = _Bindings(fd, mapping)
        return fd

    def make_inbox(self, number: int, *, trusted: bool) -> None:
        """`trusted`: sender and receiver are of one trust domain and may share an eventfd."""
        self._charge(PAGE_BYTES)
        fds: list[int] = []
        try:
            page_fd, mapping = map_new("memfd", PAGE_BYTES)
            fds.append(page_fd)
            init_inbox(mapping)
            mapping.close()
            fds += make_bell("eventfd" if trusted else "pipe")
            own = fds[2]
            if not trusted:
                fcntl.fcntl(fds[1], fcntl.F_SETPIPE_SZ, PAGE_BYTES)
                own = _reopen(fds[2], os.O_WRONLY | os.O_NONBLOCK)
        except (OSError, ResourceLimit) as error:
            self.used_bytes -= PAGE_BYTES
            for fd in fds:
                os.close(fd)
            raise ResourceLimit(f"no descriptors for another event channel: {error}") from error
        self._inboxes[number] = _Inbox(fds[0], fds[1], fds[2], own)

    def make_arena(self, arena: Arena, *, isolated: bool) -> None:
        """`isolated`: one of the two domains is."""
        provider: Provider = "memfd" if isolated else self.provider
        n_entry_bytes, n_data_bytes = entries_bytes(arena.n_pages), arena.n_pages * PAGE_BYTES
        entries_fd, entries = self._create_mapped(provider, n_entry_bytes)
        try:
            data_fd = self._create(provider, n_data_bytes, sealable=arena.read_only)
        except ResourceLimit:
            entries.close()
            os.close(entries_fd)
            self.used_bytes -= n_entry_bytes
            raise
        if arena.connection is None:
            # What a toolstack does for console and xenstore: granted to Dom0 from the start.
            entry = entries.pointer("struct pv_grant_entry *")
            entry.domid, entry.frame, entry.flags = arena.peer, arena.base, lib.PV_GTF_PERMIT_ACCESS
        self._arenas[arena.number] = _Arena(
            provider, entries_fd, data_fd, entries, arena.n_pages, n_entry_bytes + n_data_bytes
        )

    def make_maptrack(self, mapping: Map) -> int:
        """The maptrack of a new mapping; a descriptor of it, which is the caller's."""
        arena = mapping.arena
        n_bytes = maptrack_bytes(arena.n_pages)
        fd, made = self._create_mapped("memfd", n_bytes)
        init_maptrack(made, arena.base, arena.n_pages)
        self._maptracks[mapping.number] = _Maptrack(made, n_bytes)
        return fd

    def make_look(self, number: int) -> None:
        """A statistics object: always one that its process cannot shrink under Dom0's eyes.

        None is made of the last memory, which arenas may need.
        """
        if self.budget_bytes - self.used_bytes < LOOKS_LEFT * lib.PV_LOOK_BYTES:
            raise ResourceLimit("too little memory is left in the budget for statistics")
        self._looks[number] = self._create("memfd", lib.PV_LOOK_BYTES)

    # Handing out. Descriptors stay the broker's unless said otherwise.

    def receiver_fds(self, inbox: int) -> list[int]:
        """Page and doorbell for the receiver."""
        found = self._inboxes[inbox]
        return [found.page_fd, found.wait_fd]

    def sender_fds(self, inbox: int) -> list[int]:
        """Page and doorbell for a sender."""
        found = self._inboxes[inbox]
        return [found.page_fd, found.ring_fd]

    def owner_fds(self, arena: int) -> list[int]:
        """Entries and data for the domain that owns the pages."""
        found = self._arenas[arena]
        return [found.entries_fd, found.data_fd]

    def peer_data_fd(self, arena: Arena) -> int:
        """A descriptor of the data for the peer, which is the caller's. A read-only arena is closed to new writers."""
        found = self._arenas[arena.number]
        try:
            if not arena.read_only:
                return os.dup(found.data_fd)
            if found.provider == "memfd" and not found.writes_sealed:
                seal_writes(found.data_fd)
                found.writes_sealed = True
            return _reopen(found.data_fd, os.O_RDONLY)
        except OSError as error:
            raise ResourceLimit(f"no descriptor for another mapping: {error.strerror}") from error

    def entries_fd(self, arena: int) -> int:
        return self._arenas[arena].entries_fd

    def look_fd(self, number: int) -> int:
        """Of a statistics object."""
        return self._looks[number]

    def look_fds(self, arena: int) -> list[int]:
        """Entries and data, to read only; the descriptors are the caller's."""
        found, fds = self._arenas[arena], list[int]()
        try:
            for fd in (found.entries_fd, found.data_fd):
                fds.append(_reopen(fd, os.O_RDONLY))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise ResourceLimit(f"no descriptor for a look at an arena: {error.strerror}") from error
        return fds

    def slot_bits(self, inbox: int, slot: int) -> tuple[bool, bool, bool]:
        """Whether a slot of an inbox is pending, and masked, and its receiver asleep, as its page says now."""
        fd = self._inboxes[inbox].page_fd
        pending, masked = (
            os.pread(fd, 8, ffi.offsetof("struct pv_inbox", name) + slot // 64 * 8) for name in ("pending", "masked")
        )
        bit = 1 << slot % 64
        asleep = any(os.pread(fd, 4, ffi.offsetof("struct pv_inbox", "asleep")))
        return bool(int.from_bytes(pending, "little") & bit), bool(int.from_bytes(masked, "little") & bit), asleep

    def is_posix(self, arena: int) -> bool:
        return self._arenas[arena].provider == "posix"

    # Effects

    def carry_out(self, effects: Iterable[Effect]) -> None:
        """In order. Objects that are gone already are no error."""
        for effect in effects:
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case SetGeneration():
                self._set_generation(effect)
            case RingInbox(inbox):
                if found := self._inboxes.get(inbox):
                    ring_bell(found.own_ring_fd)
            case Deliver(inbox, slot):
                self._deliver(inbox, slot)
            case DropInbox(inbox):
                self._drop_inbox(inbox)
            case ReleasePins():
                self._release_pins(effect)
            case ClearByte(arena, offset_bytes):
                # pwrite, not a mapping: a truncated object must not be a SIGBUS here.
                with suppress(OSError):
                    os.pwrite(self._arenas[arena].data_fd, b"\0", offset_bytes)
            case DropMap(number):
                self._drop_map(number)
            case DropArena(number):
                self._drop_arena(number)
            case DropLook(number):
                self._drop_look(number)
            case Disconnect(connection):
                self._drop_bindings(connection)
                self._disconnect(connection)
            case DomainEnded(domid):
                self._domain_ended(domid)

    def _set_generation(self, effect: SetGeneration) -> None:
        if found := self._bindings.get(effect.connection):
            page = found.mapping.pointer("struct pv_bindings *")
            lib.pv_bindings_set(page, effect.waiter, effect.generation % 2**32)

    def _deliver(self, inbox: int, slot: int) -> None:
        found = self._inboxes.get(inbox)
        if found is None:
            return
        if status := lib.pv_hv_deliver(found.page_fd, slot, found.own_ring_fd):
            log.error("an event is lost: %s", os.strerror(-status))

    def _release_pins(self, effect: ReleasePins) -> None:
        arena, maptrack = self._arenas.get(effect.arena), self._maptracks.get(effect.map)
        if arena is None or maptrack is None:
            return
        others = [self._maptracks[number].mapping for number in effect.others if number in self._maptracks]
        if n := release_pins(arena.entries, arena.n_pages, maptrack.mapping, others):
            log.info("cleared %d grants that a process left mapped", n)

    def _drop_inbox(self, number: int) -> None:
        if found := self._inboxes.pop(number, None):
            found.close()
            self.used_bytes -= PAGE_BYTES

    def _drop_map(self, number: int) -> None:
        if found := self._maptracks.pop(number, None):
            found.mapping.close()
            self.used_bytes -= found.n_bytes

    def _drop_arena(self, number: int) -> None:
        if found := self._arenas.pop(number, None):
            found.close()
            self.used_bytes -= found.n_bytes

    def _drop_look(self, number: int) -> None:
        if (fd := self._looks.pop(number, None)) is not None:
            os.close(fd)
            self.used_bytes -= lib.PV_LOOK_BYTES

    def _drop_bindings(self, connection: int) -> None:
        if found := self._bindings.pop(connection, None):
            found.mapping.close()
            os.close(found.fd)
            self.used_bytes -= PAGE_BYTES

    def close(self) -> None:
        """Let go of everything; what domains map stays theirs."""
        for number in list(self._inboxes):
            self._drop_inbox(number)
        for number in list(self._maptracks):
            self._drop_map(number)
        for number in list(self._arenas):
            self._drop_arena(number)
        for number in list(self._looks):
            self._drop_look(number)
        for connection in list(self._bindings):
            self._drop_bindings(connection)

    # Budget

    def _charge(self, n_bytes: int) -> None:
        if self.used_bytes + n_bytes > self.budget_bytes:
            raise ResourceLimit(
                f"out of the memory budget: {n_bytes} bytes wanted, {self.budget_bytes - self.used_bytes} left "
                f"of {self.budget_bytes}"
            )
        self.used_bytes += n_bytes

    def _create_mapped(self, provider: Provider, n_bytes: int, *, sealable: bool = False) -> tuple[int, Mapping]:
        fd = self._create(provider, n_bytes, sealable=sealable)
        try:
            return fd, Mapping(fd, n_bytes)
        except BaseException:
            os.close(fd)
            self.used_bytes -= n_bytes
            raise

    def _create(self, provider: Provider, n_bytes: int, *, sealable: bool = False) -> int:
        self._charge(n_bytes)
        try:
            return create_object(provider, n_bytes, sealable=sealable)
        except BaseException as error:
            self.used_bytes -= n_bytes
            if isinstance(error, OSError):
                raise ResourceLimit(f"no descriptor for another memory object: {error.strerror}") from error
            raise
