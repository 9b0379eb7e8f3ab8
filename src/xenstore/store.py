# SPDX-License-Identifier: MIT
"""The tree: nodes by path, how many each domain owns, and a generation that grows with each change.

A *view* is what an operation works on: the store itself, or a transaction over it (`transaction.Transaction`).
Nodes are changed in place unless a transaction has seen them: those are frozen, and a change replaces them.
"""

from typing import Protocol

from paravirt.xenstore.paths import ROOT
from paravirt.xenstore.permissions import DOM0_ONLY, EVERYBODY_READS, Permissions
from paravirt.xenstore.wire import Errno

NODE_HEADER_BYTES = 16
PERMISSION_BYTES = 8


class Node:
    """One node. Only its view changes it, through `View.edit`.

    `children` holds the names of the children in the order they were made; None is none. `listing` is the reply to a
    request for them, kept until they change. `n_name_bytes` is how long that is.
    """

    __slots__ = ("_listing", "children", "frozen", "generation", "n_name_bytes", "permissions", "value")

    def __init__(self, value: bytes, permissions: Permissions) -> None:
        self.value = value
        self.permissions = permissions
        self.children: dict[bytes, None] | None = None
        self.n_name_bytes = 0
        self.generation = 0
        self.frozen = False
        self._listing: bytes | None = b""

    def copy(self) -> "Node":
        """The same, not frozen."""
        other = Node(self.value, self.permissions)
        other.children = self.children.copy() if self.children else None
        other.n_name_bytes, other._listing = self.n_name_bytes, self._listing
        return other

    @property
    def listing(self) -> bytes:
        """The names of the children, a NUL after each."""
        listing = self._listing
        if listing is None:
            listing = self._listing = b"\0".join([*(self.children or ()), b""])
        return listing

    @property
    def n_bytes(self) -> int:
        """The size that counts against a quota, as the C daemon stores nodes."""
        return (
            NODE_HEADER_BYTES + PERMISSION_BYTES * len(self.permissions.entries) + len(self.value) + self.n_name_bytes
        )

    def add_child(self, name: bytes) -> None:
        if self.children is None:
            self.children = {}
        if name in self.children:
            return
        self.children[name] = None
        self.n_name_bytes += len(name) + 1
        self._listing = None

    def has_child(self, name: bytes) -> bool:
        return self.children is not None and name in self.children

    def remove_child(self, name: bytes) -> None:
        assert self.children is not None
        del self.children[name]
        self.n_name_bytes -= len(name) + 1
        if not self.children:
            self.children = None
        self._listing = None


def stored_bytes(path: bytes, node: Node) -> int:
    """What a node counts in the memory of its owner."""
    return len(path) + node.n_bytes


class View(Protocol):
    """What operations read and change."""

    def refused(self) -> Errno | None:
        """Why a `get` found nothing although there may be something: the domain may not look at more nodes in this
        transaction (ENOSPC), or holds too much memory (ENOMEM)."""

    def get(self, path: bytes) -> Node | None:
        """The node at an absolute path, or None; not to be changed."""

    def edit(self, path: bytes) -> Node:
        """The node at a path that `get` found, to be changed right now; it has a new generation."""

    def add(self, path: bytes, node: Node) -> None:
        """Put a new node where `get` found none. Entering it in its parent is the caller's."""

    def drop(self, path: bytes) -> None:
        """Take away a node that `get` found. Taking it out of its parent is the caller's."""

    def fail(self) -> None:
        """A change could not be made as a whole: a transaction can then only be given up."""

    def owned(self, domid: int) -> int:
        """How many nodes a domain owns."""

    def charge(self, domid: int, n_nodes: int, n_bytes: int) -> None:
        """Account for a change of what a domain owns: nodes, and their `stored_bytes`."""

    def pays(self, domid: int, owner: int) -> bool:
        """Whether the memory counts as that of domain `domid`, who asks, when a node of domain `owner` grows."""


class Store:
    """The tree as it is now."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, Node] = {}
        self.special: dict[bytes, Permissions] = {
            b"@introduceDomain": DOM0_ONLY,
            b"@releaseDomain": EVERYBODY_READS,
        }
        self.generation = 0
        self._owned: dict[int, int] = {}
        self._owned_bytes: dict[int, int] = {}
        self.add(ROOT, Node(b"", DOM0_ONLY))
        self.edit(ROOT).add_child(b"tool")
        tool = Node(b"", DOM0_ONLY)
        tool.add_child(b"xenstored")
        for path, node in ((b"/tool/xenstored", Node(b"", DOM0_ONLY)), (b"/tool", tool)):
            self.add(path, node)
        self.charge(0, len(self.nodes), sum(stored_bytes(path, node) for path, node in self.nodes.items()))

    def refused(self) -> Errno | None:
        return None

    def get(self, path: bytes) -> Node | None:
        return self.nodes.get(path)

    def next_generation(self) -> int:
        self.generation += 1
        return self.generation

    def edit(self, path: bytes) -> Node:
        node = self.nodes[path]
        if node.frozen:
            node = self.nodes[path] = node.copy()
        self.generation += 1
        node.generation = self.generation
        return node

    def add(self, path: bytes, node: Node) -> None:
        self.generation += 1
        node.generation = self.generation
        self.nodes[path] = node

    def drop(self, path: bytes) -> None:
        del self.nodes[path]

    def fail(self) -> None:
        pass  # nothing has been changed

    def owned(self, domid: int) -> int:
        return self._owned.get(domid, 0)

    def owned_bytes(self, domid: int) -> int:
        """The `stored_bytes` of all nodes of a domain."""
        return self._owned_bytes.get(domid, 0)

    def charge(self, domid: int, n_nodes: int, n_bytes: int) -> None:
        count = self._owned.get(domid, 0) + n_nodes
        if count:
            self._owned[domid] = count
            self._owned_bytes[domid] = self._owned_bytes.get(domid, 0) + n_bytes
        else:
            self._owned.pop(domid, None)
            self._owned_bytes.pop(domid, None)

    def pays(self, domid: int, owner: int) -> bool:
        return domid == owner

    def statistics(self) -> dict[int, int]:
        """Nodes owned, by domid."""
        return dict(self._owned)
