# SPDX-License-Identifier: MIT
"""What all questions share: the package's way of measuring in turn, and programs in C that stand here."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from paravirt.testing.bench import turns
from paravirt.testing.bench.judge import FEWEST_PAIRS, MOST_OUTSIDE_LOAD, Answer, Mark, Pair, Spread, Verdict
from paravirt.testing.bench.machine import Distance, OutsideLoad, cpu_seconds, distance_of, machine, pin
from paravirt.testing.bench.programs import RING_PARTS, NotHere

__all__ = [
    "ALONE",
    "FEWEST_PAIRS",
    "MOST_OUTSIDE_LOAD",
    "Answer",
    "Bench",
    "Distance",
    "Mark",
    "NotHere",
    "OutsideLoad",
    "Pair",
    "Spread",
    "Verdict",
    "alone",
    "cpu_seconds",
    "distance_of",
    "machine",
    "pin",
]

HERE = Path(__file__).parent
ROOT = HERE.parent
_NO_SUCH_SIDE = 5
ALONE = "-"
"""The peer of what is held against a value."""


class Bench(turns.Bench):
    """The machine to ask, and how long to ask it."""

    def compile(self, name: str, sources: Sequence[str], core: Sequence[str] = (), *flags: str) -> Path:
        """A program of the C files here and of parts of the C core. Raises `NotHere` without a C compiler."""
        return self.programs.compile(name, [HERE / source for source in sources], *flags, core=core)

    def model(self, mode: str, seconds: float, *arguments: int) -> float:
        """Run the C model on the two CPUs; its number. Raises `NotHere` for Xen's macros without Xen's header."""
        program = self.compile("model", ["model.c"], RING_PARTS)
        command = [str(program), mode, *map(str, self.cpus), str(seconds), *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        if done.returncode == _NO_SUCH_SIDE:
            raise NotHere("Xen's ring.h is not installed (libxen-dev)")
        done.check_returncode()
        return float(done.stdout)


def alone(what: str, values: list[float], mark: Mark, *, tag: float, load: float, unit: float) -> Answer:
    """Ours against a value, not against a peer; for what neither the CPUs' distance nor others' load changes much."""
    ours = Spread.of(values)
    distance = distance_of(tag)
    verdict = mark.judge(ours, None)
    return Answer(what, ours, None, None, ALONE, str(mark), verdict, len(values), distance, tag, load, unit)
