# SPDX-License-Identifier: MIT
"""The commands dump and restore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Final, TypeVar

import click

from paravirt.cli.context import Context, emit_json, json_option, pass_context
from paravirt.cli.xenstore.batch import Request, ask, fetch, set_permissions, set_value, split, strict
from paravirt.cli.xenstore.dumpfile import Node, decode, encode
from paravirt.cli.xenstore.group import example, store_path, xenstore
from paravirt.cli.xenstore.walk import Entry, walk
from paravirt.errors import XenstoreError
from paravirt.xenstore.calls import StoreCalls
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.wire import Op

BATCH: Final = 500
T = TypeVar("T")


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
    made in the order of the file, behind those that are there.
    """
    root, nodes = decode(file.read())
    plan = _Plan(root, nodes, prune=prune, dry_run=dry_run)
    with context.store() as store:
        changes = store.transact(plan.all_at_once) if atomic else list(plan.in_parts(store, batch))
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

    def all_at_once(self, store: StoreCalls) -> list[Change]:
        changes = self._write(store, self._nodes)
        return changes + (self._remove(store, self._unknown(store)) if self._prune else [])

    def in_parts(self, store: XenstoreClient, size: int) -> Iterator[Change]:
        for nodes in _parts(self._nodes, size):
            yield from store.transact(partial(self._write, nodes=nodes))
        if self._prune:
            for paths in _parts(self._unknown(store), size):
                yield from store.transact(partial(self._remove, paths=paths))

    def _write(self, store: StoreCalls, nodes: Sequence[Node]) -> list[Change]:
        """Look at the nodes, and write those that differ."""
        replies = fetch(store, [ask(op, node.path) for node in nodes for op in (Op.READ, Op.GET_PERMS)])
        changes: list[Change] = []
        requests: list[Request] = []
        for node, value, permissions in zip(nodes, replies[::2], replies[1::2], strict=True):
            writing, choosing = set_value(node.path, node.value), set_permissions(node.path, node.permissions)
            if isinstance(value, XenstoreError) and value.name == "ENOENT":
                changes.append(Change("make", node.path))
                requests += [writing, choosing]
                continue
            value, permissions = strict([value, permissions])
            if value != node.value:
                changes.append(Change("write", node.path))
                requests.append(writing)
            if split(permissions) != list(node.permissions):
                changes.append(Change("chmod", node.path))
                requests.append(choosing)
        if not self._dry_run:
            _send(store, requests)
        return changes

    def _unknown(self, store: StoreCalls) -> list[str]:
        """The highest nodes that are not in the file."""
        if not store.exists(self._root):
            return []
        paths = (entry.path for entry in walk(store, self._root, values=False))
        return [path for path in paths if path not in self._known and _parent(path) in self._known]

    def _remove(self, store: StoreCalls, paths: Sequence[str]) -> list[Change]:
        if not self._dry_run:
            _send(store, [ask(Op.RM, path) for path in paths])
        return [Change("rm", path) for path in paths]


def _parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _parts(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _send(store: StoreCalls, requests: list[Request]) -> None:
    for (op, payload, path), reply in zip(requests, fetch(store, requests), strict=True):
        if not isinstance(reply, XenstoreError):
            continue
        if op == Op.SET_PERMS and reply.name == "ENOENT":
            owner = split(payload)[1][1:]
            raise XenstoreError(f"{path}: its owner, domain {owner}, does not exist (ENOENT)", "ENOENT") from reply
        raise reply
