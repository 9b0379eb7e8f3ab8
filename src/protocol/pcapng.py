# SPDX-License-Identifier: MIT
"""Blocks of pcapng, the file format of packet captures: as much of it as recordings of rings and captures need. Pure.

Little-endian, time in nanoseconds. A reader passes over blocks and options that it does not know. Source: IETF
draft-ietf-opsawg-pcapng.
"""

import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final

from paravirt.errors import InvalidRequest

SECTION, INTERFACE, STATISTICS, PACKET = 0x0A0D0D0A, 1, 5, 6
LINK_USER0: Final = 147
"""The link type that is left to users."""

END_OPTION, COMMENT = 0, 1
SECTION_APPLICATION = 4
INTERFACE_NAME, INTERFACE_RESOLUTION = 2, 9
PACKET_FLAGS, PACKET_HASH, PACKET_DROPPED = 2, 3, 4
STATISTICS_RECEIVED, STATISTICS_DROPPED = 4, 5

INBOUND, OUTBOUND = 1, 2
"""In the flags of a packet."""
NANOSECONDS: Final = bytes([9])
CRC32: Final = 2

MAX_BLOCK_BYTES: Final = 1 << 20
_BYTE_ORDER: Final = 0x1A2B3C4D
_UNKNOWN_LENGTH: Final = -1
_HEAD = struct.Struct("<II")
_TAIL = struct.Struct("<I")
_SECTION = struct.Struct("<IHHq")
_INTERFACE = struct.Struct("<HHI")
_PACKET = struct.Struct("<IIIII")
_OPTION = struct.Struct("<HH")

Options = Mapping[int, bytes]


class DamagedFile(InvalidRequest):
    """A file that cannot be read further than `offset`, in bytes."""

    def __init__(self, offset: int, what: str) -> None:
        self.offset = offset
        super().__init__(f"at byte {offset}: {what}")


class TornFile(DamagedFile):
    """It ends in the middle of a block, as when its writer was killed."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block."""

    kind: int
    body: bytes
    offset: int
    """Of the block in the file, in bytes."""


@dataclass(frozen=True, slots=True)
class Packet:
    """What one packet block says."""

    interface: int
    time_ns: int
    """Since 1970."""
    data: bytes
    flags: int
    dropped: int
    """Packets that were lost before this one."""
    offset: int


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _options(options: Options) -> bytes:
    if not options:
        return b""
    parts = [_OPTION.pack(code, len(value)) + _padded(value) for code, value in options.items()]
    return b"".join(parts) + _OPTION.pack(END_OPTION, 0)


def block(kind: int, body: bytes) -> bytes:
    """A block, with its length at both ends."""
    n_bytes = _HEAD.size + len(body) + _TAIL.size
    return _HEAD.pack(kind, n_bytes) + body + _TAIL.pack(n_bytes)


def section(options: Options) -> bytes:
    """The block that begins a file."""
    return block(SECTION, _SECTION.pack(_BYTE_ORDER, 1, 0, _UNKNOWN_LENGTH) + _options(options))


def interface(name: str, comment: str, *, link: int = LINK_USER0, snaplen: int = 0) -> bytes:
    """The block that says where packets come from; the first is interface 0. `snaplen`: 0: no limit."""
    options = {INTERFACE_NAME: name.encode(), INTERFACE_RESOLUTION: NANOSECONDS}
    if comment:
        options[COMMENT] = comment.encode()
    return block(INTERFACE, _INTERFACE.pack(link, 0, snaplen) + _options(options))


_FLAGS_AND_HASH = struct.Struct("<HHIHHBI3x")
_DROPPED = struct.Struct("<HHQ")


def packet(interface_number: int, time_ns: int, data: bytes, flags: int, *, dropped: int = 0) -> bytes:
    """A packet with a check sum over its data."""
    head = _PACKET.pack(interface_number, time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), len(data))
    options = _FLAGS_AND_HASH.pack(PACKET_FLAGS, 4, flags, PACKET_HASH, 5, CRC32, zlib.crc32(data))
    if dropped:
        options += _DROPPED.pack(PACKET_DROPPED, 8, dropped)
    return block(PACKET, head + _padded(data) + options + _OPTION.pack(END_OPTION, 0))


def statistics(interface_number: int, time_ns: int, *, received: int, dropped: int) -> bytes:
    """The block that ends the packets of an interface."""
    body = struct.pack("<III", interface_number, time_ns >> 32, time_ns & 0xFFFFFFFF)
    options = {STATISTICS_RECEIVED: struct.pack("<Q", received), STATISTICS_DROPPED: struct.pack("<Q", dropped)}
    return block(STATISTICS, body + _options(options))


