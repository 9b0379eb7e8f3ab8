# SPDX-License-Identifier: MIT
"""What is asked of the xenstore daemons, cell by cell, what is claimed of each, and the judgement."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from .harness import FEWEST_PAIRS, Answer, Bench, Mark, Pair
from .xenstore_daemons import OURS, OX, C, Load

Measure = Literal["rate", "cpu"]

AS_MANY = Mark(ratio=1.0)
NO_MORE_CPU = Mark(most_ratio=1.0)
"""The peer of an answer that has none."""
LARGE = 100_000
"""Nodes from which on the C daemon's transactions are slow."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Ours against one peer: operations a second, or the daemon's CPU time for an operation."""

    peer: str
    measure: Measure = "rate"
    mark: Mark = field(default_factory=Mark)


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement that is made of every daemon."""

    group: str
    name: str
    mode: str
    options: Mapping[str, int]
    claims: tuple[Claim, ...] = ()


@dataclass(slots=True)
class Row:
    """A cell's samples of every daemon, and what they say."""

    group: str
    name: str
    nodes: int
    samples: dict[str, list[Load]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    """Of every daemon, where the row is about another number than the samples'."""
    answers: list[Answer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """For JSON."""
        told = asdict(self)
        told["samples"] = {name: [asdict(load) for load in loads] for name, loads in self.samples.items()}
        return told


def cells(nodes: int) -> list[Cell]:
    """All cells, for a tree of so many nodes."""
    return [*_reads_and_writes(), *_directories(), *_transactions(nodes), *_watches(), *_others()]


def _in_words(connections: int, depth: int) -> str:
    return f"{connections}x{depth}"


def _reads_and_writes() -> list[Cell]:
    made = []
    for mode in ("read", "write"):
        for connections in (1, 8, 64):
            for depth in (1, 16):
                least = Mark(ratio=0.9) if (connections, depth) == (1, 1) else AS_MANY
                claims = (Claim(C, "rate", least), Claim(C, "cpu", NO_MORE_CPU), Claim(OX))
                options = {"connections": connections, "depth": depth}
                made.append(Cell(mode, f"{mode} {_in_words(connections, depth)}", mode, options, claims))
    return made


def _directories() -> list[Cell]:
    claims = (Claim(C, "rate", AS_MANY), Claim(C, "cpu"), Claim(OX))
    return [
        Cell("directory", f"directory of 1000 {_in_words(n, 1)}", "directory-1000", {"connections": n}, claims)
        for n in (1, 8)
    ]


def _transactions(nodes: int) -> list[Cell]:
    against_c = Mark(ratio=5.0) if nodes >= LARGE else Mark()
    claims = (Claim(C, "rate", against_c), Claim(OX, "rate", Mark(ratio=1.5)), Claim(C, "cpu"))
    return [
        Cell("transaction", f"transaction {_in_words(n, 1)}", "transaction", {"connections": n}, claims)
        for n in (1, 8, 64)
    ]


def _watches() -> list[Cell]:
    claims = (Claim(C, "rate", AS_MANY), Claim(C, "cpu"), Claim(OX))
    return [
        Cell("watch", f"watch, {n} {'watcher' if n == 1 else 'watchers'}", "watch", {"connections": n}, claims)
        for n in (1, 8, 64)
    ]


def _others() -> list[Cell]:
    names = {"directory-100": "directory of 100", "perms": "get-perms", "miss": "read of no node"}
    made = [
        Cell("other", f"{name} {_in_words(8, 1)}", mode, {"connections": 8}, (Claim(C), Claim(C, "cpu"), Claim(OX)))
        for mode, name in names.items()
    ]
    part = (Claim(C), Claim(C, "cpu"))
    return [*made, Cell("other", "directory-part of 1000 8x1", "directory-part", {"connections": 8}, part)]


def judge(row: Row, claims: Sequence[Claim], tags: Sequence[float], load: float, *, fewest: int = FEWEST_PAIRS) -> None:
    """Fill in `row.answers` from its samples. `tags`: the cache line's round trip of each round.

    A daemon that gave wrong answers is not compared; ours missed every mark then.
    """
    for claim in claims:
        if claim.peer not in row.samples:
            continue
        pairs = [
            Pair(_value(ours, claim.measure), _value(theirs, claim.measure), tag)
            for ours, theirs, tag in zip(row.samples[OURS], row.samples[claim.peer], tags, strict=True)
        ]
        what, unit = (f"{row.name}: CPU, us", 1.0) if claim.measure == "cpu" else (row.name, 1e3)
        answer = Bench.compare(what, claim.peer, pairs, load, claim.mark, unit=unit, fewest=fewest)
        row.answers.append(answer if all(sample.clean for sample in row.samples[OURS]) else missed(answer))
    row.notes += [note for name, samples in row.samples.items() if (note := trouble(name, samples))]


def _value(load: Load, measure: Measure) -> float:
    return load.per_second if measure == "rate" else load.cpu_us or 0.0


def missed(answer: Answer) -> Answer:
    """Where something was claimed, it was missed."""
    return answer if answer.verdict == "-" else replace(answer, verdict="missed")


def trouble(name: str, samples: Sequence[Load]) -> str:
    """What was wrong with a daemon's answers; empty if nothing was."""
    errors, mismatches = sum(sample.errors for sample in samples), sum(sample.mismatches for sample in samples)
    first = next((sample.first_error for sample in samples if sample.first_error), "")
    told = [f"{errors} errors, the first {first}"] if errors else []
    told += [f"{mismatches} wrong answers"] if mismatches else []
    told += [f"{n} conflicts" for n in [sum(sample.eagain for sample in samples)] if n]
    return f"{name}: {', '.join(told)}" if told else ""
