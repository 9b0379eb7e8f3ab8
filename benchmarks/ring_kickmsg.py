# SPDX-License-Identifier: MIT
"""Echo of 112-byte requests by 16-byte responses, 32 in flight, beside kickmsg, a fast message passing for Python."""

import importlib.util
from collections.abc import Iterable

from paravirt.testing.ring_bench import RingRun

from .harness import Answer, Bench, Mark, NotHere
from .kickmsg_peer import KickmsgRun

QUESTION = "Is a batch of 32 at least four times as fast as kickmsg's echo with 32 in flight?"
IN_FLIGHT = 32


def ask(bench: Bench) -> Iterable[Answer]:
    if importlib.util.find_spec("kickmsg") is None:
        raise NotHere("kickmsg is not installed (pip install kickmsg)")
    with RingRun(pages=4, wait="spin") as run, KickmsgRun(bench.cpus) as kickmsg:
        pairs, load = bench.interleave(
            lambda: run.measure(IN_FLIGHT, bench.seconds, round_trips=False).pairs_per_s,
            lambda: kickmsg.measure(IN_FLIGHT, bench.seconds),
            lambda: [*run.pids(), *kickmsg.pids()],
        )
        yield bench.compare("batches of 32", "kickmsg", pairs, load, Mark(ratio=4))
