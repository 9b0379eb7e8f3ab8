# SPDX-License-Identifier: MIT
"""Judging what was measured: medians of samples of one distance, marks, and when nothing can be said."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Final, Literal

from paravirt.testing.bench.machine import Distance, distance_of

Verdict = Literal["met", "missed", "inconclusive", "-"]

FEWEST_PAIRS: Final = 10
MOST_OUTSIDE_LOAD: Final = 0.10


def most_of_one_distance(tags: Sequence[float]) -> int:
    """How many of the round trips are of the most frequent distance."""
    distances = [distance_of(tag) for tag in tags]
    return max(map(distances.count, distances), default=0)


@dataclass(frozen=True, slots=True)
class Pair:
    """One sample of each side, taken one after the other."""

    ours: float
    theirs: float
    cache_line_ns: float

    @property
    def distance(self) -> Distance:
        return distance_of(self.cache_line_ns)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    def show(self, unit: float = 1.0) -> str:
        """The quartiles."""
        return f"{self.low / unit:.3g}-{self.high / unit:.3g}"


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of the result: two sides compared, or ours alone (`theirs` None)."""

    what: str
    ours: Spread
    theirs: Spread | None
    ratio: Spread | None
    """Ours to theirs, pair by pair."""
    peer: str
    mark: str
    verdict: Verdict
    pairs: int
    """Samples that count: of the most frequent distance."""
    distance: Distance
    cache_line_ns: float
    outside_load: float
    """CPU time of others, as a share of one CPU."""
    unit: float = 1e6


@dataclass(frozen=True, slots=True)
class Mark:
    """What is claimed, each where it is not None: a least or a most ratio, value; an empty one claims nothing."""

    ratio: float | None = None
    value: float | None = None
    most_ratio: float | None = None
    most_value: float | None = None
    unit: float = 1e6
    unit_name: str = "M/s"
    """How values are shown."""

    def __str__(self) -> str:
        values = [(">=", self.value), ("<=", self.most_value)]
        ratios = [(">=", self.ratio), ("<=", self.most_ratio)]
        shown = [f"{sign} {value / self.unit:g} {self.unit_name}" for sign, value in values if value is not None]
        return ", ".join(shown + [f"{sign} {ratio:g} x" for sign, ratio in ratios if ratio is not None])

    def judge(self, ours: Spread, ratio: Spread | None) -> Verdict:
        claims = [
            (self.value, 1, ours),
            (self.most_value, -1, ours),
            (self.ratio, 1, ratio),
            (self.most_ratio, -1, ratio),
        ]
        held = [
            seen is not None and sign * seen.median >= sign * claimed
            for claimed, sign, seen in claims
            if claimed is not None
        ]
        return "-" if not held else "met" if all(held) else "missed"


def doubt(distance: Distance, counted: int, load: float, fewest: int = FEWEST_PAIRS) -> str:
    """Why nothing is to be concluded from so many samples of one distance; empty when something is."""
    if distance == "disturbed":
        return "the CPUs were disturbed"
    if counted < fewest:
        return f"only {counted} of one distance, {fewest} are needed"
    if load > MOST_OUTSIDE_LOAD:
        return f"outside load of {load:.0%} of a CPU"
    return ""


def compare(
    what: str,
    peer: str,
    pairs: list[Pair],
    load: float,
    mark: Mark,
    *,
    unit: float = 1e6,
    fewest: int = FEWEST_PAIRS,
) -> Answer:
    """Judge the samples of the most frequent distance; "inconclusive" when there are not `fewest` of them."""
    distances = [pair.distance for pair in pairs]
    distance = max(distances, key=distances.count)
    counted = [pair for pair in pairs if pair.distance == distance]
    ours, theirs = Spread.of([pair.ours for pair in counted]), Spread.of([pair.theirs for pair in counted])
    ratios = [pair.ours / pair.theirs for pair in counted if pair.theirs > 0]
    ratio = Spread.of(ratios) if ratios else None
    verdict = mark.judge(ours, ratio)
    if verdict != "-" and doubt(distance, len(ratios), load, fewest):
        verdict = "inconclusive"
    tag = median(pair.cache_line_ns for pair in counted)
    return Answer(what, ours, theirs, ratio, peer, str(mark), verdict, len(counted), distance, tag, load, unit)
