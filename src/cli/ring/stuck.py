# SPDX-License-Identifier: MIT
"""`paravirt ring stuck`."""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from paravirt.cli.context import Context, emit, json_option, pass_context

if TYPE_CHECKING:
    from paravirt.looking.view import RingView

EXIT_STUCK = 1
COLUMNS = {"name": "Ring", "place": "Domain :gref", "owes": "Owes", "kind": "Kind", "text": "What"}


@click.command()
@click.argument("ring", required=False)
@click.option(
    "--after",
    "after_s",
    type=click.FloatRange(0.01, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Without progress for so long, a ring is called stuck.",
)
@click.option("--watch", is_flag=True, help="Go on, and say what is new; Ctrl-C ends it.")
@json_option
@pass_context
def stuck(context: Context, ring: str | None, after_s: float, watch: bool, as_json: bool) -> int:
    """Which rings do not go on although there is something to do, and which side owes what: all, or RING.

    Exit status 1 if there is any. A backend that works on one request for long is told as well: it holds it.
    """
    from paravirt.hypervisor.looking import Looker, choose
    from paravirt.looking.view import view_of

    with context.hypervisor() as hypervisor, Looker(hypervisor) as looker:

        def views() -> dict[str, "RingView"]:
            rings = looker.look()
            chosen = rings if ring is None else [choose(rings, ring)]
            return {each.place: view_of(looker, hypervisor, each) for each in chosen}

        before, said = views(), set[str]()
        while True:
            time.sleep(after_s)
            now = views()
            rows = _rows(before, now)
            if not watch:
                if rows or as_json:
                    emit(rows, COLUMNS, as_json=as_json)
                else:
                    click.echo(f"{len(now)} {'ring' if len(now) == 1 else 'rings'}, none is stuck")
                return EXIT_STUCK if rows else 0
            said = _say_new(rows, said, as_json=as_json)
            before = now


def _rows(before: "dict[str, RingView]", now: "dict[str, RingView]") -> list[dict[str, Any]]:
    from paravirt.looking.stuck import verdicts

    return [
        {"name": view.name, "place": place, **asdict(each)}
        for place, view in now.items()
        if place in before
        for each in verdicts(before[place], view)
    ]


def _say_new(rows: list[dict[str, Any]], said: set[str], *, as_json: bool) -> set[str]:
    """Print what was not said at the last look, and what is over; what is the case now."""
    found = {f"{row['name']} ({row['place']}) {row['owes']} {row['kind']}": row for row in rows}
    stamp = time.strftime("%H:%M:%S")
    for what, row in found.items():
        if what not in said:
            click.echo(json.dumps({"at": stamp, **row}) if as_json else f"{stamp} {row['name']}: {row['text']}")
    for what in sorted(said - found.keys()):
        click.echo(json.dumps({"at": stamp, "over": what}) if as_json else f"{stamp} over: {what}")
    return set(found)
