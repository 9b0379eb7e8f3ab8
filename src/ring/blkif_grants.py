# SPDX-License-Identifier: MIT
"""Grants of a block frontend that its backend keeps mapped from one request to the next (persistent grants), in C.

Source: Xen public/io/blkif.h ("feature-persistent"); the numbers are those of Linux' xen-blkback.
"""

import errno
from dataclasses import dataclass
from typing import Any

from paravirt.errors import InvalidRequest, ResourceLimit
from paravirt.ring._core import ffi, lib
from paravirt.ring.grant import Mapper

CData = Any

PERSISTENT_GRANTS: int = lib.PV_BLKIF_PERSISTENT_GRANTS
"""Pages that stay mapped for a ring: blkback's max_persistent_grants."""
UNUSED_S: float = lib.PV_BLKIF_UNUSED_MS / 1000
"""How long one does that nobody uses: blkback's persistent_grant_unused_seconds."""


@dataclass(frozen=True, slots=True)
class PersistentStatistics:
    """Of the grants that a backend keeps mapped. Counted since then, but the first two."""

    cached: int
    """Pages that are mapped now."""
    in_use: int
    """Of these, by requests."""
    hits: int
    misses: int
    purged: int
    """Let go because there were too many."""
    aged: int
    """Let go because nobody had used them for long."""
    transient: int
    """Mapped for one request, because all others were in use."""


class PersistentGrants:
    """The cache of one ring. Who serves the ring uses it; it is closed after that, and before the mapper."""

    def __init__(self, mapper: Mapper, max_grants: int = PERSISTENT_GRANTS, unused_s: float = UNUSED_S) -> None:
        """At most `max_grants` pages; those that nobody has used for `unused_s` (0: for ever) are let go while requests
        come. Raises `InvalidRequest`, `ResourceLimit`.
        """
        self._mapper = mapper
        self.core: CData = ffi.new("struct pv_blkif_grants *")
        status = lib.pv_blkif_grants_init(self.core, mapper.core, max_grants, int(unused_s * 1000))
        if status == -errno.EINVAL:
            raise InvalidRequest(f"{max_grants} persistent grants, not from 1 to {lib.PV_BLKIF_PERSISTENT_MOST}")
        if status:
            raise ResourceLimit(f"no memory for {max_grants} persistent grants")

    def statistics(self) -> PersistentStatistics:
        """The counters, live, from any thread; also after the end."""
        return PersistentStatistics(*(getattr(self.core, name) for name in PersistentStatistics.__slots__))

    def age(self, now_ms: int) -> int:
        """What is done by itself now and then: let go of what is unused at this time of CLOCK_MONOTONIC; how many."""
        aged: int = lib.pv_blkif_grants_age(self.core, now_ms)
        return aged

    def close(self) -> None:
        """Unmap all, with nothing in flight. Harmless when repeated."""
        lib.pv_blkif_grants_free(self.core)
