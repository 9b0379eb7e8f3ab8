# SPDX-License-Identifier: MIT
"""`paravirt bench ring`: this project's ring, in C and Python, and its peers, measured in turn."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from paravirt.cli.context import emit_json, json_option
from paravirt.errors import InvalidRequest, ParavirtError
from paravirt.ring.waiting import Wait
from paravirt.testing.bench.case import MODES, PROTOCOLS, Case, Mode
from paravirt.testing.bench.judge import FEWEST_PAIRS, Spread
from paravirt.testing.bench.machine import machine
from paravirt.testing.bench.plot import TITLES, check_plot, write_plot
from paravirt.testing.bench.programs import NotHere
from paravirt.testing.bench.registry import TABLE
from paravirt.testing.bench.results import (
    Comparison,
    Result,
    compare_with,
    from_json,
    measure,
    ratio,
    to_json,
)
from paravirt.testing.bench.rounds import UntaggedBench
from paravirt.testing.bench.sides import OWN, FenceChoice, Options, Own, able, open_sides, ring_pages, ring_slots

DEFAULT_PAGES = 4


def _sizes(
    protocol: str, request_bytes: int | None, response_bytes: int | None, slots: int | None, pages: int | None
) -> Case:
    """A case with the sizes that were asked for."""
    if slots is not None and pages is not None:
        raise click.UsageError("--slots and --pages both say how large the ring is: give one")
    request, response = PROTOCOLS[protocol]
    request, response = request_bytes or request, response_bytes or response
    if slots is None:
        slots = ring_slots(pages or DEFAULT_PAGES, request, response)
    case = Case("echo", 1, request, response, slots, slots)
    ring_pages(slots, request, response)
    return case


def _peers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """All peers, or those named."""
    names = tuple(TABLE) if value == "all" else tuple(filter(None, map(str.strip, value.split(","))))
    if unknown := [name for name in names if name not in TABLE]:
        raise click.BadParameter(f"no peer {', '.join(unknown)}; there are {', '.join(TABLE)}")
    return names


@click.command("ring")
@click.option(
    "--side", "own", multiple=True, type=click.Choice(OWN), default=("c", "python"), show_default=True,
    help="This project's ring, batches copied in or messages written in place. May be repeated.",
)  # fmt: skip
@click.option(
    "--peers", callback=_peers, default="", metavar="all|NAME,...",
    help=f"What else to measure, in turn with it: {', '.join(TABLE)}.",
)  # fmt: skip
@click.option(
    "--mode", "modes", multiple=True, type=click.Choice(MODES), default=("echo",), show_default=True,
    help="Pairs with many in flight, requests alone, or a batch alone and back. May be repeated.",
)  # fmt: skip
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1), default=(1, 8, 32), show_default=True,
    help="Messages in one call. May be repeated.",
)  # fmt: skip
@click.option(
    "--protocol", type=click.Choice(list(PROTOCOLS)), default="blkif", show_default=True, help="Whose messages."
)
@click.option("--request-bytes", type=click.IntRange(1), help="Another size of requests.")
@click.option("--response-bytes", type=click.IntRange(1), help="Another size of responses.")
@click.option("--pages", type=click.IntRange(1, 16), help=f"Size of the ring.  [default: {DEFAULT_PAGES}]")
@click.option("--slots", type=click.IntRange(1), help="Size of the ring, in messages: a power of two.")
@click.option("--in-flight", type=click.IntRange(1), help="Requests without a response, at most.  [default: all slots]")
@click.option(
    "--wait", type=click.Choice(["adaptive", "spin", "sleep"]), default="adaptive", show_default=True,
    help="How an end waits for the other. Peers wait their own way; those in C spin.",
)  # fmt: skip
@click.option(
    "--fence", type=click.Choice(["full", "asymmetric"]), default="full", show_default=True,
    help="A barrier in every push, or a system call before every sleep.",
)  # fmt: skip
@click.option(
    "--processes", type=click.IntRange(1, 2), default=2, show_default=True, help="Of this project: 1 is two threads."
)
@click.option(
    "--seconds",
    metavar="SECONDS",
    type=click.FloatRange(0.01, 600),
    default=0.1,
    show_default=True,
    help="For each sample.",
)
@click.option(
    "--pairs", type=click.IntRange(1), default=12, show_default=True,
    help=f"Samples of each side, taken in turn; up to twice as many if fewer than {FEWEST_PAIRS} are comparable.",
)  # fmt: skip
@click.option(
    "--baseline", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Compare with an earlier --json."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also write a chart: FILE.svg, or FILE.html."
)
@json_option
def bench_ring(
    own: tuple[Own, ...],
    peers: tuple[str, ...],
    modes: tuple[Mode, ...],
    batches: tuple[int, ...],
    protocol: str,
    request_bytes: int | None,
    response_bytes: int | None,
    pages: int | None,
    slots: int | None,
    in_flight: int | None,
    wait: Wait,
    fence: FenceChoice,
    processes: int,
    seconds: float,
    pairs: int,
    baseline: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """A bare ring between two ends, each on a CPU of its own, beside other ways to pass messages.

    All sides are measured in turn, and each sample is tagged with how far apart the two CPUs were at that moment. Only
    samples of one distance count. A result is inconclusive when those are too few, or when others used the machine.
    Needs no running host. See docs/benchmarks.md.
    """
    sizes = _sizes(protocol, request_bytes, response_bytes, slots, pages)
    most = sizes.slots if in_flight is None else in_flight
    cases = [
        Case(mode, batch, sizes.request_bytes, sizes.response_bytes, sizes.slots, most)
        for mode in dict.fromkeys(modes)
        for batch in dict.fromkeys(batches)
    ]
    before = None if baseline is None else _read(baseline)
    if plot is not None:
        check_plot(plot, list(dict.fromkeys(modes)))
    console, about = Console(highlight=False, stderr=as_json), machine()
    options = Options(wait, fence, processes)
    results, skipped = _measure(console, own, peers, cases, options, pairs, seconds)
    if not results:
        raise ParavirtError("nothing could be measured: " + "; ".join(skipped.values()))
    if as_json:
        emit_json(to_json(results, about, skipped))
    else:
        _print(console, results, options, seconds)
    for name, why in skipped.items():
        console.print(f"{name}: {why}", style="yellow", markup=False, soft_wrap=True)
    if before is not None:
        _print_changes(console, compare_with(results, *before, here=about))
    if plot is not None:
        write_plot(plot, results)


def _read(baseline: Path) -> tuple[list[Result], dict[str, str]]:
    try:
        return from_json(baseline.read_text())
    except (InvalidRequest, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{baseline}: {error}") from None


def _measure(
    console: Console,
    own: Sequence[Own],
    peers: Sequence[str],
    cases: Sequence[Case],
    options: Options,
    pairs: int,
    seconds: float,
) -> tuple[list[Result], dict[str, str]]:
    """The results, case by case, and why what is missing is."""
    columns = (BarColumn(30), TextColumn("{task.percentage:>3.0f} % {task.description}"))
    results: list[Result] = []
    skipped: dict[str, str] = {}
    names = list(dict.fromkeys(own))
    try:
        bench = UntaggedBench(pairs=pairs, seconds=seconds, extra=pairs if pairs >= FEWEST_PAIRS else 0)
    except NotHere as reason:
        raise ParavirtError(str(reason)) from None
    with bench, Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=1.0)
        with open_sides(names, peers, cases[0], options, bench.cpus, bench.programs) as sides:
            for done, case in enumerate(cases):
                there, missing = able(sides, case)
                skipped |= missing
                if not there:
                    continue
                share = 1 / len(cases)
                step = share / (pairs * len(there))
                bar.update(task, description=f"{case.mode}, batches of {case.batch}", completed=done * share)
                results += measure(bench, there, case, options, partial(bar.advance, task, step))
    if bench.untagged:
        skipped["distance of the CPUs"] = bench.untagged
    return results, skipped


def _print(console: Console, results: Sequence[Result], options: Options, seconds: float) -> None:
    case = results[0].case
    console.print(
        f"{case.request_bytes}-byte requests, {case.response_bytes}-byte responses, {case.slots} slots, "
        f"{case.in_flight} in flight; {options.wait}, {options.fence} fence, "
        + ("two processes" if options.processes == 2 else "two threads"),
        soft_wrap=True,
    )
    for mode, of_mode in groupby(results, key=lambda result: result.case.mode):
        _print_mode(console, mode, list(of_mode), seconds)


def _print_mode(console: Console, mode: Mode, results: list[Result], seconds: float) -> None:
    """One table: of rates, or of round trips."""
    first = results[0].side
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{mode}: {TITLES[mode]}",
        title_justify="left",
    )
    table.add_column("batch", justify="right")
    table.add_column("side")
    measured = ("p50", "p99") if mode == "pingpong" else ("median", "quartiles", f"x {first}")
    for heading in (*measured, "CPUs"):
        table.add_column(heading, justify="right")
    table.add_column("samples", no_wrap=True)
    for _, of_case in groupby(results, key=lambda result: result.case):
        sides = list(of_case)
        for result in sides:
            table.add_row(*_row(result, sides[0], seconds))
    console.print(table)
    for result in results:
        notified, sleeps = result.counted().spread("notified"), result.counted().spread("sleeps")
        if notified and sleeps:
            what = f"{notified.median:.2g} notifications and {sleeps.median:.2g} sleeps a message"
            console.print(f"[dim]{result.side}, batches of {result.case.batch}: {what}[/]", soft_wrap=True)
    for batch, why in {result.case.batch: result.doubt for result in results if result.doubt}.items():
        console.print(f"[yellow]batches of {batch} are inconclusive: {why}[/]", soft_wrap=True)


def _row(result: Result, reference: Result, seconds: float) -> list[str]:
    counted = result.counted()
    rate, cpu_s = counted.spread("messages_per_s"), counted.spread("cpu_s")
    p50, p99 = counted.spread("p50_ns"), counted.spread("p99_ns")
    times = ratio(result, reference)
    if result.case.mode == "pingpong":
        shown = [f"{value.median / 1000:,.2f}" if value else "" for value in (p50, p99)]
    else:
        shown = [
            f"{rate.median / 1e6:.3g}" if rate else "",
            rate.show(1e6) if rate else "",
            f"{times.median:.2f}" if times and result.side != reference.side else "",
        ]
    shown.append(f"{cpu_s.median / seconds:.2f}" if cpu_s else "")
    samples = f"{len(counted.rounds)}/{len(result.rounds)} {result.distance}"
    return [str(result.case.batch), result.side, *shown, samples]


def _print_changes(console: Console, comparisons: Sequence[Comparison]) -> None:
    """How the results differ from the baseline, and whether that is more than noise. A ratio above 1 is faster."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="speed beside the baseline", title_justify="left")
    for heading, right in (("mode", False), ("batch", True), ("side", False), ("ratio", True), ("from", True)):
        table.add_column(heading, justify="right" if right else "left")
    table.add_column("that is")
    for one in comparisons:
        seen, case = one.ratio, one.result.case
        table.add_row(case.mode, str(case.batch), one.result.side, *_ratio(seen), _change(one))
    console.print(table)


def _ratio(seen: Spread | None) -> tuple[str, str]:
    return (f"{seen.median:.2f}", seen.show()) if seen else ("", "")


def _change(one: Comparison) -> str:
    if one.change == "new":
        return "not in the baseline"
    return f"{one.change}: {one.why}" if one.why else one.change
