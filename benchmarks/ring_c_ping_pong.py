# SPDX-License-Identifier: MIT
"""The round trip of a single request and its response, our C core beside Xen's macros: both spin, both check whether to
notify. Medians of a sample's round trips."""

from collections.abc import Iterable

from paravirt.testing.bench.case import Case
from paravirt.testing.bench.registry import TABLE
from paravirt.testing.bench.sides import CoreSide, FenceChoice, Options, PeerSide, Side

from .harness import Answer, Bench, Mark

QUESTION = "Is a round trip through the C core as short as through Xen's ring.h?"
UNIT = "Nanoseconds."
CASE = Case("pingpong", 1)
MARKS: dict[FenceChoice, Mark] = {"asymmetric": Mark(most_ratio=1), "full": Mark()}


def ask(bench: Bench) -> Iterable[Answer]:
    xen = PeerSide(TABLE["xen"], bench.cpus, bench.programs)
    for fence, mark in MARKS.items():
        core = CoreSide("c", Options("spin", fence), bench.cpus, bench.programs)
        pairs, load = bench.interleave(lambda core=core: round_trip_ns(bench, core), lambda: round_trip_ns(bench, xen))
        yield bench.compare(f"{fence} fence", "ring.h", pairs, load, mark, unit=1)


def round_trip_ns(bench: Bench, side: Side) -> float:
    """The median of one sample."""
    p50_ns = side.measure(CASE, bench.seconds).p50_ns
    assert p50_ns is not None
    return p50_ns
