# SPDX-License-Identifier: MIT
"""What `paravirt bench vbd` prints: tables of results, a histogram, what has changed."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from paravirt.testing.bench.judge import Spread
from paravirt.testing.bench.rounds import ratio_of
from paravirt.testing.bench.vbd.results import BlockComparison, BlockResult

_BAR = 40


def print_results(console: Console, results: Sequence[BlockResult], seconds: float) -> None:
    """A table, a line about each disk of ours, and how long its requests took."""
    case = results[0].case
    mixed = f" ({case.read_percent:g} % reads)" if case.rw in ("rw", "randrw") else ""
    queues = f", {case.queues} queues" if case.queues > 1 else ""
    console.print(
        f"{results[0].disk}: {case.rw}{mixed}, {short_bytes(case.block_bytes)} requests in "
        f"{short_bytes(case.n_bytes)}{queues}; {case.wait}; samples of {seconds:g} s",
        soft_wrap=True,
        markup=False,
    )
    first = results[0].side
    for _, of_case in groupby(results, key=lambda result: result.case):
        _print_case(console, list(of_case))
    console.print("CPU: µs of each end for an I/O, which are seconds for a million.", soft_wrap=True)
    for result in results:
        notified, sleeps = result.counted().spread("notified"), result.counted().spread("sleeps")
        if notified and sleeps:
            what = f"{notified.median:.2g} notifications and {sleeps.median:.2g} sleeps of the frontend an I/O"
            console.print(f"[dim]{result.side}, {result.case.depth} in flight: {what}[/]", soft_wrap=True)
    for depth, why in {result.case.depth: result.doubt for result in results if result.doubt}.items():
        console.print(f"[yellow]{depth} in flight is inconclusive: {why}[/]", soft_wrap=True)
    for result in results:
        if result.side == first:
            print_histogram(console, result)


def short_bytes(n: int) -> str:
    """4 KiB, 64 MiB, 1000 bytes."""
    for size, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n >= size and n % size == 0:
            return f"{n // size} {name}"
    return f"{n} bytes"


def _print_case(console: Console, sides: Sequence[BlockResult]) -> None:
    """A table of all sides of one case, which were measured in the same rounds."""
    first, counted = sides[0], sides[0].counted()
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title=f"{first.case.depth} in flight ({len(counted.rounds)} of {len(first.rounds)} samples, {first.distance})",
        title_justify="left",
    )
    table.add_column("side", no_wrap=True)
    for heading in ("kIOPS", "quartiles", f"x {first.side}", "MB/s", "p50 µs", "p99 µs", "front CPU", "back CPU"):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for result in sides:
        table.add_row(*_row(result, first))
    console.print(table)


def _row(result: BlockResult, reference: BlockResult) -> list[str]:
    counted = result.counted()
    iops, times = counted.spread("iops"), ratio_of(result, reference, lambda sample: sample.iops)
    return [
        result.side,
        _three(iops, 1e3),
        iops.show(1e3) if iops else "",
        f"{times.median:.2f}" if times and result.side != reference.side else "",
        _three(counted.spread("mb_per_s")),
        _three(counted.spread("p50_ns"), 1e3),
        _three(counted.spread("p99_ns"), 1e3),
        _three(counted.spread("front_cpu_us")),
        _three(counted.spread("back_cpu_us")),
    ]


def _three(spread: Spread | None, unit: float = 1.0) -> str:
    """The median in three digits, and without a power of ten."""
    if spread is None:
        return "-"
    median = spread.median / unit
    return f"{median:.0f}" if median >= 100 else f"{median:.3g}" if median >= 0.001 else "0"


def print_histogram(console: Console, result: BlockResult) -> None:
    """How many requests took how long: a row for each power of two, from the first to the last with one in 10,000."""
    powers: dict[int, int] = {}
    for ns, n in result.buckets:
        power = max(0, ns.bit_length() - 1)
        powers[power] = powers.get(power, 0) + n
    total = sum(powers.values())
    shown = [power for power, n in powers.items() if n * 10_000 >= total]
    if not shown:
        return
    console.print(f"\n{result.side}, {result.case.depth} in flight: share of the requests that took so long, µs")
    most = max(powers.values())
    for power in range(min(shown), max(shown) + 1):
        n = powers.get(power, 0)
        bar = "█" * round(_BAR * n / most)
        console.print(f"{2**power / 1e3:>10,.3g} - {2 ** (power + 1) / 1e3:<10,.3g} {n / total:>7.2%} {bar}")


def print_changes(console: Console, comparisons: Iterable[BlockComparison]) -> None:
    """How the results differ from the baseline, and whether that is more than noise. A ratio above 1 is faster."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="speed beside the baseline", title_justify="left")
    for heading, right in (("in flight", True), ("side", False), ("ratio", True), ("from", True), ("that is", False)):
        table.add_column(heading, justify="right" if right else "left")
    for one in comparisons:
        seen = one.ratio
        shown = (f"{seen.median:.2f}", seen.show()) if seen else ("", "")
        change = "not in the baseline" if one.change == "new" else one.change
        table.add_row(
            str(one.result.case.depth), one.result.side, *shown, f"{change}: {one.why}" if one.why else change
        )
    console.print(table)
