# SPDX-License-Identifier: MIT
"""The command watch: what changes, line by line, as it happens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice

import click

from paravirt.cli.context import Context, pass_context
from paravirt.cli.xenstore.group import EXIT_NO, example, store_path, xenstore
from paravirt.cli.xenstore.values import json_value, printable
from paravirt.errors import AccessRefused, NoSuchNode
from paravirt.xenstore.client import WatchEvent, WatchQueue, XenstoreClient


@xenstore.command(epilog=example("watch -n 2 --values /local/domain/1/device"))
@click.argument("paths", nargs=-1, required=True, type=store_path)
@click.option("--count", "-n", type=click.IntRange(min=1), help="End after so many events.")
@click.option("--depth", type=click.IntRange(min=0), help="How many levels below PATHS count (else all).")
@click.option("--values", is_flag=True, help="Show the value that the node has now.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="SECONDS", help="End after this time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@pass_context
def watch(
    context: Context,
    paths: tuple[str, ...],
    count: int | None,
    depth: int | None,
    values: bool,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    """Changes at and below PATHS, as they happen.

    A line has the path that changed and the token of the watch, which is the PATH that was given. Each watch also tells
    of its own PATH once, at the start; that counts. Exit status 1: the time was over before --count events had come.
    """
    with context.store() as store, store.watch_queue() as queue:
        for path in dict.fromkeys(paths):
            queue.add(path, depth=depth)
        n_seen = 0
        for event in islice(_events(queue, timeout_s), count):
            n_seen += 1
            value = _value_now(store, event.path) if values else None
            click.echo(_record(event, value, values) if as_json else _line(event, value, values))
    return EXIT_NO if count is not None and n_seen < count else 0


def _events(queue: WatchQueue, timeout_s: float | None) -> Iterator[WatchEvent]:
    end = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        event = queue.get(None if end is None else max(0.0, end - time.monotonic()))
        if event is None:
            return
        yield event


def _value_now(store: XenstoreClient, path: str) -> bytes | None:
    """The value; None if there is none to see: the node is gone, or it is a special one."""
    if path.startswith("@"):
        return None
    try:
        return store.read(path)
    except (NoSuchNode, AccessRefused):
        return None


def _record(event: WatchEvent, value: bytes | None, values: bool) -> str:
    record: dict[str, object] = {"path": event.path, "token": event.token}
    if values:
        record["value"] = None if value is None else json_value(value)
    return json.dumps(record)


def _line(event: WatchEvent, value: bytes | None, values: bool) -> str:
    shown = "" if not values else " (none)" if value is None else f' = "{printable(value)}"'
    return f"{event.path} {event.token}{shown}"
