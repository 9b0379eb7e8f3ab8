# SPDX-License-Identifier: MIT
"""A device class as a value: layouts, keys, and what is refused."""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pytest

from paravirt.errors import InvalidRequest, PeerError
from paravirt.protocol.device import (
    U8,
    U64,
    DeviceOffer,
    DeviceProtocol,
    DeviceRequest,
    from_keys,
    put_message,
    to_keys,
)


@dataclass
class Ask:
    operation: U8
    place: U64
    name: Annotated[bytes, "V16"]


@dataclass
class Answer:
    size: np.uint32


@dataclass(frozen=True)
class Offer:
    max_bytes: int
    writable: bool = False
    label: str = ""


def declare(**changes: Any) -> DeviceProtocol:
    return DeviceProtocol("vtest", **{"request": Ask, "response": Answer, "pages": 2, "offer": Offer, **changes})


def test_layout_of_dataclasses() -> None:
    protocol = declare()
    assert protocol.request.names == ("id", "operation", "place", "name", "gref")
    assert [protocol.request.fields[name][1] for name in protocol.request.names] == [0, 8, 16, 24, 40]  # as in C
    assert protocol.response.names == ("id", "status", "size")
    assert (protocol.request.itemsize, protocol.response.itemsize) == (48, 16)


def test_a_dtype_that_has_all_fields_is_the_layout() -> None:
    request = np.dtype([("op", "u1"), ("id", "<u2"), ("gref", "<u4", (2,))])
    response = np.dtype([("id", "<u2"), ("op", "u1"), ("status", "i1")])
    protocol = declare(request=request, response=response)
    assert (protocol.request, protocol.response) == (request, response)


def test_a_dtype_without_them_gets_them() -> None:
    protocol = declare(request=[("a", "<u2")], response=[("b", "<u2"), ("status", "<i2")], pages=0)
    assert protocol.request.names == ("id", "a")
    assert protocol.response.names == ("id", "b", "status")


BAD = {
    "a name with a slash": {"name": "a/b"},
    "no structure": {"request": "<u4"},
    "a field without a size": {"request": type("R", (), {"__annotations__": {"n": int}})},
    "too many pages": {"pages": 257},
    "too large": {"request": [("data", "V5000")]},
    "objects": {"request": [("data", "O")]},
    "an id with a sign": {"request": [("id", "<i4")], "response": [("id", "<i4")], "pages": 0},
    "two kinds of id": {"request": [("id", "<u4")], "pages": 0},
    "a status without a sign": {"response": [("status", "<u4")]},
    "another number of references": {"request": [("gref", "<u4", (3,))]},
    "too large a ring": {"max_ring_page_order": 5},
    "keys that are no dataclass": {"offer": dict},
    "a key of every device": {"config": dataclass(type("C", (), {"__annotations__": {"state": int}}))},
    "a key that is a list": {"config": dataclass(type("C", (), {"__annotations__": {"parts": list}}))},
}


@pytest.mark.parametrize("changes", BAD.values(), ids=BAD)
def test_what_cannot_be_declared(changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"name": "vtest", "request": Ask, "response": Answer, "pages": 2, **changes}
    if isinstance(fields["request"], type) and fields["request"] is not Ask:
        fields["request"] = dataclass(fields["request"])
    with pytest.raises(InvalidRequest):
        DeviceProtocol(fields.pop("name"), **fields)


def test_keys_there_and_back() -> None:
    offer = Offer(4096, True, "a text")
    assert to_keys(offer) == {"max-bytes": "4096", "writable": "1", "label": "a text"}
    assert from_keys(Offer, to_keys(offer), PeerError) == offer
    assert from_keys(Offer, {"max-bytes": "-1"}, PeerError) == Offer(-1)


@pytest.mark.parametrize("keys", [{}, {"max-bytes": "x"}, {"max-bytes": "٣"}, {"max-bytes": "1", "writable": "2"}])
def test_keys_of_the_other_end_are_not_trusted(keys: dict[str, str]) -> None:
    with pytest.raises(PeerError):
        from_keys(Offer, keys, PeerError)


def test_offer_and_request() -> None:
    protocol = declare()
    offer = DeviceOffer(Offer(1), 4)
    assert DeviceOffer.from_keys(protocol, offer.to_keys(protocol)) == offer
    request = DeviceRequest((8, 9), 5)
    assert DeviceRequest.from_keys(protocol, request.to_keys(protocol)) == request
    assert set(request.to_keys(protocol)) <= set(DeviceRequest.NAMES)
    assert set(offer.to_keys(protocol)) == set(DeviceOffer.names(protocol))


@pytest.mark.parametrize("changes", [{"pages": 3}, {"response": [("other", "<u4")]}])
def test_halves_with_different_messages_are_told_apart(changes: dict[str, Any]) -> None:
    ours, theirs = declare(), declare(**changes)
    with pytest.raises(PeerError, match="the other half of vtest"):
        DeviceRequest.from_keys(ours, DeviceRequest((8,), 5).to_keys(theirs))
    with pytest.raises(PeerError, match="the other half of vtest"):
        DeviceOffer.from_keys(ours, DeviceOffer(Offer(1), 4).to_keys(theirs))


def test_a_half_that_does_not_say_its_layout_is_believed() -> None:
    assert DeviceRequest.from_keys(declare(), {"ring-ref": "8", "event-channel": "3"}) == DeviceRequest((8,), 3)


def test_messages() -> None:
    protocol = declare()
    batch = np.zeros(2, protocol.request)
    put_message(protocol, batch, 1, Ask(3, 1 << 40, b"name"))
    assert batch[1].item()[1:4] == (3, 1 << 40, b"name".ljust(16, b"\0"))
    put_message(protocol, batch, 0, {"id": 7, "operation": 1})
    assert batch["id"].tolist() == [0, 0]  # ids are not the caller's


@pytest.mark.parametrize(
    "message",
    [
        {"nothing": 1},
        {"operation": 256},
        {"operation": -1},
        {"operation": "x"},
        {"name": bytes(17)},
        {"gref": [1] * 3},
        5,
    ],
    ids=str,
)
def test_messages_that_do_not_fit(message: Any) -> None:
    protocol = declare()
    with pytest.raises(InvalidRequest):
        put_message(protocol, np.zeros(1, protocol.request), 0, message)
