# SPDX-License-Identifier: MIT
"""Samples of one side, taken in turn with others': which count, what they say, how they differ from earlier ones."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Generic, Literal, Self, TypeVar

from paravirt.testing.bench.judge import Spread, doubt
from paravirt.testing.bench.machine import DISTANCES_NS, Distance, distance_of
from paravirt.testing.bench.programs import NotHere
from paravirt.testing.bench.turns import Bench

S = TypeVar("S")

Change = Literal["faster", "slower", "noise", "inconclusive", "new"]

SAME: Final = ("cpu", "kernel")
"""What two machines must have in common for their results to be compared."""
UNKNOWN_NS: Final = 1e9
"""As the round trip of a cache line: it could not be measured."""


@dataclass(frozen=True, slots=True)
class Round(Generic[S]):
    """One side's sample, and the round trip of a cache line just before."""

    cache_line_ns: float
    sample: S

    @property
    def distance(self) -> Distance:
        return distance_of(self.cache_line_ns)


class Rounds(Generic[S]):
    """What results have in common: a frozen dataclass below it has these two fields."""

    __slots__ = ()

    rounds: tuple[Round[S], ...]
    outside_load: float
    """CPU time of others meanwhile, as a share of one CPU."""

    @property
    def distance(self) -> Distance:
        """The most frequent one."""
        distances = [one.distance for one in self.rounds]
        return max(distances, key=distances.count)

    def at(self, distance: Distance) -> Self:
        """The same without rounds of other distances."""
        this: Any = self  # a dataclass
        kept: Self = replace(this, rounds=tuple(one for one in self.rounds if one.distance == distance))
        return kept

    def counted(self) -> Self:
        """The same without rounds of other distances than the most frequent one."""
        return self.at(self.distance)

    def spread(self, field: str) -> Spread | None:
        """Of one field of the samples of all rounds; None where it was not measured."""
        values = [getattr(one.sample, field) for one in self.rounds]
        return None if None in values or not values else Spread.of(values)

    @property
    def doubt(self) -> str:
        """Why nothing is to be concluded from it; empty when something is."""
        return doubt(self.distance, len(self.counted().rounds), self.outside_load)


class UntaggedBench(Bench):
    """Goes on where the distance of the CPUs cannot be measured; then nothing is to be concluded from what it says."""

    untagged = ""
    """Why it could not be measured."""

    def cache_line_ns(self) -> float:
        try:
            return super().cache_line_ns()
        except NotHere as reason:
            self.untagged = str(reason)
            return UNKNOWN_NS


def ratio_of(result: Rounds[S], reference: Rounds[S], speed: Callable[[S], float]) -> Spread | None:
    """How fast one side is, as a multiple of the other, round by round. Of two results that were measured in turn."""
    pairs = zip(result.counted().rounds, reference.counted().rounds, strict=True)
    speeds = [(speed(one.sample), speed(other.sample)) for one, other in pairs]
    ratios = [ours / theirs for ours, theirs in speeds if theirs > 0]
    return Spread.of(ratios) if ratios else None


def difference(there: dict[str, str], here: dict[str, str]) -> str:
    """Why results of two machines are not to be compared; empty when they are."""
    return next((f"another {name}: {there.get(name)}" for name in SAME if here.get(name) != there.get(name)), "")


def change_from(
    old: Rounds[S], new: Rounds[S], field: str, *, is_time: bool = False, differ: str = ""
) -> tuple[Spread | None, Change, str]:
    """How a field of results differs from earlier ones: (ratio, what that is, why it is inconclusive).

    The ratio is new to old of medians (of a time old to new: above 1 is faster); its quartiles are the worst and the
    best that quartiles of either allow. `differ`: why they are not to be compared, but for the numbers.
    """
    distances: list[Distance] = [name for _, name in DISTANCES_NS]
    fewer = {name: min(len(new.at(name).rounds), len(old.at(name).rounds)) for name in distances}
    distance = max(distances, key=lambda name: fewer[name])
    if not fewer[distance]:
        return None, "inconclusive", "the two have no distance of CPUs in common"
    mine, theirs = new.at(distance).spread(field), old.at(distance).spread(field)
    if mine is None or theirs is None or not theirs.low or not mine.low:
        return None, "inconclusive", f"{field} was not measured"
    if is_time:
        mine, theirs = _inverse(mine), _inverse(theirs)
    seen = Spread(mine.median / theirs.median, mine.low / theirs.high, mine.high / theirs.low)
    load = max(new.outside_load, old.outside_load)
    if why := differ or doubt(distance, fewer[distance], load):
        return seen, "inconclusive", why
    return seen, "faster" if seen.low > 1 else "slower" if seen.high < 1 else "noise", ""


def _inverse(spread: Spread) -> Spread:
    """Of a time: the more, the slower."""
    return Spread(1 / spread.median, 1 / spread.high, 1 / spread.low)
