# SPDX-License-Identifier: MIT
"""What was measured of block devices in turn, as values: to print, to keep as JSON, to compare with what was kept."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Final, Protocol

from paravirt.errors import InvalidRequest
from paravirt.testing.bench.judge import FEWEST_PAIRS, Spread
from paravirt.testing.bench.rounds import Change, Round, Rounds, change_from, difference
from paravirt.testing.bench.turns import Bench
from paravirt.testing.bench.vbd.case import BlockCase, BlockSample, merge

FORMAT: Final = 1

_NUMBERS: Final = tuple(field.name for field in fields(BlockSample) if field.name != "buckets")


class BlockSide(Protocol):
    """Something that is measured, again and again."""

    name: str

    def measure(self, case: BlockCase, seconds: float) -> BlockSample:
        """One sample. Raises `NotHere`."""

    def pids(self) -> list[int]:
        """Its processes that outlive a sample."""


@dataclass(frozen=True, slots=True)
class BlockResult(Rounds[BlockSample]):
    """One side of one case."""

    side: str
    disk: str
    """As a backend is told of it, or the name of a domain's disk."""
    case: BlockCase
    rounds: tuple[Round[BlockSample], ...]
    outside_load: float
    """CPU time of others meanwhile, as a share of one CPU."""

    @property
    def what(self) -> tuple[str, str, BlockCase]:
        """What two results have in common that can be compared."""
        return self.side, self.disk, self.case

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """(Least time in ns, requests) of all samples that count."""
        return merge(one.sample for one in self.counted().rounds)


@dataclass(frozen=True, slots=True)
class BlockComparison:
    """A result beside what was measured of the same at another time."""

    result: BlockResult
    ratio: Spread | None
    """As `change_from`, of I/Os a second."""
    change: Change
    why: str = ""
    """Why it is inconclusive."""


def measure(
    bench: Bench,
    sides: Sequence[BlockSide],
    disk: str,
    case: BlockCase,
    progress: Callable[[], None] = lambda: None,
) -> list[BlockResult]:
    """One case of all sides, in turn; calls `progress` after each sample."""

    def sample(side: BlockSide) -> BlockSample:
        taken = side.measure(case, bench.seconds)
        progress()
        return taken

    pids = [pid for side in sides for pid in side.pids()]
    rounds, load = bench.take_turns([partial(sample, side) for side in sides], lambda: pids)
    return [
        BlockResult(side.name, disk, case, tuple(Round(tag, samples[i]) for tag, samples in rounds), load)
        for i, side in enumerate(sides)
    ]


def compare_with(
    results: Iterable[BlockResult], baseline: Iterable[BlockResult], there: dict[str, str], *, here: dict[str, str]
) -> list[BlockComparison]:
    """Each result beside the one of the same side, disk and case in a baseline; `there` and `here` are machines."""
    known = {old.what: old for old in baseline}
    differ = difference(there, here)
    return [_compare(result, known.get(result.what), differ) for result in results]


def _compare(new: BlockResult, old: BlockResult | None, differ: str) -> BlockComparison:
    if old is None:
        return BlockComparison(new, None, "new")
    return BlockComparison(new, *change_from(old, new, "iops", differ=differ))


def to_json(results: Sequence[BlockResult], machine: dict[str, str], skipped: dict[str, str]) -> dict[str, Any]:
    """Everything that was measured, with the medians for whoever reads no samples."""
    return {
        "format": FORMAT,
        "machine": machine,
        "skipped": skipped,
        "fewest_pairs": FEWEST_PAIRS,
        "results": [_to_json(result) for result in results],
    }


def _to_json(result: BlockResult) -> dict[str, Any]:
    counted = result.counted()
    medians = {name: counted.spread(name) for name in _NUMBERS}
    return {
        "side": result.side,
        "disk": result.disk,
        "case": asdict(result.case),
        "distance": result.distance,
        "counted": len(counted.rounds),
        "outside_load": result.outside_load,
        "inconclusive": result.doubt,
        **{name: None if spread is None else asdict(spread) for name, spread in medians.items()},
        "histogram_ns": result.buckets,
        "rounds": [
            {"cache_line_ns": one.cache_line_ns, **{name: getattr(one.sample, name) for name in _NUMBERS}}
            for one in result.rounds
        ],
    }


def from_json(text: str) -> tuple[list[BlockResult], dict[str, str]]:
    """The results of an earlier `to_json`, and the machine. Raises `InvalidRequest` for anything else."""
    try:
        told = json.loads(text)
        if told["format"] != FORMAT:
            raise InvalidRequest(f"results of format {told['format']!r}, not {FORMAT}")
        return [_from_json(one) for one in told["results"]], dict(told["machine"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise InvalidRequest(f"not what `paravirt bench vbd --json` prints: {why}") from None


def _from_json(told: dict[str, Any]) -> BlockResult:
    rounds = tuple(
        Round(float(one["cache_line_ns"]), BlockSample(**{name: _number(one[name]) for name in _NUMBERS}))
        for one in told["rounds"]
    )
    if not rounds:
        raise ValueError("a result without rounds")
    case = BlockCase(**told["case"])
    return BlockResult(str(told["side"]), str(told["disk"]), case, rounds, float(told["outside_load"]))


def _number(value: Any) -> Any:
    return None if value is None else float(value)
