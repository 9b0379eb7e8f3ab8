# SPDX-License-Identifier: MIT
"""Two processes that sleep whenever there is nothing to do: a round trip beside that of two bare eventfds, doorbells of
a ring that is kept full, and a waiter of ten thousand ports beside one of a single port.
"""

import subprocess
from collections.abc import Iterable
from functools import partial

from paravirt.testing.bench.programs import RING_PARTS

from .harness import Answer, Bench, Mark, alone

QUESTION = "What does it cost to sleep and be woken?"
UNIT = "Microseconds; doorbells a message; wake-ups."
PAGES = 4
MANY = 10_000
MICROSECOND = 1e3


def ask(bench: Bench) -> Iterable[Answer]:
    program = bench.compile("sleeping", ["sleeping.c"], RING_PARTS)

    def measure(mode: str, *number: int) -> float:
        command = [str(program), mode, *map(str, bench.cpus), str(bench.seconds), *map(str, number)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)

    pairs, load = bench.interleave(partial(measure, "ring"), partial(measure, "eventfd"))
    yield bench.compare("round trip", "eventfd", pairs, load, Mark(most_ratio=1.1), unit=MICROSECOND)
    for mode, what in {"cost": "CPU time of a wake-up", "ports": "round trip"}.items():
        pairs, load = bench.interleave(partial(measure, mode, MANY), partial(measure, mode, 1))
        mark = Mark(most_ratio=1.2)
        yield bench.compare(f"{what}, {MANY:,} ports", "one port", pairs, load, mark, unit=MICROSECOND)
    few = Mark(most_value=0.01, unit=1, unit_name="a message")
    yield held(bench, f"doorbells, ring of {PAGES} pages kept full", partial(measure, "saturated", PAGES), few)
    none = Mark(most_value=0, unit=1, unit_name="wake-ups")
    yield held(bench, f"wake-ups by {MANY:,} idle ports", partial(measure, "idle", MANY), none)


def held(bench: Bench, what: str, side: "partial[float]", mark: Mark) -> Answer:
    """Against a value."""
    rounds, load = bench.take_turns([side])
    return alone(what, [found for _, (found,) in rounds], mark, tag=rounds[0][0], load=load, unit=1)
