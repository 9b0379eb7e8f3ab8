# SPDX-License-Identifier: MIT
"""The domain table: names, domids and their quarantine. Pure."""

import errno
import re
from dataclasses import dataclass, field
from enum import IntEnum

from paravirt.hypervisor.rules import DOM0, DOM0_LIMITS, DOMID_FIRST_RESERVED, Limits, Refused

SHUTDOWN_NONE = 255
_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,63}")


class DomainState(IntEnum):
    RUNNING = 1
    SHUTDOWN = 2
    """Asked to end, by itself."""
    DYING = 3
    """Ended; peers still map its memory, or xenstored has not let go of it."""


class ShutdownReason(IntEnum):
    """SHUTDOWN_*, public/sched.h."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


@dataclass(slots=True)
class Domain:
    domid: int
    name: str
    isolated: bool
    limits: Limits
    uid: int | None = None
    """Owner of its listening socket; None: the broker's."""
    state: DomainState = DomainState.RUNNING
    shutdown_reason: int = SHUTDOWN_NONE
    connections: set[int] = field(default_factory=set)
    store_holds: bool = False
    """Dead, and xenstored has not said yet that it forgot it."""


class DomainTable:
    """Dom0 is there from the start and never ends."""

    def __init__(self) -> None:
        self._domains = {DOM0: Domain(DOM0, "Domain-0", False, DOM0_LIMITS)}
        self._last = DOM0

    def __len__(self) -> int:
        return len(self._domains)

    def all(self) -> list[Domain]:
        return list(self._domains.values())

    def find(self, domid: int) -> Domain:
        """A domain that lives. Raises `Refused` (ESRCH)."""
        domain = self._domains.get(domid)
        if domain is None or domain.state is DomainState.DYING:
            raise Refused(errno.ESRCH, f"there is no domain {domid}")
        return domain

    def find_any(self, domid: int) -> Domain | None:
        """Also one that is dying."""
        return self._domains.get(domid)

    def from_domid(self, domid: int) -> Domain:
        """The domain with the lowest domid not below `domid`, dying ones too. Raises `Refused` (ESRCH)."""
        found = min((number for number in self._domains if number >= domid), default=None)
        if found is None:
            raise Refused(errno.ESRCH, f"there is no domain {domid} or above")
        return self._domains[found]

    def create(self, name: str, limits: Limits, *, isolated: bool, uid: int | None) -> Domain:
        """Raises `Refused` (EINVAL, EEXIST, ENOSPC)."""
        if not _NAME.fullmatch(name):
            raise Refused(errno.EINVAL, f"{name!r} is no name for a domain: letters, digits and _.+- (at most 63)")
        if any(other.name == name for other in self._domains.values() if other.state is not DomainState.DYING):
            raise Refused(errno.EEXIST, f"there is a domain named {name!r} already")
        domain = Domain(self._free_domid(), name, isolated, limits, uid)
        self._domains[domain.domid] = domain
        return domain

    def shut_down(self, domid: int, reason: int) -> None:
        """Raises `Refused` (EINVAL)."""
        if reason not in ShutdownReason.__members__.values():
            raise Refused(errno.EINVAL, f"{reason} is no reason for a shutdown")
        domain = self.find(domid)
        if domid == DOM0 or domain.state is not DomainState.RUNNING:
            raise Refused(errno.EINVAL, f"domain {domid} cannot shut down now")
        domain.state, domain.shutdown_reason = DomainState.SHUTDOWN, reason

    def free(self, domid: int) -> None:
        """The quarantine is over: the domid may be used again."""
        del self._domains[domid]

    def _free_domid(self) -> int:
        """The next one after the last that was given out, so that a domid comes back as late as possible."""
        count = DOMID_FIRST_RESERVED - 1
        for step in range(count):
            domid = (self._last + step) % count + 1
            if domid not in self._domains:
                self._last = domid
                return domid
        raise Refused(errno.ENOSPC, f"there are {count} domains already")
