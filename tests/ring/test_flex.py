# SPDX-License-Identifier: MIT
"""Flex rings: golden bytes, a model, a lying peer, a C program built with Xen's own macros at the other end."""

import itertools
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.ring.event import EventPort, EventWaiter, Half, WaitResult, from_half, make_pair
from paravirt.ring.flex import MAX_ORDER, FlexRing, flex_bytes, look
from paravirt.ring.memory import Mapping, create_object

from .support import C_CORE, DEADLINE_S, EVENT_SOURCES, HERE, NEAR_WRAP, ROOT, compile_c, need_xen_header, output_of

IN_CONS, IN_PROD, IN_ERROR, OUT_CONS, OUT_PROD, OUT_ERROR, ORDER, REF = 0, 4, 8, 64, 68, 72, 128, 132
COUNT = 2**32


def word(page: bytearray, offset: int) -> int:
    return int.from_bytes(page[offset : offset + 4], "little")


def set_word(page: bytearray, offset: int, value: int) -> None:
    page[offset : offset + 4] = (value % COUNT).to_bytes(4, "little")


@contextmanager
def flex_pair(order: int = 0, *, start: int = 0) -> Iterator[tuple[FlexRing, FlexRing, bytearray, bytearray]]:
    indexes, data = bytearray(4096), bytearray(4096 << order)
    with FlexRing.create(indexes, data, start=start) as front, FlexRing.attach(indexes, data) as back:
        yield front, back, indexes, data


@pytest.mark.parametrize("order", range(MAX_ORDER + 1))
def test_sizes(order: int) -> None:
    assert flex_bytes(order) == 2048 << order
    with flex_pair(order) as (front, back, _, _):
        assert front.size_bytes == back.size_bytes == front.available_bytes == 2048 << order
        packet = random.Random(order).randbytes(front.size_bytes)
        assert front.write_packet(packet)
        assert not front.write_packet(b"x")
        assert (front.available_bytes, back.queued_bytes) == (0, front.size_bytes)
        assert back.read_packet(len(packet)) == packet


def test_golden_bytes() -> None:
    indexes, data = bytearray(b"\xee" * 4096), bytearray(8192)
    front = FlexRing.create(indexes, data, refs=[9, 70000], start=NEAR_WRAP)
    back = FlexRing.attach(indexes, data)
    assert (word(indexes, ORDER), word(indexes, REF), word(indexes, REF + 4)) == (1, 9, 70000)
    assert look(indexes) == [9, 70000]
    front.write_packet(b"to the back")
    back.write_packet(b"to the front, more")
    place = NEAR_WRAP % 4096
    assert data[4096 + place : 4096 + place + 11] == b"to the back", "out is the second half"
    assert data[place : place + 18] == b"to the front, more"
    assert front.read_packet(7) == b"to the "
    names = (IN_CONS, IN_PROD, OUT_CONS, OUT_PROD)
    assert [word(indexes, name) - NEAR_WRAP for name in names] == [7, 18, 0, 11]
    assert back.peek(2) == b"to"
    assert word(indexes, OUT_CONS) == NEAR_WRAP
    statistics = front.statistics()
    assert (statistics.bytes_written, statistics.bytes_read) == (11, 7)


