# SPDX-License-Identifier: MIT
"""A transaction: a view over the store that shows nothing of itself before it commits.

Starting one costs nothing whatever the size of the tree. A node is taken as it is when the transaction first looks at
it, and stays so; a node that is missing then stays missing. The commit succeeds only if every node looked at still has
the generation it had then, or is still missing: otherwise EAGAIN, also if nothing was written (the C daemon's rule).
"""

from collections.abc import Callable

from paravirt.xenstore.domains import Domain
from paravirt.xenstore.permissions import Permissions
from paravirt.xenstore.store import NODE_HEADER_BYTES, Node, Store, stored_bytes
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

    `failed` is set when a change could not be made as a whole: it can only be given up then. `n_bytes` counts in the
    memory of its domain until `close`: each path it looked at, with the node there or a node's header, and what it adds
    to nodes.
    """

    __slots__ = ("_accesses", "_charges", "_domain", "_outdated", "_refusal", "_store", "failed", "n_bytes", "number")

    def __init__(self, store: Store, domain: Domain, *, number: int = 0) -> None:
        """`number`: its id on the wire."""
        self._store = store
        self._domain = domain
        self.number = number
        self._accesses: dict[bytes, Access] = {}
        self._charges: dict[int, tuple[int, int]] = {}
        self.n_bytes = 0
        self.failed = False
        self._refusal: Errno | None = None
        self._outdated = False

    def get(self, path: bytes) -> Node | None:
        access = self._accesses.get(path)
        if access is None:
            domain = self._domain
            node = self._store.nodes.get(path)
            n_bytes = stored_bytes(path, node) if node is not None else len(path) + NODE_HEADER_BYTES
            if domain.over("transaction-nodes", len(self._accesses) + 1):
                self._refuse(Errno.ENOSPC)
                return None
            if domain.over("memory", domain.memory_bytes + n_bytes):
                self._refuse(Errno.ENOMEM)
                return None
            if node is not None:
                node.frozen = True
            access = self._accesses[path] = Access(node)
            self._hold(n_bytes)
        return access.node

    def _refuse(self, errno: Errno) -> None:
        self.failed, self._refusal = True, errno

    def _hold(self, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        self._domain.held_bytes += n_bytes

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
        return self._store.owned(domid) + self._charges.get(domid, (0, 0))[0]

    def charge(self, domid: int, n_nodes: int, n_bytes: int) -> None:
        nodes, bytes_ = self._charges.get(domid, (0, 0))
        self._charges[domid] = nodes + n_nodes, bytes_ + n_bytes
        self._hold(n_bytes)

    def pays(self, domid: int, owner: int) -> bool:
        return True  # the copies are its own

    def refused(self) -> Errno | None:
        return self._refusal

    def fail(self) -> None:
        self.failed = True

    def note_event(self, path: bytes, exact: bool) -> None:
        """Remember that watchers of a path are to be told on commit, once; all of them, or those of exactly that path
        if there is no other reason."""
        access = self._accesses[path]
        access.exact = exact and (access.exact or not access.event)
        access.event = True

    def forget_domains(self, domids: set[int]) -> None:
        """These domains are gone: no permission is made for them. It cannot commit if it gave one of them a node."""
        for access in self._accesses.values():
            node = access.node
            if access.modified and node is not None and not node.permissions.domids.isdisjoint(domids):
                if node.permissions.owner in domids:
                    self._outdated = True
                else:
                    n_before = node.n_bytes
                    node.permissions = node.permissions.without(domids)
                    self.charge(node.permissions.owner, 0, node.n_bytes - n_before)

    def close(self) -> None:
        """It holds no memory any longer; `commit` may follow."""
        self._hold(-self.n_bytes)

    def commit(self, nodes_quota: Callable[[int, int], bool] | None) -> Errno | list[Event]:
        """Make the changes real, all or none; the events they cause, in the order the paths were first looked at.

        `nodes_quota` says whether a domain may not own a number of nodes, None if nobody asks (Dom0 commits).
        ENOMEM: it has failed before; ENOSPC: a domain would own too many nodes; EAGAIN: something it looked at changed.
        """
        if self.failed:
            return Errno.ENOMEM
        if nodes_quota is not None:
            for domid, (n_nodes, _) in self._charges.items():
                if n_nodes > 0 and nodes_quota(domid, self.owned(domid)):
                    return Errno.ENOSPC
        nodes = self._store.nodes
        for path, access in self._accesses.items():
            current = nodes.get(path)
            if access.base != (current.generation if current is not None else MISSING_GENERATION):
                return Errno.EAGAIN
        if self._outdated:
            return Errno.EAGAIN
        for path, access in self._accesses.items():
            if access.modified:
                self._apply(path, access.node)
        for domid, (n_nodes, n_bytes) in self._charges.items():
            self._store.charge(domid, n_nodes, n_bytes)
        return [(path, access.exact, access.permissions) for path, access in self._accesses.items() if access.event]

    def _apply(self, path: bytes, node: Node | None) -> None:
        if node is not None:
            node.generation = self._store.next_generation()
            self._store.nodes[path] = node
        else:
            self._store.nodes.pop(path, None)
