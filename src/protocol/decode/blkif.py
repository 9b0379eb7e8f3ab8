# SPDX-License-Identifier: MIT
"""Entries of block devices, of the x86_64 and x86_32 ABIs. Source: Xen public/io/blkif.h."""

import struct
from typing import Any

from paravirt.protocol.blkif import (
    MAX_SEGMENTS,
    PAGE_BYTES,
    REQUEST,
    RESPONSE,
    SECTOR_BYTES,
    X86_32_REQUEST,
    Operation,
    Status,
)
from paravirt.protocol.decode.entry import Decoder, Entry, fitted

_HEAD = struct.Struct("<BBHIQQ")  # operation, segments or flag, handle, padding, id, sector
_SEGMENT = struct.Struct("<IBBH")
_SEGMENTS_AT = 24
_DISCARDED = struct.Struct("<Q")
_INDIRECT = struct.Struct("<BBHIQQHH8I")
_RESPONSE = struct.Struct("<QBBhI")
_SECTORS_A_PAGE = PAGE_BYTES // SECTOR_BYTES
_SEGMENTS_A_PAGE = 512
_MAX_INDIRECT = 8 * _SEGMENTS_A_PAGE
_SECURE = 1

_NAMES = {
    Operation.READ: "read",
    Operation.WRITE: "write",
    Operation.WRITE_BARRIER: "barrier",
    Operation.FLUSH_DISKCACHE: "flush",
    Operation.DISCARD: "discard",
    Operation.INDIRECT: "indirect",
}


def _name(operation: int) -> tuple[str, list[str]]:
    name = _NAMES.get(operation)  # type: ignore[call-overload]
    return (name, []) if name else (f"operation-{operation}", [f"no operation {operation}"])


class BlkifDecoder(Decoder):
    """Requests of 112 or 108 bytes and responses of 16."""

    def request(self, message: bytes) -> Entry:
        if len(message) == X86_32_REQUEST.itemsize:
            # There the id follows at once; all else is the same.
            message = message[:4] + bytes(4) + message[4:]
        message, short = fitted(message, REQUEST.itemsize)
        operation, n_segments, handle, _, identity, sector = _HEAD.unpack_from(message)
        name, wrong = _name(operation)
        wrong[:0] = short
        if operation == Operation.INDIRECT:
            return self._indirect(message, wrong)
        fields: dict[str, Any] = {"sector": sector}
        if operation == Operation.DISCARD:
            (fields["sectors"],) = _DISCARDED.unpack_from(message, _SEGMENTS_AT)
            if n_segments & _SECURE:
                fields["secure"] = True
            return Entry(name, identity, fields=fields, wrong=tuple(wrong))
        flush = operation == Operation.FLUSH_DISKCACHE
        if n_segments > MAX_SEGMENTS:
            wrong.append(f"{n_segments} segments, of {MAX_SEGMENTS}")
        elif n_segments == 0 and not flush and operation != Operation.WRITE_BARRIER:
            wrong.append("no segments")
        segments = self._segments(message, min(n_segments, MAX_SEGMENTS), wrong)
        if flush and not segments:
            fields = {}
        if handle:
            fields["handle"] = handle
        if segments:
            fields["sectors"] = sum(max(0, segment["last"] - segment["first"] + 1) for segment in segments)
            fields["segments"] = segments
        return Entry(name, identity, None, fields, tuple(each["gref"] for each in segments), tuple(wrong))

    @staticmethod
    def _segments(message: bytes, n: int, wrong: list[str]) -> list[dict[str, int]]:
        segments = []
        for i in range(n):
            gref, first, last, _ = _SEGMENT.unpack_from(message, _SEGMENTS_AT + i * _SEGMENT.size)
            if first > last or last >= _SECTORS_A_PAGE:
                wrong.append(f"segment {i} has sectors {first} to {last}")
            segments.append({"gref": gref, "first": first, "last": last})
        return segments

    @staticmethod
    def _indirect(message: bytes, wrong: list[str]) -> Entry:
        _, operation, n_segments, _, identity, sector, handle, _, *grefs = _INDIRECT.unpack_from(message)
        name, unknown = _name(operation)
        wrong += unknown
        if operation not in (Operation.READ, Operation.WRITE) and not unknown:
            wrong.append(f"an indirect {name}")
        if not 0 < n_segments <= _MAX_INDIRECT:
            wrong.append(f"{n_segments} segments, of {_MAX_INDIRECT}")
        pages = min(-(-n_segments // _SEGMENTS_A_PAGE), len(grefs))
        fields = {"sector": sector, "segments": n_segments, "of": grefs[:pages]}
        if handle:
            fields["handle"] = handle
        return Entry(f"indirect-{name}", identity, None, fields, tuple(grefs[:pages]), tuple(wrong))

    def response(self, message: bytes) -> Entry:
        message, short = fitted(message, RESPONSE.itemsize)
        identity, operation, _, status, _ = _RESPONSE.unpack(message)
        name, wrong = _name(operation)
        known = {int(value): value.name.lower() for value in Status}
        if status not in known:
            wrong.append(f"no status {status}")
        return Entry(name, identity, status, {"is": known.get(status, "unknown")}, (), (*short, *wrong))
