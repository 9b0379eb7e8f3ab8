# SPDX-License-Identifier: MIT
"""The Python batch API's echo beside that of Python libraries that have batch calls, and of kickmsg, which has none.

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

QUESTION = "Is a batch of 32 in Python 20 times as fast as other libraries' batches, four times as fast as kickmsg?"
CASE = Case(batch=32)
BATCHING = [name for name, peer in TABLE.items() if peer.language == "Python" and peer.batches]
SINGLE = ["kickmsg"]
GROUPS = ((BATCHING, "best batching peer", Mark(ratio=20)), (SINGLE, "kickmsg", Mark(ratio=4)))


def ask(bench: Bench) -> Iterable[Answer]:
    there, missing = able([PeerSide(TABLE[name], bench.cpus, bench.programs) for name in BATCHING + SINGLE], CASE)
    if not there:
        raise NotHere("; ".join(missing.values()))
    with open_sides(["python"], [], CASE, OPTIONS, bench.cpus, bench.programs) as (ours,):
        sides: list[Side] = [ours, *there]
        rounds, load = bench.take_turns([partial(rate, bench, side, CASE) for side in sides], ours.pids)
    for names, peer, mark in GROUPS:
        places = [place for place, side in enumerate(sides) if side.name in names]
        if places:
            best = max(places, key=lambda place: median(rates[place] for _, rates in rounds))
            pairs = [Pair(rates[0], rates[best], tag) for tag, rates in rounds]
            yield bench.compare(f"batches of 32, {sides[best].name}", peer, pairs, load, mark)
