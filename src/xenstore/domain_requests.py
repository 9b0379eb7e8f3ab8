# SPDX-License-Identifier: MIT
"""Requests about domains: introduce, release, resume, target, path."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from paravirt.xenstore.domains import DOM0, DOMID_SELF, Domain
from paravirt.xenstore.paths import home_of
from paravirt.xenstore.permissions import DOMID_ANY, DOMID_MAX
from paravirt.xenstore.store import View
from paravirt.xenstore.wire import ACK, Errno, Op, Reply, number, single, strings

if TYPE_CHECKING:
    from paravirt.xenstore.hub import Hub
    from paravirt.xenstore.session import Connection


def is_unknown(hub: Hub, domid: int) -> bool:
    """Whether no permission can be given to this domain now."""
    return domid != DOMID_ANY and hub.known(domid) is None


def get_domain_path(connection: Connection, view: View, payload: bytes) -> Reply:
    word = single(payload)
    if word is None or not word.isdigit() or len(word) > 5 or int(word) > DOMID_MAX:
        return Errno.EINVAL
    return home_of(int(word)) + b"\0"


def _introduced(hub: Hub, domid: int) -> Domain | None:
    domain = hub.domains.get(domid)
    return domain if domain is not None and domain.introduced else None


def _introduce(connection: Connection, view: View, payload: bytes) -> Reply:
    words = strings(payload)
    if len(words) < 3 or number(words[2]) <= 0:
        return Errno.EINVAL
    refusal = connection.hub.introduce(number(words[0]), number(words[1]), number(words[2]))
    return ACK if refusal is None else refusal


def _one_domain(connection: Connection, payload: bytes) -> Domain | Errno:
    """The introduced domain other than Dom0 that a payload names."""
    word = single(payload)
    if word is None or number(word) == DOM0:
        return Errno.EINVAL
    return _introduced(connection.hub, number(word)) or Errno.ENOENT


def _release(connection: Connection, view: View, payload: bytes) -> Reply:
    domain = _one_domain(connection, payload)
    if isinstance(domain, Errno):
        return domain
    connection.hub.release(domain.domid)
    return ACK


def _resume(connection: Connection, view: View, payload: bytes) -> Reply:
    domain = _one_domain(connection, payload)
    if isinstance(domain, Errno):
        return domain
    domain.shut_down = False
    return ACK


def _set_target(connection: Connection, view: View, payload: bytes) -> Reply:
    words = strings(payload)
    if len(words) < 2:
        return Errno.EINVAL
    domain = _introduced(connection.hub, number(words[0]))
    target = _introduced(connection.hub, number(words[1]))
    if domain is None or target is None:
        return Errno.ENOENT
    domain.target = target.domid
    return ACK


def _is_domain_introduced(connection: Connection, view: View, payload: bytes) -> Reply:
    word = single(payload)
    if word is None:
        return Errno.EINVAL
    domid = number(word)
    return b"T\0" if domid == DOMID_SELF or _introduced(connection.hub, domid) else b"F\0"


PRIVILEGED: Final[dict[int, Callable[[Connection, View, bytes], Reply]]] = {
    Op.INTRODUCE: _introduce,
    Op.RELEASE: _release,
    Op.RESUME: _resume,
    Op.SET_TARGET: _set_target,
    Op.IS_DOMAIN_INTRODUCED: _is_domain_introduced,
}
