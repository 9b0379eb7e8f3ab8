# SPDX-License-Identifier: MIT
"""What requests do to the tree: look up, write, make, remove, set permissions.

Each works on any view and comes to its result or to an errno; nothing is changed when it is an errno. No recursion: a
path may have 1500 levels.
"""

from collections.abc import Iterable

from paravirt.xenstore.domains import Domain
from paravirt.xenstore.paths import ROOT, child_of, parent_of, split
from paravirt.xenstore.permissions import OWNER, WRITE, Permissions
from paravirt.xenstore.store import NODE_HEADER_BYTES, PERMISSION_BYTES, Node, Store, View, stored_bytes
from paravirt.xenstore.wire import Errno

Removed = list[tuple[bytes, Node]]
"""Nodes that were taken away, children before their parents, the one asked for last."""


def lookup(view: View, who: Domain, path: bytes, need: int) -> Node | Errno:
    """The node, if `who` has all of the access `need`. Otherwise ENOENT or EACCES; a domain learns that a node is
    missing only if the nearest ancestor that exists would grant it the same access. ENOSPC, ENOMEM: `View.refused`."""
    node = view.get(path)
    if node is None:
        refusal = view.refused()
        if refusal is not None:
            return refusal
        errno = Errno.ENOENT
    elif who.privileged or who.access(node.permissions) & need == need:
        return node
    else:
        errno = Errno.EACCES
    ancestor = None
    while ancestor is None:
        path = parent_of(path)
        ancestor = view.get(path)
        if ancestor is None:
            refusal = view.refused()
            if refusal is not None:
                return refusal
    return errno if who.access(ancestor.permissions) & need else Errno.EACCES


def _refused_growth(view: View, who: Domain, owner: int, n_bytes: int, node_bytes: int) -> Errno | None:
    """Why a guest may not make a node of `owner` grow by `n_bytes`, to `node_bytes`; a transaction fails then."""
    errno = None
    if who.over("node-size", node_bytes):
        errno = Errno.ENOSPC
    elif n_bytes > 0 and view.pays(who.domid, owner) and who.over("memory", who.memory_bytes + n_bytes):
        errno = Errno.ENOMEM
    if errno is not None:
        view.fail()
    return errno


def write(view: View, who: Domain, path: bytes, value: bytes) -> Node | Errno:
    """Set the value of a node; it and its parents are made if they are missing."""
    node = lookup(view, who, path, WRITE)
    if node is Errno.ENOENT:
        return _create(view, who, path, value)
    if isinstance(node, Errno):
        return node
    owner, n_more = node.permissions.owner, len(value) - len(node.value)
    errno = _refused_growth(view, who, owner, n_more, node.n_bytes + n_more)
    if errno is not None:
        return errno
    node = view.edit(path)
    node.value = value
    view.charge(owner, 0, n_more)
    return node


def make(view: View, who: Domain, path: bytes) -> Node | Errno | None:
    """Make an empty node and its missing parents; None if it was there."""
    node = lookup(view, who, path, WRITE)
    if node is Errno.ENOENT:
        return _create(view, who, path, b"")
    return node if isinstance(node, Errno) else None


def _create(view: View, who: Domain, path: bytes, value: bytes) -> Node | Errno:
    missing = [path]
    above = parent_of(path)
    while (parent := view.get(above)) is None:
        refusal = view.refused()
        if refusal is not None:
            return refusal
        missing.append(above)
        above = parent_of(above)
    permissions = parent.permissions if who.privileged else parent.permissions.owned_by(who.domid)
    names = [len(split(new_path)[1]) + 1 for new_path in missing]  # deepest first; the last one is new in the parent
    own_bytes = NODE_HEADER_BYTES + PERMISSION_BYTES * len(permissions.entries)
    sizes = [own_bytes + len(value), *(own_bytes + name for name in names[:-1])]
    n_new_bytes = sum(sizes) + sum(map(len, missing))
    if not who.privileged:
        refusal = _refused_nodes(view, who, parent, names[-1], sizes, n_new_bytes)
        if refusal is not None:
            return refusal
    view.edit(above).add_child(split(missing[-1])[1])
    view.charge(parent.permissions.owner, 0, names[-1])
    for new_path, inside in zip(missing, [None, *missing], strict=False):
        node = Node(b"", permissions)
        if inside is None:
            node.value = value
            created = node
        else:
            node.add_child(split(inside)[1])
        view.add(new_path, node)
    view.charge(permissions.owner, len(missing), n_new_bytes)
    return created


def _refused_nodes(
    view: View, who: Domain, parent: Node, n_name_bytes: int, sizes: list[int], n_new_bytes: int
) -> Errno | None:
    """Why a guest may not make new nodes of these `sizes` below `parent`, which gets a longer list of names."""
    owned = view.owned(who.domid)
    if who.over("nodes", owned + len(sizes)):
        if not who.over("nodes", owned + 1):
            view.fail()
        return Errno.ENOSPC
    n_more = n_new_bytes + (n_name_bytes if view.pays(who.domid, parent.permissions.owner) else 0)
    return _refused_growth(view, who, who.domid, n_more, max(*sizes, parent.n_bytes + n_name_bytes))


def remove(view: View, who: Domain, path: bytes) -> Removed | Errno:
    """Remove a node and everything below it; nothing at all if it is missing but has a parent."""
    node = lookup(view, who, path, WRITE)
    if isinstance(node, Errno):
        return [] if node is Errno.ENOENT and view.get(parent_of(path)) is not None else node
    return Errno.EINVAL if path == ROOT else _cut(view, path)


def _cut(view: View, path: bytes) -> Removed | Errno:
    above, name = split(path)
    parent = view.get(above)
    refusal = view.refused()
    if refusal is not None:
        return refusal
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
        if node is None:
            return view.refused() or Errno.EIO
        found.append((at, node))
        if node.children:
            stack.extend([child_of(at, child) for child in node.children])
    found.reverse()
    for at, node in found:
        view.drop(at)
        view.charge(node.permissions.owner, -1, -stored_bytes(at, node))
    view.edit(above).remove_child(name)
    view.charge(parent.permissions.owner, 0, -len(name) - 1)
    return found


def set_permissions(view: View, who: Domain, path: bytes, permissions: Permissions) -> tuple[Node, Permissions] | Errno:
    """Change the permissions of a node: (node, permissions before)."""
    node = lookup(view, who, path, WRITE | OWNER)
    if isinstance(node, Errno):
        return node
    before = node.permissions
    n_more = PERMISSION_BYTES * (len(permissions.entries) - len(before.entries))
    if not who.privileged:
        if before.owner != permissions.owner:
            return Errno.EPERM
        errno = _refused_growth(view, who, before.owner, n_more, node.n_bytes + n_more)
        if errno is not None:
            return errno
    node = view.edit(path)
    _change_permissions(view, path, node, permissions)
    return node, before


def _change_permissions(view: View, path: bytes, node: Node, permissions: Permissions) -> None:
    view.charge(node.permissions.owner, -1, -stored_bytes(path, node))
    node.permissions = permissions
    view.charge(permissions.owner, 1, stored_bytes(path, node))


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
    _change_permissions(store, path, node, _unowned(node.permissions, gone).without(gone))


def _unowned(permissions: Permissions, domids: set[int]) -> Permissions:
    """Dom0 owns what a dead domain cannot own any longer: the root and the special nodes."""
    return permissions.owned_by(0) if permissions.owner in domids else permissions
