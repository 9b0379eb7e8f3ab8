# SPDX-License-Identifier: MIT
"""Capture files as other programs write them, read; and files that are damaged in any way."""

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravirt.errors import InvalidRequest
from paravirt.protocol import pcap, pcapng
from paravirt.protocol.pcap import Recorded, read_frames
from paravirt.protocol.pcapng import DamagedFile, TornFile

FRAME = bytes(range(20))
OTHER = bytes(range(100, 161))


def read(content: bytes) -> list[tuple[int, bytes]]:
    return [(each.time_ns, each.data) for each in read_frames(io.BytesIO(content))]


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(f"{order}I", 12 + len(body))
    return struct.pack(f"{order}I", kind) + length + body + length


def section(order: str) -> bytes:
    return block(order, pcapng.SECTION, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(order: str, *, link: int = 1, snaplen: int = 0, options: bytes = b"") -> bytes:
    return block(order, pcapng.INTERFACE, struct.pack(f"{order}HHI", link, 0, snaplen) + options)


def option(order: str, code: int, value: bytes) -> bytes:
    return struct.pack(f"{order}HH", code, len(value)) + value + bytes(-len(value) % 4)


def packet(order: str, time: int, data: bytes, *, number: int = 0) -> bytes:
    head = struct.pack(f"{order}IIIII", number, time >> 32, time & 0xFFFFFFFF, len(data), len(data))
    return block(order, pcapng.PACKET, head + data)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("magic", "unit"), [(0xA1B2C3D4, 1000), (0xA1B23C4D, 1)], ids=["us", "ns"])
def test_pcap_of_either_byte_order_and_resolution(order: str, magic: int, unit: int) -> None:
    content = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 65535, 1)
    content += struct.pack(f"{order}IIII", 7, 5, 20, 90) + FRAME + struct.pack(f"{order}IIII", 8, 0, 61, 61) + OTHER
    assert read(content) == [(7_000_000_000 + 5 * unit, FRAME), (8_000_000_000, OTHER)]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("resolution", "time", "time_ns"),
    [(None, 1_000_001, 1_000_001_000), (9, 1_000_001, 1_000_001), (3, 1500, 1_500_000_000), (0x81, 3, 1_500_000_000)],
)
def test_pcapng_of_either_byte_order_and_any_resolution(
    order: str, resolution: int | None, time: int, time_ns: int
) -> None:
    options = b"" if resolution is None else option(order, 9, bytes([resolution]))
    content = section(order) + interface(order, options=options + option(order, 14, struct.pack(f"{order}q", 10)))
    assert read(content + packet(order, time, FRAME)) == [(time_ns + 10_000_000_000, FRAME)]


def test_pcapng_of_two_sections_interfaces_and_blocks_of_other_kinds() -> None:
    simple = block("<", 3, struct.pack("<I", 61) + OTHER[:40])
    old = block(">", 2, struct.pack(">HHIIII", 1, 0, 0, 4, 20, 20) + FRAME)
    content = section("<") + interface("<", snaplen=40) + block("<", 0x0BAD, b"what") + simple
    content += section(">") + interface(">") + interface(">") + old + packet(">", 8, OTHER, number=1)
    assert read(content) == [(0, OTHER[:40]), (4000, FRAME), (8000, OTHER)]


def test_our_own_files_are_read() -> None:
    start = pcapng.section({}) + pcapng.interface("vif1.0", "", link=pcap.ETHERNET, snaplen=100)
    assert read(start + pcapng.packet(0, 12345, FRAME, 1) + pcapng.statistics(0, 5, received=1, dropped=0)) == [
        (12345, FRAME)
    ]
    assert read(pcap.pcap_header(9)) == []


@pytest.mark.parametrize(
    ("content", "error", "reason"),
    [
        (b"", TornFile, "empty"),
        (b"\x0a", TornFile, "first word"),
        (bytes(100), DamagedFile, "neither a pcap nor a pcapng"),
        (pcap.pcap_header(0)[:10], TornFile, "in the middle"),
        (pcap.pcap_header(0)[:4] + b"\x07\0" + pcap.pcap_header(0)[6:], DamagedFile, "version 7 of pcap"),
        (
            pcap.pcap_header(0) + struct.pack("<IIII", 0, 0, 70000, 0) + bytes(70000),
            DamagedFile,
            "a frame of 70000 bytes",
        ),
        (pcap.pcap_header(0) + struct.pack("<IIII", 0, 0, 20, 0) + bytes(19), TornFile, "in the middle"),
        (section("<")[:8] + bytes(20), DamagedFile, "no byte order"),
        (section("<")[:12] + b"\x02\0" + section("<")[14:], DamagedFile, "version 2 of pcapng"),
        (section("<") + interface("<", link=147), DamagedFile, "link type 147"),
        (section("<") + packet("<", 0, FRAME), DamagedFile, "interface 0, of which nothing"),
        (section("<") + interface("<") + packet("<", 0, FRAME)[:-1], TornFile, "in the middle"),
        (section("<") + interface("<") + packet("<", 0, FRAME)[:-4] + bytes(4), DamagedFile, "different lengths"),
        (section("<") + struct.pack("<II", 6, 13), DamagedFile, "a block of 13 bytes"),
        (section("<") + struct.pack("<II", 6, 0xFFFFFFFC), DamagedFile, "a block of 4294967292 bytes"),
        (section("<") + struct.pack("<II", 6, 8), DamagedFile, "a block of 8 bytes"),
        (section("<") + b"\x01\0", TornFile, "in the middle"),
        (section("<") + block("<", 1, b""), DamagedFile, "too short"),
        (section("<") + interface("<") + block("<", 6, bytes(8)), DamagedFile, "too short"),
        (
            section("<") + interface("<") + block("<", 6, struct.pack("<5I", 0, 0, 0, 99, 99)),
            DamagedFile,
            "longer than its",
        ),
        (section("<") + interface("<", options=struct.pack("<HH", 2, 99)), DamagedFile, "an option is longer"),
        (block("<", pcapng.SECTION, struct.pack("<I", 0x1A2B3C4D)), DamagedFile, "too short"),
    ],
)
def test_what_is_damaged_is_said(content: bytes, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        read(content)
    with pytest.raises(InvalidRequest, match=f"^x: at byte .*{reason}"):
        pcap.require(io.BytesIO(content), "x")


WHOLE = (
    section("<") + interface("<", options=option("<", 9, b"\x09")) + packet("<", 5, FRAME) + packet("<", 6, OTHER),
    pcap.pcap_header(0) + struct.pack("<IIII", 0, 0, 20, 20) + FRAME + struct.pack("<IIII", 1, 1, 61, 61) + OTHER,
)


def frames_or_damage(content: bytes) -> list[Recorded]:
    """Nothing of a file that is said to be damaged, at a place within it."""
    offset = 0
    try:
        return list(read_frames(io.BytesIO(content)))
    except DamagedFile as error:
        offset = error.offset
    assert 0 <= offset <= len(content)
    return []


@given(st.sampled_from(WHOLE), st.data())
def test_any_change_of_a_file_is_read_or_refused(whole: bytes, data: st.DataObject) -> None:
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(changed[: data.draw(st.integers(0, len(changed)))]) + data.draw(st.binary(max_size=40))
    for each in frames_or_damage(content):
        assert 14 <= len(each.data) <= 65535


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for start in (b"", pcap.pcap_header(0), section("<") + interface("<"), section(">") + interface(">")):
        frames_or_damage(start + content)
