# SPDX-License-Identifier: MIT
"""What a packet costs more through the switch than past it."""

from collections.abc import Iterable

from .harness import Answer, Bench, Mark, alone
from .vif_load import VifCase, own_side

QUESTION = "How much longer takes a packet of 64 bytes through the switch than over a wire, to a station that it knows?"
UNIT = "ns a packet."


def ask(bench: Bench) -> Iterable[Answer]:
    wire, switch = VifCase("wire"), VifCase("switch")
    with own_side(wire, bench.cpus) as own:
        pairs, load = bench.interleave(
            lambda: own.measure(switch, bench.seconds).pps, lambda: own.measure(wire, bench.seconds).pps, own.pids
        )
    added = [1e9 / pair.ours - 1e9 / pair.theirs for pair in pairs]
    mark = Mark(most_value=60, unit=1, unit_name="ns")
    yield alone("one flow", added, mark, tag=pairs[0].cache_line_ns, load=load, unit=1.0)
