# SPDX-License-Identifier: MIT
"""Watches: who wants to know of changes where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from paravirt.xenstore.paths import parent_of
from paravirt.xenstore.permissions import READ, Permissions
from paravirt.xenstore.store import Node, Store

if TYPE_CHECKING:
    from paravirt.xenstore.domains import Domain
    from paravirt.xenstore.session import Connection

UNLIMITED_DEPTH: Final = -1


class Watch:
    """One watch of one connection. `n_prefix` bytes are cut from the path of an event (a relative watch);
    `depth` is how many levels below its path it looks."""

    __slots__ = ("connection", "depth", "n_prefix", "number", "path", "token")

    def __init__(
        self, connection: Connection, path: bytes, token: bytes, *, n_prefix: int, depth: int, number: int
    ) -> None:
        self.connection = connection
        self.path = path
        self.token = token
        self.n_prefix = n_prefix
        self.depth = depth
        self.number = number

    @property
    def n_bytes(self) -> int:
        """What it counts in the memory of its domain."""
        return len(self.path) + len(self.token)

    def tell(self, path: bytes) -> None:
        """Send its connection an event for an absolute (or special) path."""
        self.connection.send_event(path[self.n_prefix :], self.token)

    def reaches(self, path: bytes) -> bool:
        """Whether a path at or below its own is not too deep for it."""
        below = path.count(b"/") - (0 if self.path == b"/" else self.path.count(b"/"))
        return self.depth == UNLIMITED_DEPTH or (0 if path == b"/" else below) <= self.depth


class WatchTable:
    """All watches by path. Events reach each connection in the order it set its watches."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_path: dict[bytes, list[Watch]] = {}
        self._n_made = 0

    @property
    def n_watches(self) -> int:
        return sum(map(len, self._by_path.values()))

    def add(self, connection: Connection, path: bytes, token: bytes, *, n_prefix: int, depth: int) -> Watch:
        self._n_made += 1
        watch = Watch(connection, path, token, n_prefix=n_prefix, depth=depth, number=self._n_made)
        self._by_path.setdefault(path, []).append(watch)
        return watch

    def remove(self, watch: Watch) -> None:
        watches = self._by_path[watch.path]
        watches.remove(watch)
        if not watches:
            del self._by_path[watch.path]

    def fire(
        self,
        path: bytes,
        node: Node | None,
        *,
        exact: bool,
        before: Permissions | None = None,
        parent: Node | None = None,
    ) -> None:
        """`path` changed: tell every watch of it and (unless `exact`) of its ancestors whose domain may know.

        `node` is what is or was there, None to look it up; `before` are its permissions before the change; `parent` is
        its parent if that was taken away with it. A domain may know if either set of permissions, or its parent's, lets
        it read.
        """
        watches = self._matching(path, exact)
        if not watches:
            return
        verdicts: dict[Domain, bool] = {}
        for watch in watches:
            domain = watch.connection.domain
            allowed = verdicts.get(domain)
            if allowed is None:
                allowed = verdicts[domain] = self._may_know(domain, path, node, before, parent)
            if allowed:
                watch.tell(path)

    def fire_special(self, name: bytes, domid: int) -> None:
        """`@introduceDomain` or `@releaseDomain` of a domain; watches with a depth are told which, and there may be
        watches for that domain alone (`@releaseDomain/5`)."""
        permissions = self._store.special[name]
        of_domain = b"%s/%d" % (name, domid)
        watches = [*self._by_path.get(name, ()), *self._by_path.get(of_domain, ())]
        watches.sort(key=lambda watch: watch.number)
        for watch in watches:
            if watch.connection.domain.access(permissions) & READ:
                watch.tell(of_domain if watch.depth >= 1 or watch.path == of_domain else name)

    def _matching(self, path: bytes, exact: bool) -> list[Watch]:
        by_path = self._by_path
        if exact:
            return [*by_path.get(path, ())]
        if not by_path:
            return []
        found: list[Watch] = []
        at, n_places = path, 0
        while True:
            here = by_path.get(at)
            if here is not None:
                found.extend([watch for watch in here if watch.depth < 0 or watch.reaches(path)])
                n_places += 1
            if at == b"/":
                break
            at = parent_of(at)
        if n_places > 1:
            found.sort(key=lambda watch: watch.number)
        return found

    def _may_know(
        self, domain: Domain, path: bytes, node: Node | None, before: Permissions | None, parent: Node | None
    ) -> bool:
        if before is not None and domain.access(before) & READ:
            return True
        node = node or self._store.get(path)
        if node is None:
            return False
        if domain.access(node.permissions) & READ:
            return True
        parent = parent or self._store.get(parent_of(path))
        return parent is not None and domain.access(parent.permissions) & READ != 0
