# SPDX-License-Identifier: MIT
"""`paravirt bench vbd`: a domain's disk, loaded from inside the domain, and what else moves blocks, in turn."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from paravirt.backend.disks.base import parse_size
from paravirt.cli.bench_vbd_tables import print_changes, print_results
from paravirt.cli.context import Context, emit_json, json_option, pass_context
from paravirt.errors import InvalidRequest, ParavirtError
from paravirt.ring.blkload import RWS, Rw
from paravirt.ring.waiting import Wait
from paravirt.testing.bench.judge import FEWEST_PAIRS
from paravirt.testing.bench.machine import machine
from paravirt.testing.bench.programs import NotHere
from paravirt.testing.bench.rounds import UntaggedBench
from paravirt.testing.bench.vbd.case import MOST_QUEUES, BlockCase
from paravirt.testing.bench.vbd.own import OwnSide, domain_side, inside_side, own_side
from paravirt.testing.bench.vbd.peers import TABLE, open_peers
from paravirt.testing.bench.vbd.plot import check_plot, write_plot
from paravirt.testing.bench.vbd.results import (
    BlockResult,
    BlockSide,
    compare_with,
    from_json,
    measure,
    to_json,
)
from paravirt.testing.bench.vbd.target import Target, target_of

DEFAULT_DISK = "memory:64M"
_TRY_S = 0.01


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A number of bytes, such as 4k."""
    try:
        return None if value is None else parse_size(value, "size")
    except InvalidRequest as error:
        raise click.BadParameter(str(error)) from None


def _peers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    """All peers, or those named."""
    names = tuple(TABLE) if value == "all" else tuple(filter(None, map(str.strip, value.split(","))))
    if unknown := [name for name in names if name not in TABLE]:
        raise click.BadParameter(f"no peer {', '.join(unknown)}; there are {', '.join(TABLE)}")
    return tuple(dict.fromkeys(names))


