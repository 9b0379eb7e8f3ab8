# SPDX-License-Identifier: MIT
"""What the split costs a file that is in memory."""

from collections.abc import Iterable

from paravirt.testing.bench.vbd.target import file_in_memory

from .harness import Answer, Bench, Mark
from .vbd_load import QEMU, BlockCase, Claim, ask_disk

QUESTION = "Is a file on tmpfs as fast through the ring as for a program that reads it itself?"
UNIT = "Thousands a second."
SIZE = 256 << 20
SMALL = BlockCase(depth=32, wait="spin")
LARGE = BlockCase(rw="read", block_bytes=128 << 10, depth=32, wait="spin", n_bytes=1 << 20)


def ask(bench: Bench) -> Iterable[Answer]:
    with file_in_memory(SIZE) as path:
        yield from ask_disk(
            bench,
            f"file:{path}",
            [
                Claim("4 KiB at random, 32 in flight", SMALL, "psync", Mark(ratio=0.85)),
                Claim("4 KiB at random, 32 in flight", SMALL, QEMU, Mark(ratio=3.0)),
                Claim("128 KiB in order, 32 in flight", LARGE, "psync", Mark(ratio=0.85)),
            ],
        )
