# SPDX-License-Identifier: MIT
"""What the broker says of domains and of itself."""

from dataclasses import dataclass
from typing import Any

from paravirt.hypervisor.domains import SHUTDOWN_NONE, DomainState, ShutdownReason
from paravirt.hypervisor.messages import NO_UID, get_text
from paravirt.ring.memory import Provider

CData = Any


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """A domain as the hypervisor knows it."""

    domid: int
    name: str
    isolated: bool
    state: DomainState
    shutdown_reason: ShutdownReason | None
    uid: int | None
    """Owner of its listening socket; None: the hypervisor's."""
    pages: int
    """Shared pages it has, also those that a peer still maps after their end."""
    max_pages: int
    arenas: int
    ports: int
    maps: int
    """Arenas of others it maps, over all its processes."""
    connections: int


@dataclass(frozen=True, slots=True)
class HypervisorInfo:
    """The hypervisor, and the limits of the caller's domain."""

    provider: Provider
    """Of memory between domains that are not isolated."""
    budget_bytes: int
    used_bytes: int
    max_pages: int
    max_ports: int
    max_arenas: int
    max_maps: int
    max_connections: int
    domains: int
    connections: int
    has_store: bool


def domain_info(reply: CData) -> DomainInfo:
    """From the broker's reply."""
    return DomainInfo(
        domid=reply.domid,
        name=get_text(reply.name),
        isolated=bool(reply.isolated),
        state=DomainState(reply.state),
        shutdown_reason=None if reply.shutdown_reason == SHUTDOWN_NONE else ShutdownReason(reply.shutdown_reason),
        uid=None if reply.uid == NO_UID else reply.uid,
        pages=reply.pages,
        max_pages=reply.max_pages,
        arenas=reply.arenas,
        ports=reply.ports,
        maps=reply.maps,
        connections=reply.connections,
    )
