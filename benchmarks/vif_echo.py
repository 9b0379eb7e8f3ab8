# SPDX-License-Identifier: MIT
"""How long a packet takes there and back."""

from collections.abc import Iterable

from paravirt.testing.bench.vif.case import VifSample

from .harness import ALONE, Answer, Bench, Mark
from .vif_load import Claim, VifCase, ask_vif

QUESTION = "How long does one packet take from a guest to its backend and back, both spinning, median?"
UNIT = "µs."


def median_ns(sample: VifSample) -> float:
    """Of the round trip."""
    assert sample.p50_ns is not None
    return sample.p50_ns


def ask(bench: Bench) -> Iterable[Answer]:
    mark = Mark(most_value=3000, unit=1e3, unit_name="µs")
    cases = [("64 bytes", VifCase("echo", 64, 1)), ("1500 bytes", VifCase("echo", 1500, 1))]
    yield from ask_vif(bench, [Claim(what, case, ALONE, mark, median_ns, 1e3) for what, case in cases])
