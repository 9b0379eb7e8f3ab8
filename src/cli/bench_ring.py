# SPDX-License-Identifier: MIT
"""`paravirt bench ring`: request/response pairs through a ring between two processes."""

from dataclasses import asdict

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from paravirt.cli.context import emit_json, json_option
from paravirt.ring.waiting import Wait
from paravirt.testing.ring_bench import BLKIF_REQUEST_BYTES, BLKIF_RESPONSE_BYTES, RingResult, measure_rings


@click.command("ring")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    default=(1, 8, 32),
    show_default=True,
    help="Requests at a time. May be repeated.",
)
@click.option("--pages", type=click.IntRange(1, 16), default=4, show_default=True, help="Size of the ring.")
@click.option(
    "--request-bytes", type=click.IntRange(1), default=BLKIF_REQUEST_BYTES, show_default=True, help="Size of a request."
)
@click.option(
    "--response-bytes",
    type=click.IntRange(1),
    default=BLKIF_RESPONSE_BYTES,
    show_default=True,
    help="Size of a response.",
)
@click.option(
    "--seconds", type=click.FloatRange(0.1, 3600), default=2.0, show_default=True, help="For each batch size."
)
@click.option(
    "--wait",
    type=click.Choice(["adaptive", "spin", "sleep"]),
    default="adaptive",
    show_default=True,
    help="How an end waits for the other.",
)
@json_option
def bench_ring(
    batches: tuple[int, ...],
    pages: int,
    request_bytes: int,
    response_bytes: int,
    seconds: float,
    wait: Wait,
    as_json: bool,
) -> None:
    """A bare ring between two processes, for each batch size.

    The defaults are blkif's messages. `spin` never sleeps, `sleep` never spins, `adaptive` spins for 50 µs and then
    sleeps. Needs no running host.
    """
    console = Console(highlight=False, stderr=as_json)
    columns = (BarColumn(30), TextColumn("{task.percentage:>3.0f} % {task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        results = measure_rings(
            batches,
            seconds,
            pages=pages,
            request_bytes=request_bytes,
            response_bytes=response_bytes,
            wait=wait,
            progress=lambda label, share: bar.update(task, description=label, completed=share),
        )
    if as_json:
        emit_json([asdict(result) for result in results])
    else:
        _print(console, results)


def _print(console: Console, results: list[RingResult]) -> None:
    first = results[0]
    title = (
        f"{first.request_bytes}-byte requests, {first.response_bytes}-byte responses, {first.pages} pages, {first.wait}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    headings = ("batch", "pairs/s", "p50 µs", "p99 µs", "notified", "suppressed", "sleeps", "CPUs")
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            str(result.batch),
            f"{result.pairs_per_s:,.0f}",
            f"{result.round_trip_p50_ns / 1000:,.2f}",
            f"{result.round_trip_p99_ns / 1000:,.2f}",
            f"{result.notifications_sent:,}",
            f"{result.notifications_suppressed:,}",
            f"{result.sleeps:,}",
            f"{result.cpu_s / result.seconds:.2f}",
        )
    console.print(table)
    console.print(
        "p50, p99: round trip of one batch alone. notified: the other end had to be told; suppressed: it had not.\n"
        "CPUs: of both ends together; 2.00 is two whole CPUs."
    )
