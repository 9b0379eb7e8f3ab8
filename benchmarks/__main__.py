# SPDX-License-Identifier: MIT
"""`python -m benchmarks [QUESTION ...]`: ask all questions, or those named, and print a verdict on each mark.

The exit code is 0 whatever the verdicts.
"""

import importlib
import json
import pkgutil
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import click
from rich import box
from rich.console import Console
from rich.table import Table

from .harness import FEWEST_PAIRS, Answer, Bench, NotHere, machine

COLORS = {"met": "green", "missed": "red", "inconclusive": "yellow", "-": "dim"}


def questions() -> dict[str, ModuleType]:
    """Name to module of every file that asks a question."""
    found = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        loaded = importlib.import_module(f"{__package__}.{module.name}") if module.name != "__main__" else None
        if loaded is not None and hasattr(loaded, "QUESTION"):
            found[module.name] = loaded
    return found


def show(console: Console, answers: list[Answer]) -> None:
    """A table for each peer."""
    for peer in dict.fromkeys(answer.peer for answer in answers):
        show_peer(console, [answer for answer in answers if answer.peer == peer])


def show_peer(console: Console, answers: list[Answer]) -> None:
    """A table of the medians, and below it what they rest on."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "ours", answers[0].peer, "ratio", "mark", "verdict"):
        table.add_column(heading, justify="right" if heading in ("ours", answers[0].peer, "ratio") else "left")
    for answer in answers:
        table.add_row(
            answer.what,
            f"{answer.ours.median / answer.unit:.3g}",
            f"{answer.theirs.median / answer.unit:.3g}" if answer.theirs else "",
            f"{answer.ratio.median:.2f}" if answer.ratio else "",
            answer.mark,
            f"[{COLORS[answer.verdict]}]{answer.verdict}[/]",
        )
    console.print(table)
    for answer in answers:
        spreads = [f"ours {answer.ours.show(answer.unit)}"]
        spreads += [f"{answer.peer} {answer.theirs.show(answer.unit)}"] if answer.theirs else []
        spreads += [f"ratio {answer.ratio.show()}"] if answer.ratio else []
        console.print(f"[dim]{answer.what}: quartiles {', '.join(spreads)};[/]")
        sampled = f"{answer.pairs} samples {answer.distance} ({answer.cache_line_ns:.0f} ns)"
        console.print(f"[dim]  {sampled}, outside load {answer.outside_load:.0%} of a CPU[/]")


@click.command()
@click.argument("names", nargs=-1)
@click.option(
    "--pairs",
    type=click.IntRange(2),
    default=15,
    show_default=True,
    help="Samples of each side; up to twice as many if fewer than 10 are comparable.",
)
@click.option("--seconds", type=click.FloatRange(0.01), default=0.2, show_default=True, help="For each sample.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Also write everything there."
)
def main(names: tuple[str, ...], pairs: int, seconds: float, json_file: Path | None) -> None:
    """Ask the questions, all or those named, and print met, missed or inconclusive for each mark."""
    console = Console(highlight=False)
    known = questions()
    if unknown := set(names) - set(known):
        raise click.UsageError(f"no question {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    about, extra = machine(), pairs if pairs >= FEWEST_PAIRS else 0
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    console.print("Medians. Both sides of a line are measured in turn, on the same two CPUs.")
    answered: dict[str, list[Answer]] = {}
    for name in names or known:
        unit = getattr(known[name], "UNIT", "Millions a second.")
        console.print(f"\n[bold]{known[name].QUESTION}[/] {unit}")
        answered[name] = []
        try:
            with console.status("measuring"), Bench(pairs=pairs, seconds=seconds, extra=extra) as bench:
                answered[name].extend(known[name].ask(bench))
        except NotHere as reason:
            console.print(f"skipped: {reason}")
        if answered[name]:
            show(console, answered[name])
    if json_file is not None:
        told = {name: [asdict(answer) for answer in answers] for name, answers in answered.items()}
        json_file.write_text(json.dumps({"machine": about, "questions": told}, indent=2) + "\n")


if __name__ == "__main__":
    main()
