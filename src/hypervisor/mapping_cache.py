# SPDX-License-Identifier: MIT
"""References of a peer that stay mapped between their uses (persistent grants): least recently used, and ageing.

A backend that is told "feature-persistent" keeps what it has mapped, as the frontend will use the same pages again. The
numbers are those of Linux' xen-blkback. Nothing here reads a clock by itself or knows what a block is.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from paravirt.errors import Closed, InvalidRequest

MAX_GRANTS = 1056
"""Blkback's max_persistent_grants."""
UNUSED_S = 60.0
"""Blkback's persistent_grant_unused_seconds."""
PURGE_PERCENT = 5
"""So many of the cached are let go at once when there are too many."""


class Maps(Protocol):
    """What the cache needs of a `Mapper`."""

    def map(self, gref: int, *, read_only: bool = False) -> int:
        """Pin a reference; the byte offset of its page. Raises `GrantFailed`."""

    def unmap(self, gref: int, *, read_only: bool = False) -> None:
        """Undo one `map`."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counted since the cache was made, but the first two."""

    cached: int
    """References that are mapped now."""
    in_use: int
    hits: int
    misses: int
    purged: int
    """Let go because there were too many."""
    aged: int
    """Let go because nobody had used them for long."""
    transient: int
    """Mapped for one use only, because all places were in use."""


@dataclass(slots=True)
class _Entry:
    offset_bytes: int
    read_only: bool
    writable: bool
    """Pinned so, or so as well."""
    users: int = 0
    used_s: float = 0.0
    transient: bool = False


class MappingCache:
    """The cached references of one mapper. Not thread-safe: one for each queue. A context manager."""

    def __init__(
        self,
        mapper: Maps,
        *,
        max_grants: int = MAX_GRANTS,
        unused_s: float = UNUSED_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`unused_s` 0: nothing ages. The mapper stays the caller's."""
        if max_grants < 1 or unused_s < 0:
            raise InvalidRequest(f"a cache of {max_grants} grants that age in {unused_s} s")
        self._mapper = mapper
        self._max = max_grants
        self._unused_s = unused_s
        self._clock = clock
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # the least recently used first
        self._hits = self._misses = self._purged = self._aged = self._transient = 0
        self._closed = False

    def acquire(self, gref: int, *, read_only: bool = False) -> int:
        """The byte offset of its page, mapped until `release` at least. Raises `GrantFailed`."""
        if self._closed:
            raise Closed("this cache is closed")
        entry = self._entries.get(gref)
        if entry is not None and (read_only or entry.writable):
            self._hits += 1
        elif entry is not None:
            self._misses += 1
            self._mapper.map(gref)
            entry.writable = True
        else:
            entry = self._map(gref, read_only)
        entry.users += 1
        self._entries.move_to_end(gref)
        return entry.offset_bytes

    def _map(self, gref: int, read_only: bool) -> _Entry:
        self._misses += 1
        if len(self._entries) >= self._max:
            self._purge()
        full = len(self._entries) >= self._max
        offset = self._mapper.map(gref, read_only=read_only)
        entry = self._entries[gref] = _Entry(offset, read_only, not read_only, transient=full)
        self._transient += full
        return entry

    def release(self, gref: int) -> None:
        """The end of one use. Raises `InvalidRequest` when it is not in use."""
        entry = self._entries.get(gref)
        if entry is None or not entry.users:
            raise InvalidRequest(f"grant reference {gref} is not in use here")
        entry.users -= 1
        entry.used_s = self._clock()
        if not entry.users and (entry.transient or len(self._entries) > self._max):
            self._let_go(gref)

    def age(self) -> int:
        """Let go of what nobody has used for `unused_s`; how many. For a backend's idle moments."""
        if not self._unused_s:
            return 0
        limit = self._clock() - self._unused_s
        old = [gref for gref, entry in self._entries.items() if not entry.users and entry.used_s <= limit]
        for gref in old:
            self._let_go(gref)
        self._aged += len(old)
        return len(old)

    def drop(self, gref: int) -> bool:
        """Let go of one, which the peer wants back; False while it is in use, or not here."""
        entry = self._entries.get(gref)
        if entry is None or entry.users:
            return False
        self._let_go(gref)
        return True

    def _purge(self) -> None:
        wanted = len(self._entries) - self._max + max(1, self._max * PURGE_PERCENT // 100)
        idle = [gref for gref, entry in self._entries.items() if not entry.users][:wanted]
        for gref in idle:
            self._let_go(gref)
        self._purged += len(idle)

    def _let_go(self, gref: int) -> None:
        entry = self._entries.pop(gref)
        if entry.writable:
            self._mapper.unmap(gref)
        if entry.read_only:
            self._mapper.unmap(gref, read_only=True)

    def statistics(self) -> CacheStatistics:
        """The counters, live."""
        return CacheStatistics(
            cached=len(self._entries),
            in_use=sum(entry.users > 0 for entry in self._entries.values()),
            hits=self._hits,
            misses=self._misses,
            purged=self._purged,
            aged=self._aged,
            transient=self._transient,
        )

    def close(self) -> None:
        """Let go of all, also of what is in use: nobody may touch these pages any more. Harmless when repeated."""
        self._closed = True
        for gref in list(self._entries):
            self._let_go(gref)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MappingCache {len(self._entries)} of {self._max} grants{' closed' if self._closed else ''}>"
