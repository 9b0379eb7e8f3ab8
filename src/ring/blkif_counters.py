# SPDX-License-Identifier: MIT
"""What one end of a blkif queue counts, and where: in its ring's record, where Dom0 sees it, or in private memory."""

from dataclasses import dataclass, fields
from typing import Any, Self

from paravirt.ring._core import ffi, lib
from paravirt.ring.shared import Ring

CData = Any


@dataclass(frozen=True, slots=True)
class BlkifCounters:
    """Counts of one end of a queue, or of several (`+`)."""

    reads: int = 0
    """Backend: requests answered that needed the disk; frontend: answered well."""
    writes: int = 0
    """With and without a barrier."""
    barriers: int = 0
    """Of the writes."""
    flushes: int = 0
    discards: int = 0
    read_bytes: int = 0
    """Of those that succeeded."""
    written_bytes: int = 0
    discarded_bytes: int = 0
    copied_bytes: int = 0
    """Of what was read and written: copied by this end. The rest was moved by the kernel or stayed where it is."""
    errors: int = 0
    """Backend: requests that the disk failed; frontend: answered with an error."""
    refused: int = 0
    """Backend: requests that failed validation."""
    no_memory: int = 0
    """Of the refused: for lack of memory."""

    @classmethod
    def of(cls, core: CData) -> Self:
        """The values of a `struct pv_blkif_counters *` now."""
        return cls(*(getattr(core, name) for name in NAMES))

    def __add__(self, other: "BlkifCounters") -> "BlkifCounters":
        return BlkifCounters(*(getattr(self, name) + getattr(other, name) for name in NAMES))


NAMES = tuple(field.name for field in fields(BlkifCounters))


class Counting:
    """Where `owner`, a C struct with a pointer `counters`, counts. Nobody may count while that changes."""

    def __init__(self, owner: CData) -> None:
        """In private memory at first."""
        self._owner = owner
        self._private = ffi.new("struct pv_blkif_counters *")
        self._kept: CData = None
        owner.counters = self._private

    @property
    def core(self) -> CData:
        """`struct pv_blkif_counters *`, live."""
        return self._owner.counters

    def show_in(self, ring: Ring | None) -> None:
        """Go on in the record of `ring`, if it is in one, until it is closed; None: in private memory."""
        core = None if ring is None else ring.core
        shown = ffi.NULL if core is None else lib.pv_look_counters(core, lib.PV_LOOK_COUNTS_BLKIF)
        place = self._private if shown == ffi.NULL else ffi.cast("struct pv_blkif_counters *", shown)
        before = self._owner.counters
        if place != before:
            place[0] = before[0]
        self._owner.counters, self._kept = place, core  # the record's memory stays as long as the ring's


def counters_of(record: CData) -> BlkifCounters | None:
    """Those in a copied `struct pv_look_record *`; None when it counts something else."""
    if record.counts != lib.PV_LOOK_COUNTS_BLKIF:
        return None
    return BlkifCounters.of(ffi.cast("struct pv_blkif_counters *", record.counters))