# -- reading


def read_blocks(file: BinaryIO) -> Iterator[Block]:
    """All blocks from where `file` stands, the beginning. Raises `DamagedFile`, `TornFile`."""
    offset = 0
    while head := _read(file, _HEAD.size, offset, offset):
        kind, n_bytes = _HEAD.unpack(head)
        if offset == 0 and kind != SECTION:
            raise DamagedFile(0, "this is no pcapng file")
        if n_bytes % 4 or not _HEAD.size + _TAIL.size <= n_bytes <= MAX_BLOCK_BYTES:
            raise DamagedFile(offset, f"a block of {n_bytes} bytes")
        rest = _read(file, n_bytes - _HEAD.size, offset, offset + _HEAD.size)
        if len(rest) < n_bytes - _HEAD.size:
            raise TornFile(offset, "the file ends in the middle of a block")
        if _TAIL.unpack_from(rest, len(rest) - _TAIL.size)[0] != n_bytes:
            raise DamagedFile(offset, "a block has different lengths at its ends")
        if kind == SECTION:
            _check_section(rest, offset)
        yield Block(kind, rest[: -_TAIL.size], offset)
        offset += n_bytes


def _read(file: BinaryIO, n_bytes: int, block_offset: int, offset: int) -> bytes:
    """Nothing at the very end of the file. Raises `TornFile` for less than asked."""
    data = file.read(n_bytes)
    if data and len(data) < n_bytes:
        raise TornFile(block_offset, f"the file ends in the middle of a block, at byte {offset + len(data)}")
    return data


def _check_section(body: bytes, offset: int) -> None:
    if len(body) < _SECTION.size:
        raise DamagedFile(offset, "the head of a section is too short")
    order, major, _, _ = _SECTION.unpack_from(body)
    if order != _BYTE_ORDER:
        raise DamagedFile(offset, "not little-endian, or damaged")
    if major != 1:
        raise DamagedFile(offset, f"version {major} of pcapng")


def options_of(found: Block, start: int) -> dict[int, bytes]:
    """Options from byte `start` of a block; the first of each sort. Raises `DamagedFile`."""
    options: dict[int, bytes] = {}
    body = found.body
    while start + _OPTION.size <= len(body):
        code, n_bytes = _OPTION.unpack_from(body, start)
        start += _OPTION.size
        if code == END_OPTION:
            break
        if start + n_bytes > len(body):
            raise DamagedFile(found.offset, "an option is longer than its block")
        options.setdefault(code, body[start : start + n_bytes])
        start += n_bytes + -n_bytes % 4
    return options


def section_options(found: Block) -> dict[int, bytes]:
    """Of a section block."""
    return options_of(found, _SECTION.size)


def parse_interface(found: Block) -> tuple[str, str]:
    """Name and comment of an interface. Raises `DamagedFile` for another link type or resolution."""
    if len(found.body) < _INTERFACE.size:
        raise DamagedFile(found.offset, "an interface block is too short")
    link, _, _ = _INTERFACE.unpack_from(found.body)
    options = options_of(found, _INTERFACE.size)
    if link != LINK_USER0:
        raise DamagedFile(found.offset, f"packets of link type {link}")
    if options.get(INTERFACE_RESOLUTION) != NANOSECONDS:
        raise DamagedFile(found.offset, "times that are not in nanoseconds")
    texts = (options.get(code, b"").decode("utf-8", "replace") for code in (INTERFACE_NAME, COMMENT))
    return next(texts), next(texts)


def parse_packet(found: Block) -> Packet:
    """Raises `DamagedFile`, also for data that do not match their check sum."""
    if len(found.body) < _PACKET.size:
        raise DamagedFile(found.offset, "a packet block is too short")
    number, high, low, n_bytes, _ = _PACKET.unpack_from(found.body)
    end = _PACKET.size + n_bytes
    if end > len(found.body):
        raise DamagedFile(found.offset, "a packet is longer than its block")
    data = found.body[_PACKET.size : end]
    options = options_of(found, end + -n_bytes % 4)
    checked = options.get(PACKET_HASH, b"")
    if checked != bytes([CRC32]) + zlib.crc32(data).to_bytes(4, "little"):
        raise DamagedFile(found.offset, "the check sum of a packet is missing or wrong")
    flags = int.from_bytes(options.get(PACKET_FLAGS, b"")[:4], "little")
    dropped = int.from_bytes(options.get(PACKET_DROPPED, b"")[:8], "little")
    return Packet(number, high << 32 | low, data, flags, dropped, found.offset)