@click.command("vbd")
@click.argument("disk", default=DEFAULT_DISK)
@click.option("--domain", metavar="DOMAIN", help="DISK is the name of one of its disks, such as xvda.")
@click.option(
    "--rw", type=click.Choice(RWS), default="randread", show_default=True,
    help="One block after the other or at random; rw and randrw mix both.",
)  # fmt: skip
@click.option(
    "--rwmixread", type=click.FloatRange(0, 100), default=50.0, show_default=True, metavar="PERCENT",
    help="Reads in a mix.",
)  # fmt: skip
@click.option("--bs", "block_bytes", callback=_bytes, default="4k", show_default=True, help="Bytes of a request.")
@click.option(
    "--iodepth", "depths", multiple=True, type=click.IntRange(1, 4096), default=(1, 32), show_default=True,
    help="Requests in flight in a queue. May be repeated.",
)  # fmt: skip
@click.option(
    "--queues", type=click.IntRange(1, MOST_QUEUES), default=1, show_default=True,
    help="Queues of the disk, each with a part of the region.",
)  # fmt: skip
@click.option("--size", "n_bytes", callback=_bytes, help="Of the region, from the first byte on.  [default: the disk]")
@click.option(
    "--runtime", "seconds", metavar="SECONDS", type=click.FloatRange(0.01, 3600), default=0.2, show_default=True,
    help="For each sample.",
)  # fmt: skip
@click.option(
    "--pairs", type=click.IntRange(1), default=12, show_default=True,
    help=f"Samples of each side, taken in turn; up to twice as many if fewer than {FEWEST_PAIRS} are comparable.",
)  # fmt: skip
@click.option("--verify", is_flag=True, help="Write patterns to the whole region first, and check every block read.")
@click.option(
    "--wait", type=click.Choice(["adaptive", "spin", "sleep"]), default="adaptive", show_default=True,
    help="How both ends wait. Clients of peers spin, and sleep with sleep.",
)  # fmt: skip
@click.option("--isolated", is_flag=True, help="Isolate the domain that is made for the measurement.")
@click.option(
    "--fence", type=click.Choice(["full", "host"]), default="full", show_default=True,
    help="A barrier in every push, or a system call before every sleep.",
)  # fmt: skip
@click.option(
    "--compare", "peers", callback=_peers, default="", metavar="all|NAME,...",
    help=f"What else to measure, in turn with it: {', '.join(TABLE)}.",
)  # fmt: skip
@click.option(
    "--baseline", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Compare with an earlier --json."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also write charts: FILE.svg, or FILE.html."
)
@json_option
@pass_context
def bench_vbd(
    context: Context,
    disk: str,
    domain: str | None,
    rw: Rw,
    rwmixread: float,
    block_bytes: int,
    depths: tuple[int, ...],
    queues: int,
    n_bytes: int | None,
    seconds: float,
    pairs: int,
    verify: bool,
    wait: Wait,
    isolated: bool,
    fence: str,
    peers: tuple[str, ...],
    baseline: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """A disk, loaded in C from inside a domain, each end on a CPU of its own, beside other ways to move blocks.

    DISK is null:SIZE, memory:SIZE (the default: memory:64M), file:PATH, or another disk as in docs/disks.md: a host and
    a domain are made for it, and go away afterwards. With --domain, or inside of a domain, it is the name of a disk
    that is there; the backend then stays where it is.

    All sides are measured in turn, and only samples with the same distance between the CPUs count. Writes destroy what
    is on the disk, and so does --verify. See docs/benchmarks.md.
    """
    if verify and peers:
        raise click.UsageError("--verify is for this project's disk alone, not with --compare")
    before = None if baseline is None else _read(baseline)
    if plot is not None:
        check_plot(plot)
    target = None if domain is not None or ":" not in disk else target_of(disk)
    if target is None and peers:
        raise click.UsageError("--compare needs to know what the disk is: give null:SIZE, memory:SIZE or file:PATH")
    first = BlockCase(rw, block_bytes, 1, max(n_bytes or block_bytes, block_bytes), queues, rwmixread, wait)
    if verify and not first.writes and (target is None or target.kind not in ("memory", "null")):
        raise click.UsageError(f"--verify writes to all of {disk}: choose a --rw that writes, if that is meant")
    console, about, skipped = Console(highlight=False, stderr=as_json), machine(), dict[str, str]()
    options = ("--fence", fence) if fence != "full" else ()
    with ExitStack() as stack:
        bench = stack.enter_context(_bench(pairs, seconds))
        with console.status("connecting"):
            own = stack.enter_context(_own(context, disk, domain, target, bench, first, isolated, options))
            size = min(own.n_bytes, n_bytes or own.n_bytes)
            sides: list[BlockSide] = [own]
            if target is not None:
                there, skipped = stack.enter_context(open_peers(peers, target, size, bench.cpus, bench.programs))
                sides += there
        cases = [BlockCase(rw, block_bytes, depth, size, queues, rwmixread, wait) for depth in dict.fromkeys(depths)]
        own.verify = verify
        results = _measure(console, bench, sides, disk, cases, skipped)
        verified = own.check() if verify else None
    if bench.untagged:
        skipped["distance of the CPUs"] = bench.untagged
    if as_json:
        emit_json({**to_json(results, about, skipped), "verified": verified})
    else:
        print_results(console, results, seconds)
        if verified is not None:
            console.print(f"{verified} blocks were read and are as they were written", soft_wrap=True)
    for name, why in skipped.items():
        console.print(f"{name}: {why}", style="yellow", markup=False, soft_wrap=True)
    if before is not None:
        print_changes(console, compare_with(results, *before, here=about))
    if plot is not None:
        write_plot(plot, results)


def _bench(pairs: int, seconds: float) -> UntaggedBench:
    try:
        return UntaggedBench(pairs=pairs, seconds=seconds, extra=pairs if pairs >= FEWEST_PAIRS else 0)
    except NotHere as reason:
        raise ParavirtError(str(reason)) from None


def _read(baseline: Path) -> tuple[list[BlockResult], dict[str, str]]:
    try:
        return from_json(baseline.read_text())
    except (InvalidRequest, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{baseline}: {error}") from None


def _own(
    context: Context,
    disk: str,
    domain: str | None,
    target: Target | None,
    bench: UntaggedBench,
    case: BlockCase,
    isolated: bool,
    options: Sequence[str],
) -> AbstractContextManager[OwnSide]:
    """The disk that was meant."""
    if target is not None:
        return own_side(
            target, wait=case.wait, cpus=bench.cpus, writes=case.writes, isolated=isolated, backend_options=options
        )
    if isolated or options:
        raise click.UsageError("--isolated and --fence are for a host that is made for the measurement")
    if domain is not None:
        return domain_side(context.hypervisor, context.rundir, domain, disk, wait=case.wait, cpus=bench.cpus)
    if {"PARAVIRT_FD", "PARAVIRT_SOCKET"} & set(os.environ):
        return inside_side(disk, wait=case.wait, cpus=bench.cpus)
    raise click.UsageError(f"{disk!r} is no disk such as memory:64M or file:PATH; for one of a domain say --domain")


def _measure(
    console: Console,
    bench: UntaggedBench,
    sides: Sequence[BlockSide],
    disk: str,
    cases: Sequence[BlockCase],
    skipped: dict[str, str],
) -> list[BlockResult]:
    """The results, case by case; `skipped` gets why what is missing is."""
    results: list[BlockResult] = []
    columns = (BarColumn(30), TextColumn("{task.percentage:>3.0f} % {task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=1.0)
        for done, case in enumerate(cases):
            there = [sides[0]]
            for side in sides[1:]:
                try:
                    side.measure(case, _TRY_S)
                    there.append(side)
                except NotHere as reason:
                    skipped[side.name] = str(reason)
            step = 1 / len(cases) / (bench.pairs * len(there))
            bar.update(task, description=f"{case.rw}, {case.depth} in flight", completed=done / len(cases))
            results += measure(bench, there, disk, case, partial(bar.advance, task, step))
    return results
