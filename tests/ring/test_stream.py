# SPDX-License-Identifier: MIT
"""Byte streams: the pages of xenstore and of the console."""

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.ring.event import from_half, make_pair
from paravirt.ring.memory import map_new
from paravirt.ring.stream import CONSOLE_BACK, CONSOLE_FRONT, XENSTORE_BACK, XENSTORE_FRONT, ByteStream, StreamLayout

Page = memoryview


@pytest.fixture
def page() -> Iterator[Page]:
    fd, mapping = map_new("memfd", 4096)
    os.close(fd)
    with mapping:
        yield mapping.view


def set_word(page: Page, offset: int, value: int) -> None:
    page[offset : offset + 4] = (value % 2**32).to_bytes(4, "little")


def test_golden_bytes_of_a_xenstore_page(page: Page) -> None:
    with ByteStream(page, XENSTORE_FRONT) as front, ByteStream(page, XENSTORE_BACK) as back:
        assert front.write_nowait(b"request") == 7
        assert bytes(page[:8]) == b"request\0"
        assert bytes(page[2048:2064]) == bytes.fromhex("00000000 07000000 00000000 00000000")
        assert back.read_nowait(4) == b"requ"
        assert bytes(page[2048:2064]) == bytes.fromhex("04000000 07000000 00000000 00000000")
        assert back.write_nowait(b"answer") == 6
        assert bytes(page[1024:1031]) == b"answer\0"
        assert front.read_nowait() == b"answer"
        assert bytes(page[2048:2064]) == bytes.fromhex("04000000 07000000 06000000 06000000")


def test_golden_bytes_of_a_console_page(page: Page) -> None:
    with ByteStream(page, CONSOLE_FRONT) as front, ByteStream(page, CONSOLE_BACK) as back:
        assert back.write_nowait(b"ls\n") == 3
        assert front.write_nowait(b"bin etc") == 7
        assert bytes(page[:4]) == b"ls\n\0"
        assert bytes(page[1024:1032]) == b"bin etc\0"
        assert front.read_nowait() == b"ls\n"
        assert bytes(page[3072:3088]) == bytes.fromhex("03000000 03000000 00000000 07000000")
        assert back.read_nowait() == b"bin etc"
        assert bytes(page[3072:3088]) == bytes.fromhex("03000000 03000000 07000000 07000000")


@pytest.mark.parametrize("start", [0, 2**32 - 700])
@pytest.mark.parametrize("ends", [(XENSTORE_FRONT, XENSTORE_BACK), (CONSOLE_FRONT, CONSOLE_BACK)])
def test_full_empty_and_wrap(page: Page, ends: tuple[StreamLayout, StreamLayout], start: int) -> None:
    for offset in (*ends[0][2:4], *ends[0][6:8]):
        set_word(page, offset, start)
    size = ends[0].out_bytes
    choose = random.Random(3)
    text = choose.randbytes(5 * size)
    with ByteStream(page, ends[0]) as front, ByteStream(page, ends[1]) as back:
        assert front.write_nowait(text) == size
        assert front.write_nowait(b"more") == 0
        assert front.writable_bytes == 0
        assert back.readable_bytes == size
        sent, got = size, b""
        while len(got) < len(text):
            got += back.read_nowait(choose.randrange(1, 500))
            sent += front.write_nowait(text[sent : sent + choose.randrange(500)])
        assert got == text
        assert back.read_nowait() == b""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1500)), max_size=40), st.integers(0, 2**32 - 1))
def test_against_a_queue(steps: list[tuple[bool, int]], start: int) -> None:
    memory = bytearray(4096)
    for offset in (2048, 2052):
        set_word(memoryview(memory), offset, start)
    queue, written = b"", 0
    with ByteStream(memory, XENSTORE_FRONT) as front, ByteStream(memory, XENSTORE_BACK) as back:
        for write, count in steps:
            if write:
                data = bytes((written + i) % 251 for i in range(count))
                moved = front.write_nowait(data)
                assert moved == min(count, 1024 - len(queue))
                queue, written = queue + data[:moved], written + moved
            else:
                assert back.read_nowait(count) == queue[:count]
                queue = queue[count:]
            assert back.readable_bytes == len(queue)
        assert front.statistics().bytes_written == written
        assert back.statistics().bytes_read == written - len(queue)


def calls_of(end: ByteStream) -> list[Any]:
    return [end.read_nowait, lambda: end.write_nowait(b"x"), lambda: end.readable_bytes, lambda: end.writable_bytes]


@pytest.mark.parametrize(("offset", "value"), [(2048, 1), (2048, -1025), (2060, 1025), (2060, -1), (2060, 2**31)])
def test_indexes_that_cannot_be(page: Page, offset: int, value: int) -> None:
    """The consumer of what we write passes our producer or falls behind; the producer of what we read does."""
    with ByteStream(page, XENSTORE_FRONT) as front:
        set_word(page, offset, value)
        with pytest.raises(PeerError, match="index"):
            _ = (front.readable_bytes, front.writable_bytes)
        set_word(page, offset, 0)
        for call in calls_of(front):
            with pytest.raises(PeerError, match="dead"):
                call()
        assert "dead" in repr(front)
    set_word(page, offset, value)
    with pytest.raises(PeerError):
        ByteStream(page, XENSTORE_FRONT)


def test_a_stream_is_joined_where_it_stands(page: Page) -> None:
    with ByteStream(page, XENSTORE_FRONT) as front, ByteStream(page, XENSTORE_BACK) as back:
        front.write_nowait(b"first second")
        back.read_nowait(6)
    with ByteStream(page, XENSTORE_FRONT) as front, ByteStream(page, XENSTORE_BACK) as back:
        front.write_nowait(b" third")
        assert back.read_nowait() == b"second third"


def test_every_move_notifies(page: Page) -> None:
    first, second = make_pair()
    (front_waiter, front_port), (back_waiter, back_port) = from_half(first), from_half(second)
    with front_waiter, back_waiter:
        with ByteStream(page, XENSTORE_FRONT, port=front_port) as front:
            with ByteStream(page, XENSTORE_BACK, port=back_port) as back:
                front.write_nowait(b"abc")
                assert back_port.take_pending()
                back.read_nowait(1)
                assert front_port.take_pending()
                back.read_nowait(0)
                front.write_nowait(b"")
                assert not front_port.take_pending()
                assert not back_port.take_pending()
                statistics = front.statistics(), back.statistics()
                assert [(s.writes, s.reads) for s in statistics] == [(1, 0), (0, 1)]


@pytest.mark.parametrize(
    "layout",
    [
        XENSTORE_FRONT._replace(out_bytes=1000),
        XENSTORE_FRONT._replace(in_bytes=0),
        XENSTORE_FRONT._replace(out=3500),
        XENSTORE_FRONT._replace(in_prod=4096),
        XENSTORE_FRONT._replace(out_cons=2049),
        XENSTORE_FRONT._replace(in_=2**32 - 1),
    ],
)
def test_layouts_that_do_not_fit(page: Page, layout: StreamLayout) -> None:
    with pytest.raises(InvalidRequest, match="does not fit"):
        ByteStream(page, layout)


def test_use_after_close(page: Page) -> None:
    end = ByteStream(page, XENSTORE_FRONT)
    end.close()
    end.close()
    assert end.closed
    for call in [*calls_of(end), end.statistics]:
        with pytest.raises(Closed):
            call()
    assert "closed" in repr(end)
