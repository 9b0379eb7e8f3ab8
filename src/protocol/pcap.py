# SPDX-License-Identifier: MIT
"""Files of Ethernet frames, as tcpdump and Wireshark write them: what begins ours, and reading pcap and pcapng. Pure.

Both byte orders, times of any resolution. Source: IETF draft-ietf-opsawg-pcap, draft-ietf-opsawg-pcapng.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

from paravirt.errors import InvalidRequest
from paravirt.protocol import pcapng
from paravirt.protocol.pcapng import DamagedFile, TornFile

ETHERNET: Final = 1
"""The link type."""
MAX_SNAPLEN: Final = 262_144
"""What readers take a file without a limit to have."""
MIN_FRAME_BYTES: Final = 14
MAX_FRAME_BYTES: Final = 65_535
MAX_PACKET_BYTES: Final = 1 << 18
"""Of a packet in a file: what is more is damage."""

_MAGIC_US, _MAGIC_NS = 0xA1B2C3D4, 0xA1B23C4D
_ORDERS: Final = ("<", ">")
_SIMPLE_PACKET, _OLD_PACKET = 3, 2
_RESOLUTION, _OFFSET = 9, 14
NS_PER_S: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Recorded:
    """A frame of a file."""

    time_ns: int
    """Since 1970; 0 where the file does not say."""
    data: bytes
    offset: int
    """Of the packet in the file, in bytes."""


def pcap_header(snaplen: int) -> bytes:
    """What begins a pcap file of Ethernet frames with times in nanoseconds."""
    return struct.pack("<IHHiIII", _MAGIC_NS, 2, 4, 0, 0, snaplen, ETHERNET)


def read_frames(file: BinaryIO) -> Iterator[Recorded]:
    """All frames of a file, from its beginning on, in its order. Raises `DamagedFile`, `TornFile`: another kind of
    file, another link type, a length that cannot be, frames of less than 14 or more than 65535 bytes.
    """
    head = file.read(4)
    if len(head) < 4:
        raise TornFile(0, "the file is empty" if not head else "the file ends in its first word")
    is_pcapng = int.from_bytes(head, "little") == pcapng.SECTION
    for frame in _read_pcapng(file) if is_pcapng else _read_pcap(file, head):
        n_bytes = len(frame.data)
        if not MIN_FRAME_BYTES <= n_bytes <= MAX_FRAME_BYTES:
            raise DamagedFile(frame.offset, f"a frame of {n_bytes} bytes, not {MIN_FRAME_BYTES} to {MAX_FRAME_BYTES}")
        yield frame


def _take(file: BinaryIO, n_bytes: int, offset: int) -> bytes:
    """Exactly so many bytes of what begins at `offset`. Raises `TornFile`."""
    data = file.read(n_bytes)
    if len(data) < n_bytes:
        raise TornFile(offset, "the file ends in the middle of a packet or block")
    return data


def _check_link(link: int, offset: int) -> None:
    if link != ETHERNET:
        raise DamagedFile(offset, f"frames of link type {link}, not of Ethernet ({ETHERNET})")


# -- pcap


def _read_pcap(file: BinaryIO, magic: bytes) -> Iterator[Recorded]:
    for order in _ORDERS:
        (word,) = struct.unpack(f"{order}I", magic)
        if word in (_MAGIC_US, _MAGIC_NS):
            break
    else:
        raise DamagedFile(0, "this is neither a pcap nor a pcapng file")
    unit = 1 if word == _MAGIC_NS else 1000
    major, _, _, _, _, link = struct.unpack(f"{order}HHiIII", _take(file, 20, 0))
    if major != 2:
        raise DamagedFile(0, f"version {major} of pcap")
    _check_link(link & 0x0FFFFFFF, 0)
    head, offset = struct.Struct(f"{order}IIII"), 24
    while first := file.read(1):
        seconds, parts, n_bytes, _ = head.unpack(first + _take(file, head.size - 1, offset))
        if n_bytes > MAX_PACKET_BYTES:
            raise DamagedFile(offset, f"a packet of {n_bytes} bytes")
        yield Recorded(seconds * NS_PER_S + parts * unit, _take(file, n_bytes, offset), offset)
        offset += head.size + n_bytes


# -- pcapng


@dataclass(frozen=True, slots=True)
class _Interface:
    snaplen: int
    units_per_s: int
    offset_s: int


def _read_pcapng(file: BinaryIO) -> Iterator[Recorded]:
    order, offset = "<", 0
    interfaces: list[_Interface] = []
    first = pcapng.SECTION.to_bytes(4, "little")  # it is a palindrome, so this says no order
    while first:
        if len(first) < 4:
            first += _take(file, 4 - len(first), offset)
        length_field = _take(file, 4, offset)
        (kind,) = struct.unpack(f"{order}I", first)
        begun = b""
        if kind == pcapng.SECTION:
            begun = _take(file, 4, offset)
            order, interfaces = _order_of(begun, offset), []
        (n_bytes,) = struct.unpack(f"{order}I", length_field)
        if n_bytes % 4 or not 12 + len(begun) <= n_bytes <= pcapng.MAX_BLOCK_BYTES:
            raise DamagedFile(offset, f"a block of {n_bytes} bytes")
        rest = begun + _take(file, n_bytes - 8 - len(begun), offset)
        if struct.unpack(f"{order}I", rest[-4:])[0] != n_bytes:
            raise DamagedFile(offset, "a block has different lengths at its ends")
        body = rest[:-4]
        if kind == pcapng.SECTION:
            _check_version(order, body, offset)
        elif kind == pcapng.INTERFACE:
            interfaces.append(_interface(order, body, offset))
        elif kind in (pcapng.PACKET, _SIMPLE_PACKET, _OLD_PACKET):
            yield _packet(order, kind, body, offset, interfaces)
        offset += n_bytes
        first = file.read(4)


def _order_of(word: bytes, offset: int) -> str:
    for order in _ORDERS:
        if struct.unpack(f"{order}I", word)[0] == 0x1A2B3C4D:
            return order
    raise DamagedFile(offset, "a section of no byte order")


def _check_version(order: str, body: bytes, offset: int) -> None:
    if len(body) < 16:
        raise DamagedFile(offset, "the head of a section is too short")
    (major,) = struct.unpack_from(f"{order}H", body, 4)
    if major != 1:
        raise DamagedFile(offset, f"version {major} of pcapng")


def _interface(order: str, body: bytes, offset: int) -> _Interface:
    if len(body) < 8:
        raise DamagedFile(offset, "an interface block is too short")
    link, _, snaplen = struct.unpack_from(f"{order}HHI", body)
    _check_link(link, offset)
    units, offset_s, at = 1_000_000, 0, 8
    while at + 4 <= len(body):
        code, n_bytes = struct.unpack_from(f"{order}HH", body, at)
        value = body[at + 4 : at + 4 + n_bytes]
        if code == pcapng.END_OPTION:
            break
        if len(value) < n_bytes:
            raise DamagedFile(offset, "an option is longer than its block")
        if code == _RESOLUTION and n_bytes == 1:
            units = 1 << (value[0] & 0x7F) if value[0] & 0x80 else 10 ** min(value[0], 20)
        elif code == _OFFSET and n_bytes == 8:
            (offset_s,) = struct.unpack(f"{order}q", value)
        at += 4 + n_bytes + -n_bytes % 4
    return _Interface(snaplen, units, offset_s)


def _packet(order: str, kind: int, body: bytes, offset: int, interfaces: list[_Interface]) -> Recorded:
    size = 4 if kind == _SIMPLE_PACKET else 20
    if len(body) < size:
        raise DamagedFile(offset, "a packet block is too short")
    if kind == _SIMPLE_PACKET:
        number, time = 0, 0
        (n_bytes,) = struct.unpack_from(f"{order}I", body)
    else:
        number, high, low, n_bytes, _ = struct.unpack_from(f"{order}IIIII", body)
        if kind == _OLD_PACKET:
            (number,) = struct.unpack_from(f"{order}H", body)
        time = high << 32 | low
    if number >= len(interfaces):
        raise DamagedFile(offset, f"a packet of interface {number}, of which nothing was said")
    interface = interfaces[number]
    if kind == _SIMPLE_PACKET and interface.snaplen:
        n_bytes = min(n_bytes, interface.snaplen)
    if size + n_bytes > len(body):
        raise DamagedFile(offset, "a packet is longer than its block")
    time_ns = time * NS_PER_S // interface.units_per_s + interface.offset_s * NS_PER_S if time else 0
    return Recorded(time_ns, body[size : size + n_bytes], offset)


def require(file: BinaryIO, name: str) -> list[Recorded]:
    """All frames of a file that a user named. Raises `InvalidRequest`, which names it."""
    try:
        return list(read_frames(file))
    except DamagedFile as error:
        raise InvalidRequest(f"{name}: {error}") from error
