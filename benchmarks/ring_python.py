# SPDX-License-Identifier: MIT
"""How many messages the Python batch API moves between two spinning processes, beside the C core in the same run."""

from collections.abc import Iterable
from functools import partial

from paravirt.testing.bench.case import Case
from paravirt.testing.bench.sides import Options, Side, open_sides

from .harness import Answer, Bench, Mark

QUESTION = "How many messages a second does the Python batch API move?"
OPTIONS = Options("spin", "asymmetric")
ECHO = {1: Mark(), 8: Mark(), 32: Mark(value=15e6)}
LARGE = Case("oneway", batch=256, slots=512, in_flight=512)
ENOUGH, CLOSE_TO_C = Mark(value=30e6), Mark(ratio=0.8)


def ask(bench: Bench) -> Iterable[Answer]:
    for batch, mark in ECHO.items():
        yield beside_c(bench, f"pairs, batches of {batch}", Case(batch=batch), mark)
    yield beside_c(bench, f"one way, batches of {LARGE.batch}", LARGE, ENOUGH, CLOSE_TO_C)


def beside_c(bench: Bench, what: str, case: Case, *marks: Mark) -> Answer:
    """The first mark that is met, else the last."""
    with open_sides(["python", "c"], [], case, OPTIONS, bench.cpus, bench.programs) as (ours, core):
        pairs, load = bench.interleave(partial(rate, bench, ours, case), partial(rate, bench, core, case), ours.pids)
    answers = [bench.compare(what, "C core", pairs, load, mark) for mark in marks]
    return next((answer for answer in answers if answer.verdict == "met"), answers[-1])


def rate(bench: Bench, side: Side, case: Case) -> float:
    """Messages a second."""
    return side.measure(case, bench.seconds).messages_per_s
