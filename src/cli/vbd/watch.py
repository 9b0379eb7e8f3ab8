# SPDX-License-Identifier: MIT
"""`paravirt vbd watch`."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import click

from paravirt.cli.context import Context, new_table, pass_context
from paravirt.cli.live import histogram, interval_options, page, ticks, time_text
from paravirt.cli.ring.rates import EndRates, Watch
from paravirt.cli.vbd.stat import attached, choose, disk_state, rows
from paravirt.host.disk_statistics import LiveDisk, look_at_disks
from paravirt.hypervisor.looking import Looker, Wish
from paravirt.testing.report import short

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = (
    "Disk", "Reads /s", "Writes /s", "Flushes /s", "MB/s read", "MB/s written", "In flight", "Back p50", "Back p99",
    "Front p50", "Front p99", "Sent /s", "Sleeps /s", "Errors /s",
)  # fmt: skip
NARROW = 112
"""Terminals with fewer columns have no room for `WIDE`."""
WIDE = ("Flushes /s", "Sent /s", "Sleeps /s")
TITLES = {"back": "Time at the backend", "front": "Latency at the frontend"}


@dataclass(frozen=True, slots=True)
class Step:
    """A disk, or one queue of it, over an interval."""

    name: str
    disk: LiveDisk
    ends: dict[str, EndRates]
    """By "front" and "back": those that were there before."""


@click.command()
@click.argument("disks", nargs=-1, metavar="[DISK]...")
@click.option("--queues", is_flag=True, help="A line for each queue.")
@interval_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object a line for each disk and interval.")
@pass_context
def watch(
    context: Context,
    disks: tuple[str, ...],
    queues: bool,
    seconds: float | None,
    interval: float,
    exact: bool,
    as_json: bool,
) -> None:
    """Watch each DISK (guest/xvda, vbd/1/51712), or all that are used: requests and bytes a second, latencies.

    Those of the backend are from taking a request to answering it, those of the frontend from sending it to taking the
    answer. Nothing is slowed, but by --exact: two looks at a clock a batch.
    """
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        looker = stack.enter_context(Looker(hypervisor))
        there = rows(hypervisor, looker, attached(context)) if disks else []
        names = [choose(name, there).disk.name for name in disks]
        show = stack.enter_context(_printer(names, as_json))
        watched = DiskWatch(queues=queues)
        for _ in ticks(interval, seconds):
            found = [disk for disk in look_at_disks(looker) if not names or disk.name in names]
            if exact:
                _want_latencies(looker, found)
            steps, is_first = watched.step(found)
            if not is_first:
                show(steps)


class DiskWatch:
    """Compares each look with the one before."""

    def __init__(self, *, queues: bool) -> None:
        """`queues`: each by itself."""
        self._queues = queues
        self._rings = Watch()
        self._is_first = True

    def step(self, disks: list[LiveDisk]) -> tuple[list[Step], bool]:
        """What each did since the look before, and whether there was none."""
        is_first, self._is_first = self._is_first, False
        ends = {ring.place: ends for ring, ends in self._rings.step([ring for disk in disks for ring in disk.queues])}
        steps = [
            Step(name, one, {which: reduce(add, each) for which, each in _by_end(one, ends).items() if each})
            for disk in disks
            for name, one in self._parts(disk)
        ]
        return steps, is_first

    def _parts(self, disk: LiveDisk) -> list[tuple[str, LiveDisk]]:
        if not self._queues:
            return [(disk.name, disk)]
        return [(f"{disk.name} q{one.queues[0].end.queue}", one) for one in disk.split()]


def _by_end(disk: LiveDisk, ends: dict[str, dict[str, EndRates]]) -> dict[str, list[EndRates]]:
    return {
        which: [ends[ring.place][which] for ring in disk.queues if which in ends[ring.place]]
        for which in ("front", "back")
    }


def _want_latencies(looker: Looker, disks: list[LiveDisk]) -> None:
    for disk in disks:
        for end in (*disk.ends("front"), *disk.ends("back")):
            looker.want(end, Wish.LATENCY)


@contextmanager
def _printer(names: list[str], as_json: bool) -> Iterator[Callable[[list[Step]], None]]:
    """What shows a step, of the disks of these names or of all."""
    if as_json:
        yield lambda steps: _print_json(steps, names)
    else:
        with page() as draw:
            yield lambda steps: draw(lambda width: _page(steps, names, width))


def _idle(steps: list[Step], names: list[str]) -> list[str]:
    there = {step.disk.name for step in steps}
    return [name for name in names if name not in there]


def _print_json(steps: list[Step], names: list[str]) -> None:
    for step in steps:
        line: dict[str, Any] = {
            "disk": step.name,
            "domid": step.disk.domid,
            "device_id": step.disk.device_id,
            "state": disk_state(step.disk.queues),
            "interval_s": round(max((rates.interval_s for rates in step.ends.values()), default=0.0), 6),
            "front": None,
            "back": None,
        }
        line.update({end: rates.to_json() for end, rates in step.ends.items()})
        click.echo(json.dumps(line))
    for name in _idle(steps, names):
        click.echo(json.dumps({"disk": name, "state": "not in use"}))


def _page(steps: list[Step], names: list[str], width: int) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    shown = [column for column in COLUMNS if width >= NARROW or column not in WIDE]
    table = new_table((column, column != "Disk") for column in shown)
    table.padding, table.show_edge = (0, 0, 0, 0), False
    for step in steps:
        cells = _cells(step)
        table.add_row(*(Text(cells[column]) for column in shown))
    waiting = (Text(f"{name}: not in use; waiting for it") for name in _idle(steps, names))
    parts: list[RenderableType] = [table, *waiting]
    if len(names) == 1:
        for step in steps:
            parts.extend(
                Text(f"\n{title}{step.name.removeprefix(names[0])}\n{chart}")
                for which, title in TITLES.items()
                if which in step.ends and (chart := histogram(step.ends[which].latency)) is not None
            )
    return Group(*parts)


def _cells(step: Step) -> dict[str, str]:
    """By the names of `COLUMNS`. Requests as the backend counts them, or the frontend where no backend is seen."""
    state = disk_state(step.disk.queues)
    cells = dict.fromkeys(COLUMNS, "-") | {"Disk": step.name if state == "live" else f"{step.name} ({state})"}
    back, front = step.ends.get("back"), step.ends.get("front")
    end = back or front
    if end is not None:
        rate = end.per_s
        for column, name in (("Reads /s", "reads"), ("Writes /s", "writes"), ("Flushes /s", "flushes")):
            cells[column] = short(rate.get(name, 0.0))
        for column, name in (("MB/s read", "read_bytes"), ("MB/s written", "written_bytes")):
            cells[column] = f"{rate.get(name, 0.0) / 1e6:.1f}"
        for column, name in (("Sent /s", "notifications_sent"), ("Sleeps /s", "sleeps"), ("Errors /s", "errors")):
            cells[column] = short(rate.get(name, 0.0))
        size = sum(ring.end.size for ring in step.disk.queues)
        cells["In flight"] = f"{(front or end).outstanding}/{size}"
    for which, rates in (("Back", back), ("Front", front)):
        if rates is not None:
            for name in ("p50", "p99"):
                cells[f"{which} {name}"] = time_text(rates.percentiles[f"{name}_ns"])
    return cells
