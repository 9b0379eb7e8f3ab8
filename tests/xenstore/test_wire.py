# SPDX-License-Identifier: MIT
"""Packets as bytes: golden ones, torn ones, impossible ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravirt.xenstore.wire import (
    ACK,
    HEADER_BYTES,
    PAYLOAD_MAX_BYTES,
    Errno,
    Op,
    PacketParser,
    encode,
    number,
    single,
    strings,
)

GOLDEN = [
    ((Op.READ, 1, 0, b"/a\0"), "02000000 01000000 00000000 03000000 2f6100"),
    ((Op.WRITE, 0x01020304, 7, b"/a\0v"), "0b000000 04030201 07000000 04000000 2f610076"),
    ((Op.ERROR, 9, 0, Errno.ENOENT.value), "10000000 09000000 00000000 07000000 454e4f454e5400"),
    ((Op.WATCH_EVENT, 0, 0, b"/a\0t\0"), "0f000000 00000000 00000000 05000000 2f61007400"),
    ((Op.SET_QUOTA, 0xFFFFFFFF, 0xFFFFFFFF, b""), "1a000000 ffffffff ffffffff 00000000"),
    ((Op.TRANSACTION_END, 2, 3, ACK), "07000000 02000000 03000000 03000000 4f4b00"),
]


@pytest.mark.parametrize(("packet", "golden"), GOLDEN)
def test_golden_bytes(packet: tuple[int, int, int, bytes], golden: str) -> None:
    data = bytes.fromhex(golden)
    assert encode(*packet) == data
    parser = PacketParser()
    assert parser.feed(data) == [packet]
    assert parser.missing_bytes == HEADER_BYTES


def test_operations_have_xens_numbers() -> None:
    assert [op.value for op in Op] == list(range(27))
    assert (Op.CONTROL, Op.WATCH_EVENT, Op.ERROR, Op.RESET_WATCHES, Op.SET_QUOTA) == (0, 15, 16, 21, 26)


def test_a_packet_may_come_byte_by_byte() -> None:
    parser = PacketParser()
    data = encode(Op.WRITE, 1, 2, b"/key\0value")
    for i in range(len(data) - 1):
        assert parser.missing_bytes == (HEADER_BYTES - i if i < HEADER_BYTES else len(data) - i)
        assert parser.feed(data[i : i + 1]) == []
    assert parser.feed(data[-1:]) == [(Op.WRITE, 1, 2, b"/key\0value")]


@pytest.mark.parametrize("length", [4097, 1 << 16, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_length_over_the_limit_ends_the_stream_but_not_what_was_before(length: int) -> None:
    parser = PacketParser()
    bad = encode(Op.READ, 1, 0, b"")[:12] + length.to_bytes(4, "little")
    assert parser.feed(encode(Op.READ, 7, 0, b"/\0") + bad + b"x" * 100) == [(Op.READ, 7, 0, b"/\0")]
    assert parser.broken is not None
    assert str(length) in parser.broken
    assert parser.feed(encode(Op.READ, 8, 0, b"/\0")) == []
    parser.reset()
    assert parser.feed(encode(Op.READ, 8, 0, b"/\0")) == [(Op.READ, 8, 0, b"/\0")]


def test_the_longest_payload_is_4096_bytes() -> None:
    parser = PacketParser()
    payload = b"x" * PAYLOAD_MAX_BYTES
    assert parser.feed(encode(Op.WRITE, 1, 0, payload)) == [(Op.WRITE, 1, 0, payload)]


packets = st.tuples(
    st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(max_size=50)
)


@given(st.lists(packets, max_size=8), st.data())
def test_any_tearing_gives_the_same_packets(sent: list[tuple[int, int, int, bytes]], data: st.DataObject) -> None:
    stream = b"".join(encode(*packet) for packet in sent)
    parser, got = PacketParser(), []
    while stream:
        n_bytes = data.draw(st.integers(1, len(stream)))
        got += parser.feed(stream[:n_bytes])
        stream = stream[n_bytes:]
    assert got == sent


@given(st.binary(max_size=200))
def test_any_bytes_are_packets_or_a_reason(junk: bytes) -> None:
    parser = PacketParser()
    for _, _, _, payload in parser.feed(junk):
        assert len(payload) <= PAYLOAD_MAX_BYTES


@pytest.mark.parametrize(
    ("payload", "expected"),
    [(b"/a\0", b"/a"), (b"\0", b""), (b"", None), (b"/a", None), (b"/a\0b\0", None), (b"/a\0\0", None)],
)
def test_one_string(payload: bytes, expected: bytes | None) -> None:
    assert single(payload) == expected


@pytest.mark.parametrize(
    ("payload", "expected"), [(b"", []), (b"a", []), (b"a\0", [b"a"]), (b"a\0b", [b"a"]), (b"\0\0", [b"", b""])]
)
def test_strings(payload: bytes, expected: list[bytes]) -> None:
    assert strings(payload) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [(b"12", 12), (b"-3", -3), (b"+4", 4), (b" 5x", 5), (b"", 0), (b"-", 0), (b"x", 0), (b"9" * 30, 0), (b"\t7", 7)],
)
def test_numbers_are_read_as_c_reads_them(text: bytes, value: int) -> None:
    assert number(text) == value
