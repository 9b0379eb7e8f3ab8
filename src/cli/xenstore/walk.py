# SPDX-License-Identifier: MIT
"""Whole trees, asked for level by level."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paravirt.cli.xenstore.batch import ask, fetch, split, strict
from paravirt.errors import XenstoreError
from paravirt.xenstore.calls import StoreCalls
from paravirt.xenstore.wire import Op


@dataclass(slots=True)
class Entry:
    """One node. `depth` counts levels below the node where the walk started, whose own depth is -1."""

    path: str
    name: str
    depth: int
    value: bytes
    permissions: list[str]
    children: list[str]


def walk(store: StoreCalls, root: str, *, values: bool = True, permissions: bool = False) -> list[Entry]:
    """`root` and all nodes below it, parents first, children in their order.

    Nodes that go away meanwhile or may not be read are left out; for `root` that is a `XenstoreError`.
    """
    found: dict[str, Entry] = {}
    level = [Entry(root, root, -1, b"", [], [])]
    while level:
        below: list[Entry] = []
        for entry, error in _look(store, level, values=values, permissions=permissions):
            if error is not None:
                if entry.depth < 0 or error.name not in ("ENOENT", "EACCES"):
                    raise error
                continue
            found[entry.path] = entry
            below += [Entry(child_of(entry.path, name), name, entry.depth + 1, b"", [], []) for name in entry.children]
        level = below
    return list(_in_order(found, root))


def child_of(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}"


def _look(
    store: StoreCalls, level: list[Entry], *, values: bool, permissions: bool
) -> Iterator[tuple[Entry, XenstoreError | None]]:
    """Fill in the entries of one level."""
    ops = [Op.DIRECTORY, *([Op.READ] if values else []), *([Op.GET_PERMS] if permissions else [])]
    replies = fetch(store, [ask(op, entry.path) for entry in level for op in ops])
    for i, entry in enumerate(level):
        listing, *others = replies[i * len(ops) : (i + 1) * len(ops)]
        try:
            entry.children = _names(store, entry.path, listing)
            good = dict(zip(ops[1:], strict(others), strict=True))
        except XenstoreError as error:
            yield entry, error
            continue
        entry.value = good.get(Op.READ, b"")
        entry.permissions = split(good.get(Op.GET_PERMS, b""))
        yield entry, None


def _names(store: StoreCalls, path: str, reply: bytes | XenstoreError) -> list[str]:
    if isinstance(reply, XenstoreError):
        if reply.name != "E2BIG":
            raise reply
        return store.ls(path)  # in parts
    return split(reply)


def _in_order(found: dict[str, Entry], root: str) -> Iterator[Entry]:
    stack = [root]
    while stack:
        entry = found.get(stack.pop())
        if entry is not None:
            yield entry
            stack.extend(child_of(entry.path, name) for name in reversed(entry.children))
