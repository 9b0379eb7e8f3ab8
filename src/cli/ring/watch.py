# SPDX-License-Identifier: MIT
"""`paravirt ring watch`."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from paravirt.cli.context import Context, new_table, pass_context
from paravirt.cli.live import histogram, interval_options, page, ticks, time_text
from paravirt.cli.ring.list import state
from paravirt.cli.ring.rates import EndRates, Watch
from paravirt.hypervisor.looking import LiveRing, Looker, Wish
from paravirt.testing.report import short

if TYPE_CHECKING:
    from rich.console import RenderableType

Step = list[tuple[LiveRing, dict[str, EndRates]]]
COLUMNS = (
    "Ring", "End", "Requests /s", "Batch", "In flight", "Sent /s", "Sup- pressed /s", "Spurious /s", "Spins /s",
    "Sleeps /s", "p50", "p99", "Max",
)  # fmt: skip
NARROW = 100
"""Terminals with fewer columns have no room for `WIDE`."""
WIDE = ("Spurious /s", "Spins /s", "Max")


@click.command()
@click.argument("ring", required=False)
@interval_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object a line for each ring and interval.")
@pass_context
def watch(
    context: Context, ring: str | None, seconds: float | None, interval: float, exact: bool, as_json: bool
) -> None:
    """Watch RING (vbd/1/51712, or 1:8), or all: rates, what is in flight, notifications, spins, sleeps, latencies.

    A frontend's latency is the time from pushing a request to taking a response, a backend's from taking to pushing;
    the k-th of the one kind is compared with the k-th of the other. Nothing is slowed, but by --exact: two looks at a
    clock a batch.
    """
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        looker = stack.enter_context(Looker(hypervisor))
        chosen = None if ring is None else looker.find(ring)
        show = stack.enter_context(_printer(as_json))
        watched = Watch()
        for _ in ticks(interval, seconds):
            rings = [found for found in looker.look() if chosen is None or found.succeeds(chosen)]
            if exact:
                _want_latencies(looker, rings)
            step = watched.step(rings)
            name = None if chosen is None else chosen.name
            if name is not None and not rings:
                show([], name)
            elif any(ends for _, ends in step):
                show(step, name)


def _want_latencies(looker: Looker, rings: list[LiveRing]) -> None:
    for ring in rings:
        for end in ring.ends.values():
            looker.want(end, Wish.LATENCY)


@contextmanager
def _printer(as_json: bool) -> Iterator[Callable[[Step, str | None], None]]:
    """What shows a step, of one ring (its name) or of all."""
    if as_json:
        yield _print_json
    else:
        with page() as draw:
            yield lambda step, name: draw(lambda width: _page(step, name, width))


def _print_json(step: Step, name: str | None) -> None:
    for ring, ends in step:
        interval_s = max((rates.interval_s for rates in ends.values()), default=0.0)
        line: dict[str, Any] = {
            "ring": ring.name,
            "place": ring.place,
            "state": state(ring),
            "interval_s": round(interval_s, 6),
            "size": ring.end.size,
            "front": None,
            "back": None,
        }
        line.update({end: rates.to_json() for end, rates in ends.items()})
        click.echo(json.dumps(line))
    if not step:
        click.echo(json.dumps({"ring": name, "state": "gone"}))


def _page(step: Step, name: str | None, width: int) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    if not step:
        return Text(f"{name}: gone; waiting for it")
    shown = [column for column in COLUMNS if width >= NARROW or column not in WIDE]
    table = new_table((column, column not in ("Ring", "End")) for column in shown)
    table.padding, table.show_edge = (0, 0, 0, 0), False
    for ring, ends in step:
        for which, rates in ends.items():
            cells = _cells(ring, which, rates)
            table.add_row(*(Text(cells[column]) for column in shown))
    if name is None:
        return table
    charts = [Text(f"\n{title}\n{chart}") for ring, ends in step for title, chart in _charts(ends)]
    return Group(table, *charts)


def _cells(ring: LiveRing, which: str, rates: EndRates) -> dict[str, str]:
    """By the names of `COLUMNS`."""
    batch = rates.mean_batch
    values = (
        ring.name,
        which if state(ring) == "live" else f"{which} ({state(ring)})",
        short(rates.per_s["requests"]),
        "-" if batch is None else f"{batch:.1f}",
        f"{rates.outstanding}/{ring.end.size}",
        *(short(rates.per_s[f"notifications_{name}"]) for name in ("sent", "suppressed", "spurious")),
        *(short(rates.per_s[name]) for name in ("spins", "sleeps")),
        *(time_text(rates.percentiles[name]) for name in ("p50_ns", "p99_ns", "max_ns")),
    )
    return dict(zip(COLUMNS, values, strict=True))


def _charts(ends: dict[str, EndRates]) -> Iterator[tuple[str, str]]:
    """A histogram for each end that has measured something: an octave a line, by its lower bound."""
    titles = {"front": "Latency at the front end", "back": "Time at the back end"}
    for which, rates in ends.items():
        chart = histogram(rates.latency)
        if chart is not None:
            yield titles[which], chart
