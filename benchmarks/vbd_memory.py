# SPDX-License-Identifier: MIT
"""What grants, checks and recovery cost beside a ring and a memcpy."""

from collections.abc import Iterable

from .harness import Answer, Bench, Mark
from .vbd_load import BlockCase, Claim, ask_disk, cpu_us

QUESTION = "Is a disk of 256 MiB of memory as fast as a bare ring and a memcpy between two processes?"
UNIT = "Thousands a second; CPU time of both ends in µs for an I/O."
ALONE_IN_FLIGHT = BlockCase(depth=1, wait="spin")
MANY = BlockCase(depth=32, wait="spin")


def ask(bench: Bench) -> Iterable[Answer]:
    yield from ask_disk(
        bench,
        "memory:256M",
        [
            Claim("1 in flight", ALONE_IN_FLIGHT, "model", Mark(ratio=0.85)),
            Claim("32 in flight", MANY, "model", Mark(ratio=0.85)),
            Claim("CPU, 32 in flight", MANY, "model", Mark(most_ratio=1.5), cpu_us, 1.0),
        ],
    )
