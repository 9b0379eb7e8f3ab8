# SPDX-License-Identifier: MIT
"""`paravirt xenstore`: look at the store and change it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from paravirt.cli.context import Context, json_option, pass_context
from paravirt.errors import InvalidRequest, XenstoreError

if TYPE_CHECKING:
    from paravirt.xenstore.calls import StoreCalls
    from paravirt.xenstore.client import XenstoreClient

EXIT_NO = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One node of a listing; `depth` counts levels below where the listing starts."""

    path: str
    name: str
    depth: int
    value: bytes
    permissions: list[str]


def walk(store: XenstoreClient, root: str, *, with_permissions: bool) -> Iterator[Entry]:
    """All nodes below `root`, parents first. Nodes that go away meanwhile are left out."""
    stack = [(root, name, 0) for name in reversed(store.ls(root))]
    while stack:
        parent, name, depth = stack.pop()
        path = f"{parent.rstrip('/')}/{name}"
        try:
            value = store.read(path)
            permissions = store.get_perms(path) if with_permissions else []
            children = store.ls(path)
        except XenstoreError as error:
            if error.name in ("ENOENT", "EACCES"):
                continue
            raise
        yield Entry(path, name, depth, value, permissions)
        stack.extend((path, child, depth + 1) for child in reversed(children))


def printable(value: bytes) -> str:
    """A value on one line: what is not printable ASCII as an escape."""
    text = value.decode("latin-1")
    shown = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\", '"': '\\"'}
    return "".join(shown.get(c) or (c if " " <= c <= "~" else f"\\x{ord(c):02x}") for c in text)


@click.group()
def xenstore() -> None:
    """List, read and write xenstore."""


@xenstore.command()
@click.argument("path", default="/")
@click.option("--flat", "-f", is_flag=True, help="Full paths instead of a tree.")
@click.option("--perms", "-p", is_flag=True, help="Show permissions.")
@json_option
@pass_context
def ls(context: Context, path: str, flat: bool, perms: bool, as_json: bool) -> None:
    """The tree below PATH with its values."""
    with context.store() as store:
        entries = walk(store, path, with_permissions=perms or as_json)
        if as_json:
            records = [{"path": e.path, "value": _text(e.value), "permissions": e.permissions} for e in entries]
            click.echo(json.dumps(records, indent=2))
            return
        for entry in entries:
            name = entry.path if flat else " " * entry.depth + entry.name
            shown = f"   ({','.join(entry.permissions)})" if perms else ""
            click.echo(f'{name} = "{printable(entry.value)}"{shown}')


@xenstore.command("list")
@click.argument("path", default="/")
@json_option
@pass_context
def list_(context: Context, path: str, as_json: bool) -> None:
    """The names directly below PATH."""
    with context.store() as store:
        names = store.ls(path)
    if as_json:
        click.echo(json.dumps(names, indent=2))
        return
    for name in names:
        click.echo(name)


@xenstore.command()
@click.argument("paths", nargs=-1, required=True)
@click.option("--raw", is_flag=True, help="The bytes as they are, nothing else.")
@json_option
@pass_context
def read(context: Context, paths: tuple[str, ...], raw: bool, as_json: bool) -> None:
    """The values of PATHS, one a line."""
    with context.store() as store:
        values = {path: store.read(path) for path in paths}
    if as_json:
        click.echo(json.dumps({path: _text(value) for path, value in values.items()}, indent=2))
        return
    for value in values.values():
        if raw:
            sys.stdout.buffer.write(value)
        else:
            click.echo(value.decode(errors="backslashreplace"))


@xenstore.command()
@click.argument("pairs", nargs=-1, required=True, metavar="PATH VALUE [PATH VALUE]...")
@pass_context
def write(context: Context, pairs: tuple[str, ...]) -> None:
    """Write values, all at once."""
    if len(pairs) % 2:
        raise InvalidRequest("write wants pairs of a path and a value")
    with context.store() as store:

        def write_all(transaction: StoreCalls) -> None:
            for path, value in zip(pairs[::2], pairs[1::2], strict=True):
                transaction.write(path, value)

        store.transact(write_all)


@xenstore.command()
@click.argument("paths", nargs=-1, required=True)
@pass_context
def rm(context: Context, paths: tuple[str, ...]) -> None:
    """Remove PATHS and all below them."""
    with context.store() as store:
        for path in paths:
            store.rm(path)


@xenstore.command()
@click.argument("paths", nargs=-1, required=True)
@pass_context
def exists(context: Context, paths: tuple[str, ...]) -> int:
    """Exit code 0 if all PATHS exist, 1 if not."""
    with context.store() as store:
        return 0 if all(store.exists(path) for path in paths) else EXIT_NO


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")
