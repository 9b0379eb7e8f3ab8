# SPDX-License-Identifier: MIT
"""Checksums, segments and hashes in C, against a naive model of them and published vectors; and frames of any content,
which end where memory ends.
"""

import ctypes
import mmap
import random
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address

import pytest

from paravirt.protocol.netif import GsoType
from paravirt.ring._core import ffi, lib
from paravirt.ring.netif import FrameFlag

from .packets import ACK, CWR, FIN, ICMP, PSH, SYN, TCP, UDP, Packet, internet_sum, pattern, plain, word

ROOM = 65536
PAGE = mmap.PAGESIZE


class Edge:
    """Memory with nothing behind it: whoever goes one byte too far dies."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, ROOM + PAGE)
        self._view = (ctypes.c_char * (ROOM + PAGE)).from_buffer(self._map)
        libc = ctypes.CDLL(None, use_errno=True)
        end = ctypes.c_void_p(ctypes.addressof(self._view) + ROOM)
        assert libc.mprotect(end, ctypes.c_size_t(PAGE), 0) == 0
        self.start = ffi.cast("uint8_t *", ctypes.addressof(self._view))

    def last(self, n: int):  # type: ignore[no-untyped-def]
        """A pointer to the last n bytes."""
        return self.start + (ROOM - n)

    def put(self, content: bytes):  # type: ignore[no-untyped-def]
        """Bytes at the very end."""
        at = self.last(len(content))
        ffi.memmove(at, content, len(content))
        return at


@pytest.fixture(scope="module")
def edge() -> Edge:
    return Edge()


@pytest.fixture(scope="module")
def other() -> Edge:
    return Edge()


BASES = [
    Packet(),
    Packet(ip_options=b"\x01" * 4),
    Packet(ip_options=b"\x44\x28" + bytes(38)),
    Packet(tcp_options=b"\x01" * 12),
    Packet(tcp_options=bytes(40), ip_options=bytes(40)),
    Packet(tags=(5,)),
    Packet(tags=(5, 4095)),
    Packet(v6=True),
    Packet(v6=True, extensions=((0, 0),)),
    Packet(v6=True, extensions=((0, 1), (43, 0), (60, 3)), tags=(7,)),
    Packet(v6=True, extensions=((60, 255), (60, 255)), tcp_options=b"\x01" * 4),
]
ALL = [
    replace(base, protocol=protocol)
    for base in BASES
    for protocol in (TCP, UDP)
    if base.tcp_options == b"" or protocol == TCP
]
LENGTHS = [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 1000, 1459, 1460]


def name_of(packet: Packet) -> str:
    return (
        f"{'v6' if packet.v6 else 'v4'}-{'tcp' if packet.protocol == TCP else 'udp'}-tags{len(packet.tags)}"
        f"-options{len(packet.ip_options)}+{len(packet.tcp_options)}-extensions{len(packet.extensions)}"
    )


of_every_form = pytest.mark.parametrize("base", ALL, ids=name_of)


def look(edge: Edge, frame: bytes):  # type: ignore[no-untyped-def]
    """(pointer, what stands where), or None: it is no packet of a known form."""
    at, l4 = edge.put(frame), ffi.new("struct pv_l4 *")
    return (at, l4) if lib.pv_offload_look(at, len(frame), l4) else None


def known(edge: Edge, frame: bytes):  # type: ignore[no-untyped-def]
    found = look(edge, frame)
    assert found is not None
    return found


# -- where things stand


@of_every_form
@pytest.mark.parametrize("padding", [0, 1, 18])
def test_what_stands_where(edge: Edge, base: Packet, padding: int) -> None:
    packet = replace(base, payload=pattern(100), padding=b"\xcc" * padding)
    frame = packet.frame()
    _, l4 = known(edge, frame)
    header = 8 if packet.protocol == UDP else 20 + len(packet.tcp_options)
    assert (l4.l3, l4.l4, l4.payload) == (14 + 4 * len(packet.tags), packet.l4_at, packet.l4_at + header)
    assert (l4.checksum, l4.end) == (packet.checksum_at, len(frame) - padding)
    assert (l4.protocol, l4.is_v6) == (packet.protocol, packet.v6)


@of_every_form
def test_what_is_cut_off_is_none(edge: Edge, base: Packet) -> None:
    frame = replace(base, payload=pattern(5)).frame()
    assert not any(look(edge, frame[:n]) for n in range(len(frame)))


def with_bytes(packet: Packet, at: int, content: bytes) -> bytes:
    frame = packet.frame()
    return frame[:at] + content + frame[at + len(content) :]


V4, V6 = Packet(pattern(40)), Packet(pattern(40), v6=True)
U4 = replace(V4, protocol=UDP)


@pytest.mark.parametrize(
    "frame",
    [
        plain(100),
        replace(V4, protocol=ICMP).frame(),
        replace(V4, tags=(1, 2, 3)).frame(),
        with_bytes(V4, 14, b"\x44"),
        with_bytes(V4, 14, b"\x65"),
        with_bytes(V4, 16, word(19)),
        with_bytes(V4, 16, word(81)),
        with_bytes(V4, 20, b"\x20\0"),
        with_bytes(V4, 20, b"\0\1"),
        with_bytes(V4, 34 + 12, b"\x40"),
        with_bytes(V4, 34 + 12, b"\xf0" + b"\x10" * 7 + bytes(40))[: 34 + 59],
        with_bytes(U4, 34 + 4, word(7)),
        with_bytes(U4, 34 + 4, word(49)),
        with_bytes(V6, 14, b"\x40"),
        with_bytes(V6, 18, word(61)),
        with_bytes(V6, 20, b"\x2c"),
        with_bytes(replace(V6, extensions=((0, 0),)), 14 + 41, b"\xff"),
        with_bytes(replace(V6, extensions=((44, 0),)), 0, b""),
        b"\xff" * 70_000,
    ],
    ids=lambda frame: frame[12:24].hex(),
)
def test_what_is_no_packet_of_a_known_form(frame: bytes) -> None:
    at = ffi.new("uint8_t[]", frame)
    assert not lib.pv_offload_look(at, len(frame), ffi.new("struct pv_l4 *"))


def test_a_datagram_ends_where_it_says(edge: Edge) -> None:
    """What follows within IP's payload is not in its checksum."""
    datagram = replace(U4, padding=b"")
    frame = bytearray(datagram.frame() + b"\xaa" * 10)
    frame[16:18] = word(int.from_bytes(frame[16:18], "big") + 10)
    at, l4 = known(edge, bytes(frame))
    assert l4.end == len(frame) - 10
    assert lib.pv_offload_is_right(at, l4)


