# SPDX-License-Identifier: MIT
"""The domains the store knows, and what it needs from whoever manages them."""

from typing import TYPE_CHECKING, Final, Protocol

from paravirt.xenstore.paths import home_of
from paravirt.xenstore.permissions import ALL, Permissions
from paravirt.xenstore.wire import Errno

if TYPE_CHECKING:
    from paravirt.xenstore.session import Connection

DOM0: Final = 0
DOMID_SELF: Final = 0x7FF0
DOMID_FIRST_RESERVED: Final = 0x7FF0


class Domain:
    """One domain: its rights and what it holds. Dom0 is privileged: no permission and no quota stops it."""

    __slots__ = (
        "complained",
        "connections",
        "domid",
        "home",
        "introduced",
        "n_transactions",
        "n_watches",
        "privileged",
        "ring",
        "shut_down",
        "target",
    )

    def __init__(self, domid: int) -> None:
        self.domid = domid
        self.privileged = domid == DOM0
        self.home = home_of(domid)
        self.introduced = domid == DOM0
        self.shut_down = False
        self.target: int | None = None
        self.complained = False
        self.n_watches = 0
        self.n_transactions = 0
        self.connections: set[Connection] = set()
        self.ring: Connection | None = None

    def access(self, permissions: Permissions) -> int:
        """What it may do to a node with these permissions."""
        return ALL if self.privileged else permissions.access(self.domid, self.target)

    def __repr__(self) -> str:
        return f"<Domain {self.domid}{' introduced' if self.introduced else ''}>"


class DomainControl(Protocol):
    """What the store asks of the hypervisor's side."""

    def exists(self, domid: int) -> bool:
        """Whether there is such a domain right now."""

    def attach_ring(self, connection: "Connection", page: int, port: int) -> Errno | None:
        """Serve `connection` over the shared page `page` of its domain, with the event channel `port` of that domain.

        If it is served already: the event channel is bound anew, both byte streams are emptied.
        """

    def detach(self, connection: "Connection") -> None:
        """The connection is closed: let go of its socket or ring once its output has been offered."""


class NoControl:
    """Without a hypervisor: there are only the domains that have connected."""

    def exists(self, domid: int) -> bool:
        return False

    def attach_ring(self, connection: "Connection", page: int, port: int) -> Errno | None:
        return Errno.EINVAL

    def detach(self, connection: "Connection") -> None:
        pass
