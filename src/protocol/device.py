# SPDX-License-Identifier: MIT
"""A device class as a value: its name in xenstore, its messages, and the keys its two halves write.

Pure. A driver developer declares one `DeviceProtocol`; `frontend/driver.py` and `backend/driver.py` do the rest. The
numpy dtype of a message *is* its layout in the ring. Three fields have a meaning for both halves, and are added where a
declaration leaves them out:

* `id`, first in both messages: the backend copies it into the response. Unsigned.
* `status`, in responses: 0, or a negative errno as in Xen public/errno.h. Signed.
* `gref`, in requests that carry pages: their grant references in order, 0 after the last one.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Self, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import InvalidRequest, ParavirtError, PeerError
from paravirt.protocol.keys import FENCE_KEY, MAX_RING_PAGE_ORDER, RING_KEYS, Keys, RingRequest, number

U8 = Annotated[int, "<u1"]
U16 = Annotated[int, "<u2"]
U32 = Annotated[int, "<u4"]
U64 = Annotated[int, "<u8"]
I8 = Annotated[int, "<i1"]
I16 = Annotated[int, "<i2"]
I32 = Annotated[int, "<i4"]
I64 = Annotated[int, "<i8"]
"""Fields of a message: integers of so many bits, unsigned or signed."""

PAGE_BYTES: Final = 4096
RING_HEADER_BYTES: Final = 64
MAX_PAGES: Final = 256

LAYOUT_KEY: Final = "paravirt-layout"
_ORDER_KEY: Final = "max-ring-page-order"
RESERVED: Final = frozenset(
    (
        *RING_KEYS,
        *("backend", "backend-id", "frontend", "frontend-id", "online", "state"),
        *("hotplug-status", "hotplug-error", _ORDER_KEY, LAYOUT_KEY, FENCE_KEY),
    )
)
"""Keys that the two halves write for every class; a class has none of these names."""


@dataclass(frozen=True)
class NoKeys:
    """Of a class that has no configuration, or offers nothing of its own."""


def to_keys(value: Any) -> Keys:
    """The fields of a dataclass of int, bool and str as nodes: `_` becomes `-`, a bool is 0 or 1."""
    keys = {}
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        keys[field.name.replace("_", "-")] = str(int(content) if isinstance(content, bool) else content)
    return keys


def from_keys(kind: type[Any], keys: Mapping[str, str], error: type[ParavirtError]) -> Any:
    """`to_keys` the other way round; a field that has a default may be missing. Raises `error`."""
    values, hints = {}, get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = field.name.replace("_", "-")
        if name in keys:
            values[field.name] = _parse(name, keys[name], hints[field.name], error)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise error(f"{name} is missing")
    return kind(**values)


def _parse(name: str, text: str, kind: type[Any], error: type[ParavirtError]) -> Any:
    if kind is str:
        return text
    if re.fullmatch("0|1" if kind is bool else "-?[0-9]{1,19}", text, re.ASCII) is None:
        raise error(f"{name} is {text[:40]!r}, not {'0 or 1' if kind is bool else 'a number'}")
    return kind(int(text))


def key_names(kind: type[Any]) -> tuple[str, ...]:
    """The nodes of a dataclass of keys."""
    return tuple(field.name.replace("_", "-") for field in dataclasses.fields(kind))


def _check_keys(kind: type[Any]) -> None:
    if not dataclasses.is_dataclass(kind):
        raise InvalidRequest(f"{kind} is not a dataclass of int, bool and str")
    hints = get_type_hints(kind)
    for name, field in zip(key_names(kind), dataclasses.fields(kind), strict=True):
        if hints[field.name] not in (int, bool, str):
            raise InvalidRequest(f"the key {name} is neither an int, a bool nor a str")
        if name in RESERVED:
            raise InvalidRequest(f"the key {name} has a meaning for every device")


def _fields_of(message: Any) -> list[tuple[Any, ...]]:
    """Of a dataclass whose fields are `U8` to `I64`, numpy scalars, or `Annotated[..., what numpy.dtype takes]`."""
    fields: list[tuple[Any, ...]] = []
    for name, hint in get_type_hints(message, include_extras=True).items():
        if get_origin(hint) is not None and hasattr(hint, "__metadata__"):
            hint = get_args(hint)[1]
        if hint in (int, float, str, bytes, bool):
            raise InvalidRequest(f"{message.__name__}.{name}: {hint.__name__} has no size; U32 has one")
        try:
            fields.append((name, np.dtype(hint).newbyteorder("<")))
        except TypeError as error:
            raise InvalidRequest(f"{message.__name__}.{name}: {hint} is no type of numpy's") from error
    return fields


def _layout(message: Any, own: Mapping[str, Any]) -> "np.dtype[Any]":
    """The dtype of a message, with those of `own` that it lacks: `id` and `status` in front, `gref` behind."""
    if isinstance(message, type) and dataclasses.is_dataclass(message):
        fields = _fields_of(message)
    else:
        given: np.dtype[Any] = np.dtype(message)
        if given.names is None:
            raise InvalidRequest(f"a message is a structured dtype or a dataclass, not {message}")
        if all(name in given.names for name in own):
            return given
        assert given.fields is not None
        fields = [(name, given.fields[name][0]) for name in given.names]
    there = {field[0] for field in fields}
    front = [(name, spec) for name, spec in own.items() if name not in there and name != "gref"]
    behind = [(name, spec) for name, spec in own.items() if name not in there and name == "gref"]
    return np.dtype([*front, *fields, *behind], align=True)


def _describe(message: "np.dtype[Any]") -> object:
    """Names, places and types, in a form that is the same with every numpy."""
    if message.subdtype is not None:
        return _describe(message.subdtype[0]), message.subdtype[1]
    if message.fields is None or message.names is None:
        return message.str
    return [(name, message.fields[name][1], _describe(message.fields[name][0])) for name in message.names]


class DeviceProtocol:
    """A device class: what both halves and the toolstack know of it. Immutable, made once by the driver's module."""

    def __init__(
        self,
        name: str,
        *,
        request: Any,
        response: Any,
        pages: int = 0,
        config: type[Any] = NoKeys,
        offer: type[Any] = NoKeys,
        max_ring_page_order: int = MAX_RING_PAGE_ORDER,
    ) -> None:
        """`name`: as in `device/NAME` in xenstore. `request`, `response`: structured dtypes, or dataclasses of `U8`
        to `I64`, which `call` takes and returns then.

        `pages`: most pages of memory that one request carries, 0 to 256. `config`: a dataclass of what the toolstack
        says to the backend; `offer`: one of what the backend says to the frontend. Raises `InvalidRequest`.
        """
        if re.fullmatch("[a-z][a-z0-9_]{0,31}", name) is None:
            raise InvalidRequest(f"{name!r} is not a name of up to 32 lower-case letters, digits and '_'")
        if not 0 <= pages <= MAX_PAGES:
            raise InvalidRequest(f"a request carries 0 to {MAX_PAGES} pages, not {pages}")
        if not 0 <= max_ring_page_order <= MAX_RING_PAGE_ORDER:
            raise InvalidRequest(f"max_ring_page_order is {max_ring_page_order}, not 0 to {MAX_RING_PAGE_ORDER}")
        _check_keys(config)
        _check_keys(offer)
        self.name, self.pages, self.config, self.offer = name, pages, config, offer
        self.max_ring_page_order = max_ring_page_order
        grefs = {"gref": ("<u4", (pages,))} if pages else {}
        self.request = _layout(request, {"id": "<u8", **grefs})
        self.response = _layout(response, {"id": "<u8", "status": "<i4"})
        self.request_class = request if isinstance(request, type) and dataclasses.is_dataclass(request) else None
        self.response_class = response if isinstance(response, type) and dataclasses.is_dataclass(response) else None
        self._check()

    def _check(self) -> None:
        for message, what in ((self.request, "request"), (self.response, "response")):
            if message.hasobject or message.itemsize > PAGE_BYTES - RING_HEADER_BYTES:
                raise InvalidRequest(f"a {what} of {self.name} does not fit a page of a ring, or holds Python objects")
            if message["id"].kind != "u":
                raise InvalidRequest(f"the id of a {what} is an unsigned integer, not {message['id']}")
        if self.response["status"].kind != "i":
            raise InvalidRequest(f"the status of a response is a signed integer, not {self.response['status']}")
        if self.request["id"] != self.response["id"]:
            raise InvalidRequest("the ids of request and response are of different types")
        if self.pages and self.request["gref"] != np.dtype(("<u4", (self.pages,))):
            raise InvalidRequest(f"gref is {self.request['gref']}, not {self.pages} unsigned integers of 4 bytes")

    @property
    def layout(self) -> str:
        """What both halves publish, so that different declarations are told before a message is misread."""
        described = repr((_describe(self.request), _describe(self.response)))
        return f"{self.request.itemsize}-{self.response.itemsize}-{zlib.crc32(described.encode()):08x}"

    def __repr__(self) -> str:
        sizes = f"requests of {self.request.itemsize} and responses of {self.response.itemsize} bytes"
        return f"<DeviceProtocol {self.name}, {sizes}>"


