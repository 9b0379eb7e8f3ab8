# SPDX-License-Identifier: MIT
"""What was measured of network devices in turn, as values: to print, to keep as JSON, to compare with what was kept."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Final, Protocol

from paravirt.errors import InvalidRequest
from paravirt.testing.bench.judge import FEWEST_PAIRS, Spread
from paravirt.testing.bench.rounds import Change, Round, Rounds, change_from, difference
from paravirt.testing.bench.turns import Bench
from paravirt.testing.bench.vif.case import VifCase, VifSample

FORMAT: Final = 1
_NUMBERS: Final = tuple(field.name for field in fields(VifSample))


class VifSide(Protocol):
    """Something that is measured, again and again."""

    name: str

    def measure(self, case: VifCase, seconds: float) -> VifSample:
        """One sample. Raises `NotHere`."""

    def pids(self) -> list[int]:
        """Its processes that outlive a sample."""


@dataclass(frozen=True, slots=True)
class VifResult(Rounds[VifSample]):
    """One side of one case."""

    side: str
    case: VifCase
    rounds: tuple[Round[VifSample], ...]
    outside_load: float
    """CPU time of others meanwhile, as a share of one CPU."""

    @property
    def what(self) -> tuple[str, VifCase]:
        """What two results have in common that can be compared."""
        return self.side, self.case


@dataclass(frozen=True, slots=True)
class VifComparison:
    """A result beside what was measured of the same at another time."""

    result: VifResult
    ratio: Spread | None
    """As `change_from`, of packets a second."""
    change: Change
    why: str = ""
    """Why it is inconclusive."""


def measure(
    bench: Bench, sides: Sequence[VifSide], case: VifCase, progress: Callable[[], None] = lambda: None
) -> list[VifResult]:
    """One case of all sides, in turn; calls `progress` after each sample."""

    def sample(side: VifSide) -> VifSample:
        taken = side.measure(case, bench.seconds)
        progress()
        return taken

    pids = [pid for side in sides for pid in side.pids()]
    rounds, load = bench.take_turns([partial(sample, side) for side in sides], lambda: pids)
    return [
        VifResult(side.name, case, tuple(Round(tag, samples[i]) for tag, samples in rounds), load)
        for i, side in enumerate(sides)
    ]


def compare_with(
    results: Iterable[VifResult], baseline: Iterable[VifResult], there: dict[str, str], *, here: dict[str, str]
) -> list[VifComparison]:
    """Each result beside the one of the same side and case in a baseline; `there` and `here` are machines."""
    known = {old.what: old for old in baseline}
    differ = difference(there, here)
    return [
        VifComparison(new, *change_from(known[new.what], new, "pps", differ=differ))
        if new.what in known
        else VifComparison(new, None, "new")
        for new in results
    ]


def to_json(results: Sequence[VifResult], machine: dict[str, str], skipped: dict[str, str]) -> dict[str, Any]:
    """Everything that was measured, with the medians for whoever reads no samples."""
    return {
        "format": FORMAT,
        "machine": machine,
        "skipped": skipped,
        "fewest_pairs": FEWEST_PAIRS,
        "results": [_to_json(result) for result in results],
    }


def _to_json(result: VifResult) -> dict[str, Any]:
    counted = result.counted()
    medians = {name: counted.spread(name) for name in _NUMBERS}
    return {
        "side": result.side,
        "case": asdict(result.case),
        "distance": result.distance,
        "counted": len(counted.rounds),
        "outside_load": result.outside_load,
        "inconclusive": result.doubt,
        **{name: None if spread is None else asdict(spread) for name, spread in medians.items()},
        "rounds": [{"cache_line_ns": one.cache_line_ns, **asdict(one.sample)} for one in result.rounds],
    }


def from_json(text: str) -> tuple[list[VifResult], dict[str, str]]:
    """The results of an earlier `to_json`, and the machine. Raises `InvalidRequest` for anything else."""
    try:
        told = json.loads(text)
        if told["format"] != FORMAT:
            raise InvalidRequest(f"results of format {told['format']!r}, not {FORMAT}")
        return [_from_json(one) for one in told["results"]], dict(told["machine"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InvalidRequest(f"not what `paravirt bench vif --json` prints: {why}") from None


def _from_json(told: dict[str, Any]) -> VifResult:
    rounds = tuple(
        Round(
            float(one["cache_line_ns"]),
            VifSample(**{name: _number(one[name]) for name in _NUMBERS}),
        )
        for one in told["rounds"]
    )
    if not rounds:
        raise ValueError("a result without rounds")
    return VifResult(str(told["side"]), VifCase(**told["case"]), rounds, float(told["outside_load"]))


def _number(value: Any) -> Any:
    return None if value is None else float(value)