# -- checksums


@of_every_form
@pytest.mark.parametrize("n", LENGTHS)
def test_checksums(edge: Edge, base: Packet, n: int) -> None:
    packet = replace(base, payload=pattern(n, n), padding=b"\xff" * 3)
    frame = packet.frame()
    at, l4 = known(edge, replace(packet, checksum=0x5555).frame())
    assert not lib.pv_offload_is_right(at, l4)
    lib.pv_offload_prepare(at, l4)
    assert bytes(ffi.buffer(at + l4.checksum, 2)) == word(packet.pseudo_sum)
    lib.pv_offload_finish(at, l4)
    assert bytes(ffi.buffer(at, len(frame))) == frame
    assert lib.pv_offload_is_right(at, l4)


@of_every_form
def test_every_bit_counts(edge: Edge, base: Packet) -> None:
    packet = replace(base, payload=pattern(33))
    frame = packet.frame()
    for at in [*range(packet.l4_at + (12 if packet.protocol == TCP else 8), len(frame)), packet.l4_at]:
        if at == packet.l4_at + 12:
            continue  # the length of its header
        changed = bytearray(frame)
        changed[at] ^= 1 << at % 8
        pointer, l4 = known(edge, bytes(changed))
        assert not lib.pv_offload_is_right(pointer, l4)


@pytest.mark.parametrize("v6", [False, True])
def test_a_checksum_of_zero(edge: Edge, v6: bool) -> None:
    """UDP's is sent as 0xFFFF, for 0 says that there is none; TCP's may be either."""
    for protocol in (UDP, TCP):
        blank = Packet(bytes(2), protocol=protocol, v6=v6)
        packet = replace(blank, payload=word(blank.right_checksum))
        assert packet.right_checksum == (0xFFFF if protocol == UDP else 0)
        at, l4 = known(edge, replace(packet, checksum=1).frame())
        lib.pv_offload_finish(at, l4)
        assert bytes(ffi.buffer(at, len(packet.frame()))) == packet.frame()
        for found in (0, 0xFFFF):
            at, l4 = known(edge, replace(packet, checksum=found).frame())
            assert lib.pv_offload_is_right(at, l4) == (not (v6 and protocol == UDP and not found))


def test_datagrams_without_a_checksum(edge: Edge) -> None:
    for v6 in (False, True):
        at, l4 = known(edge, Packet(b"abc", protocol=UDP, v6=v6, checksum=0).frame())
        assert lib.pv_offload_is_right(at, l4) == (not v6)


