# SPDX-License-Identifier: MIT
"""Entries of a device class that is declared by the layout of its messages."""

import errno
from typing import Any

import numpy as np

from paravirt.protocol.decode.entry import Decoder, Entry, fitted, hexadecimal
from paravirt.protocol.layout import MessagePair

MAX_VALUES = 64
"""Of one field that is an array."""


def _plain(value: Any) -> Any:
    """A value of numpy's as one of JSON's."""
    if isinstance(value, np.void):
        if value.dtype.names is None:
            return hexadecimal(value.tobytes())
        return {name: _plain(value[name]) for name in value.dtype.names}
    if isinstance(value, np.ndarray):
        flat = value.reshape(-1)
        return [_plain(each) for each in flat[:MAX_VALUES]] + (["..."] if len(flat) > MAX_VALUES else [])
    if isinstance(value, bytes):
        return value.decode("ascii", "backslashreplace")
    if isinstance(value, np.generic):
        plain = value.item()
        finite = not isinstance(plain, float) or abs(plain) < float("inf")
        return plain if isinstance(plain, bool | int | str) or (isinstance(plain, float) and finite) else str(plain)
    return value


class MessageDecoder(Decoder):
    """The fields by name; `id`, `status` and `gref` mean what they mean in every declared class."""

    def __init__(self, messages: MessagePair) -> None:
        self._messages = messages

    def request(self, message: bytes) -> Entry:
        return self._entry("request", message, self._messages.request)

    def response(self, message: bytes) -> Entry:
        return self._entry("response", message, self._messages.response)

    @staticmethod
    def _entry(kind: str, message: bytes, dtype: "np.dtype[Any]") -> Entry:
        message, short = fitted(message, dtype.itemsize)
        record = np.frombuffer(message, dtype, 1)[0]
        fields = {name: _plain(record[name]) for name in dtype.names or ()}
        wrong = list(short)
        identity, status = fields.get("id"), None
        if isinstance(identity, int):
            del fields["id"]
        if kind == "response" and isinstance(fields.get("status"), int):
            status = fields.pop("status")
            if status < 0:
                fields = {"is": errno.errorcode.get(-status, "unknown"), **fields}
            elif status > 0:
                wrong.append("a positive status")
        grefs = _grefs(fields, wrong) if kind == "request" else ()
        return Entry(kind, identity if isinstance(identity, int) else None, status, fields, grefs, tuple(wrong))


def _grefs(fields: dict[str, Any], wrong: list[str]) -> tuple[int, ...]:
    """Without the zeros behind the last one."""
    listed = fields.get("gref")
    if not isinstance(listed, list) or not all(isinstance(each, int) for each in listed):
        return ()
    while listed and listed[-1] == 0:
        listed.pop()
    if 0 in listed:
        wrong.append("a gap between its grant references")
    if not listed:
        del fields["gref"]
    return tuple(each for each in listed if each)
