# SPDX-License-Identifier: MIT
"""Counts what a disk is asked, and how long it takes."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from paravirt.backend.disks.base import Disk
from paravirt.backend.disks.filters.around import OPERATIONS, AroundEach, Operation
from paravirt.backend.disks.spec import Opening

WRITE_EVERY_S = 1.0
CLASSES = 40  # powers of two of nanoseconds: the last is from 9 minutes on


@dataclass(slots=True)
class Counters:
    """Of one operation."""

    calls: int = 0
    errors: int = 0
    n_bytes: int = 0  # of calls that succeeded
    busy_ns: int = 0  # inside calls, all together
    longest_ns: int = 0
    latency: list[int] = field(
        default_factory=lambda: [0] * CLASSES
    )  # [i]: calls that took under 2**i ns, not 2**(i-1)

    def add(self, ns: int) -> None:
        self.calls += 1
        self.busy_ns += ns
        self.longest_ns = max(self.longest_ns, ns)
        self.latency[min(ns.bit_length(), CLASSES - 1)] += 1


class StatsFilter(AroundEach):
    """`stats,file=PATH:DISK`: the file has the counters as JSON, at most a second old while calls come and right after
    `close`. Without `file` they are in `counters` alone.
    """

    def __init__(self, below: Disk, path: str | None = None) -> None:
        super().__init__(below)
        self.counters: dict[Operation, Counters] = {operation: Counters() for operation in OPERATIONS}
        self._path = None if path is None else Path(path)
        self._write_at = 0.0
        self._closed = False

    @classmethod
    def open(cls, opening: Opening) -> Self:
        path = opening.options.text("file")
        opening.options.end()
        return cls(opening.below(opening.read_only), path)

    def around(self, operation: Operation, offset: int, length: int) -> AbstractContextManager[object]:
        return self._counted(self.counters[operation], length)

    @contextmanager
    def _counted(self, counters: Counters, length: int) -> Iterator[None]:
        start = time.perf_counter_ns()
        try:
            yield
            counters.n_bytes += length
        except OSError:
            counters.errors += 1
            raise
        finally:
            counters.add(time.perf_counter_ns() - start)
            self._write(time.monotonic())

    def _write(self, now: float) -> None:
        if self._path is None or now < self._write_at:
            return
        self._write_at = now + WRITE_EVERY_S
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        try:
            new.write_text(json.dumps({operation: asdict(counters) for operation, counters in self.counters.items()}))
            new.replace(self._path)  # readers see one state or the next
        except OSError:
            new.unlink(missing_ok=True)  # the disk goes on without its statistics

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._write(self._write_at)
        super().close()