def put_message(protocol: DeviceProtocol, batch: NDArray[Any], i: int, message: Any) -> None:
    """Write the fields of a dataclass or a dictionary into the `i`th message of a batch, but for `id`, which is ours.

    Raises `InvalidRequest` for a name that is none, and for a value that does not fit.
    """
    if dataclasses.is_dataclass(message) and not isinstance(message, type):
        message = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    if not isinstance(message, dict):
        raise InvalidRequest(f"a message is a dataclass or a dictionary of its fields, not {message!r:.60}")
    assert batch.dtype.fields is not None
    for name, value in message.items():
        if name not in batch.dtype.fields:
            raise InvalidRequest(f"a message of {protocol.name} has no field {name}")
        if name == "id":
            continue
        room = batch.dtype.fields[name][0]
        if room.kind in "SV" and isinstance(value, bytes | bytearray | memoryview) and len(value) > room.itemsize:
            raise InvalidRequest(f"{name} of a message of {protocol.name} has {room.itemsize} bytes, not {len(value)}")
        try:
            batch[name][i] = value
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidRequest(f"{name} of a message of {protocol.name} cannot be {value!r:.60}: {error}") from error


def _check_layout(protocol: DeviceProtocol, keys: Mapping[str, str]) -> None:
    theirs = keys.get(LAYOUT_KEY, protocol.layout)
    if theirs != protocol.layout:
        raise PeerError(f"the other half of {protocol.name} has messages {theirs[:40]!r}, ours are {protocol.layout}")


