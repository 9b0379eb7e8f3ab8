# SPDX-License-Identifier: MIT
"""What all connections share: the tree, the watches, the domains. Pure: whoever moves bytes stands around it."""

from collections.abc import Iterable

from paravirt.xenstore.domains import DOM0, Domain, DomainControl, NoControl
from paravirt.xenstore.limits import Limits
from paravirt.xenstore.permissions import Permissions
from paravirt.xenstore.session import Connection
from paravirt.xenstore.store import Node, Store, View
from paravirt.xenstore.transaction import Transaction
from paravirt.xenstore.tree import Removed, forget_domains
from paravirt.xenstore.watches import WatchTable
from paravirt.xenstore.wire import Errno


class Hub:
    """One store and those connected to it.

    `n_causes` counts what may change the tree, requests and deaths of domains: equal events of one cause are one event.
    `dirty` holds the connections that have output (or have become broken) since whoever moves bytes last looked.
    """

    def __init__(self, *, limits: Limits | None = None, control: DomainControl | None = None) -> None:
        self.limits = limits or Limits()
        self.control: DomainControl = control or NoControl()
        self.store = Store()
        self.watches = WatchTable(self.store)
        self.domains: dict[int, Domain] = {DOM0: Domain(DOM0)}
        self.connections: set[Connection] = set()
        self.dirty: set[Connection] = set()
        self.n_causes = 0

    # -- connections

    def connect(self, domid: int = DOM0) -> Connection:
        """A new connection that speaks for `domid`; the caller has made sure that it may."""
        domain = self.domains.get(domid) or self._learn(domid)
        connection = Connection(self, domain)
        domain.connections.add(connection)
        self.connections.add(connection)
        return connection

    def disconnect(self, connection: Connection) -> None:
        """The connection is over: what it holds goes. Doing it twice is harmless."""
        if connection in self.connections:
            connection.drop_state()
            self.connections.discard(connection)
            self.dirty.discard(connection)
            domain = connection.domain
            domain.connections.discard(connection)
            if domain.ring is connection:
                domain.ring = None
            connection.closed = True

    # -- changes and who is told of them

    def changed(
        self, view: View, path: bytes, node: Node, *, exact: bool = False, before: Permissions | None = None
    ) -> None:
        """Tell watchers, or have the transaction do it when it commits."""
        if isinstance(view, Transaction):
            view.note_event(path, exact)
        else:
            self.watches.fire(path, node, exact=exact, before=before)

    def removed(self, view: View, nodes: Removed) -> None:
        """Tell watchers of a removed subtree: for what was below only those who watch exactly that."""
        last = len(nodes) - 1
        for i, (path, node) in enumerate(nodes):
            self.changed(view, path, node, exact=i != last)

    # -- domains

    def known(self, domid: int) -> Domain | None:
        """The domain, if there is one with this id."""
        domain = self.domains.get(domid)
        return domain or (self._learn(domid) if self.control.exists(domid) else None)

    def _learn(self, domid: int) -> Domain:
        domain = self.domains[domid] = Domain(domid)
        return domain

    def introduce(self, domid: int, page: int, port: int) -> Errno | None:
        """Serve a domain over its ring page. Done again, its event channel is bound anew and its connection reset."""
        domain = self.known(domid)
        if domain is None or domid == DOM0:
            return Errno.EINVAL
        connection = domain.ring or self.connect(domid)
        domain.ring = connection
        refusal = self.control.attach_ring(connection, page, port)
        if refusal is not None:
            self.disconnect(connection)
            return refusal
        connection.reset()
        self.served(domain)
        return None

    def served(self, domain: Domain) -> None:
        """The domain can use the store from now on: watchers are told, once."""
        if not domain.introduced:
            domain.introduced = True
            domain.shut_down = False
            self.watches.fire_special(b"@introduceDomain", domain.domid)

    def release(self, domid: int) -> None:
        """The domain is over for the store: its watches, connections, nodes and permissions go, watchers are told."""
        self.forget([domid])
        self.watches.fire_special(b"@releaseDomain", domid)

    def shut_down(self, domid: int) -> None:
        """The domain has stopped but is still there: watchers are told once, until RESUME."""
        self.n_causes += 1
        domain = self.domains.get(domid)
        if domain is not None and domain.introduced and not domain.shut_down:
            domain.shut_down = True
            self.watches.fire_special(b"@releaseDomain", domid)

    def died(self, domids: Iterable[int]) -> None:
        """These domains are gone."""
        self.n_causes += 1
        gone = [domid for domid in domids if domid in self.domains and domid != DOM0]
        told = [domid for domid in gone if self.domains[domid].introduced]
        if gone:
            self.forget(gone)
        for domid in told:
            self.watches.fire_special(b"@releaseDomain", domid)

    def forget(self, domids: list[int]) -> None:
        """Take away all that these domains hold, in one pass over the tree."""
        for domid in domids:
            domain = self.domains.pop(domid)
            for connection in list(domain.connections):
                self.disconnect(connection)
                self.control.detach(connection)
        gone = set(domids)
        for domain in self.domains.values():
            if domain.target in gone:
                domain.target = None
        for nodes in forget_domains(self.store, gone):
            self.removed(self.store, nodes)
