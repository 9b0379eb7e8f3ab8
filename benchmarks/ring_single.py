# SPDX-License-Identifier: MIT
"""Single messages from Python beside kickmsg, a fast message passing for Python: one way, put and iterated over in
buffers; and the median round trip of `exchange`. All spin.
"""

import subprocess
import sys
from collections.abc import Iterable
from functools import partial

from paravirt.testing.bench.case import Case, Mode
from paravirt.testing.bench.registry import TABLE
from paravirt.testing.bench.sides import PeerSide, able

from .harness import Answer, Bench, Mark, NotHere

QUESTION = "Are single messages as fast as kickmsg's?"
UNIT = "Millions a second; nanoseconds."
CASES: dict[Mode, tuple[Case, str, Mark, float]] = {
    "oneway": (Case("oneway", in_flight=32), "one way, put and iterated", Mark(ratio=1), 1e6),
    "pingpong": (Case("pingpong", batch=1, in_flight=1), "round trip of exchange", Mark(most_ratio=1.2), 1),
}


def ask(bench: Bench) -> Iterable[Answer]:
    kickmsg = PeerSide(TABLE["kickmsg"], bench.cpus, bench.programs)
    _, missing = able([kickmsg], CASES["oneway"][0])
    if missing:
        raise NotHere(missing["kickmsg"])
    for mode, (case, what, mark, unit) in CASES.items():
        pairs, load = bench.interleave(partial(ours, bench, mode), partial(theirs, bench, kickmsg, case))
        yield bench.compare(what, "kickmsg", pairs, load, mark, unit=unit)


def ours(bench: Bench, mode: Mode) -> float:
    """Messages a second, or nanoseconds."""
    command = [sys.executable, "-m", "benchmarks.single_messages", mode, *map(str, bench.cpus), str(bench.seconds)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


def theirs(bench: Bench, kickmsg: PeerSide, case: Case) -> float:
    sample = kickmsg.measure(case, bench.seconds)
    return sample.messages_per_s if sample.p50_ns is None else sample.p50_ns