def test_a_packet_is_whole_or_nothing() -> None:
    with flex_pair() as (front, back, indexes, _):
        front.write_packet(b"12345")
        assert back.read_packet(6) is None
        assert back.peek(6) is None
        assert word(indexes, OUT_CONS) == 0
        assert back.read_packet(0) == b""
        assert back.read_packet(5) == b"12345"
        assert front.write_packet(bytes(2040))
        assert not front.write_packet(bytes(9))
        assert front.available_bytes == 8
        for n in (2049, -1):
            with pytest.raises(InvalidRequest, match="packet"):
                back.read_packet(n)
        with pytest.raises(InvalidRequest, match="packet"):
            front.write_packet(bytes(2049))


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(COUNT - 3000, COUNT - 1) | st.just(0),
    steps=st.lists(
        st.tuples(st.sampled_from(["out", "in"]), st.sampled_from(["write", "read", "peek"]), st.integers(0, 2100)),
        max_size=60,
    ),
)
def test_against_a_model(start: int, steps: list[tuple[str, str, int]]) -> None:
    """Any order of packets in both directions, over the wrap of the ring and of the indexes."""
    bytes_ = itertools.cycle(range(251))
    with flex_pair(start=start) as (front, back, indexes, _):
        queues = {"out": b"", "in": b""}
        moved = {name: [start, start] for name in queues}
        for direction, what, n in steps:
            writer, reader = (front, back) if direction == "out" else (back, front)
            queue = queues[direction]
            n = min(n, 2048)
            if what == "write":
                packet = bytes(itertools.islice(bytes_, n))
                fits = n <= 2048 - len(queue)
                assert writer.write_packet(packet) == fits
                queues[direction] += packet if fits else b""
                moved[direction][0] += n if fits else 0
            else:
                wanted = queue[:n] if n <= len(queue) else None
                assert getattr(reader, "peek" if what == "peek" else "read_packet")(n) == wanted
                if what == "read" and wanted is not None:
                    queues[direction] = queue[n:]
                    moved[direction][1] += n
            assert writer.available_bytes == 2048 - len(queues[direction])
            assert reader.queued_bytes == len(queues[direction])
        names = (OUT_PROD, OUT_CONS, IN_PROD, IN_CONS)
        assert [word(indexes, name) for name in names] == [n % COUNT for n in moved["out"] + moved["in"]]


@pytest.mark.parametrize("too_far", [2049, 5000, 2**31, COUNT - 1])
@pytest.mark.parametrize("name", [OUT_PROD, IN_CONS])
def test_an_index_out_of_range_kills_the_ring(name: int, too_far: int) -> None:
    with flex_pair(start=NEAR_WRAP) as (_, back, indexes, _):
        set_word(indexes, name, NEAR_WRAP + too_far if name == OUT_PROD else NEAR_WRAP - too_far)
        with pytest.raises(PeerError, match="dead"):
            back.read_packet(1) if name == OUT_PROD else back.write_packet(b"x")
        set_word(indexes, name, NEAR_WRAP)
        for call in (lambda: back.queued_bytes, lambda: back.write_packet(b"x"), lambda: back.peek(1)):
            with pytest.raises(PeerError):
                call()
        with pytest.raises(PeerError):
            FlexRing.attach(_spoiled(indexes, name, too_far), bytearray(4096))


def _spoiled(indexes: bytearray, name: int, too_far: int) -> bytearray:
    copy = bytearray(indexes)
    set_word(copy, name, NEAR_WRAP + too_far if name == OUT_PROD else NEAR_WRAP - too_far)
    return copy


def test_own_indexes_are_never_read_back() -> None:
    with flex_pair() as (front, back, indexes, _):
        front.write_packet(b"abc")
        set_word(indexes, OUT_PROD, 9999)
        front.write_packet(b"def")
        assert word(indexes, OUT_PROD) == 6
        assert back.read_packet(6) == b"abcdef"


@pytest.mark.parametrize("order", [3, 10, 2**31, COUNT - 1])
def test_an_order_that_is_too_high(order: int) -> None:
    indexes = bytearray(4096)
    set_word(indexes, ORDER, order)
    with pytest.raises(PeerError, match="order"):
        look(indexes, 2)


def test_the_errors_of_pvcalls() -> None:
    with flex_pair() as (front, back, indexes, _):
        assert (front.in_error, front.out_error) == (0, 0)
        back.write_packet(b"last")
        back.set_errors(in_error=-104, out_error=-32)
        assert (word(indexes, IN_ERROR), word(indexes, OUT_ERROR)) == (COUNT - 104, COUNT - 32)
        assert (front.in_error, front.out_error) == (-104, -32)
        assert front.read_packet(4) == b"last", "what was written before the end is read"
        with pytest.raises(InvalidRequest, match="back end"):
            front.set_errors(in_error=0)


@pytest.mark.parametrize(
    ("indexes", "pages", "refs"),
    [(4095, 1, None), (4096, 0, None), (4096, 3, None), (4096, 1024, None), (4096, 2, [1])],
)
def test_what_is_no_ring(indexes: int, pages: int, refs: list[int] | None) -> None:
    with pytest.raises(InvalidRequest):
        FlexRing.create(bytearray(indexes), bytearray(pages * 4096), refs=refs)


