# SPDX-License-Identifier: MIT
"""Round trips of ends that sleep."""

from collections.abc import Iterable

from paravirt.testing.bench.vbd.target import file_in_memory

from .harness import Answer, Bench, Mark
from .vbd_load import QEMU, BlockCase, Claim, ask_disk

QUESTION = "Are single requests whose both ends sleep answered as fast as QEMU's over vhost-user?"
UNIT = "Thousands a second."


def ask(bench: Bench) -> Iterable[Answer]:
    case = BlockCase(depth=1, wait="sleep")
    with file_in_memory(64 << 20) as path:
        yield from ask_disk(bench, f"file:{path}", [Claim("4 KiB, 1 in flight", case, QEMU, Mark(ratio=1.0))])
