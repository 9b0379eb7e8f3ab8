# SPDX-License-Identifier: MIT
"""Commands that change nodes: write, mkdir, rm, chmod, tidy. Each is one transaction: all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from paravirt.cli.context import Context, emit_json, json_option, pass_context
from paravirt.cli.xenstore.batch import Store, perform
from paravirt.cli.xenstore.group import example, store_path, xenstore
from paravirt.cli.xenstore.values import unescaped
from paravirt.cli.xenstore.walk import walk
from paravirt.errors import InvalidRequest
from paravirt.xenstore import operations
from paravirt.xenstore.permissions import Permissions


@xenstore.command(epilog=example("write /tool/name guest /tool/size 12"))
@click.argument("pairs", nargs=-1, required=True, metavar="PATH VALUE [PATH VALUE]...")
@click.option(
    "--escapes", "-e", is_flag=True, help=r"\n, \t, \r, \\, \xHH and \NNN (octal) in VALUE, as read shows them."
)
@pass_context
def write(context: Context, pairs: tuple[str, ...], escapes: bool) -> None:
    """Write values, all at once; missing parents are made."""
    if len(pairs) % 2:
        raise InvalidRequest("write wants pairs of a path and a value")
    values = [unescaped(value) if escapes else value.encode(errors="surrogateescape") for value in pairs[1::2]]
    with context.store() as store:

        def write_all(transaction: Store) -> None:
            perform(transaction, map(operations.write, pairs[::2], values))

        store.transact(write_all)


@xenstore.command(epilog=example("mkdir /tool/empty"))
@click.argument("paths", nargs=-1, required=True, type=store_path)
@pass_context
def mkdir(context: Context, paths: tuple[str, ...]) -> None:
    """Make empty nodes, all at once.

    Missing parents are made; nodes that exist stay as they are.
    """
    with context.store() as store:

        def make_all(transaction: Store) -> None:
            perform(transaction, map(operations.mkdir, paths))

        store.transact(make_all)


@xenstore.command(epilog=example("rm --tidy /local/domain/1/device/vbd/51712"))
@click.argument("paths", nargs=-1, required=True, type=store_path)
@click.option(
    "--tidy", "-t", "and_parents", is_flag=True, help="Also parents that are left empty and without children."
)
@pass_context
def rm(context: Context, paths: tuple[str, ...], and_parents: bool) -> None:
    """Remove PATHS and all below them, all at once."""
    with context.store() as store:

        def remove_all(transaction: Store) -> None:
            for path in paths:
                transaction.rm(path)
                if and_parents:
                    _remove_empty_parents(transaction, path)

        store.transact(remove_all)


def _remove_empty_parents(store: Store, path: str) -> None:
    for parent in _parents(path):
        if not store.exists(parent):
            continue  # an earlier path of the command has taken it along
        if store.ls(parent) or store.read(parent):
            return
        store.rm(parent)


def _parents(path: str) -> Iterator[str]:
    """From the nearest up; never the root, and for a relative path never its start."""
    parent = path.rpartition("/")[0]
    while parent:
        yield parent
        parent = parent.rpartition("/")[0]


@xenstore.command(epilog=example("chmod -r /local/domain/1/data n1 r2"))
@click.argument("path", type=store_path)
@click.argument("permissions", nargs=-1, required=True, metavar="PERMISSION...")
@click.option("--recursive", "-r", is_flag=True, help="Also all nodes below PATH.")
@click.option("--upwards", "-u", is_flag=True, help="Also all nodes above PATH but the root.")
@pass_context
def chmod(context: Context, path: str, permissions: tuple[str, ...], recursive: bool, upwards: bool) -> None:
    """Set the permissions of PATH.

    A PERMISSION is a letter (n none, r read, w write, b both) and a domain id, such as r5. The first names the owner,
    who may do everything, and says what all other domains may do; each further one is for one domain.
    """
    check_permissions(permissions)
    with context.store() as store:

        def change_all(transaction: Store) -> None:
            paths = [path]
            if upwards:
                paths += _parents(path)
            if recursive:
                paths += [entry.path for entry in walk(transaction, path, values=False)[1:]]
            perform(transaction, [operations.set_perms(each, permissions) for each in paths])

        store.transact(change_all)


def check_permissions(words: Sequence[str]) -> None:
    """Raise `InvalidRequest` for a word that is no permission."""
    for word in words:
        if not word.isascii() or Permissions.parse([word.encode()]) is None:
            raise InvalidRequest(
                f"permission {word!r} is not one of n, r, w, b and a domain id up to 65535, such as r5"
            )


@xenstore.command(epilog=example("tidy --dry-run /local/domain/1"))
@click.argument("path", type=store_path)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
@pass_context
def tidy(context: Context, path: str, dry_run: bool, as_json: bool) -> None:
    """Remove empty nodes without children below PATH.

    Also those that are left without children then. All in one transaction; prints the paths, in the order in which they
    go.
    """
    with context.store() as store:

        def tidy_all(transaction: Store) -> list[str]:
            paths = _empty_below(transaction, path)
            if not dry_run:
                perform(transaction, map(operations.rm, paths))
            return paths

        removed = store.transact(tidy_all)
    if as_json:
        emit_json(removed)
    elif removed:
        click.echo("\n".join(removed))


def _empty_below(store: Store, root: str) -> list[str]:
    _root, *entries = walk(store, root)
    n_left = {entry.path: len(entry.children) for entry in entries}
    empty = []
    for entry in reversed(entries):
        if not n_left[entry.path] and not entry.value:
            empty.append(entry.path)
            parent = entry.path.rpartition("/")[0]
            if parent in n_left:
                n_left[parent] -= 1
    return empty
