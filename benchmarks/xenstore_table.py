# SPDX-License-Identifier: MIT
"""The results of `benchmarks.xenstore` as tables."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .harness import ALONE, Answer, Spread
from .xenstore_cells import Row
from .xenstore_daemons import OX, SIDES, C

COLORS = {"met": "green", "missed": "red", "inconclusive": "yellow", "-": "dim"}
SHORT = {C: "C", OX: "ox"}
LEAST_WIDTH = 160


def show(console: Console, rows: Sequence[Row]) -> None:
    """One table for each size of the tree, one for the isolation, and what was noticed."""
    console.width = max(console.width, LEAST_WIDTH)
    compared = [row for row in rows if row.group != "isolation" and row.answers]
    for nodes in dict.fromkeys(row.nodes for row in compared):
        of_size = [row for row in compared if row.nodes == nodes]
        console.print(_comparison(f"{nodes:,} nodes" if nodes else "a guest's ring page", of_size))
    flooded = [row for row in rows if row.group == "isolation" and row.answers]
    if flooded:
        console.print(_isolation(flooded))
    for row in rows:
        if row.notes:
            console.print(f"[dim]{row.name}: {'; '.join(row.notes)}[/]")
    verdicts = [answer.verdict for row in rows for answer in row.answers]
    console.print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("met", "missed", "inconclusive")))


def _comparison(title: str, rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    table.add_column("")
    for name in SIDES:
        for heading in (f"{SHORT.get(name, name)}\nk/s", "p99\nus", "CPU\nus"):
            table.add_column(heading, justify="right")
    for heading in ("ours / C\n(quartiles)", "CPU\nours / C", "ours / ox\n(quartiles)"):
        table.add_column(heading, justify="right")
    table.add_column("marks")
    for row in rows:
        values = [cell for name in SIDES for cell in _values(row, name)]
        ratios = [_ratio(row, C, cpu=False), _ratio(row, C, cpu=True), _ratio(row, OX, cpu=False)]
        table.add_row(row.name, *values, *ratios, judgement(row.answers))
    return table


def _values(row: Row, name: str) -> tuple[str, str, str]:
    """Rate, p99 latency and CPU time of one daemon; or the row's own value."""
    if name in row.values:
        return f"{row.values[name]:.3g}", "", ""
    samples = row.samples.get(name)
    if not samples:
        return "", "", ""
    rate = Spread.of([sample.per_second for sample in samples]).median
    p99 = Spread.of([sample.p99_us for sample in samples]).median
    cpu = [sample.cpu_us for sample in samples if sample.cpu_us is not None]
    return f"{rate / 1e3:.1f}", f"{p99:.0f}", f"{Spread.of(cpu).median:.1f}" if cpu else ""


def _ratio(row: Row, peer: str, *, cpu: bool) -> str:
    for answer in row.answers:
        if answer.peer == peer and ("CPU" in answer.what) == cpu and answer.ratio is not None:
            return f"{answer.ratio.median:.2f}" + ("" if cpu else f" ({answer.ratio.show()})")
    return ""


def judgement(answers: Sequence[Answer]) -> str:
    """All marks of a row in a few words: each verdict, and what it was given for."""
    told: dict[str, list[str]] = {}
    for answer in answers:
        if answer.verdict != "-":
            against = "" if answer.peer == ALONE else f"{SHORT.get(answer.peer, answer.peer)} "
            cpu = "CPU " if "CPU" in answer.what else ""
            told.setdefault(answer.verdict, []).append(f"{against}{cpu}{answer.mark}")
    return "; ".join(f"[{COLORS[verdict]}]{verdict}[/] {', '.join(marks)}" for verdict, marks in told.items())


def _isolation(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Dom0's reads while a guest floods")
    table.add_column("")
    for heading in ("p99 quiet\nus", "p99 flooded\nus", "slowest\nus", "flooded / quiet\n(quartiles)", "memory\nMiB"):
        table.add_column(heading, justify="right")
    table.add_column("marks")
    for row in rows:
        latency, memory = row.answers
        quiet, flooded = row.samples["quiet"], row.samples["flooded"]
        values = [
            f"{Spread.of([sample.p99_us for sample in quiet]).median:.0f}",
            f"{Spread.of([sample.p99_us for sample in flooded]).median:.0f}",
            f"{max(sample.max_us for sample in flooded):.0f}",
            f"{latency.ratio.median:.1f} ({latency.ratio.show()})" if latency.ratio else "",
            f"+{memory.ours.median:.1f}",
        ]
        table.add_row(row.name, *values, judgement(row.answers))
    return table
