# SPDX-License-Identifier: MIT
"""What a packet costs from a guest to its backend, copied on both sides."""

from collections.abc import Iterable

from .harness import ALONE, Answer, Bench, Mark
from .vif_load import Claim, VifCase, ask_vif

QUESTION = "How many packets go from a guest to its backend, both spinning, in bursts of 64, beside other ways?"
SMALL, LARGE = VifCase(size=64), VifCase(size=1500)


def ask(bench: Bench) -> Iterable[Answer]:
    millions = {"unit": 1e6, "unit_name": "M/s"}
    claims = [
        Claim("64 bytes", SMALL, ALONE, Mark(value=10e6, **millions)),
        Claim("1500 bytes", LARGE, ALONE, Mark(value=6e6, **millions)),
    ]
    for peer, ratio in (("af-packet", 8.0), ("unix", 8.0), ("memif", 0.8)):
        claims += [
            Claim("64 bytes", SMALL, peer, Mark(ratio=ratio)),
            Claim("1500 bytes", LARGE, peer, Mark(ratio=ratio)),
        ]
    yield from ask_vif(bench, claims)
