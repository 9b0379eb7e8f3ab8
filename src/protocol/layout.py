# SPDX-License-Identifier: MIT
"""The layout of messages as JSON: for files that outlive the program whose messages they hold. Pure.

A message is `{"bytes": 24, "fields": [["id", 0, "<u8"], ["gref", 8, "<u4", [4]], ["part", 24, {...}]]}`: name, offset,
type as numpy writes it (or a message), and the shape of an array.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from paravirt.errors import InvalidRequest
from paravirt.protocol.device import DeviceProtocol

MAX_BYTES = 65536
MAX_FIELDS = 256
MAX_DEPTH = 4
_TYPE = re.compile(r"[<>|][uifcbSV][1-9][0-9]{0,4}", re.ASCII)


def describe(message: "np.dtype[Any]") -> dict[str, Any]:
    """Of a structured dtype."""
    fields = []
    for name in message.names or ():
        assert message.fields is not None
        kind, offset = message.fields[name][:2]
        base, shape = kind.subdtype or (kind, ())
        fields.append([name, offset, describe(base) if base.names else base.str, *([list(shape)] if shape else [])])
    return {"bytes": message.itemsize, "fields": fields}


def parse(described: Any, depth: int = 0) -> "np.dtype[Any]":
    """`describe` the other way round, of anything that JSON gave. Raises `InvalidRequest` for what is no layout."""
    if not isinstance(described, dict) or depth > MAX_DEPTH:
        raise InvalidRequest("the layout of a message is no mapping, or too deep")
    n_bytes, fields = described.get("bytes"), described.get("fields")
    if type(n_bytes) is not int or not 0 < n_bytes <= MAX_BYTES:
        raise InvalidRequest(f"a message of {n_bytes!r:.40} bytes")
    if not isinstance(fields, list) or not 0 < len(fields) <= MAX_FIELDS:
        raise InvalidRequest(f"a message of no field, or of more than {MAX_FIELDS}")
    names, formats, offsets = [], [], []
    for field in fields:
        name, offset, kind = _parse_field(field, n_bytes, depth)
        names.append(name)
        offsets.append(offset)
        formats.append(kind)
    spec: Any = {"names": names, "formats": formats, "offsets": offsets, "itemsize": n_bytes}
    with suppress(TypeError, ValueError, OverflowError):
        aligned: np.dtype[Any] = np.dtype(spec, align=True)  # as C lays it out: then an entry of a ring is, too
        return aligned
    try:
        made: np.dtype[Any] = np.dtype(spec)
        return made
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"the layout of a message is none: {error}") from error


def _parse_field(field: Any, n_bytes: int, depth: int) -> tuple[str, int, Any]:
    if not isinstance(field, list) or len(field) not in (3, 4) or not isinstance(field[0], str) or not field[0]:
        raise InvalidRequest(f"a field of a message is {field!r:.60}")
    name, offset, kind, *rest = field
    shape = rest[0] if rest else []
    whole = isinstance(shape, list) and len(shape) <= MAX_DEPTH
    if not whole or not all(type(n) is int and 0 < n <= MAX_BYTES for n in shape):
        raise InvalidRequest(f"the field {name[:40]!r} has the shape {shape!r:.40}")
    if isinstance(kind, str) and _TYPE.fullmatch(kind):
        try:
            base = np.dtype(kind)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"the field {name[:40]!r} has the type {kind!r:.40}") from error
    else:
        base = parse(kind, depth + 1)
    total = base.itemsize
    for n in shape:
        total *= n
    if type(offset) is not int or not 0 <= offset <= n_bytes - total:
        raise InvalidRequest(f"the field {name[:40]!r} is not within its message")
    return name, offset, (base, tuple(shape)) if shape else base


def _is_padding(field: list[Any]) -> bool:
    """Of a dtype that went through its `descr`: bytes between the fields, with a name that numpy made up."""
    return re.fullmatch("f[0-9]+", field[0]) is not None and isinstance(field[2], str) and field[2].startswith("|V")


@dataclass(frozen=True)
class MessagePair:
    """Layouts of the requests and responses of a ring."""

    request: "np.dtype[Any]"
    response: "np.dtype[Any]"
    pages: int = 0
    """That one request of a declared class carries at most."""

    @classmethod
    def of(cls, protocol: DeviceProtocol) -> Self:
        return cls(protocol.request, protocol.response, protocol.pages)

    def checked(self) -> Self:
        """The same, of plain fields only, without padding that was given a name: for a layout that somebody else wrote.

        Raises `InvalidRequest`.
        """
        value = self.to_json()
        for message in (value["request"], value["response"]):
            fields = [field for field in message["fields"] if not _is_padding(field)]
            message["fields"] = fields or message["fields"]
        return self.from_json(value)

    def to_json(self) -> dict[str, Any]:
        return {"request": describe(self.request), "response": describe(self.response), "pages": self.pages}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Raises `InvalidRequest` for what is no pair of layouts."""
        if not isinstance(value, dict):
            raise InvalidRequest(f"the layout of messages is {value!r:.40}")
        pages = value.get("pages", 0)
        if type(pages) is not int or not 0 <= pages <= MAX_BYTES:
            raise InvalidRequest(f"a request of {pages!r:.40} pages")
        return cls(parse(value.get("request")), parse(value.get("response")), pages)
