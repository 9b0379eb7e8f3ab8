# SPDX-License-Identifier: MIT
"""What Python sends and takes."""

from collections.abc import Iterable

from .harness import ALONE, Answer, Bench, Mark
from .vif_load import Claim, VifCase, ask_vif

QUESTION = "How many packets of 64 bytes does Python send, or take, in bursts of 64?"


def ask(bench: Bench) -> Iterable[Answer]:
    mark = Mark(value=3e6, unit=1e6, unit_name="M/s")
    yield from ask_vif(
        bench,
        [
            Claim("sent to the backend", VifCase("python", wait="adaptive"), ALONE, mark),
            Claim("taken, from another guest", VifCase("python-receive", wait="adaptive"), ALONE, mark),
        ],
    )
