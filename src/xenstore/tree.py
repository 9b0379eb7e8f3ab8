# SPDX-License-Identifier: MIT
"""What requests do to the tree: look up, write, make, remove, set permissions.

Each works on any view and comes to its result or to an errno; nothing is changed when it is an errno. No recursion: a
path may have 1500 levels.
"""

from collections.abc import Iterable

from paravirt.xenstore.domains import Domain
from paravirt.xenstore.limits import Limits, reached
from paravirt.xenstore.paths import ROOT, child_of, parent_of, split
from paravirt.xenstore.permissions import OWNER, WRITE, Permissions
from paravirt.xenstore.store import NODE_HEADER_BYTES, PERMISSION_BYTES, Node, Store, View
from paravirt.xenstore.wire import Errno

Removed = list[tuple[bytes, Node]]
"""Nodes that were taken away, children before their parents, the one asked for last."""


def lookup(view: View, who: Domain, path: bytes, need: int) -> Node | Errno:
    """The node, if `who` has all of the access `need`. Otherwise ENOENT or EACCES; a domain learns that a node is
    missing only if the nearest ancestor that exists would grant it the same access."""
    node = view.get(path)
    if node is None:
        errno = Errno.ENOSPC if view.refused() else Errno.ENOENT
    elif who.privileged or who.access(node.permissions) & need == need:
        return node
    else:
        errno = Errno.EACCES
    if errno is Errno.ENOSPC:
        return errno
    ancestor = None
    while ancestor is None:
        path = parent_of(path)
        ancestor = view.get(path)
        if view.refused():
            return Errno.ENOSPC
    return errno if who.access(ancestor.permissions) & need else Errno.EACCES


def write(view: View, who: Domain, path: bytes, value: bytes, limits: Limits) -> Node | Errno:
    """Set the value of a node; it and its parents are made if they are missing."""
    node = lookup(view, who, path, WRITE)
    if node is Errno.ENOENT:
        return _create(view, who, path, value, limits)
    if isinstance(node, Errno):
        return node
    if not who.privileged and reached(node.n_bytes - len(node.value) + len(value), limits.node_bytes):
        view.fail()
        return Errno.ENOSPC
    node = view.edit(path)
    node.value = value
    return node


def make(view: View, who: Domain, path: bytes, limits: Limits) -> Node | Errno | None:
    """Make an empty node and its missing parents; None if it was there."""
    node = lookup(view, who, path, WRITE)
    if node is Errno.ENOENT:
        return _create(view, who, path, b"", limits)
    return node if isinstance(node, Errno) else None


def _create(view: View, who: Domain, path: bytes, value: bytes, limits: Limits) -> Node | Errno:
    missing = [path]
    above = parent_of(path)
    while (parent := view.get(above)) is None:
        if view.refused():
            return Errno.ENOSPC
        missing.append(above)
        above = parent_of(above)
    permissions = parent.permissions
    if not who.privileged:
        permissions = permissions.owned_by(who.domid)
        if not _affordable(view, who, parent, missing, value, permissions, limits):
            return Errno.ENOSPC
    view.edit(above).add_child(split(missing[-1])[1])
    for new_path, inside in zip(missing, [None, *missing], strict=False):
        node = Node(b"", permissions)
        if inside is None:
            node.value = value
            created = node
        else:
            node.add_child(split(inside)[1])
        view.add(new_path, node)
    view.charge(permissions.owner, len(missing))
    return created


def _affordable(
    view: View, who: Domain, parent: Node, missing: list[bytes], value: bytes, permissions: Permissions, limits: Limits
) -> bool:
    """Whether a guest's quotas allow to make the `missing` nodes (deepest first) below `parent`."""
    owned = view.owned(who.domid)
    if reached(owned + len(missing), limits.nodes):
        if not reached(owned + 1, limits.nodes):
            view.fail()
        return False
    names = [len(split(path)[1]) + 1 for path in missing]
    own_bytes = NODE_HEADER_BYTES + PERMISSION_BYTES * len(permissions.entries)
    sizes = (own_bytes + len(value), *(own_bytes + name for name in names[:-1]), parent.n_bytes + names[-1])
    if reached(max(sizes), limits.node_bytes):
        view.fail()
        return False
    return True


def remove(view: View, who: Domain, path: bytes) -> Removed | Errno:
    """Remove a node and everything below it; nothing at all if it is missing but has a parent."""
    node = lookup(view, who, path, WRITE)
    if isinstance(node, Errno):
        return [] if node is Errno.ENOENT and view.get(parent_of(path)) is not None else node
    return Errno.EINVAL if path == ROOT else _cut(view, path)


def _cut(view: View, path: bytes) -> Removed | Errno:
    above, name = split(path)
    parent = view.get(above)
    if view.refused():
        return Errno.ENOSPC
    # A transaction that first saw these nodes at different times may find them at odds; it will not commit.
    if parent is None:
        return Errno.EINVAL
    if not parent.has_child(name):
        return Errno.EIO
    found: Removed = []
    stack = [path]
    while stack:
        at = stack.pop()
        node = view.get(at)
        if view.refused():
            return Errno.ENOSPC
        if node is None:
            return Errno.EIO
        found.append((at, node))
        if node.children:
            stack.extend([child_of(at, child) for child in node.children])
    found.reverse()
    for at, node in found:
        view.drop(at)
        view.charge(node.permissions.owner, -1)
    view.edit(above).remove_child(name)
    return found


def set_permissions(
    view: View, who: Domain, path: bytes, permissions: Permissions, limits: Limits
) -> tuple[Node, Permissions] | Errno:
    """Change the permissions of a node: (node, permissions before)."""
    node = lookup(view, who, path, WRITE | OWNER)
    if isinstance(node, Errno):
        return node
    before = node.permissions
    if not who.privileged:
        if before.owner != permissions.owner:
            return Errno.EPERM
        n_more = len(permissions.entries) - len(before.entries)
        if reached(node.n_bytes + PERMISSION_BYTES * n_more, limits.node_bytes):
            view.fail()
            return Errno.ENOSPC
    view.charge(before.owner, -1)
    view.charge(permissions.owner, 1)
    node = view.edit(path)
    node.permissions = permissions
    return node, before


def forget_domains(store: Store, domids: set[int]) -> list[Removed]:
    """Remove all nodes these domains own, with what is below them, and their permissions on other nodes."""
    owned: list[bytes] = []
    named: list[bytes] = []
    for path, node in store.nodes.items():
        permissions = node.permissions
        if not permissions.domids.isdisjoint(domids):
            (owned if permissions.owner in domids and path != ROOT else named).append(path)
    cuts = []
    for path in sorted(owned, key=len):
        if path in store.nodes:
            removed = _cut(store, path)
            assert not isinstance(removed, Errno)
            cuts.append(removed)
    for path in named:
        if path in store.nodes:
            _forget_entries(store, path, domids)
    for name, permissions in store.special.items():
        store.special[name] = _unowned(permissions, domids).without(domids)
    return cuts


def _forget_entries(store: Store, path: bytes, domids: Iterable[int]) -> None:
    node = store.edit(path)
    gone = set(domids)
    kept = _unowned(node.permissions, gone).without(gone)
    if kept.owner != node.permissions.owner:
        store.charge(node.permissions.owner, -1)
        store.charge(kept.owner, 1)
    node.permissions = kept


def _unowned(permissions: Permissions, domids: set[int]) -> Permissions:
    """Dom0 owns what a dead domain cannot own any longer: the root and the special nodes."""
    return permissions.owned_by(0) if permissions.owner in domids else permissions
