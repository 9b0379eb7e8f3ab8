# SPDX-License-Identifier: MIT
"""What one end of a ring counts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

CData = Any


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """What one end counted since it was made."""

    requests: int
    """Requests pushed (front) or taken (back)."""
    responses: int
    """Responses taken (front) or pushed (back)."""
    batches: int
    """Publications of this end's producer index."""
    notifications_sent: int
    """Of the batches: the peer had asked to be notified."""
    notifications_suppressed: int
    """Of the batches: it had not, so nothing was sent."""
    events: int
    """Events received while waiting."""
    notifications_spurious: int
    """Of the events: nothing was consumed since the event before, and nothing was there."""
    waits: int
    """Waits that did not find work at once."""
    spins: int
    """Of the waits: work came within the spin."""
    sleeps: int
    """System calls that slept."""
    max_outstanding: int
    """Most requests without a response, seen by this end."""
    heavy_fences: int
    """Calls of membarrier(2) on the way to sleep: the price of pushing without a barrier."""
    spun_ns: int
    """Time spent in spins of the learnt length."""
    spins_gated: int
    """Of those: not begun, because no CPU was idle or the peer was on this one."""


def statistics_of(core: CData, *, is_front: bool) -> RingStatistics:
    """The counters of a `struct pv_ring *`, live."""
    return RingStatistics(
        requests=core.produced if is_front else core.consumed,
        responses=core.consumed if is_front else core.produced,
        batches=core.batches,
        notifications_sent=core.notified,
        notifications_suppressed=core.suppressed,
        events=core.events,
        notifications_spurious=core.spurious,
        waits=core.waits,
        spins=core.spins,
        sleeps=core.sleeps,
        max_outstanding=core.max_outstanding,
        heavy_fences=core.heavy_fences,
        spun_ns=core.spin.spun_ns,
        spins_gated=core.spin.gated,
    )


def total_of(rings: Sequence[RingStatistics]) -> RingStatistics:
    """Of several rings together: sums, but for `max_outstanding`, which is the largest."""
    counts = {field.name: [getattr(ring, field.name) for ring in rings] for field in fields(RingStatistics)}
    return RingStatistics(**{name: (max if name == "max_outstanding" else sum)(n) for name, n in counts.items()})
