# SPDX-License-Identifier: MIT
"""Our xenstored beside Debian's C xenstored and oxenstored: `python -m benchmarks.xenstore`, see its --help.

Every daemon gets the same tree and then every load in turn (A B C, B C A, ...), all on one CPU, the load on the other.
Ratios are ours to theirs, round by round. The daemon's CPU time for an operation is the steadiest number.
"""

import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
from rich.console import Console

from paravirt.errors import ParavirtError

from .harness import Answer, Bench, Mark, NotHere, OutsideLoad, Pair, Spread, alone, cpu_seconds, machine
from .xenstore_cells import LARGE, Cell, Claim, Row, cells, judge, missed
from .xenstore_daemons import OURS, OX, SIDES, C, Load, LoadGenerator, Running, available, started
from .xenstore_isolation import isolation
from .xenstore_ring import ring
from .xenstore_table import judgement, show

QUESTION = "Is our xenstored as fast as the C xenstored and oxenstored?"
UNIT = "Thousands a second, or what the line says."

GROUPS = ("populate", "read", "write", "directory", "transaction", "watch", "other", "domains", "isolation", "ring")
ASKED = ("populate", "read", "write", "directory", "transaction", "watch")
"""What `python -m benchmarks` asks, of a tree of ASKED_NODES; the rest takes longer."""
ASKED_NODES = 10_000
POPULATE_ROUNDS = 3
POPULATE_DEPTH = 32
BYTES_A_NODE = Mark(most_value=400, unit=1, unit_name="bytes")
DOMAINS = 500
DOMAINS_LIMIT_S = 30.0
DOMAINS_MARK = Mark(most_value=10.0, unit=1, unit_name="s")
QUICK_PAIRS, QUICK_SECONDS, QUICK_NODES, QUICK_DOMAINS = 2, 0.05, 1000, 20

BREAKS = (RuntimeError, subprocess.TimeoutExpired, ParavirtError)


class Comparison:
    """All daemons, one tree size, cell by cell."""

    def __init__(
        self,
        bench: Bench,
        generator: LoadGenerator,
        nodes: int,
        *,
        names: Sequence[str] = SIDES,
        arguments: Sequence[str] = (),
        domains: int = DOMAINS,
        verify: bool = False,
    ) -> None:
        """`names`: which daemons, ours among them. `arguments`: more of our `paravirt xenstored`."""
        self._bench = bench
        self._generator = generator
        self._nodes = nodes
        self._names = list(names)
        self._arguments = arguments
        self._n_domains = domains
        self._verify = verify

    def rows(self, groups: Sequence[str]) -> Iterator[Row]:
        """Measure the groups that are named, row by row."""
        with ExitStack() as stack:
            rounds = min(POPULATE_ROUNDS, self._bench.pairs) if "populate" in groups else 1
            daemons, made = self._populate(stack, rounds)
            if "populate" in groups:
                yield from made
            for cell in cells(self._nodes):
                if cell.group in groups:
                    yield self._measure_or_tell(cell, daemons)
            if "domains" in groups:
                yield self._domains(daemons)

    def _load(self, mode: str, daemon: Running, **options: float) -> Load:
        return self._generator.run(mode, daemon, nodes=self._nodes, verify=self._verify, **options)

    def _populate(self, stack: ExitStack, rounds: int) -> tuple[list[Running], list[Row]]:
        """Fill fresh daemons, some rounds of them; those of the last round stay."""
        row = Row("populate", "populate", self._nodes, {name: [] for name in self._names})
        memory = Row("populate", "memory, bytes a node", self._nodes)
        bytes_a_node: dict[str, list[float]] = {name: [] for name in self._names}
        tags, outside = list[float](), OutsideLoad()
        kept: list[Running] = []
        for i in range(rounds):
            daemons = {}
            with ExitStack() as scratch:
                for name in self._names[i % len(self._names) :] + self._names[: i % len(self._names)]:
                    owner = stack if i == rounds - 1 else scratch
                    daemon = owner.enter_context(started(name, cpu=self._bench.cpus[0], arguments=self._arguments))
                    before = daemon.rss_bytes()
                    tags.append(self._bench.cache_line_ns())
                    load = self._load("populate", daemon, depth=POPULATE_DEPTH)
                    row.samples[name].append(load)
                    bytes_a_node[name].append((daemon.rss_bytes() - before) / load.operations)
                    daemons[name] = daemon
            kept = [daemons[name] for name in self._names]
        tag = median(tags)  # of rounds that last for seconds there are too few to tell distances apart
        others = outside.share(sum(cpu_seconds(daemon.pid) for daemon in kept))
        least = Mark(ratio=1.0) if self._nodes >= LARGE else Mark()
        judge(row, [Claim(OX, "rate", least), Claim(C), Claim(C, "cpu")], [tag] * rounds, others, fewest=rounds)
        mark = BYTES_A_NODE if self._nodes >= LARGE else Mark()
        memory.answers = [alone(memory.name, bytes_a_node[OURS], mark, tag=tag, load=others, unit=1)]
        memory.values = {name: Spread.of(values).median for name, values in bytes_a_node.items()}
        return kept, [row, memory]

    def _measure_or_tell(self, cell: Cell, daemons: Sequence[Running]) -> Row:
        try:
            return self._measure(cell, daemons)
        except BREAKS as error:
            return Row(cell.group, cell.name, self._nodes, notes=[f"BROKEN: {error}"])

    def _measure(self, cell: Cell, daemons: Sequence[Running]) -> Row:
        def sampler(daemon: Running) -> Callable[[], Load]:
            return lambda: self._load(cell.mode, daemon, seconds=self._bench.seconds, **cell.options)

        rounds, load = self._bench.take_turns(
            [sampler(daemon) for daemon in daemons], lambda: [daemon.pid for daemon in daemons]
        )
        row = Row(cell.group, cell.name, self._nodes)
        row.samples = {daemon.name: [samples[i] for _, samples in rounds] for i, daemon in enumerate(daemons)}
        judge(row, cell.claims, [tag for tag, _ in rounds], load)
        return row

    def _domains(self, daemons: Sequence[Running]) -> Row:
        """Last, and once: what a daemon that does not finish leaves behind is in nobody's way then."""
        devices = 3 * self._n_domains
        row = Row("domains", f"{self._n_domains} domains start, s", self._nodes)
        tag = self._bench.cache_line_ns()
        for daemon in daemons:
            load = self._generator.run("domains", daemon, domains=self._n_domains, seconds=DOMAINS_LIMIT_S)
            row.samples[daemon.name] = [load]
            row.values[daemon.name] = load.seconds
            done = f"{devices - load.unfinished} of {devices} devices in {load.seconds:.2f} s"
            row.notes.append(f"{daemon.name}: {done}, {load.eagain} transactions repeated")
        (ours,) = row.samples[OURS]
        answer = alone(row.name, [ours.seconds], DOMAINS_MARK, tag=tag, load=0.0, unit=1)
        row.answers = [answer if ours.clean else missed(answer)]
        for name in self._names[1:]:
            pair = Pair(ours.seconds, row.samples[name][0].seconds, tag)
            row.answers.append(Bench.compare(row.name, name, [pair], 0.0, Mark(), unit=1))
        return row