def test_closed() -> None:
    with flex_pair() as (front, back, indexes, _):
        assert "front order 0" in repr(front)
        front.close()
        front.close()
        for call in (lambda: front.queued_bytes, lambda: front.write_packet(b"x"), lambda: front.in_error):
            with pytest.raises(Closed):
                call()
        assert repr(front) == "<FlexRing closed>"
        back.close()
        indexes.extend(b"let go of")


# -- a peer made of Xen's own macros


@pytest.fixture(scope="module")
def flex_peer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_xen_header()
    sources = [HERE / "flex_peer.c", *(C_CORE / f"{name}.c" for name in EVENT_SOURCES)]
    return compile_c(tmp_path_factory.mktemp("flex") / "flex_peer", sources)


@contextmanager
def run_peer(command: list[str], fds: tuple[int, ...], half: Half) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [*command, *map(str, fds), *map(str, half)],
        pass_fds=(*fds, *half),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    half.close()
    try:
        yield process
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.communicate()


@contextmanager
def shared(order: int) -> Iterator[tuple[tuple[int, int], Mapping, Mapping, EventWaiter, EventPort, Half]]:
    with ExitStack() as stack:
        fds = create_object("memfd", 4096), create_object("memfd", 4096 << order)
        for fd in fds:
            stack.callback(os.close, fd)
        ours, theirs = make_pair()
        waiter, port = from_half(ours)
        stack.enter_context(waiter)
        indexes = stack.enter_context(Mapping(fds[0], 4096))
        data = stack.enter_context(Mapping(fds[1], 4096 << order))
        yield fds, indexes, data, waiter, port, theirs


def packet_of(number: int, n_bytes: int) -> bytes:
    body = bytes((number * 7 + i * 13) & 255 for i in range(256))
    header = n_bytes.to_bytes(4, "little") + number.to_bytes(4, "little")
    return header + (body[8:] + body * (n_bytes // 256 + 1))[: n_bytes - 8]


def read_whole(ring: FlexRing) -> bytes | None:
    header = ring.peek(8)
    return None if header is None else ring.read_packet(int.from_bytes(header[:4], "little"))


@pytest.mark.parametrize("order", [0, 3])
def test_xens_macros_at_the_back(flex_peer: Path, order: int) -> None:
    count = 3000
    choose = random.Random(order)
    with shared(order) as (fds, indexes, data, waiter, port, theirs):
        with FlexRing.create(indexes, data, port=port, start=NEAR_WRAP) as ring:
            with run_peer([str(flex_peer), "back", str(count), "3", str(order)], fds, theirs) as process:
                assert output_of(process).readline() == "ready\n"
                sent: list[bytes] = []
                got = 0
                packet = b""
                while got < count:
                    moved = False
                    if not packet and len(sent) < count:
                        most = 200 if choose.randrange(8) else ring.size_bytes - 8
                        packet = packet_of(len(sent), 8 + choose.randrange(most))
                    if packet and ring.write_packet(packet):
                        sent.append(packet)
                        packet, moved = b"", True
                    while (came := read_whole(ring)) is not None:
                        assert came == sent[got]
                        got, moved = got + 1, True
                    if not moved:
                        assert waiter.wait(port, timeout_s=DEADLINE_S) is WaitResult.EVENT
                assert output_of(process).readline() == "done\n"


@pytest.mark.parametrize("order", [0, 2])
def test_xens_macros_at_the_front(flex_peer: Path, order: int) -> None:
    count = 3000
    with shared(order) as (fds, indexes, data, waiter, port, theirs):
        with run_peer([str(flex_peer), "front", str(count), "5", str(order)], fds, theirs) as process:
            assert output_of(process).readline() == "ready\n"
            assert len(look(indexes)) == 1 << order
            with FlexRing.attach(indexes, data, port=port) as ring:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                for _ in range(count):
                    while (packet := read_whole(ring)) is None:
                        assert waiter.wait(port, timeout_s=DEADLINE_S) is WaitResult.EVENT
                    while not ring.write_packet(packet):
                        assert waiter.wait(port, timeout_s=DEADLINE_S) is WaitResult.EVENT
            assert output_of(process).readline() == "done\n"
