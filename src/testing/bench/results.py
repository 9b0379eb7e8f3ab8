# SPDX-License-Identifier: MIT
"""What was measured of sides in turn, as values: to print, to keep as JSON, to compare with what was kept before."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Final, Literal

from paravirt.errors import InvalidRequest
from paravirt.testing.bench.case import Case, Sample
from paravirt.testing.bench.judge import FEWEST_PAIRS, Spread, doubt
from paravirt.testing.bench.machine import DISTANCES_NS, Distance, distance_of
from paravirt.testing.bench.programs import NotHere
from paravirt.testing.bench.sides import OWN, Options, Side
from paravirt.testing.bench.turns import Bench

Change = Literal["faster", "slower", "noise", "inconclusive", "new"]

FORMAT: Final = 1
SAME: Final = ("cpu", "kernel")
"""What two machines must have in common for their results to be compared."""
UNKNOWN_NS: Final = 1e9
"""As the round trip of a cache line: it could not be measured."""


@dataclass(frozen=True, slots=True)
class Round:
    """One side's sample, and the round trip of a cache line just before."""

    cache_line_ns: float
    sample: Sample

    @property
    def distance(self) -> Distance:
        return distance_of(self.cache_line_ns)


@dataclass(frozen=True, slots=True)
class Result:
    """One side of one case."""

    side: str
    case: Case
    options: Options | None
    """Of this project's own ring; None for a peer."""
    rounds: tuple[Round, ...]
    outside_load: float
    """CPU time of others meanwhile, as a share of one CPU."""

    @property
    def what(self) -> tuple[str, Case, Options | None]:
        """What two results have in common that can be compared."""
        return self.side, self.case, self.options

    @property
    def distance(self) -> Distance:
        """The most frequent one."""
        distances = [one.distance for one in self.rounds]
        return max(distances, key=distances.count)

    def at(self, distance: Distance) -> "Result":
        """The same without rounds of other distances."""
        return replace(self, rounds=tuple(one for one in self.rounds if one.distance == distance))

    def counted(self) -> "Result":
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


class RingBench(Bench):
    """Goes on where the distance of the CPUs cannot be measured; then nothing is to be concluded from what it says."""

    untagged = ""
    """Why it could not be measured."""

    def cache_line_ns(self) -> float:
        try:
            return super().cache_line_ns()
        except NotHere as reason:
            self.untagged = str(reason)
            return UNKNOWN_NS


def measure(
    bench: RingBench,
    sides: Sequence[Side],
    case: Case,
    options: Options,
    progress: Callable[[], None] = lambda: None,
) -> list[Result]:
    """One case of all sides, in turn; calls `progress` after each sample."""

    def sample(side: Side) -> Sample:
        taken = side.measure(case, bench.seconds)
        progress()
        return taken

    pids = [pid for side in sides for pid in side.pids()]
    rounds, load = bench.take_turns([partial(sample, side) for side in sides], lambda: pids)
    return [
        Result(
            side.name,
            case,
            options if side.name in OWN else None,
            tuple(Round(tag, samples[i]) for tag, samples in rounds),
            load,
        )
        for i, side in enumerate(sides)
    ]


def ratio(result: Result, reference: Result) -> Spread | None:
    """How fast one side is, as a multiple of the other, round by round. Of two results that were measured in turn."""
    pairs = zip(result.counted().rounds, reference.counted().rounds, strict=True)
    ratios = [one.sample.messages_per_s / other.sample.messages_per_s for one, other in pairs if _speed(other) > 0]
    return Spread.of(ratios) if ratios else None


def _speed(one: Round) -> float:
    return one.sample.messages_per_s


@dataclass(frozen=True, slots=True)
class Comparison:
    """A result beside what was measured of the same at another time."""

    result: Result
    ratio: Spread | None
    """New to old, of medians; the quartiles are the worst and the best that quartiles of either allow."""
    change: Change
    why: str = ""
    """Why it is inconclusive."""


