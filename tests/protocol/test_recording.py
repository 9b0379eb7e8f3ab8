# SPDX-License-Identifier: MIT
"""Recordings: what is written is read, in capture files as others know them, and damage is named with its place."""

import io
import shutil
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.errors import InvalidRequest
from paravirt.protocol import pcapng
from paravirt.protocol.layout import MessagePair
from paravirt.protocol.pcapng import DamagedFile, TornFile
from paravirt.protocol.recording import Header, Kind, Reader, Record, Writer
from tests.echo_device import ECHO

START_NS = 1_700_000_000_000_000_000
HEADER = Header("vbd/1/51712", "vbd", 1, "back", 32, 112, 112, 16, START_NS, "here")
RECORDS = [
    Record(START_NS + 5, Kind.REQUEST, 2**32 - 1, b"\1" * 112),
    Record(START_NS + 9, Kind.RESPONSE, 2**32 - 1, b"\2" * 16),
    Record(START_NS + 12, Kind.REQUEST, 0, b"\3" * 111, lost=4),
]


def written(header: Header = HEADER, records: list[Record] = RECORDS, *, end: bool = True) -> bytes:
    file = io.BytesIO()
    writer = Writer(file, header)
    for record in records:
        if record.lost:
            writer.note_lost(record.lost)
        writer.write(record.time_ns, record.kind, record.index, record.message)
    if end:
        writer.finish()
    return file.getvalue()


def test_what_is_written_is_read() -> None:
    reader = Reader(io.BytesIO(written()))
    assert reader.header == HEADER
    assert list(reader) == RECORDS
    assert (reader.torn, reader.lost) == (None, 4)


def test_the_layout_of_declared_messages_is_in_the_file() -> None:
    header = replace(HEADER, protocol="vecho", messages=MessagePair.of(ECHO))
    assert Reader(io.BytesIO(written(header))).header == header


def test_a_file_that_was_not_ended_says_so() -> None:
    reader = Reader(io.BytesIO(written(end=False)))
    assert list(reader) == RECORDS
    assert reader.torn is not None
    assert "not ended" in reader.torn


def test_a_torn_tail_is_read_up_to_the_tear() -> None:
    whole, two = written(), written(records=RECORDS[:2], end=False)
    for cut in range(len(two) + 1, len(written(end=False))):
        reader = Reader(io.BytesIO(whole[:cut]))
        assert list(reader) == RECORDS[:2]
        assert reader.torn is not None
        assert f"at byte {len(two)}:" in reader.torn


def test_a_tear_in_the_head_is_an_error_with_its_place() -> None:
    head = written(records=[], end=False)
    for cut in range(len(head)):
        with pytest.raises(DamagedFile, match=r"at byte [0-9]+: "):
            Reader(io.BytesIO(head[:cut]))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_are_found_or_harmless(data: st.DataObject) -> None:
    """Whatever is flipped: an error that names the place, or a record whose message is as it was."""
    whole = bytearray(written())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    found, error = read(bytes(whole))
    assert all(any(record.message == known.message for known in RECORDS) for record in found)
    if error is not None:
        assert str(error).startswith(f"at byte {error.offset}: ")
        assert error.offset <= at


def read(content: bytes) -> tuple[list[Record], DamagedFile | None]:
    try:
        return list(Reader(io.BytesIO(content))), None
    except DamagedFile as error:
        return [], error


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_junk_is_no_recording(junk: bytes, after_a_section: bool) -> None:
    if after_a_section:
        junk = pcapng.section({}) + junk
    with pytest.raises(DamagedFile):
        Reader(io.BytesIO(junk))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"domid": -1}, "domid"),
        ({"end": "middle"}, "end"),
        ({"request_bytes": 0}, "request_bytes"),
        ({"device": 5}, "device"),
        ({"messages": {"request": 1}}, "layout"),
    ],
)
def test_a_wrong_description_of_the_ring_is_named(change: dict[str, object], what: str) -> None:
    with pytest.raises(InvalidRequest, match=what):
        Header.from_json({**HEADER.to_json(), **change})


def test_a_later_version_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="version 2 of a recording"):
        Header.from_comment(HEADER.comment.replace("paravirt-ring 1 ", "paravirt-ring 2 "))


def test_the_description_has_a_check_sum() -> None:
    with pytest.raises(InvalidRequest, match="check sum"):
        Header.from_comment(HEADER.comment.replace("51712", "51713"))


def test_another_capture_is_told_apart() -> None:
    other = pcapng.section({}) + pcapng.interface("eth0", "a network")
    with pytest.raises(DamagedFile, match="not a recording"):
        Reader(io.BytesIO(other))
    ethernet = pcapng.section({}) + pcapng.block(pcapng.INTERFACE, struct.pack("<HHI", 1, 0, 0))
    with pytest.raises(DamagedFile, match="link type 1"):
        Reader(io.BytesIO(ethernet))


def test_blocks_and_options_that_are_not_known_are_passed_over() -> None:
    whole, head = written(), written(records=[], end=False)
    with_more = whole[: len(head)] + pcapng.block(0x0BAD, b"abcd") + whole[len(head) :]
    assert list(Reader(io.BytesIO(with_more))) == RECORDS


def test_a_block_without_end_is_refused_before_it_is_read() -> None:
    huge = written(records=[], end=False) + struct.pack("<II", pcapng.PACKET, 1 << 30)
    reader = Reader(io.BytesIO(huge))
    with pytest.raises(DamagedFile, match="a block of 1073741824 bytes") as caught:
        list(reader)
    assert not isinstance(caught.value, TornFile)


@pytest.mark.skipif(shutil.which("capinfos") is None, reason="capinfos, of wireshark-common, is not installed")
def test_other_programs_open_it(tmp_path: Path) -> None:
    file = tmp_path / "ring.pcapng"
    file.write_bytes(written())
    told = subprocess.run(["capinfos", "-M", "-c", "-E", str(file)], capture_output=True, text=True, check=True).stdout
    assert "Number of packets:   3" in told
    assert "user0" in told.lower()
