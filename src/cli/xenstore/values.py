# SPDX-License-Identifier: MIT
"""Values of nodes as text: on one line with escapes, and in JSON. Any bytes come back as they were."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final

from paravirt.errors import InvalidRequest

JsonValue = str | dict[str, str]
"""Text, or {"base64": ...} for bytes that are no UTF-8."""

_NAMED: Final = {"\t": "\\t", "\n": "\\n", "\r": "\\r", "\\": "\\\\"}
_BYTES: Final = {escape: character.encode() for character, escape in _NAMED.items()}
_ESCAPE: Final = re.compile(r"\\(?:x[0-9a-fA-F]{2}|[0-3][0-7]{2}|.|$)", re.DOTALL)


def _escape(byte: int) -> str:
    character = chr(byte)
    if character in _NAMED:
        return _NAMED[character]
    if " " <= character <= "~":
        return character
    return f"\\{byte:03o}" if byte < 8 else f"\\x{byte:02x}"


_SHOWN: Final = [_escape(byte) for byte in range(256)]


def printable(value: bytes) -> str:
    """A value on one line, with escapes for all but printable ASCII: the form of Debian's xenstore-ls."""
    return "".join([_SHOWN[byte] for byte in value])


def unescaped(text: str) -> bytes:
    """The bytes that `printable` shows as `text`; other characters stand for their UTF-8. `InvalidRequest`."""
    parts, end = [], 0
    for match in _ESCAPE.finditer(text):
        parts += [text[end : match.start()].encode(), _byte_of(match.group())]
        end = match.end()
    return b"".join([*parts, text[end:].encode()])


def _byte_of(escape: str) -> bytes:
    if escape in _BYTES:
        return _BYTES[escape]
    if len(escape) != 4:
        raise InvalidRequest(f"{escape} is no escape: there are \\t \\n \\r \\\\ \\xHH and \\NNN (octal)")
    return bytes([int(escape[2:], 16) if escape[1] == "x" else int(escape[1:], 8)])


def json_value(value: bytes) -> JsonValue:
    """A value for JSON."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def from_json(value: object) -> bytes:
    """The bytes that `json_value` wrote. Raises `InvalidRequest` for anything it never writes."""
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:  # a lone surrogate, which JSON can spell
            raise InvalidRequest("the value is no text") from None
    if isinstance(value, dict) and list(value) == ["base64"] and isinstance(value["base64"], str):
        try:
            return base64.b64decode(value["base64"], validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest("the value is no base64") from None
    raise InvalidRequest('the value is neither text nor {"base64": ...}')
