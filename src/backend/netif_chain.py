# SPDX-License-Identifier: MIT
"""The chain of requests that makes a packet, told from the public header and from what Linux' backend does: a second
implementation of what the C core has (`ring.netif.parse_chain`), which tests hold against it.

Source: Xen public/io/netif.h; limits and what is fatal as in Linux' drivers/net/xen-netback/netback.c.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paravirt.protocol.netif import (
    EXTRA_INFO,
    EXTRA_MORE,
    MIN_FRAME_BYTES,
    PAGE_BYTES,
    Extra,
    Fatal,
    GsoType,
    HashAlgorithm,
    Status,
    TxFlag,
)
from paravirt.ring.netif import Chain, Piece

MAX_FOLLOWING = 18
"""Requests for data after the first; a packet with more is dropped."""
FATAL_FOLLOWING = 20
"""With more than that its frontend is not to be trusted."""
MAX_EXTRAS = 235
"""Slots of extra information in one packet."""


class _Refused(Exception):
    def __init__(self, reason: Fatal) -> None:
        self.reason = reason


class _Unfinished(Exception):
    """More is announced than there is."""


def parse_chain(requests: NDArray[Any]) -> Chain | int:
    """As `ring.netif.parse_chain`, of the same array."""
    rows = iter(requests)
    try:
        return _parse(rows)
    except _Refused as refused:
        return refused.reason
    except _Unfinished:
        return 0


def _next(rows: Iterator[Any]) -> Any:
    row = next(rows, None)
    if row is None:
        raise _Unfinished
    return row


def _parse(rows: Iterator[Any]) -> Chain:
    first = _next(rows)
    flags = TxFlag(int(first["flags"]) & 15)
    extras = list(_extras(rows)) if TxFlag.EXTRA_INFO in flags else []
    last = {Extra(int(extra["type"])): extra["content"].tobytes() for extra in extras}
    for wish in (Extra.MCAST_ADD, Extra.MCAST_DEL):
        if wish in last:
            return Chain(1 + len(extras), len(extras), mcast=wish, mcast_address=last[wish])
    following = list(_following(rows)) if TxFlag.MORE_DATA in flags else []
    n_requests, n_bytes = 1 + len(extras) + len(following), int(first["size"])
    if n_bytes < MIN_FRAME_BYTES or not _is_whole(n_bytes, following):
        return Chain(n_requests, len(extras), status=Status.ERROR)
    own = Piece(int(first["gref"]), int(first["offset"]), n_bytes - sum(piece.n_bytes for piece in following))
    _check_page(own)
    size, kind = _gso(last.get(Extra.GSO))
    return Chain(
        n_requests,
        len(extras),
        n_bytes=n_bytes,
        flags=int(first["flags"]),
        gso_size=size,
        gso_type=kind,
        hash=_hash(last.get(Extra.HASH)),
        pieces=(own, *following),
    )


def _extras(rows: Iterator[Any]) -> Iterator[Any]:
    for _ in range(MAX_EXTRAS):
        extra = np.frombuffer(_next(rows).tobytes()[: EXTRA_INFO.itemsize], EXTRA_INFO)[0]
        if not Extra.NONE < extra["type"] <= Extra.XDP:
            raise _Refused(Fatal.EXTRA)
        yield extra
        if not extra["flags"] & EXTRA_MORE:
            return
    raise _Refused(Fatal.EXTRA)


def _following(rows: Iterator[Any]) -> Iterator[Piece]:
    for _ in range(FATAL_FOLLOWING):
        row = _next(rows)
        piece = Piece(int(row["gref"]), int(row["offset"]), int(row["size"]))
        _check_page(piece)
        yield piece
        if not int(row["flags"]) & TxFlag.MORE_DATA:
            return
    raise _Refused(Fatal.SLOTS)


def _check_page(piece: Piece) -> None:
    if piece.offset + piece.n_bytes > PAGE_BYTES:
        raise _Refused(Fatal.PAGE)


def _is_whole(n_bytes: int, following: list[Piece]) -> bool:
    """Whether the parts are few enough, and together not more than the packet."""
    left = n_bytes
    for piece in following:
        if piece.n_bytes > left:
            return False
        left -= piece.n_bytes
    return len(following) <= MAX_FOLLOWING


def _hash(extra: bytes | None) -> tuple[int, int] | None:
    """Type and value; None: there is none, or none that anybody knows."""
    if extra is None or extra[0] > 3 or extra[1] != HashAlgorithm.TOEPLITZ:
        return None
    return extra[0], int.from_bytes(extra[2:6], "little")


def _gso(extra: bytes | None) -> tuple[int, int]:
    """Bytes of payload in each segment, and of which protocol; (0, 0): it is one."""
    if extra is None:
        return 0, 0
    size, kind = int.from_bytes(extra[:2], "little"), extra[2]
    if not size:
        raise _Refused(Fatal.GSO_SIZE)
    if kind not in (GsoType.TCPV4, GsoType.TCPV6):
        raise _Refused(Fatal.GSO_TYPE)
    return size, kind
