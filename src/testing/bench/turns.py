# SPDX-License-Identifier: MIT
"""Sides that are measured in turn, so that what moves the machine moves them all."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from paravirt.testing.bench.judge import FEWEST_PAIRS, Pair, compare, most_of_one_distance
from paravirt.testing.bench.machine import OutsideLoad, cache_line_ns, cpu_seconds, two_cpus
from paravirt.testing.bench.programs import Programs

T = TypeVar("T")


class Bench:
    """The machine to ask, and how long to ask it."""

    def __init__(self, *, pairs: int = 15, seconds: float = 0.2, extra: int = 0) -> None:
        """`extra`: so many more rounds at most, as long as too few are of one distance. Raises `NotHere`."""
        self.pairs = pairs
        self.seconds = seconds
        self._extra = extra
        self.cpus = two_cpus()
        self.programs = Programs()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.programs.close()

    def cache_line_ns(self) -> float:
        return cache_line_ns(self.programs, self.cpus)

    def interleave(
        self, ours: Callable[[], float], theirs: Callable[[], float], pids: Callable[[], list[int]] = list
    ) -> tuple[list[Pair], float]:
        """Samples of both sides in turn, first one and then the other first; and the outside load meanwhile.

        `pids`: own processes that outlive the samples.
        """
        rounds, load = self.take_turns([ours, theirs], pids)
        return [Pair(first, second, tag) for tag, (first, second) in rounds], load

    def take_turns(
        self, sides: Sequence[Callable[[], T]], pids: Callable[[], list[int]] = list
    ) -> tuple[list[tuple[float, list[T]]], float]:
        """Samples of all sides in turn, each time another one first: for each round the cache line's round trip in ns
        and a sample of each side; and the outside load meanwhile.
        """
        before, load = sum(map(cpu_seconds, pids())), OutsideLoad()
        rounds: list[tuple[float, list[T]]] = []
        for i in range(self.pairs + self._extra):
            if i >= self.pairs and most_of_one_distance([tag for tag, _ in rounds]) >= FEWEST_PAIRS:
                break
            tag, samples = self.cache_line_ns(), {}
            for j in range(len(sides)):
                turn = (i + j) % len(sides)
                samples[turn] = sides[turn]()
            rounds.append((tag, [samples[turn] for turn in range(len(sides))]))
        return rounds, load.share(sum(map(cpu_seconds, pids())) - before)

    compare = staticmethod(compare)
