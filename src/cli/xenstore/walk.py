# SPDX-License-Identifier: MIT
"""Whole trees, asked for level by level, many nodes at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from paravirt.cli.xenstore.batch import Store, parts
from paravirt.errors import AccessRefused, NoSuchNode

NODES_AT_ONCE: Final = 4096


@dataclass(slots=True)
class Entry:
    """One node. `depth` counts levels below the node where the walk started, whose own depth is -1."""

    path: str
    name: str
    depth: int
    value: bytes
    permissions: list[str]
    children: list[str]


def walk(store: Store, root: str, *, values: bool = True, permissions: bool = False) -> list[Entry]:
    """`root` and all nodes below it, parents first, children in their order.

    Nodes that go away meanwhile or may not be read are left out; for `root` that is a `XenstoreError`.
    """
    found: dict[str, Entry] = {}
    level = [Entry(root, root, -1, b"", [], [])]
    while level:
        below: list[Entry] = []
        for part in parts(level, NODES_AT_ONCE):
            for entry in _look(store, part, values=values, permissions=permissions):
                found[entry.path] = entry
                below += [
                    Entry(child_of(entry.path, name), name, entry.depth + 1, b"", [], []) for name in entry.children
                ]
        level = below
    return list(_in_order(found, root))


def child_of(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}"


def _look(store: Store, entries: Sequence[Entry], *, values: bool, permissions: bool) -> Iterator[Entry]:
    """Fill the entries in; those that can be seen."""
    with store.pipeline() as pipeline:
        looks = [
            (
                entry,
                pipeline.ls(entry.path),
                pipeline.read(entry.path) if values else None,
                pipeline.get_perms(entry.path) if permissions else None,
            )
            for entry in entries
        ]
    for entry, names, value, words in looks:
        try:
            entry.children = names.value
            entry.value = value.value if value is not None else b""
            entry.permissions = words.value if words is not None else []
        except (NoSuchNode, AccessRefused):
            if entry.depth < 0:
                raise
            continue
        yield entry


def _in_order(found: dict[str, Entry], root: str) -> Iterator[Entry]:
    stack = [root]
    while stack:
        entry = found.get(stack.pop())
        if entry is not None:
            yield entry
            stack.extend(child_of(entry.path, name) for name in reversed(entry.children))
