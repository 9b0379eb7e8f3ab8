# SPDX-License-Identifier: MIT
"""Entries of the control ring of network devices. Source: Xen public/io/netif.h, control messages."""

import struct
from collections.abc import Callable
from typing import Any

from paravirt.protocol.decode.entry import Decoder, Entry, fitted

_REQUEST = struct.Struct("<HH3I")
_RESPONSE = struct.Struct("<HHII")

_ALGORITHMS = {0: "none", 1: "toeplitz"}
_FLAGS = {1: "ipv4", 2: "ipv4_tcp", 4: "ipv6", 8: "ipv6_tcp"}
_STATUS = {0: "success", 1: "not_supported", 2: "invalid_parameter", 3: "buffer_overflow"}

Words = tuple[int, int, int]


def _nothing(data: Words) -> dict[str, Any]:
    return {}


def _flags(flags: int) -> list[str]:
    unknown = flags & ~sum(_FLAGS)
    return [name for bit, name in _FLAGS.items() if flags & bit] + ([f"{unknown:#x}"] if unknown else [])


def _grefs(data: Words) -> dict[str, Any]:
    return {"queue": data[0], "gref": data[1], "entries": data[2]}


_TYPES: dict[int, tuple[str, Callable[[Words], dict[str, Any]]]] = {
    1: ("get-hash-flags", _nothing),
    2: ("set-hash-flags", lambda data: {"flags": _flags(data[0])}),
    3: ("set-hash-key", lambda data: {"gref": data[0], "bytes": data[1]}),
    4: ("get-hash-mapping-size", _nothing),
    5: ("set-hash-mapping-size", lambda data: {"entries": data[0]}),
    6: ("set-hash-mapping", lambda data: {"gref": data[0], "entries": data[1], "from": data[2]}),
    7: ("set-hash-algorithm", lambda data: {"algorithm": _ALGORITHMS.get(data[0], str(data[0]))}),
    8: ("get-gref-mapping-size", lambda data: {"queue": data[0]}),
    9: ("add-gref-mapping", _grefs),
    10: ("del-gref-mapping", _grefs),
}


class NetifCtrlDecoder(Decoder):
    """What a guest wants of its backend beside packets."""

    def request(self, message: bytes) -> Entry:
        message, short = fitted(message, _REQUEST.size)
        identity, kind, *words = _REQUEST.unpack(message)
        data: Words = (words[0], words[1], words[2])
        wrong = list(short)
        if kind not in _TYPES:
            wrong.append(f"no type {kind}")
            return Entry(f"ctrl-{kind}", identity, None, {"data": list(data)}, (), tuple(wrong))
        name, read = _TYPES[kind]
        fields = read(data)
        if "algorithm" in fields and data[0] not in _ALGORITHMS:
            wrong.append(f"no algorithm {data[0]}")
        if kind == 2 and data[0] & ~sum(_FLAGS):
            wrong.append(f"no flags {data[0] & ~sum(_FLAGS):#x}")
        return Entry(name, identity, None, fields, (fields["gref"],) if "gref" in fields else (), tuple(wrong))

    def response(self, message: bytes) -> Entry:
        message, short = fitted(message, _RESPONSE.size)
        identity, kind, status, data = _RESPONSE.unpack(message)
        wrong = list(short)
        if kind not in _TYPES:
            wrong.append(f"no type {kind}")
        if status not in _STATUS:
            wrong.append(f"no status {status}")
        name = _TYPES[kind][0] if kind in _TYPES else f"ctrl-{kind}"
        fields: dict[str, Any] = {"is": _STATUS.get(status, "unknown"), "data": data}
        return Entry(name, identity, status, fields, (), tuple(wrong))
