# SPDX-License-Identifier: MIT
"""The commands dump and restore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final

import click

from paravirt.cli.context import Context, emit_json, json_option, pass_context
from paravirt.cli.xenstore.batch import Store, fetch, parts, perform
from paravirt.cli.xenstore.dumpfile import Node, decode, encode
from paravirt.cli.xenstore.group import example, store_path, xenstore
from paravirt.cli.xenstore.walk import Entry, walk
from paravirt.errors import NoSuchNode, XenstoreError
from paravirt.xenstore import operations
from paravirt.xenstore.client import XenstoreClient

BATCH: Final = 500


@xenstore.command(epilog=example("dump /local/domain/1 > domain.json"))
@click.argument("path", default="/", type=store_path)
@click.option("--atomic", is_flag=True, help="One state of the store: in one transaction, tried again on conflict.")
@pass_context
def dump(context: Context, path: str, atomic: bool) -> None:
    """PATH and all below it as JSON, for restore."""
    with context.store() as store:
        root = path if path.startswith("/") else f"{store.get_domain_path(0)}/{path}"
        read = partial(walk, root=root, permissions=True)
        entries: list[Entry] = store.transact(read) if atomic else read(store)
    nodes = (Node(entry.path, entry.value, tuple(entry.permissions)) for entry in entries)
    click.echo("".join(encode(root, nodes)), nl=False)


@dataclass(frozen=True, slots=True)
class Change:
    """What makes the store like the file at one path: make, write, chmod or rm."""

    change: str
    path: str


@xenstore.command(epilog=example("restore --prune --dry-run domain.json"))
@click.argument("file", type=click.File("rb"))
@click.option("--atomic", is_flag=True, help="All in one transaction.")
@click.option("--batch", type=click.IntRange(min=1), default=BATCH, show_default=True, help="Nodes of one transaction.")
@click.option("--prune", is_flag=True, help="Also remove what is below the path of the dump and not in the file.")
@click.option("--dry-run", is_flag=True, help="Change nothing, only print what would be changed.")
@json_option
@pass_context
def restore(
    context: Context, file: BinaryIO, atomic: bool, batch: int, prune: bool, dry_run: bool, as_json: bool
) -> None:
    """Write what dump has written to FILE ("-": standard input).

    The whole file is checked before anything is written. Nodes that are as in the file are left alone. New children are
    made in the order of the file, behind those that are there. Without --atomic, an error leaves what the transactions
    before it have written.
    """
    root, nodes = decode(file.read())
    plan = _Plan(root, nodes, prune=prune, dry_run=dry_run)
    with context.store() as store:
        changes = store.transact(plan.all_at_once) if atomic else list(plan.inparts(store, batch))
    if as_json:
        emit_json([{"change": change.change, "path": change.path} for change in changes])
        return
    if dry_run:
        for change in changes:
            click.echo(f"{change.change} {change.path}")
    n = Counter(change.change for change in changes)
    would = "would be " if dry_run else ""
    click.echo(
        f"nodes in the file: {len(nodes)}; {would}made: {n['make']}, written: {n['write']}, "
        f"permissions changed: {n['chmod']}, removed: {n['rm']}"
    )


class _Plan:
    """What one restore is to do."""

    def __init__(self, root: str, nodes: list[Node], *, prune: bool, dry_run: bool) -> None:
        self._root = root
        self._nodes = nodes
        self._known = {node.path for node in nodes}
        self._prune = prune
        self._dry_run = dry_run

    def all_at_once(self, store: Store) -> list[Change]:
        changes = self._write(store, self._nodes)
        return changes + (self._remove(store, self._unknown(store)) if self._prune else [])

    def inparts(self, store: XenstoreClient, size: int) -> Iterator[Change]:
        for nodes in parts(self._nodes, size):
            yield from store.transact(partial(self._write, nodes=nodes))
        if self._prune:
            for paths in parts(self._unknown(store), size):
                yield from store.transact(partial(self._remove, paths=paths))

    def _write(self, store: Store, nodes: Sequence[Node]) -> list[Change]:
        """Look at the nodes, and write those that differ."""
        values = fetch(store, [operations.read(node.path) for node in nodes])
        permissions = fetch(store, [operations.get_perms(node.path) for node in nodes])
        changes: list[Change] = []
        to_write: list[Node] = []
        to_chmod: list[Node] = []
        for node, value, words in zip(nodes, values, permissions, strict=True):
            is_new = isinstance(value, NoSuchNode)
            if isinstance(value, XenstoreError) and not is_new:
                raise value
            writes, chooses = value != node.value, words != list(node.permissions)
            to_write += [node] * writes
            to_chmod += [node] * chooses
            kinds = ["make"] if is_new else ["write"] * writes + ["chmod"] * chooses
            changes += [Change(kind, node.path) for kind in kinds]
        if not self._dry_run:
            perform(store, [operations.write(node.path, node.value) for node in to_write])
            _set_permissions(store, to_chmod)
        return changes

    def _unknown(self, store: Store) -> list[str]:
        """The highest nodes that are not in the file."""
        if not store.exists(self._root):
            return []
        paths = (entry.path for entry in walk(store, self._root, values=False))
        return [path for path in paths if path not in self._known and _parent(path) in self._known]

    def _remove(self, store: Store, paths: Sequence[str]) -> list[Change]:
        if not self._dry_run:
            perform(store, map(operations.rm, paths))
        return [Change("rm", path) for path in paths]


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _set_permissions(store: Store, nodes: Sequence[Node]) -> None:
    replies = fetch(store, [operations.set_perms(node.path, node.permissions) for node in nodes])
    for node, reply in zip(nodes, replies, strict=True):
        if isinstance(reply, NoSuchNode):
            owner = node.permissions[0][1:]
            raise NoSuchNode(f"{node.path}: its owner, domain {owner}, does not exist (ENOENT)", reply.name) from reply
        if isinstance(reply, XenstoreError):
            raise reply
