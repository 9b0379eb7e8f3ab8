# SPDX-License-Identifier: MIT
"""NBD as values: the client's half of the fixed newstyle handshake, requests, simple and structured replies.

Pure: bytes in, values out; everything a server sends is checked. Source: the NBD protocol, doc/proto.md of
NetworkBlockDevice/nbd.
"""

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Self

from paravirt.errors import PeerError

PORT = 10809
MAX_STRING_BYTES = 4096
MAX_OPTION_REPLY_BYTES = 1 << 16
DEFAULT_MAX_PAYLOAD_BYTES = 32 << 20

GREETING = struct.Struct(">8s8sH")  # "NBDMAGIC", "IHAVEOPT", HandshakeFlag
OPTION = struct.Struct(">8sII")  # "IHAVEOPT", Option, bytes that follow
OPTION_REPLY = struct.Struct(">QIII")  # magic, the option, Reply, bytes that follow
EXPORT = struct.Struct(">QH")  # bytes, TransmissionFlag
BLOCK_SIZES = struct.Struct(">III")  # least, preferred, most
REQUEST = struct.Struct(">IHHQQI")  # magic, flags, Command, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
STRUCTURED_REPLY = struct.Struct(">IHHQI")  # magic, flags, Chunk, cookie, bytes that follow
HOLE = struct.Struct(">QI")  # offset, length
ERROR = struct.Struct(">IH")  # error, bytes of a message
OFFSET = struct.Struct(">Q")

OLD_MAGIC = b"\x00\x00\x42\x02\x81\x86\x12\x53"
NEW_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
CHUNK_DONE = 1  # flag of a structured reply: the last of its request


class HandshakeFlag(IntFlag):
    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    GO = 7
    STRUCTURED_REPLY = 8


class Reply(IntEnum):
    """To an option. Those from `ERROR` on are refusals."""

    ACK = 1
    INFO = 3
    ERROR = 1 << 31
    UNSUPPORTED = (1 << 31) + 1
    POLICY = (1 << 31) + 2
    INVALID = (1 << 31) + 3
    TLS_REQUIRED = (1 << 31) + 5
    UNKNOWN = (1 << 31) + 6
    SHUTDOWN = (1 << 31) + 7
    BLOCK_SIZE_REQUIRED = (1 << 31) + 8


REFUSALS: dict[int, str] = {
    Reply.POLICY: "it does not let us",
    Reply.TLS_REQUIRED: "it wants TLS, which this client has not",
    Reply.UNKNOWN: "it has no such export",
    Reply.SHUTDOWN: "it is shutting down",
}


class Info(IntEnum):
    EXPORT = 0
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISCONNECT = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


class Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


# The numbers that may stand on the wire; they are Linux' own.
ERRNOS = (
    errno.EPERM,
    errno.EIO,
    errno.ENOMEM,
    errno.EINVAL,
    errno.ENOSPC,
    errno.EOVERFLOW,
    errno.EOPNOTSUPP,
    errno.ESHUTDOWN,
)


def errno_of(code: int) -> int:
    """What an error on the wire means here; EINVAL for one that has no meaning, as the protocol wants it."""
    return code if code in ERRNOS else errno.EINVAL


@dataclass(frozen=True, slots=True)
class Export:
    """What a server says of the export it serves."""

    size_bytes: int
    flags: TransmissionFlag
    least_block_bytes: int = 1
    preferred_block_bytes: int = 4096
    most_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES  # in one read or write

    @classmethod
    def from_wire(cls, export: bytes, block_sizes: bytes | None) -> Self:
        """From the payloads of two INFO replies (their type cut off); `PeerError` for what cannot be."""
        if len(export) != EXPORT.size:
            raise PeerError(f"an export of {len(export)} bytes, not {EXPORT.size}")
        size, flags = EXPORT.unpack(export)
        if size >= 1 << 63:
            raise PeerError(f"an export of {size} bytes")
        if block_sizes is None:
            return cls(size, TransmissionFlag(flags))
        if len(block_sizes) != BLOCK_SIZES.size:
            raise PeerError(f"block sizes of {len(block_sizes)} bytes, not {BLOCK_SIZES.size}")
        least, preferred, most = BLOCK_SIZES.unpack(block_sizes)
        powers = all(size and not size & (size - 1) for size in (least, preferred))
        if not powers or least > 1 << 16 or preferred < max(512, least):
            raise PeerError(f"block sizes {least} and {preferred}")
        if most < preferred or (most % least and most != 0xFFFFFFFF):
            raise PeerError(f"a largest block of {most} with blocks of {least} and {preferred}")
        return cls(size, TransmissionFlag(flags), least, preferred, min(most, DEFAULT_MAX_PAYLOAD_BYTES))


def option(code: Option, data: bytes = b"") -> bytes:
    """An option as it is sent."""
    return OPTION.pack(NEW_MAGIC, code, len(data)) + data


def go(export: bytes) -> bytes:
    """The data of GO: the name, and that we want to know block sizes."""
    return struct.pack(">I", len(export)) + export + struct.pack(">HH", 1, Info.BLOCK_SIZE)


def request(command: Command, cookie: int, offset: int, length: int) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, 0, command, cookie, offset, length)
