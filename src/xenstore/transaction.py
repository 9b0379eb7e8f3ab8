# SPDX-License-Identifier: MIT
"""A transaction: a view over the store that shows nothing of itself before it commits.

Starting one costs nothing whatever the size of the tree. A node is taken as it is when the transaction first looks at
it, and stays so; a node that is missing then stays missing. The commit succeeds only if every node looked at still has
the generation it had then, or is still missing: otherwise EAGAIN, also if nothing was written (the C daemon's rule).
"""

from paravirt.xenstore.limits import Limits, reached
from paravirt.xenstore.permissions import Permissions
from paravirt.xenstore.store import Node, Store
from paravirt.xenstore.wire import Errno

MISSING_GENERATION = 0


class Access:
    """What a transaction knows of one path it has looked at."""

    __slots__ = ("base", "event", "exact", "modified", "node", "permissions")

    def __init__(self, node: Node | None) -> None:
        self.node = node
        self.base = node.generation if node is not None else MISSING_GENERATION
        self.permissions: Permissions | None = node.permissions if node is not None else None
        self.modified = False
        self.event = False
        self.exact = False


Event = tuple[bytes, bool, Permissions | None]
"""A change to tell watchers of: path, whether only watches of exactly that path, permissions before the change."""


class Transaction:
    """One open transaction of one connection.

    `failed` is set when a change could not be made as a whole: it can only be given up then.
    """

    __slots__ = ("_accesses", "_charges", "_limit", "_refused", "_store", "failed", "number")

    def __init__(self, store: Store, *, number: int = 0, node_limit: int = 0) -> None:
        """`number`: its id on the wire. `node_limit`: how many nodes it may look at (a quota: 0 is none)."""
        self._store = store
        self.number = number
        self._accesses: dict[bytes, Access] = {}
        self._charges: dict[int, int] = {}
        self._limit = node_limit
        self.failed = False
        self._refused = False

    def get(self, path: bytes) -> Node | None:
        access = self._accesses.get(path)
        if access is None:
            if reached(len(self._accesses) + 1, self._limit):
                self.failed = self._refused = True
                return None
            node = self._store.nodes.get(path)
            if node is not None:
                node.frozen = True
            access = self._accesses[path] = Access(node)
        return access.node

    def edit(self, path: bytes) -> Node:
        access = self._accesses[path]
        node = access.node
        assert node is not None
        if not access.modified:
            node = access.node = node.copy()
        access.modified = True
        node.generation = self._store.next_generation()
        return node

    def add(self, path: bytes, node: Node) -> None:
        access = self._accesses[path]
        access.node, access.modified = node, True
        node.generation = self._store.next_generation()

    def drop(self, path: bytes) -> None:
        access = self._accesses[path]
        access.node, access.modified = None, True

    def owned(self, domid: int) -> int:
        return self._store.owned(domid) + self._charges.get(domid, 0)

    def charge(self, domid: int, n_nodes: int) -> None:
        self._charges[domid] = self._charges.get(domid, 0) + n_nodes

    def refused(self) -> bool:
        return self._refused

    def fail(self) -> None:
        self.failed = True

    def note_event(self, path: bytes, exact: bool) -> None:
        """Remember that watchers of a path are to be told on commit; one event a path, the latest kind of it."""
        access = self._accesses[path]
        access.event, access.exact = True, exact

    def commit(self, limits: Limits | None) -> Errno | list[Event]:
        """Make the changes real, all or none; the events they cause, in the order the paths were first looked at.

        `limits` are those of the domain that commits, None if it is privileged. ENOMEM: it has failed before; EAGAIN:
        something it looked at has changed; ENOSPC: a domain would own too many nodes.
        """
        if self.failed:
            return Errno.ENOMEM
        nodes = self._store.nodes
        for path, access in self._accesses.items():
            current = nodes.get(path)
            if access.base != (current.generation if current is not None else MISSING_GENERATION):
                return Errno.EAGAIN
        if limits is not None:
            for domid, n_nodes in self._charges.items():
                if n_nodes > 0 and domid and reached(self.owned(domid), limits.nodes):
                    return Errno.ENOSPC
        for path, access in self._accesses.items():
            if access.modified:
                self._apply(path, access.node)
        for domid, n_nodes in self._charges.items():
            if n_nodes:
                self._store.charge(domid, n_nodes)
        return [(path, access.exact, access.permissions) for path, access in self._accesses.items() if access.event]

    def _apply(self, path: bytes, node: Node | None) -> None:
        if node is not None:
            node.generation = self._store.next_generation()
            self._store.nodes[path] = node
        else:
            self._store.nodes.pop(path, None)