def compare_with(
    results: Iterable[Result], baseline: Iterable[Result], there: dict[str, str], *, here: dict[str, str]
) -> list[Comparison]:
    """Each result beside the one of the same side, case and options in a baseline; `there` and `here` are machines."""
    known = {old.what: old for old in baseline}
    differ = next((f"another {name}: {there.get(name)}" for name in SAME if here.get(name) != there.get(name)), "")
    return [_compare(result, known.get(result.what), differ) for result in results]


def _compare(new: Result, old: Result | None, differ: str) -> Comparison:
    if old is None:
        return Comparison(new, None, "new")
    distances: list[Distance] = [name for _, name in DISTANCES_NS]
    fewer = {name: min(len(new.at(name).rounds), len(old.at(name).rounds)) for name in distances}
    distance = max(distances, key=lambda name: fewer[name])
    if not fewer[distance]:
        return Comparison(new, None, "inconclusive", "the two have no distance of CPUs in common")
    field = "p50_ns" if new.case.mode == "pingpong" else "messages_per_s"
    mine, theirs = new.at(distance).spread(field), old.at(distance).spread(field)
    if mine is None or theirs is None or not theirs.low or not mine.low:
        return Comparison(new, None, "inconclusive", f"{field} was not measured")
    if field == "p50_ns":
        mine, theirs = _inverse(mine), _inverse(theirs)
    seen = Spread(mine.median / theirs.median, mine.low / theirs.high, mine.high / theirs.low)
    load = max(new.outside_load, old.outside_load)
    if why := differ or doubt(distance, fewer[distance], load):
        return Comparison(new, seen, "inconclusive", why)
    return Comparison(new, seen, "faster" if seen.low > 1 else "slower" if seen.high < 1 else "noise")


def _inverse(spread: Spread) -> Spread:
    """Of a time: the more, the slower."""
    return Spread(1 / spread.median, 1 / spread.high, 1 / spread.low)


def to_json(results: Sequence[Result], machine: dict[str, str], skipped: dict[str, str]) -> dict[str, Any]:
    """Everything that was measured, with the medians for whoever reads no samples."""
    return {
        "format": FORMAT,
        "machine": machine,
        "skipped": skipped,
        "fewest_pairs": FEWEST_PAIRS,
        "results": [_to_json(result) for result in results],
    }


def _to_json(result: Result) -> dict[str, Any]:
    counted = result.counted()
    medians = {field.name: counted.spread(field.name) for field in fields(Sample)}
    return {
        "side": result.side,
        "case": asdict(result.case),
        "options": None if result.options is None else asdict(result.options),
        "distance": result.distance,
        "counted": len(counted.rounds),
        "outside_load": result.outside_load,
        "inconclusive": result.doubt,
        **{name: None if spread is None else asdict(spread) for name, spread in medians.items()},
        "rounds": [{"cache_line_ns": one.cache_line_ns, **asdict(one.sample)} for one in result.rounds],
    }


def from_json(text: str) -> tuple[list[Result], dict[str, str]]:
    """The results of an earlier `to_json`, and the machine. Raises `InvalidRequest` for anything else."""
    try:
        told = json.loads(text)
        if told["format"] != FORMAT:
            raise InvalidRequest(f"results of format {told['format']!r}, not {FORMAT}")
        return [_from_json(one) for one in told["results"]], dict(told["machine"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InvalidRequest(f"not what `paravirt bench ring --json` prints: {why}") from None


def _from_json(told: dict[str, Any]) -> Result:
    samples = [field.name for field in fields(Sample)]
    rounds = tuple(
        Round(float(one["cache_line_ns"]), Sample(*(_number(one[name]) for name in samples))) for one in told["rounds"]
    )
    if not rounds:
        raise ValueError("a result without rounds")
    options = None if told["options"] is None else Options(**told["options"])
    return Result(str(told["side"]), Case(**told["case"]), options, rounds, float(told["outside_load"]))


def _number(value: Any) -> Any:
    return None if value is None else float(value)
