# SPDX-License-Identifier: MIT
"""Entries of network devices, with the slots of extra information between them. Source: Xen public/io/netif.h.

A packet takes several entries: the flags of one say whether the next is more of the packet, or extra information.
Whoever begins to look in the middle may take the first extra information for a packet.
"""

import struct
from typing import Any

from paravirt.protocol.decode.entry import Decoder, Entry, fitted

_TX_REQUEST = struct.Struct("<IHHHH")  # gref, offset, flags, id, size
_TX_RESPONSE = struct.Struct("<Hh")
_RX_REQUEST = struct.Struct("<HHI")
_RX_RESPONSE = struct.Struct("<HHHh")  # id, offset, flags, status
_EXTRA = struct.Struct("<BB6s")

PAGE_BYTES = 4096
MIN_FRAME_BYTES = 14
MORE_DATA, EXTRA_INFO = 4, 8
EXTRA_MORE = 1

_TX_FLAGS = {1: "csum_blank", 2: "data_validated", MORE_DATA: "more_data", EXTRA_INFO: "extra_info"}
_RX_FLAGS = {1: "data_validated", 2: "csum_blank", MORE_DATA: "more_data", EXTRA_INFO: "extra_info", 16: "gso_prefix"}
_TX_STATUS = {-2: "dropped", -1: "error", 0: "okay", 1: "null"}
_EXTRAS = {1: "gso", 2: "mcast_add", 3: "mcast_del", 4: "hash", 5: "xdp"}
_GSO = {1: "tcpv4", 2: "tcpv6"}


def _flags(flags: int, names: dict[int, str], wrong: list[str]) -> list[str]:
    unknown = flags & ~sum(names)
    if unknown:
        wrong.append(f"no flags {unknown:#x}")
    return [name for bit, name in names.items() if flags & bit]


def extra(message: bytes) -> tuple[Entry, bool]:
    """A slot of extra information, and whether the next one is another."""
    kind, flags, content = _EXTRA.unpack(fitted(message, _EXTRA.size)[0])
    wrong = [f"no flags {flags & ~EXTRA_MORE:#x}"] if flags & ~EXTRA_MORE else []
    name, fields = _EXTRAS.get(kind), {}
    if name is None:
        wrong.append(f"no extra information {kind}")
        fields = {"bytes": content.hex()}
    elif name == "gso":
        size, protocol = struct.unpack_from("<HB", content)
        fields = {"size": size, "protocol": _GSO.get(protocol, str(protocol))}
        if not size or protocol not in _GSO:
            wrong.append("no such segmentation")
    elif name == "hash":
        protocol, algorithm, value = struct.unpack("<BBI", content)
        fields = {"protocol": protocol, "algorithm": algorithm, "value": f"{value:#010x}"}
    elif name == "xdp":
        fields = {"headroom": struct.unpack_from("<H", content)[0]}
    else:
        fields = {"address": content.hex(":")}
    return Entry(f"extra-{name or kind}", fields=fields, wrong=tuple(wrong)), bool(flags & EXTRA_MORE)


class _WithExtras(Decoder):
    """Knows what the next entry of its direction is."""

    def __init__(self) -> None:
        self._extra = False  # the next one is extra information
        self._more = False  # the next packet entry belongs to the packet before

    def _next_is_extra(self, message: bytes) -> Entry | None:
        if not self._extra:
            return None
        entry, self._extra = extra(message)
        return entry

    def _follow(self, flags: int) -> bool:
        """Remember what comes next; whether this entry is the first of its packet."""
        first = not self._more
        self._extra, self._more = bool(flags & EXTRA_INFO), bool(flags & MORE_DATA)
        return first


class NetifTxDecoder(_WithExtras):
    """What a guest sends."""

    def request(self, message: bytes) -> Entry:
        if found := self._next_is_extra(message):
            return found
        message, short = fitted(message, _TX_REQUEST.size)
        gref, offset, flags, identity, size = _TX_REQUEST.unpack(message)
        wrong = list(short)
        names = _flags(flags, _TX_FLAGS, wrong)
        first = self._follow(flags)
        # The size of the first entry is that of the whole packet, which may fill more pages than one.
        alone = first and not flags & MORE_DATA
        if offset > PAGE_BYTES or ((alone or not first) and offset + size > PAGE_BYTES):
            wrong.append(f"{size} bytes at {offset} cross the page")
        if first and size < MIN_FRAME_BYTES:
            wrong.append(f"a packet of {size} bytes")
        fields: dict[str, Any] = {"size": size, "gref": gref, "offset": offset}
        if names:
            fields["flags"] = names
        return Entry("packet" if first else "more", identity, None, fields, (gref,), tuple(wrong))

    def response(self, message: bytes) -> Entry:
        message, short = fitted(message, _TX_RESPONSE.size)
        identity, status = _TX_RESPONSE.unpack(message)
        wrong = [*short, *([] if status in _TX_STATUS else [f"no status {status}"])]
        return Entry("sent", identity, status, {"is": _TX_STATUS.get(status, "unknown")}, (), tuple(wrong))


class NetifRxDecoder(_WithExtras):
    """What a guest receives."""

    def request(self, message: bytes) -> Entry:
        message, short = fitted(message, _RX_REQUEST.size)
        identity, _, gref = _RX_REQUEST.unpack(message)
        return Entry("buffer", identity, None, {"gref": gref}, (gref,), short)

    def response(self, message: bytes) -> Entry:
        if found := self._next_is_extra(message):
            return found
        message, short = fitted(message, _RX_RESPONSE.size)
        identity, offset, flags, status = _RX_RESPONSE.unpack(message)
        wrong = list(short)
        names = _flags(flags, _RX_FLAGS, wrong)
        if offset > PAGE_BYTES or (status > 0 and offset + status > PAGE_BYTES):
            wrong.append(f"{status} bytes at {offset} cross the page")
        if status < -2:
            wrong.append(f"no status {status}")
        first = self._follow(flags)
        fields: dict[str, Any] = {"offset": offset, **({"flags": names} if names else {})}
        return Entry("packet" if first else "more", identity, status, fields, (), tuple(wrong))
