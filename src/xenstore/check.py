# SPDX-License-Identifier: MIT
"""Whether what a store counts twice agrees: the tree with its listings, its owners, what domains hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paravirt.xenstore.paths import ROOT, child_of, split
from paravirt.xenstore.store import Store, stored_bytes

if TYPE_CHECKING:
    from paravirt.xenstore.hub import Hub


def problems(hub: Hub) -> list[str]:
    """What does not agree, a line each."""
    return [*_tree_problems(hub), *_owner_problems(hub), *_domain_problems(hub)]


def _text(path: bytes) -> str:
    return path.decode("ascii", "backslashreplace")


def _tree_problems(hub: Hub) -> list[str]:
    nodes, found = hub.store.nodes, []
    for path, node in nodes.items():
        names = node.children or ()
        if node.n_name_bytes != sum(len(name) + 1 for name in names) or node.n_name_bytes != len(node.listing):
            found.append(f"{_text(path)}: the names of its children are not as long as counted")
        found += [
            f"{_text(path)}: has no child {_text(name)} although it says so"
            for name in names
            if child_of(path, name) not in nodes
        ]
        if path != ROOT:
            above, name = split(path)
            parent = nodes.get(above)
            if parent is None or not parent.has_child(name):
                found.append(f"{_text(path)}: its parent does not know it")
    return found


def _owner_problems(hub: Hub) -> list[str]:
    counted: dict[int, tuple[int, int]] = {}
    for path, node in hub.store.nodes.items():
        n_nodes, n_bytes = counted.get(node.permissions.owner, (0, 0))
        counted[node.permissions.owner] = n_nodes + 1, n_bytes + stored_bytes(path, node)
    booked = {domid: _booked(hub.store, domid) for domid in hub.store.statistics()}
    found = [f"nodes are owned by domain {domid}, which is not known" for domid in counted if domid not in hub.domains]
    for domid in sorted({*counted, *booked}):
        is_now, was_booked = counted.get(domid, (0, 0)), booked.get(domid, (0, 0))
        if is_now != was_booked:
            found.append(
                f"domain {domid} owns {is_now[0]} nodes of {is_now[1]} bytes, not {was_booked[0]} of {was_booked[1]}"
            )
    return found


def _booked(store: Store, domid: int) -> tuple[int, int]:
    return store.owned(domid), store.owned_bytes(domid)


def _domain_problems(hub: Hub) -> list[str]:
    found = []
    for domain in hub.domains.values():
        n_watches = sum(len(connection.watches) for connection in domain.connections)
        n_transactions = sum(len(connection.transactions) for connection in domain.connections)
        n_held = sum(connection.n_held_bytes for connection in domain.connections)
        for what, is_now, was_booked in (
            ("watches", n_watches, domain.n_watches),
            ("transactions", n_transactions, domain.n_transactions),
            ("bytes held", n_held, domain.held_bytes),
        ):
            if is_now != was_booked:
                found.append(f"domain {domain.domid}: {what}: {is_now}, not {was_booked}")
    if sum(domain.n_transactions for domain in hub.domains.values()) != hub.n_transactions:
        found.append(f"transactions: not {hub.n_transactions}")
    if sum(domain.n_watches for domain in hub.domains.values()) != hub.watches.n_watches:
        found.append(f"watches: not {hub.watches.n_watches}")
    return found
