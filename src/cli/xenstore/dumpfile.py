# SPDX-License-Identifier: MIT
"""The file of dump and restore. Pure: JSON in, nodes out, and back.

    {"format": "paravirt xenstore dump", "version": 1, "path": "/a", "nodes": [
     {"path": "/a", "value": "text", "permissions": ["n0"]},
     {"path": "/a/b", "value": {"base64": "/w=="}, "permissions": ["n0", "r5"]}]}

The first node is the one that was dumped. Every other one comes after its parent, and children stand in the order in
which they were made. A value that is no UTF-8 stands as base64.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from paravirt.cli.xenstore.values import from_json, json_value
from paravirt.errors import InvalidRequest
from paravirt.xenstore.paths import canonical
from paravirt.xenstore.permissions import Permissions
from paravirt.xenstore.wire import PAYLOAD_MAX_BYTES

FORMAT: Final = "paravirt xenstore dump"
VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a dump; `permissions` in wire form, the owner's first."""

    path: str
    value: bytes
    permissions: tuple[str, ...]


def encode(root: str, nodes: Iterable[Node]) -> Iterator[str]:
    """The file's text in pieces, a line for each node."""
    yield f'{{"format": {json.dumps(FORMAT)}, "version": {VERSION}, "path": {json.dumps(root)}, "nodes": ['
    separator = "\n "
    for node in nodes:
        record = {"path": node.path, "value": json_value(node.value), "permissions": node.permissions}
        yield f"{separator}{json.dumps(record)}"
        separator = ",\n "
    yield "]}\n"


def decode(text: bytes) -> tuple[str, list[Node]]:
    """(path of the root, all nodes). Raises `InvalidRequest` that names the entry that is wrong, counted from 1."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the dump is no JSON: {error}") from None
    root, records = _header(document)
    nodes: list[Node] = []
    seen: set[str] = set()
    for number, record in enumerate(records, start=1):
        try:
            node = _node(record)
            _check_place(node.path, root, seen)
        except InvalidRequest as error:
            name = record.get("path") if isinstance(record, dict) else None
            raise InvalidRequest(f"entry {number}{f' ({name})' if isinstance(name, str) else ''}: {error}") from None
        seen.add(node.path)
        nodes.append(node)
    return root, nodes


def _header(document: Any) -> tuple[str, list[Any]]:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InvalidRequest("this is no dump of a store")
    if document.get("version") != VERSION:
        raise InvalidRequest(f"this dump has version {document.get('version')!r}; known is {VERSION}")
    if unknown := document.keys() - {"format", "version", "path", "nodes"}:
        raise InvalidRequest(f"the dump has an unknown part: {min(unknown)}")
    root, nodes = document.get("path"), document.get("nodes")
    if not isinstance(root, str) or not isinstance(nodes, list) or not nodes:
        raise InvalidRequest("the dump has no path or no nodes")
    return root, nodes


def _node(record: Any) -> Node:
    if not isinstance(record, dict) or record.keys() != {"path", "value", "permissions"}:
        raise InvalidRequest("a node has exactly path, value and permissions")
    path, words = record["path"], record["permissions"]
    if not isinstance(path, str) or not path.startswith("/") or not path.isascii():
        raise InvalidRequest("the path is not absolute")
    if canonical(path.encode(), b"") is None:
        raise InvalidRequest("the path is not valid")
    value = from_json(record["value"])
    if len(path) + 1 + len(value) > PAYLOAD_MAX_BYTES:
        raise InvalidRequest(f"path and value are longer than the {PAYLOAD_MAX_BYTES - 1} bytes of a request")
    if not isinstance(words, list) or not words:
        raise InvalidRequest("it has no permissions")
    for word in words:
        if not isinstance(word, str) or not word.isascii() or Permissions.parse([word.encode()]) is None:
            raise InvalidRequest(f"permission {word!r} is none")
    if len(path) + 1 + sum(len(word) + 1 for word in words) > PAYLOAD_MAX_BYTES:
        raise InvalidRequest("it has more permissions than fit in a request")
    return Node(path, value, tuple(words))


def _check_place(path: str, root: str, seen: set[str]) -> None:
    if path in seen:
        raise InvalidRequest("it is there twice")
    if not seen:
        if path != root:
            raise InvalidRequest(f"the first node is not {root}")
    elif path == "/" or (path.rpartition("/")[0] or "/") not in seen:
        raise InvalidRequest("its parent does not come before it")
