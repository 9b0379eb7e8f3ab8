# SPDX-License-Identifier: MIT
"""Does our C core cost anything against Xen's own macros? Both spin, both check whether to notify."""

from collections.abc import Iterable

from .harness import Answer, Bench, Mark

QUESTION = "Is the C core as fast as Xen's ring.h?"
PAGES = 4
MARKS = {1: Mark(), 8: Mark(ratio=0.95), 32: Mark(ratio=0.95)}


def ask(bench: Bench) -> Iterable[Answer]:
    for batch, mark in MARKS.items():
        pairs, load = bench.interleave(
            lambda batch=batch: bench.model("core", bench.seconds, batch, PAGES),
            lambda batch=batch: bench.model("xen", bench.seconds, batch, PAGES),
        )
        yield bench.compare(f"batches of {batch}", "ring.h", pairs, load, mark)
