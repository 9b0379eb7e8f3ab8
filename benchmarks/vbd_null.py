# SPDX-License-Identifier: MIT
"""What a request costs when there is nothing to move."""

from collections.abc import Iterable

from .harness import ALONE, Answer, Bench, Mark
from .vbd_load import QEMU, BlockCase, Claim, ask_disk

QUESTION = "How many requests of 4 KiB does a disk of nothing answer, 32 in flight, beside QEMU's over vhost-user?"
UNIT = "Thousands a second."
CASE = BlockCase(wait="spin")


def ask(bench: Bench) -> Iterable[Answer]:
    thousands = {"unit": 1e3, "unit_name": "k/s"}
    yield from ask_disk(
        bench,
        "null:1G",
        [
            Claim("null, 32 in flight", CASE, ALONE, Mark(value=10e6, **thousands)),
            Claim("null, 32 in flight", CASE, QEMU, Mark(ratio=5.0)),
        ],
    )
