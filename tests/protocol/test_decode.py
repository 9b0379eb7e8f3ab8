# SPDX-License-Identifier: MIT
"""Decoders: golden entries, and junk, which is shown and never raises."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.errors import InvalidRequest
from paravirt.protocol import blkif
from paravirt.protocol.decode import decoder_for
from paravirt.protocol.decode.entry import hexadecimal
from paravirt.protocol.device import DeviceProtocol
from paravirt.protocol.layout import MessagePair, describe, parse
from tests.echo_device import ECHO


def blkif_request(operation: int, identity: int, sector: int, *segments: tuple[int, int, int]) -> bytes:
    request = np.zeros(1, blkif.REQUEST)
    request["operation"], request["nr_segments"] = operation, len(segments)
    request["id"], request["sector"] = identity, sector
    for i, segment in enumerate(segments):
        request["seg"][0, i]["gref"], request["seg"][0, i]["first_sect"], request["seg"][0, i]["last_sect"] = segment
    return request.tobytes()


def test_blkif_read_and_its_answer() -> None:
    decoder = decoder_for("vbd")
    entry = decoder.request(blkif_request(0, 7, 64, (9, 0, 7), (10, 2, 3)))
    assert str(entry) == "read id 7 sector 64 sectors 10 segments (9/0/7 10/2/3)"
    assert entry.grefs == (9, 10)
    assert not entry.wrong
    answer = decoder.response(struct.pack("<QBBhI", 7, 0, 0, -1, 0))
    assert str(answer) == "read id 7 status -1 is error"


def test_blkif_flush_discard_and_indirect() -> None:
    decoder = decoder_for("vbd")
    assert str(decoder.request(blkif_request(3, 1, 0))) == "flush id 1"
    discard = struct.pack("<BBHIQQQ", 5, 1, 0, 0, 2, 100, 50).ljust(112, b"\0")
    assert str(decoder.request(discard)) == "discard id 2 sector 100 sectors 50 secure True"
    indirect = struct.pack("<BBHIQQHH8I", 6, 1, 513, 0, 3, 8, 0, 0, 40, 41, *[0] * 6).ljust(112, b"\0")
    entry = decoder.request(indirect)
    assert str(entry) == "indirect-write id 3 sector 8 segments 513 of (40 41)"
    assert entry.grefs == (40, 41)


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        (blkif_request(9, 1, 0, (1, 0, 7)), "no operation 9"),
        (blkif_request(0, 1, 0), "no segments"),
        (blkif_request(0, 1, 0, (1, 5, 2)), "segment 0 has sectors 5 to 2"),
        (b"\1\14" + bytes(110), "12 segments, of 11"),
        (struct.pack("<BBH", 6, 3, 1).ljust(112, b"\0"), "an indirect flush"),
        (b"\0\0\0", "only 3 of 112 bytes"),
    ],
)
def test_blkif_says_what_is_wrong(message: bytes, wrong: str) -> None:
    entry = decoder_for("vbd").request(message)
    assert wrong in entry.wrong
    assert f"[{wrong}]" in str(entry)


def test_netif_packet_with_extra_information_and_more_data() -> None:
    decoder = decoder_for("netif-tx")
    entries = [
        decoder.request(struct.pack("<IHHHH", 5, 0, 4 | 8, 1, 5000)),
        decoder.request(struct.pack("<BBHBxH", 1, 1, 1448, 1, 0).ljust(12, b"\0")),
        decoder.request(struct.pack("<BB", 4, 0) + struct.pack("<BBI", 2, 1, 0xABCD)),
        decoder.request(struct.pack("<IHHHH", 6, 0, 0, 2, 904)),
        decoder.request(struct.pack("<IHHHH", 7, 0, 0, 3, 60)),
    ]
    assert [str(entry) for entry in entries] == [
        "packet id 1 size 5000 gref 5 offset 0 flags (more_data extra_info)",
        "extra-gso size 1448 protocol tcpv4",
        "extra-hash protocol 2 algorithm 1 value 0x0000abcd",
        "more id 2 size 904 gref 6 offset 0",
        "packet id 3 size 60 gref 7 offset 0",
    ]
    assert str(decoder.response(struct.pack("<Hh", 2, 1))) == "sent id 2 status 1 is null"


def test_netif_says_what_is_wrong() -> None:
    tx = decoder_for("netif-tx")
    assert "5 bytes at 4094 cross the page" in tx.request(struct.pack("<IHHHH", 5, 4094, 0, 1, 5)).wrong
    assert "a packet of 13 bytes" in tx.request(struct.pack("<IHHHH", 5, 0, 0, 1, 13)).wrong
    assert "no flags 0x40" in tx.request(struct.pack("<IHHHH", 5, 0, 0x48, 1, 60)).wrong
    assert tx.request(bytes([9, 0]) + bytes(10)).wrong == ("no extra information 9",)
    rx = decoder_for("netif-rx")
    assert str(rx.request(struct.pack("<HHI", 3, 0, 77))) == "buffer id 3 gref 77"
    assert rx.response(struct.pack("<HHHh", 3, 4000, 16, 100)).wrong == ("100 bytes at 4000 cross the page",)
    assert rx.response(struct.pack("<HHHh", 3, 0, 0, -9)).wrong == ("no status -9",)


def test_control_messages_of_network_devices() -> None:
    decoder = decoder_for("netif-ctrl")

    def request(kind: int, *data: int) -> str:
        return str(decoder.request(struct.pack("<HH3I", 7, kind, *data)))

    assert request(1, 0, 0, 0) == "get-hash-flags id 7"
    assert request(2, 3, 0, 0) == "set-hash-flags id 7 flags (ipv4 ipv4_tcp)"
    assert request(3, 20, 40, 0) == "set-hash-key id 7 gref 20 bytes 40"
    assert request(6, 20, 128, 64) == "set-hash-mapping id 7 gref 20 entries 128 from 64"
    assert request(7, 1, 0, 0) == "set-hash-algorithm id 7 algorithm toeplitz"
    assert request(9, 2, 20, 512) == "add-gref-mapping id 7 queue 2 gref 20 entries 512"
    assert decoder.request(struct.pack("<HH3I", 7, 10, 2, 20, 5)).grefs == (20,)
    assert decoder.request(struct.pack("<HH3I", 7, 11, 2, 20, 5)).wrong == ("no type 11",)
    assert decoder.request(struct.pack("<HH3I", 7, 7, 2, 0, 0)).wrong == ("no algorithm 2",)
    assert decoder.request(struct.pack("<HH3I", 7, 2, 16, 0, 0)).wrong == ("no flags 0x10",)
    answer = decoder.response(struct.pack("<HHII", 7, 8, 0, 512))
    assert str(answer) == "get-gref-mapping-size id 7 status 0 is success data 512"
    assert decoder.response(struct.pack("<HHII", 7, 0, 4, 0)).wrong == ("no type 0", "no status 4")


def test_declared_messages_by_their_names() -> None:
    decoder = decoder_for("vecho", MessagePair.of(ECHO))
    request = np.zeros(1, ECHO.request)
    request["id"], request["operation"], request["value"], request["gref"][0, :2] = 5, 1, 300, (8, 9)
    entry = decoder.request(request.tobytes())
    assert str(entry) == "request id 5 operation 1 value 300 gref (8 9)"
    assert entry.grefs == (8, 9)
    response = np.zeros(1, ECHO.response)
    response["id"], response["status"] = 5, -28
    assert str(decoder.response(response.tobytes())) == "response id 5 status -28 is ENOSPC value 0"
    request["gref"] = [[0, 4, 0, 0]]
    assert decoder.request(request.tobytes()).wrong == ("a gap between its grant references",)


def test_what_a_peer_wrote_moves_no_cursor() -> None:
    request = np.zeros(1, ODD.request)
    request["s"] = b"\x1b[2Jx"
    entry = decoder_for("vodd", MessagePair.of(ODD)).request(request.tobytes())
    assert "s \\x1b[2Jx" in str(entry)


def test_unknown_messages_as_numbers() -> None:
    decoder = decoder_for("vnothing")
    assert str(decoder.request(b"\1\2\3\4\5" + bytes(11))) == "request bytes 01020304 05 and 11 zeros"
    assert hexadecimal(b"") == ""
    assert hexadecimal(bytes(8)) == "00 and 7 zeros"
    assert hexadecimal(bytes(range(40))).endswith("1c1d1e1f and 8 more")


ODD = DeviceProtocol(
    "vodd",
    request=np.dtype([("b", "?"), ("f", "<f8"), ("s", "S5"), ("v", "V3"), ("n", [("a", "u1"), ("c", "<c8")], (2,))]),
    response=np.dtype([("f", "<f2", (3,)), ("many", "u1", (200,))]),
)


@given(
    st.sampled_from(["vbd", "netif-tx", "netif-rx", "netif-ctrl", "vecho", "vodd", "hex"]),
    st.lists(st.binary(max_size=300), max_size=6),
)
def test_junk_is_shown(protocol: str, messages: list[bytes]) -> None:
    layouts = {"vecho": MessagePair.of(ECHO), "vodd": MessagePair.of(ODD)}
    decoder = decoder_for(protocol, layouts.get(protocol))
    for message in messages:
        for entry in (decoder.request(message), decoder.response(message)):
            assert str(entry).isprintable()
            json.dumps(entry.to_json(), allow_nan=False)


@pytest.mark.parametrize("message", [blkif.REQUEST, blkif.RESPONSE, ECHO.request, ODD.request, ODD.response])
def test_layouts_survive_json(message: "np.dtype[np.void]") -> None:
    assert parse(json.loads(json.dumps(describe(message)))) == message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["<u4", "|O", "<u99999", "|b1"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["bytes", "fields", "request", "response", "pages"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=50, deadline=None)
@given(JSON)
def test_a_layout_from_anywhere_is_one_or_refused(value: object) -> None:
    try:
        assert MessagePair.from_json(value).request.itemsize > 0
    except InvalidRequest:
        pass


@pytest.mark.parametrize(
    "described",
    [
        {"bytes": 8, "fields": [["a", 0, "|O"]]},
        {"bytes": 8, "fields": [["a", 6, "<u4"]]},
        {"bytes": 8, "fields": [["a", 0, "<u4"], ["a", 4, "<u4"]]},
        {"bytes": 8, "fields": [["a", 0, "<u4", [65536, 65536, 65536, 65536]]]},
        {"bytes": 8, "fields": [["a", 0, "<u3"]]},
        {"bytes": True, "fields": [["a", 0, "u1"]]},
        {"bytes": 8, "fields": [["", 0, "|u1"]]},
        {"bytes": 8, "fields": []},
    ],
)
def test_layouts_that_are_none(described: object) -> None:
    with pytest.raises(InvalidRequest):
        parse(described)


def test_a_deep_layout_is_refused() -> None:
    described: object = "|u1"
    for _ in range(50):
        described = {"bytes": 1, "fields": [["a", 0, described]]}
    with pytest.raises(InvalidRequest, match="too deep"):
        parse(described)
