# SPDX-License-Identifier: MIT
"""Measurements of rings and disks as one table."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from paravirt.testing.bench.machine import cpu_seconds as cpu_seconds
from paravirt.testing.ring_bench import RingResult


@dataclass(frozen=True, slots=True)
class Measured:
    """One row: what was measured, how fast, at what cost."""

    what: str
    per_second: float
    mb_per_s: float
    p50_us: float
    p99_us: float
    sent: int
    suppressed: int
    cpu_s: float  # of both sides
    seconds: float


def disk_row(result: dict[str, Any], backend_cpu_s: float) -> Measured:
    """What a guest has measured of its disk as a row."""
    return Measured(
        f"disk, {result['n_bytes'] / 1024:g} KiB x {result['depth']}",
        result["iops"],
        result["mb_per_s"],
        result["p50_us"],
        result["p99_us"],
        result["notifications"],
        result["suppressed"],
        result["cpu_s"] + backend_cpu_s,
        result["seconds"],
    )


def ring_rows(results: Iterable[RingResult]) -> list[Measured]:
    """Measured rings as rows; the round trip is that of a batch alone on the ring."""
    return [
        Measured(
            f"ring, batch {result.batch}",
            result.pairs_per_s,
            result.pairs_per_s * (result.request_bytes + result.response_bytes) / 1e6,
            result.round_trip_p50_ns / 1000,
            result.round_trip_p99_ns / 1000,
            result.notifications_sent,
            result.notifications_suppressed,
            result.cpu_s,
            result.seconds,
        )
        for result in results
    ]


def short(number: float) -> str:
    """A count in at most five characters: 950, 83.7k, 5.40M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.{2 if number < 10 * size else 1 if number < 100 * size else 0}f}{unit}"
    return f"{number:.0f}"


def print_table(console: Console, rows: Iterable[Measured]) -> None:
    """The one table of a demonstration; fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for heading in ("per s", "MB/s", "p50 µs", "p99 µs", "sent", "suppr.", "CPUs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.what,
            short(row.per_second),
            short(row.mb_per_s),
            f"{row.p50_us:.1f}",
            f"{row.p99_us:.1f}",
            short(row.sent),
            short(row.suppressed),
            f"{row.cpu_s / row.seconds:.2f}",
        )
    console.print(table)
    console.print(
        "per s: pairs of request and response, or reads. p50, p99: of a batch alone on the ring; of one read.",
        soft_wrap=True,
    )
    console.print(
        "sent, suppr.: notifications sent and saved, because the other side was awake. CPUs: of both sides.",
        soft_wrap=True,
    )