def measure(
    bench: Bench,
    sizes: Sequence[int],
    groups: Sequence[str],
    *,
    arguments: Sequence[str] = (),
    domains: int = DOMAINS,
    verify: bool = False,
) -> Iterator[Row]:
    """Everything that is asked for, row by row. Raises `NotHere` without a compiler or without any peer."""
    generator = LoadGenerator.compile(bench)
    names = available()
    for i, nodes in enumerate(sizes):
        here = [group for group in groups if group != "domains" or i == 0]
        comparison = Comparison(
            bench, generator, nodes, names=names, arguments=arguments, domains=domains, verify=verify
        )
        if set(here) - {"isolation", "ring"}:
            yield from _guarded("comparison", comparison.rows(here))
    if "isolation" in groups:
        yield from _guarded("isolation", isolation(bench, generator))
    if "ring" in groups:
        yield from _guarded("ring", ring(bench, C in names))


def _guarded(group: str, rows: Iterator[Row]) -> Iterator[Row]:
    """What breaks costs its rows, not those of before and after."""
    try:
        yield from rows
    except BREAKS as error:
        yield Row(group, group, 0, notes=[f"BROKEN: {error}"])


def ask(bench: Bench) -> Iterable[Answer]:
    """For `python -m benchmarks`."""
    if available() == [OURS]:
        raise NotHere("no other xenstored is here (python -m paravirt.testing.reference_xenstored gets them)")
    for row in measure(bench, [ASKED_NODES], ASKED):
        yield from row.answers


def _sizes(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        sizes = [int(word) for word in value.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise click.BadParameter("numbers with commas between them")
    return sizes


def _groups(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    groups = value.split(",") if value else list(GROUPS)
    if unknown := set(groups) - set(GROUPS):
        raise click.BadParameter(f"no {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    return groups


@click.command()
@click.option("--pairs", type=click.IntRange(2), default=15, show_default=True, help="Samples of each daemon.")
@click.option("--seconds", type=click.FloatRange(0.01), default=0.2, show_default=True, help="For each sample.")
@click.option("--nodes", callback=_sizes, default="10000,100000", show_default=True, help="Sizes of the tree.")
@click.option("--only", callback=_groups, default="", help=f"Some of: {','.join(GROUPS)}.")
@click.option("--quick", is_flag=True, help="See that it runs: few short samples, a small tree, nothing conclusive.")
@click.option("--verify", is_flag=True, help="Look at the contents of every answer.")
@click.option("--daemon-option", multiple=True, metavar="OPTION", help="One more for our xenstored; may be repeated.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write all there.")
def main(
    pairs: int,
    seconds: float,
    nodes: list[int],
    only: list[str],
    quick: bool,
    verify: bool,
    daemon_option: tuple[str, ...],
    json_file: Path | None,
) -> None:
    """Compare xenstore daemons and print met, missed or inconclusive for each mark. The exit code is always 0."""
    console, progress = Console(highlight=False), Console(stderr=True, highlight=False)
    about = machine()
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows: list[Row] = []
    if quick:
        pairs, seconds, nodes = QUICK_PAIRS, QUICK_SECONDS, [QUICK_NODES]
    try:
        with Bench(pairs=pairs, seconds=seconds, extra=0 if quick else pairs) as bench:
            domains = QUICK_DOMAINS if quick else DOMAINS
            for row in measure(bench, nodes, only, arguments=daemon_option, domains=domains, verify=verify):
                rows.append(row)
                progress.print(f"[dim]{row.nodes:,} nodes,[/] {row.name}: {judgement(row.answers)}", soft_wrap=True)
    except NotHere as reason:
        console.print(f"skipped: {reason}")
    show(console, rows)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": about, "rows": [row.told() for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
