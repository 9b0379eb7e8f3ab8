# SPDX-License-Identifier: MIT
"""`paravirt bench vif`: frames from a guest to its backend, to another guest, there and back, beside other ways."""

from collections.abc import Sequence
from contextlib import ExitStack
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
from paravirt.testing.bench.judge import FEWEST_PAIRS, Spread
from paravirt.testing.bench.machine import machine
from paravirt.testing.bench.programs import NotHere
from paravirt.testing.bench.rounds import UntaggedBench, ratio_of
from paravirt.testing.bench.vif.case import WAYS, VifCase, Way
from paravirt.testing.bench.vif.own import own_side
from paravirt.testing.bench.vif.peers import TABLE, open_peers
from paravirt.testing.bench.vif.plot import check_plot, write_plot
from paravirt.testing.bench.vif.results import (
    VifComparison,
    VifResult,
    VifSide,
    compare_with,
    from_json,
    measure,
    to_json,
)

_TRY_S = 0.05


def _peers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """All peers, or those named."""
    names = tuple(TABLE) if value == "all" else tuple(filter(None, map(str.strip, value.split(","))))
    if unknown := [name for name in names if name not in TABLE]:
        raise click.BadParameter(f"no peer {', '.join(unknown)}; there are {', '.join(TABLE)}")
    return tuple(dict.fromkeys(names))


