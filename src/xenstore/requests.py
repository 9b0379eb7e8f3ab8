# SPDX-License-Identifier: MIT
"""What each operation does. A handler gets (connection, view, payload) and comes to a reply's payload or an errno.

Order of checks, before a handler runs: unknown operation (ENOSYS), Dom0 only (EACCES), unknown transaction (ENOENT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from paravirt.xenstore import domain_requests, tree
from paravirt.xenstore.admin import Administer
from paravirt.xenstore.domains import FEATURE_DOMID_ANY, FEATURE_WATCH_DEPTH
from paravirt.xenstore.paths import canonical, canonical_to_watch, quota_length
from paravirt.xenstore.permissions import DOMID_ANY, OWNER, READ, WRITE, Permissions
from paravirt.xenstore.store import Node, View
from paravirt.xenstore.transaction import Transaction
from paravirt.xenstore.watches import UNLIMITED_DEPTH
from paravirt.xenstore.wire import ACK, PAYLOAD_MAX_BYTES, Errno, Op, Reply, number, single, strings

if TYPE_CHECKING:
    from paravirt.xenstore.session import Connection

Run = Callable[["Connection", View, bytes], Reply]


class Handler(NamedTuple):
    run: Run
    privileged: bool
    in_transaction: bool


def node_path(connection: Connection, path: bytes | None) -> bytes | None:
    """The canonical form of a path this client may name, or None."""
    if path is None:
        return None
    if path not in connection.hub.store.nodes:
        path = canonical(path, connection.domain.home)
    return _of_fair_length(connection, path)


def watch_path(connection: Connection, path: bytes) -> bytes | None:
    """The same for a path that is watched, which may be special."""
    return _of_fair_length(connection, canonical_to_watch(path, connection.domain.home))


def _of_fair_length(connection: Connection, path: bytes | None) -> bytes | None:
    domain = connection.domain
    if path is None or (not domain.privileged and domain.over("path-max", quota_length(path))):
        return None
    return path


def _node(connection: Connection, view: View, path: bytes | None, need: int) -> Node | Errno:
    path = node_path(connection, path)
    return tree.lookup(view, connection.domain, path, need) if path is not None else Errno.EINVAL


def _directory(connection: Connection, view: View, payload: bytes) -> Reply:
    node = _node(connection, view, single(payload), READ)
    return node if isinstance(node, Errno) else node.listing


def _read(connection: Connection, view: View, payload: bytes) -> Reply:
    node = _node(connection, view, single(payload), READ)
    return node if isinstance(node, Errno) else node.value


def _directory_part(connection: Connection, view: View, payload: bytes) -> Reply:
    words = strings(payload)
    if len(words) != 2:
        return Errno.EINVAL
    node = _node(connection, view, words[0], READ)
    if isinstance(node, Errno):
        return node
    start = b"%d\0" % node.generation
    offset, listing = number(words[1]), node.listing
    if not 0 <= offset < len(listing):
        return start + b"\0"
    room = PAYLOAD_MAX_BYTES - len(start) - 1
    end = len(listing) if len(listing) - offset <= room else listing.rfind(b"\0", offset, offset + room) + 1
    return start + listing[offset:end] + (b"\0" if end == len(listing) else b"")


def _write(connection: Connection, view: View, payload: bytes) -> Reply:
    name, nul, value = payload.partition(b"\0")
    path = node_path(connection, name) if nul else None
    if path is None:
        return Errno.EINVAL
    hub = connection.hub
    node = tree.write(view, connection.domain, path, value)
    if isinstance(node, Errno):
        return node
    hub.changed(view, path, node)
    hub.debit(connection.domain, view)
    return ACK


def _mkdir(connection: Connection, view: View, payload: bytes) -> Reply:
    path = node_path(connection, single(payload))
    if path is None:
        return Errno.EINVAL
    hub = connection.hub
    node = tree.make(view, connection.domain, path)
    if isinstance(node, Errno):
        return node
    if node is not None:
        hub.changed(view, path, node)
        hub.debit(connection.domain, view)
    return ACK


def _rm(connection: Connection, view: View, payload: bytes) -> Reply:
    path = node_path(connection, single(payload))
    if path is None:
        return Errno.EINVAL
    nodes = tree.remove(view, connection.domain, path)
    if isinstance(nodes, Errno):
        return nodes
    if nodes:
        connection.hub.removed(view, nodes)
        connection.hub.debit(connection.domain, view)
    return ACK


def _get_perms(connection: Connection, view: View, payload: bytes) -> Reply:
    path = single(payload)
    if path is not None and path.startswith(b"@"):
        permissions = _special(connection, path, READ)
        return permissions if isinstance(permissions, Errno) else permissions.format()
    node = _node(connection, view, path, READ)
    return node if isinstance(node, Errno) else node.permissions.format()


def _special(connection: Connection, name: bytes, need: int) -> Permissions | Errno:
    permissions = connection.hub.store.special.get(name)
    if permissions is None:
        return Errno.EINVAL
    return permissions if connection.domain.access(permissions) & need == need else Errno.EACCES


def _set_perms(connection: Connection, view: View, payload: bytes) -> Reply:
    words = strings(payload)
    if len(words) < 2:
        return Errno.EINVAL
    hub, domain = connection.hub, connection.domain
    if domain.over("node-permissions", len(words) - 1):
        return Errno.ENOSPC
    permissions = Permissions.parse(words[1:])
    if permissions is None or (DOMID_ANY in permissions.domids and not domain.features & FEATURE_DOMID_ANY):
        return Errno.EINVAL
    if hub.known(permissions.owner) is None:
        return Errno.ENOENT
    unknown = {domid for domid in permissions.domids if domid != DOMID_ANY and hub.known(domid) is None}
    if unknown:
        permissions = permissions.ignoring(unknown)
    if words[0].startswith(b"@"):
        return _set_special(connection, words[0], permissions)
    path = node_path(connection, words[0])
    if path is None:
        return Errno.EINVAL
    result = tree.set_permissions(view, domain, path, permissions)
    if isinstance(result, Errno):
        return result
    node, before = result
    hub.changed(view, path, node, before=before)
    hub.debit(domain, view)
    return ACK


def _set_special(connection: Connection, name: bytes, permissions: Permissions) -> Reply:
    before = _special(connection, name, WRITE | OWNER)
    if isinstance(before, Errno):
        return before
    if not connection.domain.privileged and before.owner != permissions.owner:
        return Errno.EPERM
    connection.hub.store.special[name] = permissions
    return ACK


def _watch(connection: Connection, view: View, payload: bytes) -> Reply:
    words = strings(payload)
    if len(words) not in (2, 3):
        return Errno.EINVAL
    depth = UNLIMITED_DEPTH
    if len(words) == 3:
        depth = number(words[2])
        if not words[2].isdigit() or len(words[2]) > 9 or not connection.domain.features & FEATURE_WATCH_DEPTH:
            return Errno.EINVAL
    path = watch_path(connection, words[0])
    if path is None:
        return Errno.EINVAL
    if (path, words[1]) in connection.watches:
        return Errno.EEXIST
    domain = connection.domain
    if domain.over("watches", domain.n_watches + 1):
        return Errno.ENOSPC
    if domain.over("memory", domain.memory_bytes + len(path) + len(words[1])):
        return Errno.ENOMEM
    n_prefix = 0 if words[0][:1] in (b"/", b"@") else len(domain.home) + 1
    connection.tell_after_reply(connection.add_watch(path, words[1], n_prefix=n_prefix, depth=depth))
    return ACK


def _unwatch(connection: Connection, view: View, payload: bytes) -> Reply:
    words = strings(payload)
    if len(words) != 2:
        return Errno.EINVAL
    path = watch_path(connection, words[0])
    if path is None:
        return Errno.EINVAL
    watch = connection.watches.get((path, words[1]))
    if watch is None:
        return Errno.ENOENT
    connection.remove_watch(watch)
    return ACK


def _reset_watches(connection: Connection, view: View, payload: bytes) -> Reply:
    connection.drop_state()
    return ACK


def _transaction_start(connection: Connection, view: View, payload: bytes) -> Reply:
    if isinstance(view, Transaction):
        return Errno.EBUSY
    domain = connection.domain
    if domain.over("transactions", domain.n_transactions + 1):
        return Errno.ENOSPC
    return b"%d\0" % connection.new_transaction().number


def _transaction_end(connection: Connection, view: View, payload: bytes) -> Reply:
    if payload not in (b"T\0", b"F\0"):
        return Errno.EINVAL
    if not isinstance(view, Transaction):
        return Errno.ENOENT
    connection.end_transaction(view)
    if payload == b"F\0":
        return ACK
    hub = connection.hub
    events = view.commit(None if connection.domain.privileged else hub.owns_too_many)
    if isinstance(events, Errno):
        return events
    hub.debit(connection.domain, hub.store)
    for path, exact, before in events:
        hub.watches.fire(path, None, exact=exact, before=before)
    return ACK


def _admin(administer: Administer) -> Run:
    """The handler of a request that needs to know only of the store as a whole."""
    return lambda connection, view, payload: administer(connection.hub, payload)


def _table() -> tuple[Handler | None, ...]:
    tree_ops: dict[int, Run] = {
        Op.DIRECTORY: _directory,
        Op.READ: _read,
        Op.GET_PERMS: _get_perms,
        Op.TRANSACTION_START: _transaction_start,
        Op.TRANSACTION_END: _transaction_end,
        Op.WRITE: _write,
        Op.MKDIR: _mkdir,
        Op.RM: _rm,
        Op.SET_PERMS: _set_perms,
        Op.RESET_WATCHES: _reset_watches,
        Op.DIRECTORY_PART: _directory_part,
        Op.GET_DOMAIN_PATH: _admin(domain_requests.get_domain_path),
    }
    table: list[Handler | None] = [None] * (max(Op) + 1)
    for op, run in tree_ops.items():
        table[op] = Handler(run, privileged=False, in_transaction=True)
    for op, run in ((Op.WATCH, _watch), (Op.UNWATCH, _unwatch)):
        table[op] = Handler(run, privileged=False, in_transaction=False)
    for op, administer in domain_requests.PRIVILEGED.items():
        table[op] = Handler(_admin(administer), privileged=True, in_transaction=True)
    return tuple(table)


HANDLERS: Final = _table()
