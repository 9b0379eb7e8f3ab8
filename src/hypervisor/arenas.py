# SPDX-License-Identifier: MIT
"""The arena table: which memory a domain shares with which other one, and which processes map it. Pure."""

import errno
from dataclasses import dataclass, field

from paravirt.hypervisor.rules import (
    DOM0,
    RESERVED_GREFS,
    ClearByte,
    DropArena,
    DropMap,
    Effect,
    Limits,
    Refused,
    ReleasePins,
)

PAGE_BYTES = 4096
GREF_LIMIT = 2**32
NOTIFY_CLEAR_BYTE = 1
NOTIFY_SEND_EVENT = 2


@dataclass(slots=True)
class Arena:
    """Pages of `owner` for one peer. Reference `base + i` is page i."""

    number: int
    owner: int
    connection: int | None
    """Of the process that made it and ends it; None for a reserved page, which ends with its domain."""
    base: int
    n_pages: int
    peer: int
    read_only: bool
    ended: bool = False
    """Its owner is through with it; it stays as long as it is mapped."""
    maps: dict[int, "Map"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Notify:
    """What to do when a mapping goes away."""

    number: int
    actions: int
    gref: int
    offset_bytes: int
    port: int


@dataclass(slots=True)
class Map:
    """One process' mapping of an arena."""

    number: int
    arena: Arena
    connection: int
    notifies: dict[int, Notify] = field(default_factory=dict)
    last_notify: int = 0


def maptrack_pages(arena: Arena) -> int:
    """Pages of the maptrack of one mapping: a header of 64 bytes, 4 bytes a reference."""
    return -(-(64 + 4 * arena.n_pages) // PAGE_BYTES)


class ArenaTable:
    """All arenas and mappings. Whether the domains exist is checked by the caller."""

    def __init__(self) -> None:
        self._arenas: dict[int, Arena] = {}
        self._by_owner: dict[int, list[Arena]] = {}
        self._maps: dict[int, dict[int, Map]] = {}
        self._last_gref: dict[int, int] = {}
        self._last_arena = 0
        self._last_map = 0

    # Looking

    def count(self, owner: int) -> int:
        """How many arenas a domain has, those that peers still map included."""
        return len(self._by_owner.get(owner, ()))

    def pages(self, owner: int) -> int:
        """Data pages of all these."""
        return sum(arena.n_pages for arena in self._by_owner.get(owner, ()))

    def arenas_of(self, owner: int) -> list[Arena]:
        return list(self._by_owner.get(owner, ()))

    def maps_of(self, connection: int) -> list[Map]:
        return list(self._maps.get(connection, {}).values())

    def n_maps_of(self, connection: int) -> int:
        return len(self._maps.get(connection, ()))

    def maptrack_pages_of(self, connection: int) -> int:
        """Pages of the maptracks of a process."""
        return sum(maptrack_pages(mapping.arena) for mapping in self._maps.get(connection, {}).values())

    def find(self, owner: int, gref: int) -> Arena | None:
        """The arena that has this reference and has not ended."""
        for arena in self._by_owner.get(owner, ()):
            if not arena.ended and arena.base <= gref < arena.base + arena.n_pages:
                return arena
        return None

    def find_map(self, connection: int, number: int) -> Map:
        """Raises `Refused` (EINVAL) for a mapping that is not of this process."""
        found = self._maps.get(connection, {}).get(number)
        if found is None:
            raise Refused(errno.EINVAL, f"this process has no mapping {number}")
        return found

    # The owner

    def create(self, owner: int, connection: int, peer: int, n_pages: int, limits: Limits, *, read_only: bool) -> Arena:
        """Raises `Refused` (EINVAL, ENOSPC)."""
        if not 0 < n_pages <= GREF_LIMIT - RESERVED_GREFS:
            raise Refused(errno.EINVAL, f"an arena cannot have {n_pages} pages")
        self._check_quota(owner, n_pages, limits)
        base = self._free_base(owner, n_pages)
        return self._add(owner, connection, base, n_pages, peer, read_only)

    def reserve(self, owner: int, gref: int, limits: Limits) -> tuple[Arena, bool]:
        """The one-page arena with a reserved reference, which is for Dom0, and whether it is new.

        Raises `Refused` (EINVAL not a reserved one, ENOSPC).
        """
        if not 0 <= gref < RESERVED_GREFS:
            raise Refused(errno.EINVAL, f"grant reference {gref} is not a reserved one (0-{RESERVED_GREFS - 1})")
        if arena := self.find(owner, gref):
            return arena, False
        self._check_quota(owner, 1, limits)
        return self._add(owner, None, gref, 1, DOM0, False), True

    def end(self, arena: Arena) -> list[Effect]:
        """Its owner is through with it: nobody new may map it, and it goes with its last mapping."""
        arena.ended = True
        return self._drop_if_unused(arena)

    # The peer

    def map(self, connection: int, arena: Arena, n_maps: int, n_maptrack_pages: int, limits: Limits) -> Map:
        """`n_maps` and `n_maptrack_pages`: what the caller's domain has. Raises `Refused` (EEXIST, ENOSPC)."""
        if any(found.connection == connection for found in arena.maps.values()):
            raise Refused(errno.EEXIST, f"this process maps the arena at {arena.base} already")
        if n_maps >= limits.max_maps:
            raise Refused(errno.ENOSPC, f"a domain may map {limits.max_maps} arenas")
        if n_maptrack_pages + maptrack_pages(arena) > limits.max_maptrack_pages:
            raise Refused(errno.ENOSPC, f"a domain may have {limits.max_maptrack_pages} pages of maptrack")
        self._last_map += 1
        made = Map(self._last_map, arena, connection)
        self._maps.setdefault(connection, {})[made.number] = arena.maps[made.number] = made
        return made

    def unmap(self, mapping: Map) -> list[Effect]:
        """Forget a mapping; its notifications are the caller's to run, between the release of the pins and the rest."""
        arena = mapping.arena
        del arena.maps[mapping.number], self._maps[mapping.connection][mapping.number]
        return [DropMap(mapping.number), *self._drop_if_unused(arena)]

    def release_pins(self, mapping: Map) -> Effect:
        others = tuple(number for number, found in sorted(mapping.arena.maps.items()) if number != mapping.number)
        return ReleasePins(mapping.arena.number, mapping.number, others)

    def set_notify(self, mapping: Map, actions: int, gref: int, offset_bytes: int, port: int, limits: Limits) -> int:
        """Remember what to do when the mapping goes away; its number. Raises `Refused` (EINVAL, EPERM, ENOSPC)."""
        arena = mapping.arena
        if not actions or actions & ~(NOTIFY_CLEAR_BYTE | NOTIFY_SEND_EVENT):
            raise Refused(errno.EINVAL, f"{actions:#x} is no set of unmap notifications")
        if actions & NOTIFY_CLEAR_BYTE:
            if not 0 <= gref - arena.base < arena.n_pages or offset_bytes >= PAGE_BYTES:
                raise Refused(errno.EINVAL, f"byte {offset_bytes} of page {gref} is outside the mapping")
            if arena.read_only:
                raise Refused(errno.EPERM, "the mapping is read-only")
        if len(mapping.notifies) >= limits.max_notifies:
            raise Refused(errno.ENOSPC, f"a mapping may have {limits.max_notifies} unmap notifications")
        mapping.last_notify += 1
        number = mapping.last_notify
        mapping.notifies[number] = Notify(number, actions, gref, offset_bytes, port)
        return number

    def take_notify(self, mapping: Map, number: int) -> Notify:
        """Raises `Refused` (EINVAL)."""
        notify = mapping.notifies.pop(number, None)
        if notify is None:
            raise Refused(errno.EINVAL, f"mapping {mapping.number} has no unmap notification {number}")
        return notify

    @staticmethod
    def clear_byte(arena: Arena, notify: Notify) -> Effect:
        return ClearByte(arena.number, (notify.gref - arena.base) * PAGE_BYTES + notify.offset_bytes)

    def forget_connection(self, connection: int) -> None:
        """It ended; its mappings are gone."""
        self._maps.pop(connection, None)

    def forget_domain(self, domid: int) -> None:
        """A domid is free again."""
        self._by_owner.pop(domid, None)
        self._last_gref.pop(domid, None)

    # Inside

    def _check_quota(self, owner: int, n_pages: int, limits: Limits) -> None:
        if self.count(owner) >= limits.max_arenas:
            raise Refused(errno.ENOSPC, f"domain {owner} may have {limits.max_arenas} arenas")
        if self.pages(owner) + n_pages > limits.max_pages:
            raise Refused(errno.ENOSPC, f"domain {owner} may share {limits.max_pages} pages")

    def _free_base(self, owner: int, n_pages: int) -> int:
        """References are not used again before the numbers run out: a late user of an old one finds nothing."""
        base = self._last_gref.get(owner, RESERVED_GREFS)
        if base + n_pages > GREF_LIMIT:
            base = RESERVED_GREFS
            for arena in sorted(self._by_owner.get(owner, ()), key=lambda arena: arena.base):
                if arena.base >= base + n_pages:
                    break
                base = max(base, arena.base + arena.n_pages)
            if base + n_pages > GREF_LIMIT:
                raise Refused(errno.ENOSPC, f"domain {owner} has no {n_pages} grant references in a row")
        else:
            self._last_gref[owner] = base + n_pages
        return base

    def _add(self, owner: int, connection: int | None, base: int, n_pages: int, peer: int, read_only: bool) -> Arena:
        self._last_arena += 1
        arena = Arena(self._last_arena, owner, connection, base, n_pages, peer, read_only)
        self._arenas[arena.number] = arena
        self._by_owner.setdefault(owner, []).append(arena)
        return arena

    def _drop_if_unused(self, arena: Arena) -> list[Effect]:
        if not arena.ended or arena.maps:
            return []
        del self._arenas[arena.number]
        self._by_owner[arena.owner].remove(arena)
        return [DropArena(arena.number)]