@click.command("vif")
@click.option(
    "--way", "ways", multiple=True, type=click.Choice(WAYS), default=("wire", "switch", "echo"), show_default=True,
    help="From a guest to its backend, through the switch too, to another guest, there and back; or bursts by Python. "
    "May be repeated.",
)  # fmt: skip
@click.option(
    "--size", "sizes", multiple=True, type=click.IntRange(0, 65535), default=(64, 1500), show_default=True,
    help="Bytes of a frame; 0: a mix of 64, 570 and 1518. May be repeated.",
)  # fmt: skip
@click.option(
    "--burst", "bursts", multiple=True, type=click.IntRange(1, 256), default=(64,), show_default=True,
    help="Frames that are sent together. May be repeated. An echo of one size is of 1 frame, unless this is given.",
)  # fmt: skip
@click.option(
    "--pages", type=click.Choice(["1", "2", "4", "8", "16"]), default="4", show_default=True, help="Of each ring."
)
@click.option(
    "--wait", type=click.Choice(["adaptive", "spin", "sleep"]), default="adaptive", show_default=True,
    help="How both ends wait. Peers of DPDK spin.",
)  # fmt: skip
@click.option(
    "--runtime", "seconds", metavar="SECONDS", type=click.FloatRange(0.01, 3600), default=0.2, show_default=True,
    help="For each sample.",
)  # fmt: skip
@click.option(
    "--pairs", type=click.IntRange(1), default=12, show_default=True,
    help=f"Samples of each side, taken in turn; up to twice as many if fewer than {FEWEST_PAIRS} are comparable.",
)  # fmt: skip
@click.option("--verify", is_flag=True, help="Fill every frame, and check what guests take.")
@click.option(
    "--compare", "peers", callback=_peers, default="", metavar="all|NAME,...",
    help=f"What else to measure, in turn with the wire: {', '.join(TABLE)}.",
)  # fmt: skip
@click.option(
    "--baseline", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Compare with an earlier --json."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also write a chart: FILE.svg, or FILE.html."
)
@json_option
@click.pass_context
def bench_vif(
    click_context: click.Context,
    ways: tuple[Way, ...],
    sizes: tuple[int, ...],
    bursts: tuple[int, ...],
    pages: str,
    wait: Wait,
    seconds: float,
    pairs: int,
    verify: bool,
    peers: tuple[str, ...],
    baseline: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Frames over a network device, sent and taken in C, each end on a CPU of its own, beside other ways to move them.

    A process with two guests and a bridge is made for it. All sides are measured in turn, and only samples with the
    same distance between the CPUs count. See docs/benchmarks.md.
    """
    before = None if baseline is None else _read(baseline)
    if plot is not None:
        check_plot(plot)
    chosen = click_context.get_parameter_source("bursts") is not click.core.ParameterSource.DEFAULT
    cases = [
        VifCase(way, size, burst if chosen or way != "echo" else 1, int(pages), wait)
        for way in dict.fromkeys(ways)
        for size in dict.fromkeys(sizes)
        for burst in dict.fromkeys(bursts)
    ]
    console, about = Console(highlight=False, stderr=as_json), machine()
    with ExitStack() as stack:
        bench = stack.enter_context(_bench(pairs, seconds))
        with console.status("connecting"):
            own = stack.enter_context(own_side(cases[0], bench.cpus, verify=verify))
            there, skipped = open_peers(peers, bench.cpus, bench.programs)
        results = _measure(console, bench, own, there, cases, skipped)
    if bench.untagged:
        skipped["distance of the CPUs"] = bench.untagged
    if as_json:
        emit_json(to_json(results, about, skipped))
    else:
        _print(console, results, seconds)
    for name, why in skipped.items():
        console.print(f"{name}: {why}", style="yellow", markup=False, soft_wrap=True)
    if before is not None:
        _print_changes(console, compare_with(results, *before, here=about))
    if plot is not None:
        write_plot(plot, results)


def _bench(pairs: int, seconds: float) -> UntaggedBench:
    try:
        return UntaggedBench(pairs=pairs, seconds=seconds, extra=pairs if pairs >= FEWEST_PAIRS else 0)
    except NotHere as reason:
        raise ParavirtError(str(reason)) from None


def _read(baseline: Path) -> tuple[list[VifResult], dict[str, str]]:
    try:
        return from_json(baseline.read_text())
    except (InvalidRequest, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{baseline}: {error}") from None


def _measure(
    console: Console,
    bench: UntaggedBench,
    own: VifSide,
    peers: Sequence[VifSide],
    cases: Sequence[VifCase],
    skipped: dict[str, str],
) -> list[VifResult]:
    """The results, case by case; `skipped` gets why what is missing is."""
    results: list[VifResult] = []
    columns = (BarColumn(30), TextColumn("{task.percentage:>3.0f} % {task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=1.0)
        for done, case in enumerate(cases):
            there = [own]
            for side in peers if case.way == "wire" else ():
                try:
                    side.measure(case, _TRY_S)
                    there.append(side)
                except NotHere as reason:
                    skipped[side.name] = str(reason)
            step = 1 / len(cases) / (bench.pairs * len(there))
            bar.update(task, description=f"{case.way}, {case.size} bytes", completed=done / len(cases))
            results += measure(bench, there, case, partial(bar.advance, task, step))
    return results


def _print(console: Console, results: Sequence[VifResult], seconds: float) -> None:
    first = results[0].case
    console.print(f"network devices: rings of {first.pages} pages; {first.wait}; samples of {seconds:g} s")
    for case, of_case in groupby(results, key=lambda result: result.case):
        _print_case(console, case, list(of_case))
    console.print("sender, other: CPU time of each end for a packet, ns.")


def _print_case(console: Console, case: VifCase, sides: Sequence[VifResult]) -> None:
    """A table of all sides of one case, which were measured in the same rounds."""
    first, counted = sides[0], sides[0].counted()
    what = f"{case.way}, {case.size or 'a mix of'} bytes, bursts of {case.burst}"
    title = f"{what} ({len(counted.rounds)} of {len(first.rounds)} samples, {first.distance})"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    table.add_column("side", no_wrap=True)
    for heading in ("Mpps", "quartiles", "x ours", "Gbit/s", "p50 µs", "p99 µs", "sender", "other"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in sides:
        table.add_row(*_row(result, first))
    console.print(table)
    for result in sides:
        lost = result.counted().spread("dropped")
        if lost is not None and lost.median > 0:
            console.print(f"{result.side}: {lost.median:.1%} dropped")
    if first.doubt:
        console.print(f"[yellow]inconclusive: {first.doubt}[/]", soft_wrap=True)


def _row(result: VifResult, reference: VifResult) -> list[str]:
    counted = result.counted()
    pps = counted.spread("pps")
    times = ratio_of(result, reference, lambda sample: sample.pps) if result is not reference else None
    return [
        result.side,
        _three(pps, 1e6),
        pps.show(1e6) if pps else "",
        f"{times.median:.2f}" if times else "",
        *(_three(counted.spread(name), unit) for name, unit in _SHOWN),
    ]


_SHOWN = (("gbit_per_s", 1.0), ("p50_ns", 1e3), ("p99_ns", 1e3), ("front_cpu_ns", 1.0), ("back_cpu_ns", 1.0))


def _three(spread: Spread | None, unit: float = 1.0) -> str:
    if spread is None:
        return ""
    median = spread.median / unit
    return f"{median:.0f}" if median >= 100 else f"{median:.3g}"


def _print_changes(console: Console, comparisons: Sequence[VifComparison]) -> None:
    """How the results differ from the baseline, and whether that is more than noise. A ratio above 1 is faster."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="speed beside the baseline", title_justify="left")
    for heading in ("way", "bytes", "side", "ratio", "that is"):
        table.add_column(heading, justify="right" if heading in ("bytes", "ratio") else "left")
    for one in comparisons:
        change = "not in the baseline" if one.change == "new" else one.change
        table.add_row(
            one.result.case.way,
            str(one.result.case.size or "mix"),
            one.result.side,
            f"{one.ratio.median:.2f}" if one.ratio else "",
            f"{change}: {one.why}" if one.why else change,
        )
    console.print(table)
