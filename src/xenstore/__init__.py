# SPDX-License-Identifier: MIT
"""The xenstore daemon, its clients, and the handling of xenbus keys.

The daemon: `server` with `loop`, `journal`, `update` (live update), `guests` (the hypervisor's side) and `actions`
(what CONTROL does to files) around an engine. That is `core`, the one in C. `control` and `domain_requests` answer for
any engine what only Dom0 may ask (`admin`).

The second engine, in Python and pure, from the bottom up: `wire` (packets), `paths`, `permissions`, `limits`, `store`
and `transaction` (the tree and its views), `tree` (what a request does to a view), `watches`, `rate`, `domains`,
`requests` (the operations), `outbox` and `session` (one connection), `hub` (what all connections share).

The clients' pure parts: `operations` (what can be asked), `protocol_state` (what is under way, and what becomes of it
when the connection breaks), `transaction_steps`. Shells: `client` with `pipeline` and `watch_queue`, `async_client`
with `async_watch`; bytes go through a `transport`.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["AsyncXenstoreClient", "WatchEvent", "XenstoreClient", "XenstoreServer"]

if TYPE_CHECKING:
    from paravirt.xenstore.async_client import AsyncXenstoreClient
    from paravirt.xenstore.client import XenstoreClient
    from paravirt.xenstore.server import XenstoreServer
    from paravirt.xenstore.watch_queue import WatchEvent

_HOMES = {
    "AsyncXenstoreClient": "async_client",
    "WatchEvent": "watch_queue",
    "XenstoreClient": "client",
    "XenstoreServer": "server",
}


def __getattr__(name: str) -> Any:
    """Loaded on first use: a client needs nothing of the daemon."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
