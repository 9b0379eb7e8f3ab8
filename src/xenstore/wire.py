# SPDX-License-Identifier: MIT
"""xenstore's wire protocol: packets, operations, errors (Xen's public/io/xs_wire.h).

A packet is a header of four little-endian u32 (operation, request id, transaction id, payload length) and at most 4096
bytes of payload. A reply repeats the first three words; an error is operation 16 with the name of an errno as payload.
Nothing here does I/O.
"""

import struct
from enum import Enum, IntEnum
from typing import Final

HEADER: Final = struct.Struct("<IIII")
HEADER_BYTES: Final = HEADER.size
PAYLOAD_MAX_BYTES: Final = 4096
ACK: Final = b"OK\0"

Packet = tuple[int, int, int, bytes]
"""(operation, request id, transaction id, payload). The operation may be any u32."""


class Op(IntEnum):
    """Operations, as numbered on the wire."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESTRICT = 20
    RESET_WATCHES = 21
    DIRECTORY_PART = 22
    GET_FEATURE = 23
    SET_FEATURE = 24
    GET_QUOTA = 25
    SET_QUOTA = 26


class Errno(Enum):
    """The errors that exist on the wire; the value is what an error reply carries."""

    EINVAL = b"EINVAL\0"
    EACCES = b"EACCES\0"
    EEXIST = b"EEXIST\0"
    EISDIR = b"EISDIR\0"
    ENOENT = b"ENOENT\0"
    ENOMEM = b"ENOMEM\0"
    ENOSPC = b"ENOSPC\0"
    EIO = b"EIO\0"
    ENOTEMPTY = b"ENOTEMPTY\0"
    ENOSYS = b"ENOSYS\0"
    EROFS = b"EROFS\0"
    EBUSY = b"EBUSY\0"
    EAGAIN = b"EAGAIN\0"
    EISCONN = b"EISCONN\0"
    E2BIG = b"E2BIG\0"
    EPERM = b"EPERM\0"


Reply = bytes | Errno
"""What a request comes to: the payload of its reply, or an error. A value, so that the common path raises nothing."""


def encode(op: int, request_id: int, transaction_id: int, payload: bytes) -> bytes:
    """One packet. The caller has checked that `payload` is not longer than `PAYLOAD_MAX_BYTES`."""
    return HEADER.pack(op, request_id, transaction_id, len(payload)) + payload


class PacketParser:
    """Cuts a byte stream into packets, however it was torn.

    `broken` is None, or why the stream cannot be followed any longer (a payload length over the limit): the packets
    before that point are still good, everything after it is ignored.
    """

    __slots__ = ("_rest", "broken")

    def __init__(self) -> None:
        self._rest = b""
        self.broken: str | None = None

    @property
    def missing_bytes(self) -> int:
        """How many more bytes the next packet needs at least; 16 when nothing has come yet."""
        rest = self._rest
        if len(rest) < HEADER_BYTES:
            return HEADER_BYTES - len(rest)
        return HEADER_BYTES + int(HEADER.unpack_from(rest)[3]) - len(rest)

    def feed(self, data: bytes) -> list[Packet]:
        """Take what was read and return the packets it completes, in order."""
        if self.broken is not None:
            return []
        stream = self._rest + data if self._rest else data
        n_bytes, position = len(stream), 0
        packets: list[Packet] = []
        unpack = HEADER.unpack_from
        while n_bytes - position >= HEADER_BYTES:
            op, request_id, transaction_id, length = unpack(stream, position)
            if length > PAYLOAD_MAX_BYTES:
                self.broken = f"payload of {length} bytes; at most {PAYLOAD_MAX_BYTES} are allowed"
                self._rest = b""
                return packets
            start = position + HEADER_BYTES
            if start + length > n_bytes:
                break
            position = start + length
            packets.append((op, request_id, transaction_id, stream[start:position]))
        self._rest = stream[position:] if position else stream
        return packets

    def reset(self) -> None:
        """Forget a half-received packet and any error: the stream starts anew."""
        self._rest = b""
        self.broken = None


def single(payload: bytes) -> bytes | None:
    """The one NUL-terminated string a payload consists of, or None if it is anything else."""
    return payload[:-1] if payload and payload.find(0) == len(payload) - 1 else None


def strings(payload: bytes) -> list[bytes]:
    """All NUL-terminated strings at the start of a payload; bytes after the last NUL are no string."""
    return payload.split(b"\0")[:-1]


def number(text: bytes) -> int:
    """The decimal number a string starts with, 0 if there is none (C's atoi, which the protocol's numbers follow)."""
    text = text.lstrip(b" \t\n\v\f\r")
    end = 1 if text[:1] in (b"-", b"+") else 0
    while text[end : end + 1].isdigit():
        end += 1
    digits = text[:end]
    return int(digits) if digits[-1:].isdigit() and len(digits) < 20 else 0
