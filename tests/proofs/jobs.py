# SPDX-License-Identifier: MIT
"""Two cores and a line for each piece of work that is done."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")


def each(do: Callable[[Work], Result], work: Iterable[Work]) -> Iterator[tuple[Work, Result]]:
    """Do all of it, as many at a time as there are cores, and give each with its result as it is done. `do` runs a
    program: it is called in threads. What it raises is raised here."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = {pool.submit(do, piece): piece for piece in work}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            for future in running:
                future.cancel()


def progress(text: str, start: float) -> None:
    print(f"{time.monotonic() - start:6.0f} s  {text}", flush=True)
