# SPDX-License-Identifier: MIT
"""The domains the store knows, and what it needs from whoever manages them."""

from typing import TYPE_CHECKING, Final, Protocol

from paravirt.xenstore.limits import reached
from paravirt.xenstore.paths import home_of
from paravirt.xenstore.permissions import ALL, Permissions
from paravirt.xenstore.rate import Credit
from paravirt.xenstore.wire import Errno

if TYPE_CHECKING:
    from paravirt.xenstore.session import Connection
    from paravirt.xenstore.store import Store

DOM0: Final = 0
DOMID_SELF: Final = 0x7FF0
DOMID_FIRST_RESERVED: Final = 0x7FF0


FEATURE_RECONNECTION: Final = 1
FEATURE_ERROR: Final = 2
FEATURE_WATCH_DEPTH: Final = 4
FEATURE_DOMID_ANY: Final = 8
FEATURES: Final = FEATURE_RECONNECTION | FEATURE_ERROR | FEATURE_WATCH_DEPTH | FEATURE_DOMID_ANY
"""What the store can do, as told to a domain in its ring page; a domain may be given less."""


class Domain:
    """One domain: its rights and what it holds. Dom0 is privileged: no permission and no quota stops it.

    `held_bytes`: its watches, packets that wait in both directions, and what its transactions have looked at.
    `maxima`: the highest value seen of each quota's count.
    """

    __slots__ = (
        "_store",
        "complained",
        "connections",
        "credit",
        "domid",
        "features",
        "held_bytes",
        "home",
        "introduced",
        "maxima",
        "memory_reported_ms",
        "n_outstanding",
        "n_transactions",
        "n_watches",
        "privileged",
        "quotas",
        "ring",
        "shut_down",
        "target",
    )

    def __init__(self, domid: int, store: "Store", quotas: dict[str, int]) -> None:
        self._store = store
        self.domid = domid
        self.privileged = domid == DOM0
        self.home = home_of(domid)
        self.introduced = domid == DOM0
        self.shut_down = False
        self.target: int | None = None
        self.complained = False
        self.features = FEATURES
        self.quotas = dict(quotas)
        self.maxima: dict[str, int] = {}
        self.n_watches = 0
        self.n_transactions = 0
        self.n_outstanding = 0
        self.held_bytes = 0
        self.memory_reported_ms: int | None = None
        self.credit: Credit | None = None
        self.connections: set[Connection] = set()
        self.ring: Connection | None = None

    @property
    def n_nodes(self) -> int:
        """Nodes it owns."""
        return self._store.owned(self.domid)

    @property
    def memory_bytes(self) -> int:
        """What is held for it: its nodes, with their paths, and `held_bytes`."""
        return self.held_bytes + self._store.owned_bytes(self.domid)

    def access(self, permissions: Permissions) -> int:
        """What it may do to a node with these permissions."""
        return ALL if self.privileged else permissions.access(self.domid, self.target)

    def over(self, quota: str, count: int) -> bool:
        """Whether a guest may not have `count` of what a quota is for; if it may, the count is noted."""
        if self.privileged:
            return False
        if reached(count, self.quotas[quota]):
            return True
        self.note(quota, count)
        return False

    def note(self, quota: str, count: int) -> None:
        """Remember the highest count of what a quota is for."""
        if count > self.maxima.get(quota, 0):
            self.maxima[quota] = count

    def may_be_handled(self) -> bool:
        """Whether requests that were read may be handled now: neither are too many outstanding, nor is it in debt."""
        return self.privileged or not (
            reached(self.n_outstanding, self.quotas["outstanding"])
            or (self.credit is not None and self.credit.balance < 0)
        )

    def may_be_read(self) -> bool:
        """Whether more requests may be read now: it also holds less memory than its quota."""
        return self.privileged or (self.may_be_handled() and not reached(self.memory_bytes, self.quotas["memory"]))

    def __repr__(self) -> str:
        return f"<Domain {self.domid}{' introduced' if self.introduced else ''}>"


class OfDomain(Protocol):
    """Something that belongs to a domain."""

    @property
    def domid(self) -> int: ...


class AnyConnection(Protocol):
    """A connection of either engine."""

    @property
    def domain(self) -> OfDomain: ...


class DomainControl(Protocol):
    """What the store asks of the hypervisor's side."""

    def exists(self, domid: int) -> bool:
        """Whether there is such a domain right now."""

    def attach_ring(self, connection: AnyConnection, page: int, port: int) -> Errno | None:
        """Serve `connection` over the shared page `page` of its domain, with the event channel `port` of that domain.

        If it is served already: the event channel is bound anew, both byte streams are emptied.
        """

    def detach(self, connection: AnyConnection) -> None:
        """The connection is closed: let go of its socket or ring once its output has been offered."""


class NoControl:
    """Without a hypervisor: there are only the domains that have connected."""

    def exists(self, domid: int) -> bool:
        return False

    def attach_ring(self, connection: AnyConnection, page: int, port: int) -> Errno | None:
        return Errno.EINVAL

    def detach(self, connection: AnyConnection) -> None:
        pass
