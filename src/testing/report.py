# SPDX-License-Identifier: MIT
"""Measurements of rings and disks as one table."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

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


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def disk_row(result: dict[str, Any], backend_cpu_s: float) -> Measured:
    """A guest's `DiskResult` as a row."""
    return Measured(
        f"disk: {result['n_bytes'] / 1024:g} KiB, {result['depth']} in flight",
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
            f"ring: batches of {result.batch}",
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


def print_table(console: Console, rows: Iterable[Measured]) -> None:
    """The one table of a demonstration."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="What was measured", title_justify="left")
    table.add_column("")
    for heading in ("per second", "MB/s", "p50 µs", "p99 µs", "notified", "suppressed", "CPUs used"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.what,
            f"{row.per_second:,.0f}",
            f"{row.mb_per_s:,.0f}",
            f"{row.p50_us:,.1f}",
            f"{row.p99_us:,.1f}",
            f"{row.sent:,}",
            f"{row.suppressed:,}",
            f"{row.cpu_s / row.seconds:.2f}",
        )
    console.print(table)
    console.print(
        "per second: pairs of request and answer, or reads. notified: the other side slept and was rung; "
        "suppressed: it was awake.\nCPUs used: both sides together; 2.00 is two whole CPUs."
    )
