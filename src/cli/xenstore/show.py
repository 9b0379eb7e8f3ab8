# SPDX-License-Identifier: MIT
"""Commands that only look: ls, list, read, exists."""

from __future__ import annotations

import sys

import click

from paravirt.cli.context import Context, emit_json, json_option, pass_context
from paravirt.cli.xenstore.batch import perform
from paravirt.cli.xenstore.group import EXIT_NO, example, store_path, xenstore
from paravirt.cli.xenstore.values import json_value, printable
from paravirt.cli.xenstore.walk import Entry, walk
from paravirt.xenstore import operations


@xenstore.command(epilog=example("ls --flat --perms /local/domain"))
@click.argument("path", default="/", type=store_path)
@click.option("--flat", "-f", is_flag=True, help="Full paths instead of a tree.")
@click.option("--perms", "-p", is_flag=True, help="Show permissions.")
@json_option
@pass_context
def ls(context: Context, path: str, flat: bool, perms: bool, as_json: bool) -> None:
    """The tree below PATH with its values."""
    with context.store() as store:
        _root, *entries = walk(store, path, permissions=perms or as_json)
    if as_json:
        emit_json(
            [{"path": e.path, "value": json_value(e.value), "permissions": e.permissions} for e in entries],
        )
    elif entries:
        click.echo("\n".join([_line(entry, flat=flat, perms=perms) for entry in entries]))


def _line(entry: Entry, *, flat: bool, perms: bool) -> str:
    name = entry.path if flat else " " * entry.depth + entry.name
    shown = f"   ({','.join(entry.permissions)})" if perms else ""
    return f'{name} = "{printable(entry.value)}"{shown}'


@xenstore.command("list", epilog=example("list /local/domain"))
@click.argument("path", default="/", type=store_path)
@json_option
@pass_context
def list_(context: Context, path: str, as_json: bool) -> None:
    """The names directly below PATH, in the order they were made."""
    with context.store() as store:
        names = store.ls(path)
    if as_json:
        emit_json(names)
        return
    for name in names:
        click.echo(name)


@xenstore.command(epilog=example("read /local/domain/1/name"))
@click.argument("paths", nargs=-1, required=True, type=store_path)
@click.option("--raw", is_flag=True, help="The bytes as they are, nothing else.")
@json_option
@pass_context
def read(context: Context, paths: tuple[str, ...], raw: bool, as_json: bool) -> None:
    """The values of PATHS, one a line; odd bytes as escapes."""
    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other")
    with context.store() as store:
        values = dict(zip(paths, perform(store, map(operations.read, paths)), strict=True))
    if as_json:
        emit_json({path: json_value(value) for path, value in values.items()})
        return
    for path in paths:
        if raw:
            sys.stdout.buffer.write(values[path])
        else:
            click.echo(printable(values[path]))


@xenstore.command(epilog=example("exists /local/domain/1 && echo yes"))
@click.argument("paths", nargs=-1, required=True, type=store_path)
@pass_context
def exists(context: Context, paths: tuple[str, ...]) -> int:
    """Exit status 0 if all PATHS exist, 1 if not."""
    with context.store() as store:
        return 0 if all(store.exists(path) for path in paths) else EXIT_NO
