# SPDX-License-Identifier: MIT
"""The Python batch API's echo beside that of Python libraries that have batch calls, and of the fastest that has none.

The best of those with batch calls is the one with the highest median.
"""

from collections.abc import Iterable
from functools import partial
from statistics import median

from paravirt.testing.bench.case import Case
from paravirt.testing.bench.registry import TABLE
from paravirt.testing.bench.sides import PeerSide, Side, able, open_sides

from .harness import Answer, Bench, Mark, NotHere, Pair
from .ring_python import OPTIONS, rate

QUESTION = "Is the Python batch API's echo 20 times as fast as that of the best batching Python library?"
CASE = Case(batch=32)
BATCHING = [name for name, peer in TABLE.items() if peer.language == "Python" and peer.batches]
MARK = Mark(ratio=20)


def ask(bench: Bench) -> Iterable[Answer]:
    there, missing = able([PeerSide(TABLE[name], bench.cpus, bench.programs) for name in BATCHING], CASE)
    if not there:
        raise NotHere("; ".join(missing.values()))
    with open_sides(["python"], [], CASE, OPTIONS, bench.cpus, bench.programs) as (ours,):
        sides: list[Side] = [ours, *there]
        rounds, load = bench.take_turns([partial(rate, bench, side, CASE) for side in sides], ours.pids)
    best = max(range(1, len(sides)), key=lambda side: median(rates[side] for _, rates in rounds))
    pairs = [Pair(rates[0], rates[best], tag) for tag, rates in rounds]
    yield bench.compare(f"batches of 32, best: {sides[best].name}", "best batching peer", pairs, load, MARK)
