# SPDX-License-Identifier: MIT
"""How many pairs the Python batch API moves between two spinning processes, beside Xen's ring.h in bare C."""

from collections.abc import Iterable

from paravirt.testing.ring_bench import RingRun

from .harness import Answer, Bench, Mark

QUESTION = "How many pairs a second does the Python batch API move?"
MARKS = {1: Mark(), 8: Mark(), 32: Mark(value=10e6)}


def ask(bench: Bench) -> Iterable[Answer]:
    with RingRun(pages=4, wait="spin") as run:
        for batch, mark in MARKS.items():
            pairs, load = bench.interleave(
                lambda batch=batch: run.measure(batch, bench.seconds, round_trips=False).pairs_per_s,
                lambda batch=batch: bench.model("xen", bench.seconds, batch, run.pages),
                run.pids,
            )
            yield bench.compare(f"batches of {batch}", "ring.h in C", pairs, load, mark)
