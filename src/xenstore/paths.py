# SPDX-License-Identifier: MIT
"""Paths of the store: canonical form and validity. Paths are bytes, as on the wire."""

import re
from typing import Final

ABSOLUTE_MAX_BYTES: Final = 3072
RELATIVE_MAX_BYTES: Final = 2048
ROOT: Final = b"/"
ALLOWED: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-/_@"

_DOMAIN_PREFIX: Final = re.compile(rb"/local/domain/[0-9]{1,5}/")


def home_of(domid: int) -> bytes:
    """Where relative paths of a domain start."""
    return b"/local/domain/%d" % domid


def canonical(path: bytes, home: bytes) -> bytes | None:
    """The absolute form of `path`, relative ones below `home`; None if it is not a valid path of a node."""
    if path[:1] == b"/":
        if len(path) > ABSOLUTE_MAX_BYTES:
            return None
    else:
        if len(path) > RELATIVE_MAX_BYTES or path[:1] == b"@":
            return None
        path = home + b"/" + path
    return path if _is_well_formed(path) else None


def canonical_to_watch(path: bytes, home: bytes) -> bytes | None:
    """The same for what may be watched: beside nodes, special names, which begin with @."""
    if path[:1] != b"@":
        return canonical(path, home)
    return path if len(path) <= RELATIVE_MAX_BYTES and _is_well_formed(path) else None


def _is_well_formed(path: bytes) -> bool:
    return not (path.translate(None, ALLOWED) or b"//" in path or (path[-1:] == b"/" and path != ROOT))


def quota_length(path: bytes) -> int:
    """Bytes of an absolute path that count against a guest's longest path: those below /local/domain/N/."""
    prefix = _DOMAIN_PREFIX.match(path)
    return len(path) - (prefix.end() if prefix else 0)


def parent_of(path: bytes) -> bytes:
    """The path above an absolute path; the root's is the root."""
    return path[: path.rfind(b"/")] or ROOT


def child_of(path: bytes, name: bytes) -> bytes:
    return path + name if path == ROOT else path + b"/" + name


def split(path: bytes) -> tuple[bytes, bytes]:
    """(parent, last name) of an absolute path other than the root."""
    at = path.rfind(b"/")
    return path[:at] or ROOT, path[at + 1 :]
