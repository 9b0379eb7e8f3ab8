# SPDX-License-Identifier: MIT
"""The command trace: who asks the daemon for what, as it happens.

The daemon traces while somebody asks. CONTROL "trace", SEQ answers with the number of the next line and the lines from
number SEQ on, as many as fit; so the next question goes on where this answer ends.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Final

import click

from paravirt.cli.context import Context, pass_context
from paravirt.cli.xenstore.group import example, store_path, xenstore
from paravirt.errors import InvalidRequest, PeerError
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.wire import PAYLOAD_MAX_BYTES, Op

INTERVAL_S: Final = 0.2
FROM_NOW: Final = 10**18
"""As the number of a line: beyond any there is, so that the answer is where the next one will be."""

WITH_PATH: Final = frozenset(
    ("DIRECTORY", "DIRECTORY_PART", "READ", "WRITE", "MKDIR", "RM", "GET_PERMS", "SET_PERMS", "WATCH", "UNWATCH")
)
"""Operations whose first argument is a path."""

_LOST: Final = re.compile(r"\.\.\. ([0-9]+) lines lost")
_LINE: Final = re.compile(r"([0-9.]+) ([0-9]+)\.([0-9]+) ([0-9]+|-) (\S+) (.+) (\S+) ([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Record:
    """One request as the daemon saw it; `time` in seconds of the Unix epoch, `us` how long it took.

    `arguments`: the strings of the request, with commas between.
    """

    time: float
    domid: int
    connection: int
    transaction: int | None
    op: str
    arguments: str
    reply: str
    us: float

    @property
    def is_of_trace(self) -> bool:
        """Whether it is a question for the trace itself."""
        return self.op == "CONTROL" and self.arguments.startswith("trace")

    def concerns(self, path: str) -> bool:
        """Whether the request is for a path, and that is `path` or below it; a relative one below the domain's home."""
        if self.op not in WITH_PATH:
            return False
        mine = self.arguments.partition(",")[0]
        if not mine.startswith(("/", "@")):
            mine = f"/local/domain/{self.domid}/{mine}"
        return mine == path or mine.startswith(path.rstrip("/") + "/")


def parse(line: str) -> Record | int:
    """A line of the trace; a number: so many lines were lost. Raises `PeerError`."""
    if lost := _LOST.fullmatch(line):
        return int(lost[1])
    found = _LINE.fullmatch(line)
    if found is None:
        raise PeerError(f"xenstored wrote a trace that cannot be read: {line!r}")
    at, domid, connection, transaction, op, arguments, reply, us = found.groups()
    number = None if transaction == "-" else int(transaction)
    return Record(
        float(at), int(domid), int(connection), number, op, "" if arguments == "-" else arguments, reply, float(us)
    )


def follow(store: XenstoreClient, start: int, interval_s: float) -> Iterator[str]:
    """All lines from number `start` on, for ever; asks every `interval_s`, or at once after a rather full answer."""
    next_line = start
    while True:
        head, _, text = store.control("trace", str(next_line)).partition("\n")
        if not head.isdigit():
            raise PeerError(f"xenstored answered a question for the trace with {head!r}")
        yield from text.splitlines()
        if len(text) < PAYLOAD_MAX_BYTES // 2:
            time.sleep(interval_s)
        next_line = int(head)


def _operation(name: str) -> str:
    if name.upper() not in Op.__members__:
        raise InvalidRequest(f"{name!r} is no operation; there are: {' '.join(Op.__members__)}")
    return name.upper()


@xenstore.command(epilog=example("trace --domid 1 --op write --path /local/domain/1/data"))
@click.option(
    "--domid", "domids", multiple=True, type=click.IntRange(0, 0xFFFF), help="Only of this domain; repeatable."
)
@click.option("--op", "ops", multiple=True, help="Only this operation, such as READ; repeatable.")
@click.option("--path", type=store_path, metavar="PATH", help="Only requests for this path or one below it.")
@click.option("--kept", is_flag=True, help="First the lines that the daemon has kept from earlier tracing.")
@click.option("--count", "-n", type=click.IntRange(min=1), help="End after so many lines.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0),
    default=INTERVAL_S,
    show_default=True,
    metavar="SECONDS",
    help="How often to ask for more.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@pass_context
def trace(
    context: Context,
    domids: tuple[int, ...],
    ops: tuple[str, ...],
    path: str | None,
    kept: bool,
    count: int | None,
    interval_s: float,
    as_json: bool,
) -> None:
    """Who asks the daemon for what, as it happens.

    A line: time, domain and connection, transaction, operation, its arguments, OK or the error, microseconds. What
    trace itself asks is left out.
    """
    wanted_ops = {_operation(op) for op in ops}

    def wanted(record: Record) -> bool:
        return (
            not record.is_of_trace
            and (not domids or record.domid in domids)
            and (not ops or record.op in wanted_ops)
            and (path is None or record.concerns(path))
        )

    def shown(store: XenstoreClient) -> Iterator[str]:
        for line in follow(store, 0 if kept else FROM_NOW, interval_s):
            record = parse(line)
            if isinstance(record, int):
                click.echo(f"paravirt: {line.removeprefix('... ')}", err=True)
            elif wanted(record):
                yield json.dumps(asdict(record)) if as_json else line

    with context.store() as store:
        for line in islice(shown(store), count):
            click.echo(line)
