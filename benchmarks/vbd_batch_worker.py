# SPDX-License-Identifier: MIT
"""A program that `vbd_batch` measures: for each line with a number of seconds on standard input, reads that long.

Arguments: "disk", in a domain, or the socket of an NBD server; bytes that there are. Answers with reads a second.
"""

import random
import sys
import time
from collections.abc import Callable

BATCH = 64
BLOCK = 4096


def of_disk() -> Callable[[list[int]], None]:
    import numpy as np

    from paravirt.frontend.domain import Domain

    disk = Domain.from_environment().open_disk(wait="spin")
    into = np.empty((BATCH, BLOCK), np.uint8)

    def read(offsets: list[int]) -> None:
        disk.read_batch(offsets, BLOCK, into)

    return read


def of_server(socket: str) -> Callable[[list[int]], None]:
    import nbd  # type: ignore[import-not-found]

    handle = nbd.NBD()
    handle.connect_unix(socket)
    buffers = [nbd.Buffer(BLOCK) for _ in range(BATCH)]

    def read(offsets: list[int]) -> None:
        left = [handle.aio_pread(buffer, offset) for buffer, offset in zip(buffers, offsets, strict=True)]
        while left:
            left = [cookie for cookie in left if not handle.aio_command_completed(cookie)]
            if left:
                handle.poll(-1)

    return read


def main(what: str, n_bytes: int) -> None:
    read = of_disk() if what == "disk" else of_server(what)
    chance = random.Random(1)
    batches = [[chance.randrange(n_bytes // BLOCK) * BLOCK for _ in range(BATCH)] for _ in range(256)]
    print(1, flush=True)
    for line in sys.stdin:
        n, start = 0, time.perf_counter()
        end = start + float(line)
        while time.perf_counter() < end:
            read(batches[n % len(batches)])
            n += 1
        print(n * BATCH / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
