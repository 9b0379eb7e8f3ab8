# SPDX-License-Identifier: MIT
"""What was measured of sides in turn, as values: to print, to keep as JSON, to compare with what was kept before."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Final

from paravirt.errors import InvalidRequest
from paravirt.testing.bench.case import Case, Sample
from paravirt.testing.bench.judge import FEWEST_PAIRS, Spread
from paravirt.testing.bench.rounds import Change, Round, Rounds, change_from, difference, ratio_of
from paravirt.testing.bench.sides import OWN, Options, Side
from paravirt.testing.bench.turns import Bench

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Result(Rounds[Sample]):
    """One side of one case."""

    side: str
    case: Case
    options: Options | None
    """Of this project's own ring; None for a peer."""
    rounds: tuple[Round[Sample], ...]
    outside_load: float
    """CPU time of others meanwhile, as a share of one CPU."""

    @property
    def what(self) -> tuple[str, Case, Options | None]:
        """What two results have in common that can be compared."""
        return self.side, self.case, self.options


def measure(
    bench: Bench,
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
    return ratio_of(result, reference, lambda sample: sample.messages_per_s)


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
    differ = difference(there, here)
    return [_compare(result, known.get(result.what), differ) for result in results]


def _compare(new: Result, old: Result | None, differ: str) -> Comparison:
    if old is None:
        return Comparison(new, None, "new")
    is_time = new.case.mode == "pingpong"
    change = change_from(old, new, "p50_ns" if is_time else "messages_per_s", is_time=is_time, differ=differ)
    return Comparison(new, *change)


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
