# SPDX-License-Identifier: MIT
"""What one unprivileged domain may take of the store. Dom0 has no quota; a quota of 0 is none.

A quota has the C daemon's name on the wire. There is a global value of each, which new domains start with, and a value
of each domain's own.
"""

from dataclasses import dataclass
from typing import Final

QUOTAS: Final = {
    "nodes": "nodes a domain owns",
    "watches": "watches of a domain",
    "outstanding": "requests of a domain that are not answered, or whose events are not read",
    "memory": "bytes held for a domain, at which it is not served",
    "soft-memory": "bytes held for a domain, at which it is reported",
    "transactions": "open transactions of a domain",
    "transaction-nodes": "nodes a transaction looks at",
    "node-permissions": "permissions of one node",
    "path-max": "bytes of a path, below /local/domain/N/",
    "node-size": "bytes of one node: permissions, names of its children and value",
}
"""What is limited, by name. A count may stay below its quota, never reach it."""

SOFT_PREFIX: Final = "soft-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a store starts with: the global quotas, with the C daemon's defaults, and what belongs to no domain."""

    nodes: int = 1000
    watches: int = 128
    outstanding: int = 20
    memory_bytes: int = 2_621_440
    soft_memory_bytes: int = 2_097_152
    transactions: int = 10
    transaction_nodes: int = 1024
    node_permissions: int = 5
    path_bytes: int = 2048
    node_bytes: int = 2048
    watch_event_timeout_ms: int = 20_000
    """An event that a guest has not read for so long is dropped; 0: never."""
    privileged_output_bytes: int = 64 << 20
    """Unread replies and events of one connection of Dom0; over it, it is closed, as its client must miss no event."""

    def quotas(self) -> dict[str, int]:
        """The global quotas by name."""
        values = (
            self.nodes,
            self.watches,
            self.outstanding,
            self.memory_bytes,
            self.soft_memory_bytes,
            self.transactions,
            self.transaction_nodes,
            self.node_permissions,
            self.path_bytes,
            self.node_bytes,
        )
        return dict(zip(QUOTAS, values, strict=True))


def reached(count: int, quota: int) -> bool:
    """Whether `count` is more than a domain under `quota` may have."""
    return 0 < quota <= count
