# SPDX-License-Identifier: MIT
"""NBD servers that are old, refuse, answer in parts and in any order, or lie."""

import errno
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paravirt.errors import InvalidRequest, PeerError
from paravirt.protocol import nbd
from paravirt.protocol.nbd import Chunk, Export, Option, Reply
from tests.backend import nbd_servers
from tests.backend.disk_model import data_of, raises, read
from tests.backend.nbd_servers import chunk, connect, reply, scripted, shake_hands, simple, take_option


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s"


def test_a_server_without_go(path: Path) -> None:
    def talk(client: socket.socket) -> None:
        nbd_servers.greet(client, flags=1)
        for option in (Option.STRUCTURED_REPLY, Option.GO):
            take_option(client)
            reply(client, option, Reply.UNSUPPORTED)
        assert take_option(client) == (Option.EXPORT_NAME, b"name")
        client.sendall(nbd.EXPORT.pack(1 << 20, 1) + bytes(124))
        _, cookie, _, length = nbd_servers.take_request(client)
        client.sendall(simple(cookie, b"d" * length))
        nbd_servers.take_request(client)

    with scripted(path, talk):
        disk = connect(path, ",export=name")
        assert read(disk, 1024, at=0) == b"d" * 1024
        disk.flush()  # which it does not know: nothing is sent
        assert not disk.can_discard
        disk.close()


@pytest.mark.parametrize(
    ("kind", "data", "wrong"),
    [
        (Reply.TLS_REQUIRED, b"", "it wants TLS"),
        (Reply.POLICY, b"go \n away\xff", r"it does not let us \(go  away�\)"),
        (Reply.SHUTDOWN, b"", "it is shutting down"),
        ((1 << 31) + 99, b"", "error 99"),
        (Reply.ACK, b"", "says nothing of its export"),
        (Reply.INFO, b"", "error 3"),
        (Reply.INFO, b"\0\0abc", "does not come to the end"),
    ],
)
def test_exports_that_are_not_given(path: Path, kind: int, data: bytes, wrong: str) -> None:
    def talk(client: socket.socket) -> None:
        nbd_servers.greet(client)
        take_option(client)
        reply(client, Option.STRUCTURED_REPLY, Reply.ACK)
        take_option(client)
        while True:
            reply(client, Option.GO, kind, data)

    with scripted(path, talk), pytest.raises(InvalidRequest, match=wrong):
        connect(path)


@pytest.mark.parametrize(
    ("flags", "size", "blocks", "wrong"),
    [
        (1, 1 << 63, None, "an export of 9223372036854775808 bytes"),
        (1, 0, None, "has 0 bytes, not a positive multiple"),
        (1, 1 << 20, (3, 512, 512), "block sizes 3 and 512"),
        (1, 1 << 20, (1, 0, 512), "block sizes 1 and 0"),
        (1, 1 << 20, (1, 4096, 512), "a largest block of 512"),
        (1, 1 << 20, (8192, 8192, 1 << 20), "has blocks of 8192 bytes; 4096 are the most"),
        (1, (1 << 20) + 512, (4096, 4096, 1 << 20), "not a positive multiple of 4096"),
    ],
)
def test_exports_that_cannot_be(
    path: Path, flags: int, size: int, blocks: tuple[int, int, int] | None, wrong: str
) -> None:
    with scripted(path, lambda client: shake_hands(client, size_bytes=size, flags=flags, blocks=blocks)):
        with pytest.raises(InvalidRequest, match=wrong):
            connect(path)


@pytest.mark.parametrize(("preferred", "physical"), [(4096, 4096), (65536, 65536), (1 << 20, 65536)])
def test_large_blocks_are_sectors_of_4096(path: Path, preferred: int, physical: int) -> None:
    with scripted(path, lambda client: shake_hands(client, blocks=(4096, preferred, 1 << 20))):
        disk = connect(path)
        assert (disk.sector_size, disk.physical_sector_size) == (4096, physical)
        disk.close()


