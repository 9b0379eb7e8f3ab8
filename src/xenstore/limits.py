# SPDX-License-Identifier: MIT
"""What one unprivileged domain may take of the store. Dom0 has no quota; a quota of 0 is none."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Quotas per domain with the C daemon's defaults. A count may stay below its quota, never reach it."""

    nodes: int = 1000
    watches: int = 128
    transactions: int = 10
    transaction_nodes: int = 1024
    node_permissions: int = 5
    path_bytes: int = 2048
    node_bytes: int = 2048
    """Permissions, names of the children and value of one node."""
    output_bytes: int = 2_621_440
    """Unread replies and events of one connection of a guest; further events are dropped."""
    privileged_output_bytes: int = 64 << 20
    """The same for Dom0; a connection over it is closed, as its client must not miss events."""


def reached(count: int, quota: int) -> bool:
    """Whether `count` is more than a domain under `quota` may have."""
    return 0 < quota <= count
