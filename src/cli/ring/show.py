# SPDX-License-Identifier: MIT
"""`paravirt ring show`."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paravirt.cli.ring.given import messages_of, messages_option
from paravirt.errors import InvalidRequest

if TYPE_CHECKING:
    from paravirt.looking.show import Shown


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--ops", metavar="NAME[,NAME]...", help="Only these operations, such as read,write.")
@click.option(
    "--id", "ids", type=int, multiple=True, help="Only the request with this id and its response; repeatable."
)
@click.option("--since", "since_s", type=float, metavar="SECONDS", help="From so long after the start on.")
@click.option("--until", "until_s", type=float, metavar="SECONDS", help="Up to so long after the start.")
@click.option("--direction", type=click.Choice(["request", "response"]), help="Only one of the two.")
@click.option("--count", "-n", type=click.IntRange(min=1), help="End after so many.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, the description of the ring first.")
@messages_option
def show(
    file: Path,
    ops: str | None,
    ids: tuple[int, ...],
    since_s: float | None,
    until_s: float | None,
    direction: str | None,
    count: int | None,
    as_json: bool,
    driver: str | None,
) -> int:
    """What a recording says: one line a message, with seconds since the start, > or < for a request or a response, and
    its index in the ring. FILE '-' is standard input.

    Exit status 1 for a file that ends too early: it is shown as far as it goes.
    """
    from itertools import islice

    from paravirt.looking.show import Choice, shown
    from paravirt.protocol.recording import Kind, Reader

    chosen = Choice(
        ops=frozenset(ops.lower().split(",")) if ops else frozenset(),
        ids=frozenset(ids),
        since_s=since_s,
        until_s=until_s,
        kind=None if direction is None else Kind[direction.upper()],
    )
    messages = messages_of(driver)
    try:
        opened = nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb")
    except OSError as error:
        raise InvalidRequest(f"{file}: {error.strerror}") from error
    with opened as recording:
        try:
            reader = Reader(recording)
            header = reader.header if messages is None else reader.header.with_messages(messages)
            click.echo(json.dumps(header.to_json()) if as_json else header.summary)
            kinds, nothing = set[str](), chosen != Choice()
            found = (each for each in _noted(shown(header, reader), kinds) if chosen.takes(each))
            for each in islice(found, count):
                nothing = False
                if each.lost and not as_json:
                    click.echo(f"paravirt: {each.lost} messages lost here", err=True)
                click.echo(json.dumps(each.to_json()) if as_json else str(each))
        except InvalidRequest as error:
            raise InvalidRequest(f"{file}: {error}") from error
        except BrokenPipeError:
            raise  # not the file, but who reads what we say
        except OSError as error:
            raise InvalidRequest(f"{file}: {error.strerror}") from error
    if nothing:
        there = f"its operations are {', '.join(sorted(kinds))}" if kinds else "it is empty"
        click.echo(f"paravirt: {file}: no message is like that; {there}", err=True)
    if count is None and reader.torn is not None:
        click.echo(f"paravirt: {file}: {reader.torn}", err=True)
        return 1
    return 0


def _noted(messages: Iterable["Shown"], kinds: set[str]) -> Iterator["Shown"]:
    """All of them; `kinds` gets their operations."""
    for each in messages:
        kinds.add(each.entry.kind)
        yield each