@pytest.mark.parametrize(
    "greeting", [b"", b"HTTP/1.1 400 Bad Request", b"NBDMAGIC" + nbd.OLD_MAGIC + bytes(200), bytes(1000)]
)
def test_who_is_no_nbd_server(path: Path, greeting: bytes) -> None:
    with scripted(path, lambda client: client.sendall(greeting)):
        with pytest.raises(InvalidRequest, match=r"not an NBD server|fixed newstyle|closed the connection"):
            connect(path)


OFFSET = struct.pack(">Q", 4096)
LIES: dict[str, Callable[[int], bytes]] = {
    "another magic": lambda cookie: b"abcd" + bytes(12),
    "another cookie": lambda cookie: chunk(Chunk.NONE, cookie + 1),
    "a simple reply to a read": lambda cookie: simple(cookie, bytes(1024)),
    "nothing of a read": lambda cookie: chunk(Chunk.NONE, cookie),
    "half of a read": lambda cookie: chunk(Chunk.OFFSET_DATA, cookie, OFFSET + bytes(512)),
    "too much": lambda cookie: chunk(Chunk.OFFSET_DATA, cookie, OFFSET + bytes(2048)),
    "before": lambda cookie: chunk(Chunk.OFFSET_DATA, cookie, struct.pack(">Q", 4095) + bytes(1024)),
    "behind": lambda cookie: chunk(Chunk.OFFSET_DATA, cookie, struct.pack(">Q", 1 << 63) + bytes(1024)),
    "twice": lambda cookie: 2 * chunk(Chunk.OFFSET_DATA, cookie, OFFSET + bytes(512), done=False),
    "a hole of nothing": lambda cookie: chunk(Chunk.OFFSET_HOLE, cookie, struct.pack(">QI", 4096, 0)),
    "a hole too large": lambda cookie: chunk(Chunk.OFFSET_HOLE, cookie, struct.pack(">QI", 4096, 1 << 31)),
    "no data": lambda cookie: chunk(Chunk.OFFSET_DATA, cookie, OFFSET),
    "a short error": lambda cookie: chunk(Chunk.ERROR, cookie, b"\0"),
    "an error without end": lambda cookie: chunk(Chunk.ERROR, cookie, bytes(1 << 20)),
    "an unknown chunk": lambda cookie: chunk(77, cookie),
    "the end of the connection": lambda cookie: b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_left_and_asked_again(path: Path, lie: str) -> None:
    """The next connection is honest: what came before is not taken for data."""

    def lying(client: socket.socket) -> None:
        shake_hands(client)
        _, cookie, _, _ = nbd_servers.take_request(client)
        client.sendall(LIES[lie](cookie))

    def honest(client: socket.socket) -> None:
        shake_hands(client)
        _, cookie, _, _ = nbd_servers.take_request(client)
        client.sendall(chunk(Chunk.OFFSET_HOLE, cookie, struct.pack(">QI", 4096 + 512, 512), done=False))
        client.sendall(chunk(Chunk.OFFSET_DATA, cookie, OFFSET + b"h" * 512, done=False))
        client.sendall(chunk(Chunk.NONE, cookie))

    with scripted(path, lying, honest):
        disk = connect(path)
        assert read(disk, 100, 924, at=4096) == b"h" * 512 + bytes(512)
        disk.close()


@pytest.mark.parametrize(("code", "number"), [(5, errno.EIO), (28, errno.ENOSPC), (95, errno.EOPNOTSUPP), (4711, 22)])
@pytest.mark.parametrize("structured", [True, False])
def test_numbers_of_errors(path: Path, code: int, number: int, structured: bool) -> None:
    def talk(client: socket.socket) -> None:
        shake_hands(client, structured=structured)
        for _ in range(2):
            _, cookie, _, _ = nbd_servers.take_request(client)
            answer = chunk(Chunk.ERROR, cookie, nbd.ERROR.pack(code, 0)) if structured else simple(cookie, error=code)
            client.sendall(answer)

    with scripted(path, talk):
        disk = connect(path)
        assert raises(disk.preadv, [memoryview(bytearray(512))], 0) == number
        assert raises(disk.flush) == number
        disk.close()


def test_a_large_transfer_is_in_flight_at_once_and_answered_in_any_order(path: Path) -> None:
    data = data_of(9, 64 << 10)

    def talk(client: socket.socket) -> None:
        shake_hands(client, blocks=(1, 512, 4096))
        requests = [nbd_servers.take_request(client) for _ in range(16)]
        for _, cookie, offset, length in reversed(requests):
            client.sendall(chunk(Chunk.OFFSET_DATA, cookie, struct.pack(">Q", offset) + data[offset : offset + length]))

    with scripted(path, talk):
        disk = connect(path)
        assert read(disk, 512, 65024, at=0) == data
        disk.close()


def test_several_transfers_are_in_flight_together_and_each_has_its_own_end(path: Path) -> None:
    def talk(client: socket.socket) -> None:
        shake_hands(client, blocks=(1, 512, 4096))
        for _ in range(2):
            requests = [nbd_servers.take_request(client) for _ in range(3)]
            for _, cookie, offset, length in reversed(requests):
                if offset == 3584 + 4096:
                    client.sendall(chunk(Chunk.ERROR, cookie, nbd.ERROR.pack(errno.ENOSPC, 0)))
                else:
                    client.sendall(chunk(Chunk.OFFSET_DATA, cookie, struct.pack(">Q", offset) + b"d" * length))

    with scripted(path, talk):
        disk = connect(path, ",patience=0s")
        pages = [bytearray(length) for length in (512, 8192)]
        for _ in range(2):
            # The second is two requests for this server, of which one fails.
            ends = disk.preadv_many([([memoryview(pages[0])], 0), ([memoryview(pages[1])], 3584)])
            assert ends == [0, errno.ENOSPC]
            assert pages[0] == b"d" * 512
        assert disk.preadv_many([([memoryview(pages[0])], 0)] * 2) == [errno.EIO] * 2  # the server is gone
        disk.close()


def test_long_ranges_are_cut(path: Path) -> None:
    asked: list[tuple[int, int, int]] = []

    def talk(client: socket.socket) -> None:
        shake_hands(client, size_bytes=5 << 30)
        for _ in range(10):
            command, cookie, offset, length = nbd_servers.take_request(client)
            asked.append((command, offset, length))
            client.sendall(chunk(Chunk.NONE, cookie))

    with scripted(path, talk):
        disk = connect(path)
        disk.discard(512, 3 << 30)
        disk.write_zeroes(0, 5 << 30)
        disk.close()
    assert asked[:4] == [
        (4, 512, 1 << 30),
        (4, 512 + (1 << 30), 1 << 30),
        (4, 512 + (2 << 30), 1 << 30),
        (6, 0, 1 << 30),
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                chunk,
                st.sampled_from([0, 1, 2, 32769, 32770, 9]),
                st.integers(0, 2),
                st.one_of(
                    st.binary(max_size=20),
                    st.builds(lambda o, d: struct.pack(">Q", o) + d, st.integers(0, 600), st.binary(max_size=300)),
                ),
                done=st.booleans(),
            ),
            st.builds(simple, st.integers(0, 2), st.binary(max_size=512), st.integers(0, 100)),
        ),
        max_size=6,
    )
)
def test_whatever_a_server_sends(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    """A read ends well or with an `OSError`, whatever comes."""
    path = tmp_path_factory.getbasetemp() / "whatever"

    def talk(client: socket.socket) -> None:
        shake_hands(client)
        nbd_servers.take_request(client)
        client.sendall(b"".join(pieces))

    with scripted(path, talk):
        disk = connect(path, ",patience=0s")
        raises(disk.preadv, [memoryview(bytearray(512))], 0)
        disk.close()


@settings(max_examples=100)
@given(st.binary(max_size=20), st.none() | st.binary(max_size=20))
def test_whatever_a_server_says_of_its_export(export: bytes, blocks: bytes | None) -> None:
    try:
        found = Export.from_wire(export, blocks)
    except PeerError:
        return
    assert 0 <= found.size_bytes < 1 << 63
    assert found.least_block_bytes <= found.preferred_block_bytes <= found.most_bytes or found.most_bytes == 32 << 20