def test_the_largest_packet(edge: Edge) -> None:
    for payload in (b"\xff" * (65535 - 54), pattern(65535 - 54), bytes(65535 - 54)):
        packet = Packet(payload)
        at, l4 = known(edge, replace(packet, checksum=3).frame())
        lib.pv_offload_finish(at, l4)
        assert bytes(ffi.buffer(at + l4.checksum, 2)) == word(packet.right_checksum)


# -- whether a frame fits what is said of it


@pytest.mark.parametrize(
    ("packet", "flags", "size", "kind", "fits"),
    [
        (plain(60), 0, 0, 0, True),
        (plain(60), FrameFlag.VALIDATED, 0, 0, True),
        (plain(60), FrameFlag.CSUM_BLANK, 0, 0, False),
        (V4.frame(), FrameFlag.CSUM_BLANK, 0, 0, True),
        (V4.frame(), 0, 10, GsoType.TCPV4, True),
        (V4.frame(), 0, 10, GsoType.TCPV6, False),
        (V6.frame(), 0, 10, GsoType.TCPV6, True),
        (V6.frame(), 0, 10, GsoType.TCPV4, False),
        (V4.frame(), 0, 0, GsoType.TCPV4, False),
        (V4.frame(), 0, 10, 3, False),
        (U4.frame(), 0, 10, GsoType.TCPV4, False),
    ],
)
def test_what_fits(edge: Edge, packet: bytes, flags: int, size: int, kind: int, fits: bool) -> None:
    frame = ffi.new("struct pv_frame *", {"length": len(packet), "flags": flags, "gso_size": size, "gso_type": kind})
    assert lib.pv_offload_fits(edge.put(packet), frame) == fits


# -- segments


def segments(edge: Edge, other: Edge, packet: Packet, size: int) -> list[bytes]:
    at, l4 = known(edge, packet.frame())
    made = []
    for i in range(lib.pv_offload_segments(l4, size)):
        # No more than a segment may be written.
        to = other.last(l4.payload + min(size, len(packet.payload)))
        n = lib.pv_offload_segment(at, l4, size, i, to)
        made.append(bytes(ffi.buffer(to, n)))
    return made


@pytest.mark.parametrize("base", [base for base in ALL if base.protocol == TCP], ids=name_of)
@pytest.mark.parametrize(
    ("n", "size"), [(0, 10), (1, 10), (10, 10), (11, 10), (99, 10), (3000, 1448), (1449, 1), (5000, 65535)]
)
def test_segments(edge: Edge, other: Edge, base: Packet, n: int, size: int) -> None:
    packet = replace(base, payload=pattern(n), checksum=0, padding=b"\xcc" * 5)
    expected = replace(packet, checksum=None).segments(size)
    assert segments(edge, other, packet, size) == expected
    if not base.v6:
        assert all(
            internet_sum(one[14 + 4 * len(base.tags) :][: 20 + len(base.ip_options)]) == 0xFFFF for one in expected
        )


@pytest.mark.parametrize("flags", [ACK, ACK | PSH, ACK | FIN, ACK | CWR, ACK | PSH | FIN | CWR | SYN])
def test_flags_of_segments(edge: Edge, other: Edge, flags: int) -> None:
    """FIN and PSH are the last one's, CWR the first one's."""
    packet = Packet(pattern(35), tcp_flags=flags, ident=0xFFFE, sequence=0xFFFFFFF0)
    made = segments(edge, other, packet, 10)
    assert made == packet.segments(10)
    assert [one[14 + 20 + 13] for one in made] == [
        flags & ~(FIN | PSH),
        *[flags & ~(FIN | PSH | CWR)] * 2,
        flags & ~CWR,
    ]


@pytest.mark.parametrize("packet", [V4, V6], ids=["v4", "v6"])
def test_segments_of_the_largest(edge: Edge, other: Edge, packet: Packet) -> None:
    packet = replace(packet, payload=pattern(65535 - packet.l4_at - 20))
    assert segments(edge, other, packet, 1448) == packet.segments(1448)


def test_what_cannot_be_cut(edge: Edge) -> None:
    _, l4 = known(edge, U4.frame())
    assert lib.pv_offload_segments(l4, 10) == 0
    _, l4 = known(edge, V4.frame())
    assert lib.pv_offload_segments(l4, 0) == 0


# -- hashes

KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")


