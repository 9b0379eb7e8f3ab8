# SPDX-License-Identifier: MIT
"""What commands share that show what changes: intervals, a page that is drawn again and again, latencies."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paravirt.hypervisor.looking import BUCKETS_NS

if TYPE_CHECKING:
    from rich.console import RenderableType

F = TypeVar("F", bound=Callable[..., Any])
BAR_WIDTH = 40


def pace_options(command: F) -> F:
    """Give a command `--seconds` and `--interval`, for `ticks`."""
    options = (
        click.option(
            "--seconds",
            type=click.FloatRange(0, min_open=True),
            metavar="SECONDS",
            help="Stop after so long; otherwise with Ctrl-C.",
        ),
        click.option(
            "--interval",
            type=click.FloatRange(0.01),
            default=1.0,
            show_default=True,
            metavar="SECONDS",
            help="From one look to the next.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def interval_options(command: F) -> F:
    """Give a command `--seconds` and `--interval`, and `--exact`."""
    exact = click.option("--exact", is_flag=True, help="Measure the latency of every message, not of one in 64.")
    return pace_options(exact(command))


def ticks(interval_s: float, seconds: float | None) -> Iterator[None]:
    """Now and after each interval, for `seconds`."""
    start, n = time.monotonic(), 0
    while seconds is None or n * interval_s <= seconds + interval_s / 2:
        time.sleep(max(0.0, start + n * interval_s - time.monotonic()))
        yield
        n += 1


@contextmanager
def page() -> "Iterator[Callable[[Callable[[int], RenderableType]], None]]":
    """What draws a page in the place of the one before: it is given what makes the page for a number of columns. Into a
    pipe it prints one below the other."""
    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as live:
            yield lambda make: live.update(make(console.width), refresh=True)
    else:
        console.width = 1000  # a pipe has no width: never fold
        yield lambda make: console.print(make(console.width))


def histogram(latency: Sequence[int]) -> str | None:
    """A chart, an octave a line, by its lower bound; None when nothing was measured."""
    octaves = [sum(latency[i : i + 4]) for i in range(0, len(latency), 4)]
    filled = [i for i, n in enumerate(octaves) if n]
    if not filled:
        return None
    most = max(octaves)
    return "\n".join(
        f"{time_text(BUCKETS_NS[4 * i]):>8} {'█' * -(-octaves[i] * BAR_WIDTH // most)} {octaves[i]:,}"
        for i in range(filled[0], filled[-1] + 1)
    )


def time_text(ns: int | None) -> str:
    """Three digits and a unit."""
    if ns is None:
        return "-"
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns} ns"
