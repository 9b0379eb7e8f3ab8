# SPDX-License-Identifier: MIT
"""Our C core beside DPDK's rte_ring, Concurrency Kit's ck_ring and boost's spsc_queue, two of each: all spin.

With the asymmetric fence. Every round measures all of them; the best is the one with the highest median.
"""

from collections.abc import Iterable
from functools import partial
from statistics import median

from paravirt.testing.bench.case import Case
from paravirt.testing.bench.registry import TABLE
from paravirt.testing.bench.sides import CoreSide, Options, PeerSide, Side, able

from .harness import Answer, Bench, Mark, NotHere, Pair

QUESTION = "Is the C core as fast as the best of rte_ring, ck_ring and boost?"
PEERS = ("rte", "ck", "boost")
MARKS = {1: Mark(ratio=1.3), 8: Mark(ratio=1.2), 32: Mark(ratio=1)}


def ask(bench: Bench) -> Iterable[Answer]:
    core = CoreSide("c", Options("spin", "asymmetric"), bench.cpus, bench.programs)
    there, missing = able([PeerSide(TABLE[name], bench.cpus, bench.programs) for name in PEERS], Case())
    if not there:
        raise NotHere("; ".join(missing.values()))
    for batch, mark in MARKS.items():
        sides: list[Side] = [core, *there]
        rounds, load = bench.take_turns([partial(rate, bench, side, Case(batch=batch)) for side in sides])
        best = max(range(1, len(sides)), key=lambda side: median(rates[side] for _, rates in rounds))
        pairs = [Pair(rates[0], rates[best], tag) for tag, rates in rounds]
        yield bench.compare(f"batches of {batch}, best: {sides[best].name}", "best peer", pairs, load, mark)


def rate(bench: Bench, side: Side, case: Case) -> float:
    """Pairs a second."""
    return side.measure(case, bench.seconds).messages_per_s