@pytest.mark.parametrize(
    ("to", "source", "by_address", "by_port"),
    [
        ("161.142.100.80 1766", "66.9.149.187 2794", 0x323E8FC2, 0x51CCC178),
        ("65.69.140.83 4739", "199.92.111.2 14230", 0xD718262A, 0xC626B0EA),
        ("12.22.207.184 38024", "24.19.198.95 12898", 0xD2D0A5DE, 0x5C2B394A),
        ("209.142.163.6 2217", "38.27.205.30 48228", 0x82989176, 0xAFC7327F),
        ("202.188.127.2 1303", "153.39.163.191 44251", 0x5D1809C5, 0x10E828A2),
        ("3ffe:2501:200:3::1 1766", "3ffe:2501:200:1fff::7 2794", 0x2CC18CD5, 0x40207D3D),
        ("ff02::1 4739", "3ffe:501:8::260:97ff:fe40:efab 14230", 0x0F0C461C, 0xDDE51BBF),
        ("fe80::200:f8ff:fe21:67cf 38024", "3ffe:1900:4545:3:200:f8ff:fe21:67cf 44251", 0x4B61E985, 0x02D1FEEF),
    ],
)
def test_toeplitz_by_microsofts_vectors(to: str, source: str, by_address: int, by_port: int) -> None:
    """Of "Verifying the RSS Hash Calculation"."""
    (address, port), (own, own_port) = to.split(), source.split()
    addresses = ip_address(own).packed + ip_address(address).packed
    ports = word(int(own_port)) + word(int(port))
    assert lib.pv_toeplitz(KEY, addresses, len(addresses)) == by_address
    assert lib.pv_toeplitz(KEY, addresses + ports, len(addresses) + 4) == by_port


def test_flows(edge: Edge) -> None:
    """All packets of one go to one queue, different ones to different ones."""

    def flow(packet: Packet | bytes) -> int:
        frame = packet if isinstance(packet, bytes) else packet.frame()
        n: int = lib.pv_offload_flow(edge.put(frame), len(frame))
        return n

    for base in ALL:
        assert len({flow(replace(base, payload=pattern(n, n), sequence=n)) for n in range(50)}) == 1
        numbers = [flow(replace(base, ports=(1024 + i, 80))) for i in range(256)]
        assert len(set(numbers)) > 250
        assert all(min(sum(n % k == i for n in numbers) for i in range(k)) > 256 // k // 4 for k in (2, 4, 8))
    assert flow(plain(60)) == flow(plain(61, 2)) != flow(V4)
    assert flow(b"") == flow(b"short") == 1


# -- hostile bytes


def hostile(seed: int) -> Iterator[bytes]:
    """Frames that are nearly well, cut off, or noise behind an Ethernet header."""
    random_ = random.Random(seed)
    for _ in range(3000):
        packet = replace(random_.choice(ALL), payload=pattern(random_.choice([0, 1, 30, 600])))
        frame = bytearray(packet.frame())
        match random_.randrange(4):
            case 0:
                frame = frame[: random_.randrange(len(frame) + 1)]
            case 1:
                frame = frame[: random_.randrange(14, 64)] + random_.randbytes(random_.randrange(64))
            case _:
                for _ in range(random_.randrange(1, 6)):
                    frame[random_.randrange(12, min(len(frame), 100))] = random_.choice(
                        [0, 1, 255, random_.randrange(256)]
                    )
        yield bytes(frame)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_outside_of_a_frame_is_touched(edge: Edge, other: Edge, seed: int) -> None:
    random_, n_known = random.Random(seed), 0
    for frame in hostile(seed):
        lib.pv_offload_flow(edge.put(frame), len(frame))
        found = look(edge, frame)
        if found is None:
            continue
        at, l4 = found
        n_known += 1
        assert 14 <= l4.l3 < l4.l4 <= l4.checksum < l4.payload <= l4.end <= len(frame)
        lib.pv_offload_is_right(at, l4)
        lib.pv_offload_prepare(at, l4)
        lib.pv_offload_finish(at, l4)
        assert lib.pv_offload_is_right(at, l4)
        size = random_.choice([0, 1, 9, 536, 65535])
        payload = l4.end - l4.payload
        total = 0
        for i in range(lib.pv_offload_segments(l4, size)):
            to = other.last(l4.payload + min(size, payload))
            n = lib.pv_offload_segment(at, l4, size, i, to)
            total += n - l4.payload
        assert total in (0, payload)
    assert n_known > 300


@pytest.mark.parametrize("gso", [0, 1, 2, 9])
def test_hostile_bytes_that_are_said_to_be_large_packets(edge: Edge, gso: int) -> None:
    for frame in hostile(100 + gso):
        flags = FrameFlag.CSUM_BLANK
        said = ffi.new("struct pv_frame *", {"length": len(frame), "flags": flags, "gso_size": 100, "gso_type": gso})
        fits = lib.pv_offload_fits(edge.put(frame), said)
        assert not fits or look(edge, frame)
