# SPDX-License-Identifier: MIT
"""What all connections share: the tree, the watches, the domains. Pure: whoever moves bytes stands around it."""

from collections.abc import Callable, Iterable
from typing import Final

from paravirt.xenstore import check
from paravirt.xenstore.admin import AdminState, ControlActions, NoActions, Statistics
from paravirt.xenstore.domains import DOM0, DOMID_FIRST_RESERVED, Domain, DomainControl, NoControl
from paravirt.xenstore.limits import Limits
from paravirt.xenstore.outbox import Request
from paravirt.xenstore.paths import parent_of
from paravirt.xenstore.permissions import Permissions
from paravirt.xenstore.rate import WriteRate
from paravirt.xenstore.session import Connection
from paravirt.xenstore.store import Node, Store, View
from paravirt.xenstore.trace import TraceLog
from paravirt.xenstore.transaction import Transaction
from paravirt.xenstore.tree import Removed, forget_domains
from paravirt.xenstore.watches import WatchTable
from paravirt.xenstore.wire import Errno, Op, Packet

MEMORY_REPORT_MS: Final = 10_000
"""A domain that holds much memory is reported so often at most."""


class Hub:
    """One store and those connected to it; an `admin.AdminHub`.

    For whoever moves bytes: `dirty` holds the connections to look at, as they have output, have become broken, or may
    go on (`Connection.resume`, `wants_input`). Before it calls, it sets `now_ms` from a clock that only goes forward;
    `next_timeout_ms` says when `on_time` has something to do. `log` is told of guests that hold too much. `trace`, if
    set, gets a line for each handled request, with times from `clock_us` (microseconds since 1970).

    `request` is the guest's request that is handled now. `timed` holds the connections that may have events to drop.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        control: DomainControl | None = None,
        actions: ControlActions | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.control: DomainControl = control or NoControl()
        self.actions: ControlActions = actions or NoActions()
        self.admin_state = AdminState()
        self.quotas = self.limits.quotas()
        self.rate = WriteRate()
        self.store = Store()
        self.watches = WatchTable(self.store)
        self.domains: dict[int, Domain] = {DOM0: Domain(DOM0, self.store, self.quotas)}
        self.connections: set[Connection] = set()
        self.dirty: set[Connection] = set()
        self.n_transactions = 0
        self.now_ms = 0
        self.request: Request | None = None
        self.log: Callable[[str], None] | None = None
        self.trace: Callable[[str], None] | None = None
        self.clock_us: Callable[[], int] = lambda: self.now_ms * 1000
        self.timed: set[Connection] = set()
        self._stalled: set[Domain] = set()
        self._n_connected = 0
        self._maxima: dict[str, int] = {}
        self.trace_log = TraceLog()

    # -- connections

    def connect(self, domid: int = DOM0) -> Connection:
        """A new connection that speaks for `domid`; the caller has made sure that it may."""
        domain = self.domains.get(domid) or self._learn(domid)
        if domain.credit is None and not domain.privileged:
            domain.credit = self.rate.join(self.now_ms)
        self._n_connected += 1
        connection = Connection(self, domain, self._n_connected)
        domain.connections.add(connection)
        self.connections.add(connection)
        return connection

    def disconnect(self, connection: Connection) -> None:
        """The connection is over: what it holds goes. Doing it twice is harmless."""
        if connection in self.connections:
            connection.reset()
            self.connections.discard(connection)
            self.dirty.discard(connection)
            self.timed.discard(connection)
            domain = connection.domain
            domain.connections.discard(connection)
            if domain.ring is connection:
                domain.ring = None
            connection.closed = True

    # -- changes and who is told of them

    def changed(self, view: View, path: bytes, node: Node, *, before: Permissions | None = None) -> None:
        """Tell watchers, or have the transaction do it when it commits."""
        if isinstance(view, Transaction):
            view.note_event(path, exact=False)
        else:
            self.watches.fire(path, node, exact=False, before=before)

    def removed(self, view: View, nodes: Removed) -> None:
        """Tell watchers of a removed subtree: for what was below only those who watch exactly that."""
        if isinstance(view, Transaction):
            for path, _ in nodes:
                view.note_event(path, exact=path != nodes[-1][0])
            return
        gone = dict(nodes)
        for path, node in nodes:
            self.watches.fire(path, node, exact=path != nodes[-1][0], parent=gone.get(parent_of(path)))

    # -- limits

    def debit(self, domain: Domain, view: View) -> None:
        """A domain has changed the tree (not a transaction): it pays while transactions are open that it may spoil."""
        if domain.credit is not None and self.n_transactions and view is self.store:
            self.rate.spend(domain.credit, self.now_ms)

    def owns_too_many(self, domid: int, n_nodes: int) -> bool:
        """Whether a domain may not own so many nodes."""
        domain = self.domains.get(domid)
        return domain is not None and domain.over("nodes", n_nodes)

    def stall(self, domain: Domain) -> bool:
        """A domain is not served for now: `settle` looks at it again. Returns False, as an answer to whether it is."""
        self._stalled.add(domain)
        return False

    def settle(self) -> None:
        """See which domains that were not served may go on: their connections become `dirty`."""
        for domain in list(self._stalled):
            if domain.credit is not None and domain.credit.balance < 0:
                self.rate.update(domain.credit, self.now_ms)
            if domain.may_be_read():
                self._stalled.discard(domain)
                self.dirty.update(domain.connections)
            elif domain.may_be_handled():
                self.dirty.update(connection for connection in domain.connections if connection.has_waiting)

    def next_timeout_ms(self) -> int | None:
        """In how many milliseconds `on_time` has something to do, if nothing else happens before; None: never."""
        times = [connection.next_expiry_ms() for connection in self.timed]
        for domain in self._stalled:
            if domain.credit is not None and domain.credit.balance < 0:
                times.append(domain.credit.at_ms + self.rate.wait_ms(domain.credit))
        waits = [max(0, at_ms - self.now_ms) for at_ms in times if at_ms is not None]
        return min(waits, default=None)

    def on_time(self) -> None:
        """Do what is due at `now_ms`: drop events that were not read in time, serve domains that were in debt."""
        for connection in list(self.timed):
            if not connection.drop_old_events():
                self.timed.discard(connection)
        self.settle()

    def note_memory(self, domain: Domain) -> None:
        """Report a guest that holds much memory, now and then."""
        n_bytes = domain.memory_bytes
        domain.note("memory", n_bytes)
        soft = domain.quotas["soft-memory"]
        if self.log is None or not 0 < soft <= n_bytes:
            return
        if domain.memory_reported_ms is None or self.now_ms - domain.memory_reported_ms >= MEMORY_REPORT_MS:
            domain.memory_reported_ms = self.now_ms
            stalled = "" if domain.may_be_read() else " and is not served for now"
            self.log(f"domain {domain.domid} holds {n_bytes} bytes, over its soft quota of {soft}{stalled}")

    # -- domains

    def known(self, domid: int) -> Domain | None:
        """The domain, if there is one with this id."""
        domain = self.domains.get(domid)
        if domain is None and 0 <= domid < DOMID_FIRST_RESERVED and self.control.exists(domid):
            domain = self._learn(domid)
        return domain

    def _learn(self, domid: int) -> Domain:
        domain = self.domains[domid] = Domain(domid, self.store, self.quotas)
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

    def resume(self, domid: int) -> None:
        """The domain runs again."""
        self.domains[domid].shut_down = False

    def set_target(self, domid: int, target: int) -> None:
        """The domain has the rights of another, too."""
        self.domains[domid].target = target

    def shut_down(self, domid: int) -> None:
        """The domain has stopped but is still there: watchers are told once, until RESUME."""
        domain = self.domains.get(domid)
        if domain is not None and domain.introduced and not domain.shut_down:
            domain.shut_down = True
            self.watches.fire_special(b"@releaseDomain", domid)

    def died(self, domids: Iterable[int]) -> None:
        """These domains are gone."""
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
            self._stalled.discard(domain)
            if domain.credit is not None:
                self.rate.leave(domain.credit)
            self._note_maxima(domain)
        gone = set(domids)
        for domain in self.domains.values():
            if domain.target in gone:
                domain.target = None
        for connection in self.connections:
            for transaction in connection.transactions.values():
                transaction.forget_domains(gone)
        for nodes in forget_domains(self.store, gone):
            self.removed(self.store, nodes)
        self.settle()

    # -- administration

    def set_features(self, domid: int, bits: int) -> None:
        """What the domain may use once it is introduced."""
        self.domains[domid].features = bits

    def quota(self, domid: int | None, name: str) -> int:
        """A domain's quota, or the global one."""
        return self._quotas(domid)[name]

    def set_quota(self, domid: int | None, name: str, value: int) -> None:
        """Set a domain's quota, or the global one, which new domains get; 0 is none."""
        self._quotas(domid)[name] = value
        self.settle()

    def _quotas(self, domid: int | None) -> dict[str, int]:
        return self.quotas if domid is None else self.domains[domid].quotas

    def quota_maxima(self, reset: bool) -> dict[str, int]:
        """The highest value seen of each quota's count in any guest; `reset`: forget what was before."""
        if reset:
            self._maxima.clear()
            for domain in self.domains.values():
                domain.maxima.clear()
        for domain in self.domains.values():
            self._note_maxima(domain)
        return dict(self._maxima)

    def _note_maxima(self, domain: Domain) -> None:
        for name, count in domain.maxima.items():
            self._maxima[name] = max(count, self._maxima.get(name, 0))

    def check(self) -> list[str]:
        """What is inconsistent, a line each."""
        return check.problems(self)

    def statistics(self) -> Statistics:
        """How large the store is now."""
        domains = self.domains.values()
        return Statistics(
            nodes=len(self.store.nodes),
            watches=sum(domain.n_watches for domain in domains),
            connections=len(self.connections),
            transactions=self.n_transactions,
            memory_bytes=sum(domain.memory_bytes for domain in domains),
        )

    # -- tracing

    def traces(self, packet: Packet) -> bool:
        """Whether a request is traced. Who asks for the trace is not in it."""
        if self.trace is None and not self.trace_log.wants(self.now_ms):
            return False
        return packet[0] != Op.CONTROL or not packet[3].startswith(b"trace\0")

    def traced(self, line: str) -> None:
        """A request was handled."""
        if self.trace is not None:
            self.trace(line)
        if self.trace_log.wants(self.now_ms):
            self.trace_log.add(line)

    def trace_lines(self, seq: int) -> tuple[int, list[str]]:
        """(number of the first line returned, lines) from a number on; requests are traced for a while from now on."""
        return self.trace_log.since(seq, self.now_ms)
