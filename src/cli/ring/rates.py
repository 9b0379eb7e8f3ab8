# SPDX-License-Identifier: MIT
"""What happened to a ring between two looks."""

from dataclasses import dataclass, fields
from operator import add
from typing import Any

from paravirt.hypervisor.looking import BUCKETS_NS, LiveRing, LookedEnd, percentile_ns
from paravirt.ring.blkif_counters import NAMES
from paravirt.ring.ring_statistics import RingStatistics

RATES = (
    "requests",
    "responses",
    "batches",
    "notifications_sent",
    "notifications_suppressed",
    "notifications_spurious",
    "events",
    "waits",
    "spins",
    "sleeps",
)
assert {field.name for field in fields(RingStatistics)} >= set(RATES)
SHARES = {"p50_ns": 0.5, "p90_ns": 0.9, "p99_ns": 0.99, "p999_ns": 0.999, "max_ns": 1.0}


@dataclass(frozen=True, slots=True)
class EndRates:
    """One end over an interval."""

    interval_s: float
    per_s: dict[str, float]
    """Each of `RATES`; of a block device also what its end counts."""
    outstanding: int
    """At the later look."""
    max_outstanding: int
    """Since the end was made."""
    latency: tuple[int, ...]
    """Messages of the interval by latency, in the buckets of `BUCKETS_NS`."""

    def __add__(self, other: "EndRates") -> "EndRates":
        """The same end of several queues."""
        return EndRates(
            interval_s=max(self.interval_s, other.interval_s),
            per_s={name: rate + other.per_s.get(name, 0.0) for name, rate in self.per_s.items()},
            outstanding=self.outstanding + other.outstanding,
            max_outstanding=self.max_outstanding + other.max_outstanding,
            latency=tuple(map(add, self.latency, other.latency)),
        )

    @property
    def mean_batch(self) -> float | None:
        """Messages a batch that this end pushed; None when it pushed none."""
        batches, messages = self.per_s["batches"], max(self.per_s["requests"], self.per_s["responses"])
        return round(messages / batches, 2) if batches else None

    @property
    def percentiles(self) -> dict[str, int | None]:
        """Upper bounds, by the names of `SHARES`."""
        return {name: percentile_ns(self.latency, share) for name, share in SHARES.items()}

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            **{f"{name}_per_s": round(rate, 1) for name, rate in self.per_s.items()},
            "mean_batch": self.mean_batch,
            "outstanding": self.outstanding,
            "max_outstanding": self.max_outstanding,
            "latency": {
                "count": sum(self.latency),
                **self.percentiles,
                "histogram_ns": [[BUCKETS_NS[bucket], n] for bucket, n in enumerate(self.latency) if n],
            },
        }


def rates(before: LookedEnd, now: LookedEnd) -> EndRates:
    """Of one and the same end. A process that counts backwards has done nothing."""
    interval_s = max(now.at_ns - before.at_ns, 1) / 1e9
    old, new = before.statistics, now.statistics
    per_s = {name: max(0, getattr(new, name) - getattr(old, name)) / interval_s for name in RATES}
    if before.blkif is not None and now.blkif is not None:
        for name in NAMES:
            per_s[name] = max(0, getattr(now.blkif, name) - getattr(before.blkif, name)) / interval_s
    return EndRates(
        interval_s=interval_s,
        per_s=per_s,
        outstanding=now.outstanding,
        max_outstanding=min(new.max_outstanding, now.size),
        latency=tuple(max(0, n - was) for n, was in zip(now.latency, before.latency, strict=True)),
    )


class Watch:
    """Compares each look with the one before."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, int, int], LookedEnd] = {}

    def step(self, rings: list[LiveRing]) -> list[tuple[LiveRing, dict[str, EndRates]]]:
        """The rings that are there now, with the rates of those of their ends that were there before."""
        before = self._before
        self._before = {end.key: end for ring in rings for end in ring.ends.values()}
        return [
            (ring, {name: rates(before[end.key], end) for name, end in ring.ends.items() if end.key in before})
            for ring in rings
        ]
