# SPDX-License-Identifier: MIT
"""Requests about domains: introduce, release, resume, target, path, features, quotas. For any engine (`admin`).

`PRIVILEGED` is the table of all requests that only Dom0 may make, CONTROL among them.
"""

from typing import Final

from paravirt.xenstore.admin import AdminDomain, AdminHub, Administer
from paravirt.xenstore.control import control
from paravirt.xenstore.domains import DOM0, DOMID_SELF, FEATURES
from paravirt.xenstore.limits import QUOTAS
from paravirt.xenstore.paths import home_of
from paravirt.xenstore.permissions import DOMID_MAX
from paravirt.xenstore.wire import ACK, Errno, Op, Reply, number, single, strings


def get_domain_path(hub: AdminHub, payload: bytes) -> Reply:
    """GET_DOMAIN_PATH domid: of any domain, whether there is one or not. Everybody may ask."""
    word = single(payload)
    if word is None or not word.isdigit() or len(word) > 5 or int(word) > DOMID_MAX:
        return Errno.EINVAL
    return home_of(int(word)) + b"\0"


def _introduced(hub: AdminHub, domid: int) -> AdminDomain | None:
    domain = hub.domains.get(domid)
    return domain if domain is not None and domain.introduced else None


def introduce(hub: AdminHub, payload: bytes) -> Reply:
    """INTRODUCE domid, page, port."""
    words = strings(payload)
    if len(words) < 3 or number(words[2]) <= 0:
        return Errno.EINVAL
    refusal = hub.introduce(number(words[0]), number(words[1]), number(words[2]))
    return ACK if refusal is None else refusal


def _one_domain(hub: AdminHub, payload: bytes) -> AdminDomain | Errno:
    """The introduced domain other than Dom0 that a payload names."""
    word = single(payload)
    if word is None or number(word) == DOM0:
        return Errno.EINVAL
    return _introduced(hub, number(word)) or Errno.ENOENT


def release(hub: AdminHub, payload: bytes) -> Reply:
    """RELEASE domid."""
    domain = _one_domain(hub, payload)
    if isinstance(domain, Errno):
        return domain
    hub.release(domain.domid)
    return ACK


def resume(hub: AdminHub, payload: bytes) -> Reply:
    """RESUME domid."""
    domain = _one_domain(hub, payload)
    if isinstance(domain, Errno):
        return domain
    hub.resume(domain.domid)
    return ACK


def set_target(hub: AdminHub, payload: bytes) -> Reply:
    """SET_TARGET domid, domid of the target."""
    words = strings(payload)
    if len(words) < 2:
        return Errno.EINVAL
    domain, target = _introduced(hub, number(words[0])), _introduced(hub, number(words[1]))
    if domain is None or target is None:
        return Errno.ENOENT
    hub.set_target(domain.domid, target.domid)
    return ACK


def is_domain_introduced(hub: AdminHub, payload: bytes) -> Reply:
    """IS_DOMAIN_INTRODUCED domid."""
    word = single(payload)
    if word is None:
        return Errno.EINVAL
    domid = number(word)
    return b"T\0" if domid == DOMID_SELF or _introduced(hub, domid) else b"F\0"


def _words(payload: bytes) -> list[bytes]:
    """The strings of a payload; one empty string, as C clients send it, is none."""
    words = strings(payload)
    return [] if words == [b""] else words


def get_feature(hub: AdminHub, payload: bytes) -> Reply:
    """GET_FEATURE [domid]: the features a domain has, or all this store has."""
    words = _words(payload)
    if not words:
        return b"%d\0" % FEATURES
    if len(words) > 1:
        return Errno.EINVAL
    domain = hub.known(number(words[0]))
    return b"%d\0" % domain.features if domain is not None else Errno.ENOENT


def set_feature(hub: AdminHub, payload: bytes) -> Reply:
    """SET_FEATURE domid, sum of bits: only before the domain is introduced, as it reads them in its ring page."""
    words = strings(payload)
    if len(words) != 2 or not words[1].isdigit() or number(words[1]) & ~FEATURES:
        return Errno.EINVAL
    domain = hub.known(number(words[0]))
    if domain is None:
        return Errno.ENOENT
    if domain.introduced:
        return Errno.EBUSY
    hub.set_features(domain.domid, number(words[1]))
    return ACK


def _quota_of(hub: AdminHub, words: list[bytes]) -> tuple[int | None, str] | Errno:
    """What `[domid] name` names."""
    domid = None
    if len(words) == 2:
        domain = hub.known(number(words[0]))
        if domain is None:
            return Errno.ENOENT
        domid = domain.domid
    name = words[-1].decode("ascii", "replace")
    return (domid, name) if name in QUOTAS else Errno.EINVAL


def get_quota(hub: AdminHub, payload: bytes) -> Reply:
    """GET_QUOTA [[domid] name]: a domain's quota, the global one, or the names there are."""
    words = _words(payload)
    if not words:
        return " ".join(QUOTAS).encode() + b"\0"
    if len(words) > 2:
        return Errno.EINVAL
    which = _quota_of(hub, words)
    return which if isinstance(which, Errno) else b"%d\0" % hub.quota(*which)


def set_quota(hub: AdminHub, payload: bytes) -> Reply:
    """SET_QUOTA [domid] name, value: a domain's quota, or the one new domains get; 0 is none."""
    words = strings(payload)
    if len(words) not in (2, 3) or not words[-1].isdigit() or len(words[-1]) > 10:
        return Errno.EINVAL
    which = _quota_of(hub, words[:-1])
    if isinstance(which, Errno):
        return which
    hub.set_quota(*which, number(words[-1]))
    return ACK


PRIVILEGED: Final[dict[int, Administer]] = {
    Op.CONTROL: control,
    Op.INTRODUCE: introduce,
    Op.RELEASE: release,
    Op.RESUME: resume,
    Op.SET_TARGET: set_target,
    Op.IS_DOMAIN_INTRODUCED: is_domain_introduced,
    Op.GET_FEATURE: get_feature,
    Op.SET_FEATURE: set_feature,
    Op.GET_QUOTA: get_quota,
    Op.SET_QUOTA: set_quota,
}
