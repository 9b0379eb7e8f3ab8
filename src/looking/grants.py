# SPDX-License-Identifier: MIT
"""Grants in use: whose, for whom, since when, for which device.

Read from the entries of all arenas, and the notes behind them. Both ends of an arena can write these: what stands here
is what they say. Which device a page is for follows from the ring in its arena: a frontend has one for each.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from paravirt.errors import NotFound
from paravirt.hypervisor.looking import LiveRing, LookedArena, Looker

LEAK_AFTER_S: Final = 60.0
"""A page that its owner wants back, and that its peer keeps for so long, is called leaked."""

PERMIT_ACCESS, READ_ONLY, READING, WRITING = 1, 4, 8, 16
_TYPE = 3
_ENTRY = np.dtype([("flags", "<u2"), ("domid", "<u2"), ("frame", "<u4")])
_NOTE = np.dtype([("granted_ms", "<u4"), ("recalled_ms", "<u4")])
_WRAP = 2**32


@dataclass(frozen=True, slots=True)
class Grant:
    """One grant in use."""

    domid: int
    """Whose page it is."""
    gref: int
    peer: int
    """Who may use it."""
    pid: int
    """Of the process that granted it; 0: not known."""
    device: str | None
    """Whose ring stands in the same arena."""
    is_ring: bool
    """It is a page of that ring."""
    read_only: bool
    reading: bool
    """The peer has it mapped..."""
    writing: bool
    """...writable."""
    age_s: float | None
    """Since it was granted; None: not known."""
    recalled_s: float | None
    """Since its owner first wanted it back in vain; None: it did not."""
    ended: bool
    """Its owner is through with the arena; the peer maps it still."""

    @property
    def leaked(self) -> bool:
        """The peer keeps it without right for a long time."""
        return self.recalled_s is not None and self.recalled_s >= LEAK_AFTER_S

    @property
    def use(self) -> str:
        """As people read it."""
        words = ["read-only" if self.read_only else "read-write"]
        words += ["reading"] if self.reading and not self.writing else []
        words += ["writing"] if self.writing else []
        words += ["leaked"] if self.leaked else ["recalled"] if self.recalled_s is not None else []
        words += ["ended"] if self.ended else []
        return " ".join(words)


def devices_by_page(rings: Iterable[LiveRing]) -> dict[tuple[int, int], str]:
    """Names of devices by domain and reference of the pages of their rings."""
    return {(ring.domid, gref): ring.name for ring in rings for gref in ring.refs}


def grants_of(looker: Looker, domid: int, devices: Mapping[tuple[int, int], str]) -> list[Grant]:
    """Grants of one domain, by reference. `devices`: `devices_by_page` of all rings. `NotFound`: no such domain."""
    found = list[Grant]()
    for arena in looker.arenas(domid):
        found += _grants_in(arena, devices)
    return found


def all_grants(looker: Looker, domids: Iterable[int]) -> list[Grant]:
    """Grants of all these domains; those that end meanwhile have none."""
    devices, found = devices_by_page(looker.look()), list[Grant]()
    for domid in domids:
        try:
            found += grants_of(looker, domid, devices)
        except NotFound:
            continue
    return found


def _grants_in(arena: LookedArena, devices: Mapping[tuple[int, int], str]) -> Iterable[Grant]:
    entries = np.frombuffer(arena.entries(), _ENTRY)
    notes = np.frombuffer(arena.notes(), _NOTE)
    now_ms = time.monotonic_ns() // 1_000_000
    here = {gref: name for (domid, gref), name in devices.items() if domid == arena.domid and arena.holds(gref)}
    device = next(iter(here.values()), None) if len(set(here.values())) == 1 else None
    for page in np.flatnonzero((entries["flags"] & _TYPE) == PERMIT_ACCESS).tolist():
        flags, gref, note = int(entries["flags"][page]), arena.base + page, notes[page]
        recalled = int(note["recalled_ms"])
        yield Grant(
            domid=arena.domid,
            gref=gref,
            peer=int(entries["domid"][page]),
            pid=arena.pid,
            device=here.get(gref, device),
            is_ring=gref in here,
            read_only=bool(flags & READ_ONLY),
            reading=bool(flags & READING),
            writing=bool(flags & WRITING),
            age_s=_age_s(int(note["granted_ms"]), now_ms),
            recalled_s=_age_s(recalled, now_ms),
            ended=arena.ended,
        )


def _age_s(then_ms: int, now_ms: int) -> float | None:
    """Of a time modulo 2^32 ms; one that has not come yet is now, to the tick."""
    if not then_ms:
        return None
    ago = (now_ms - then_ms) % _WRAP
    return 0.0 if ago >= _WRAP // 2 else ago / 1000
