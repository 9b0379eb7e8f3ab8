# SPDX-License-Identifier: MIT
"""What the broker's tables share: refusals, limits, and the effects that a change of the tables asks for.

The tables are pure: they open nothing, send nothing and read no clock. A change returns effects as values, in the order
in which they are to be carried out, and `resources.py` does that.
"""

import errno
from dataclasses import dataclass

DOM0 = 0
DOMID_FIRST_RESERVED = 0x7FF0
"""Domids from here on name no domain."""
DOMID_SELF = 0x7FF0
DOMID_XEN = 0x7FF2
RESERVED_GREFS = 8
MAX_WAITERS = 2**14
MAX_SLOTS = 4096


class Refused(Exception):
    """The tables refuse a request; the broker answers with `code` (a positive errno value) and the text."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code

    def __repr__(self) -> str:
        return f"<Refused {errno.errorcode[self.code]}: {self}>"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one domain may hold at a time."""

    max_pages: int = 65536
    """Data pages of its arenas, also of those that a peer still maps after their end."""
    max_arenas: int = 256
    max_ports: int = 1023
    max_maps: int = 256
    """Mappings of other domains' arenas."""
    max_maptrack_pages: int = 1024
    """What tells the broker which references they have pinned; Xen's gnttab_max_maptrack_frames."""
    max_connections: int = 32
    max_waiters: int = 64
    """Waiters of one connection."""
    max_notifies: int = 64
    """Unmap notifications of one mapping."""
    max_looks: int = 4
    """Statistics objects of one connection."""


DOM0_LIMITS = Limits(
    max_pages=2**40,
    max_arenas=2**20,
    max_ports=2**17 - 1,
    max_maps=2**20,
    max_maptrack_pages=2**32,
    max_connections=2**12,
    max_waiters=MAX_WAITERS,
    max_notifies=2**12,
    max_looks=2**8,
)


@dataclass(frozen=True, slots=True)
class SetGeneration:
    """Write a waiter's word in its connection's bindings page."""

    connection: int
    waiter: int
    generation: int


@dataclass(frozen=True, slots=True)
class RingInbox:
    """Ring the doorbell of an inbox, whatever its receiver does."""

    inbox: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Set a slot of an inbox pending and wake its receiver if it sleeps."""

    inbox: int
    slot: int


@dataclass(frozen=True, slots=True)
class DropInbox:
    """Close an inbox: its receiver has no use for it any more."""

    inbox: int


@dataclass(frozen=True, slots=True)
class ReleasePins:
    """Clear what a mapping has pinned in its arena, but not what the mappings `others` have."""

    arena: int
    map: int
    others: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ClearByte:
    """Write a zero byte at `offset_bytes` of an arena's data."""

    arena: int
    offset_bytes: int


@dataclass(frozen=True, slots=True)
class DropMap:
    """Forget a mapping's maptrack."""

    map: int


@dataclass(frozen=True, slots=True)
class DropArena:
    """Free an arena: nobody maps it any more."""

    arena: int


@dataclass(frozen=True, slots=True)
class DropLook:
    """Forget a statistics object; who maps it keeps it."""

    object: int


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the socket of a connection; the tables have forgotten it already."""

    connection: int


@dataclass(frozen=True, slots=True)
class DomainEnded:
    """A domain died: its listening socket goes, and its init process is killed if it still lives."""

    domid: int


Effect = (
    SetGeneration
    | RingInbox
    | Deliver
    | DropInbox
    | ReleasePins
    | ClearByte
    | DropMap
    | DropArena
    | DropLook
    | Disconnect
    | DomainEnded
)
