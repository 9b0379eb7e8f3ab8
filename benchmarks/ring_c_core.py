# SPDX-License-Identifier: MIT
"""Our C core beside Xen's own macros: both spin, both check whether to notify.

With the asymmetric fence, which our ends use where they trust each other, copied in and filled in place; and with the
full barrier, as with any peer.
"""

from collections.abc import Iterable

from .harness import Answer, Bench, Mark

QUESTION = "Is the C core as fast as Xen's ring.h?"
PAGES = 4
SIDES: dict[str, tuple[str, dict[int, Mark]]] = {
    "asymmetric fence": ("core-light", {1: Mark(ratio=2), 8: Mark(ratio=1.25), 32: Mark(ratio=1.05)}),
    "the same, in place": ("core-inplace", {1: Mark(), 8: Mark(), 32: Mark()}),
    "full barrier": ("core", {1: Mark(ratio=1), 8: Mark(ratio=1), 32: Mark(ratio=1)}),
}


def ask(bench: Bench) -> Iterable[Answer]:
    for name, (side, marks) in SIDES.items():
        for batch, mark in marks.items():
            pairs, load = bench.interleave(
                lambda side=side, batch=batch: bench.model(side, bench.seconds, batch, PAGES),
                lambda batch=batch: bench.model("xen", bench.seconds, batch, PAGES),
            )
            yield bench.compare(f"{name}, batches of {batch}", "ring.h", pairs, load, mark)