@dataclass(frozen=True, slots=True)
class DeviceOffer:
    """What a backend publishes before INIT_WAIT."""

    values: Any  # of the protocol's `offer`
    max_ring_page_order: int

    def to_keys(self, protocol: DeviceProtocol) -> Keys:
        return {
            **to_keys(self.values),
            _ORDER_KEY: str(self.max_ring_page_order),
            LAYOUT_KEY: protocol.layout,
        }

    @staticmethod
    def names(protocol: DeviceProtocol) -> tuple[str, ...]:
        """The nodes to read."""
        return (*key_names(protocol.offer), _ORDER_KEY, LAYOUT_KEY)

    @classmethod
    def from_keys(cls, protocol: DeviceProtocol, keys: Mapping[str, str]) -> Self:
        """What a frontend makes of the backend's directory. Raises `PeerError`."""
        _check_layout(protocol, keys)
        order = min(number(keys, _ORDER_KEY, 0), protocol.max_ring_page_order)
        return cls(from_keys(protocol.offer, keys, PeerError), order)


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """What a frontend publishes with INITIALISED."""

    ring_refs: tuple[int, ...]
    event_channel: int

    NAMES = (*RING_KEYS, LAYOUT_KEY)

    @property
    def queues(self) -> tuple[RingRequest, ...]:
        """There is one."""
        return (RingRequest(self.ring_refs, self.event_channel),)

    def to_keys(self, protocol: DeviceProtocol) -> Keys:
        return {**RingRequest(self.ring_refs, self.event_channel).to_keys(), LAYOUT_KEY: protocol.layout}

    @classmethod
    def from_keys(cls, protocol: DeviceProtocol, keys: Mapping[str, str]) -> Self:
        """What a backend makes of the frontend's directory. Raises `PeerError`."""
        _check_layout(protocol, keys)
        ring = RingRequest.from_keys(keys, max_ring_page_order=protocol.max_ring_page_order)
        return cls(ring.ring_refs, ring.event_channel)
