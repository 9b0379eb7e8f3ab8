# SPDX-License-Identifier: MIT
"""The file of a recorded ring: every request and response with its time, and what a reader needs to understand them.

A capture file (pcapng) of one interface, the ring, so that its tools open it and a file whose writer was killed is
good up to there. A packet is one message behind a head of eight bytes: what it is, and its index in the ring. The
comment of the interface says which ring that was, as JSON with a check sum.
"""

import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, BinaryIO, Final, Self

from paravirt.errors import InvalidRequest
from paravirt.protocol import pcapng
from paravirt.protocol.decode.entry import printable
from paravirt.protocol.layout import MessagePair
from paravirt.protocol.pcapng import DamagedFile, TornFile

VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 65536
MAX_TEXT: Final = 256
MAX_OFFERED: Final = 64
_NUMBERS = ("domid", "entries", "entry_bytes", "request_bytes", "response_bytes", "started_ns")
_HEAD = struct.Struct("<BBHI")
_COMMENT = re.compile(r"paravirt-ring ([0-9]{1,4}) (\{.*\}) ([0-9a-f]{8})", re.ASCII | re.DOTALL)


class Kind(IntEnum):
    """What a record holds."""

    REQUEST = 0
    RESPONSE = 1


@dataclass(frozen=True, slots=True)
class Header:
    """Which ring was recorded."""

    device: str
    """As rings are named: `vbd/1/51712`."""
    protocol: str
    """As its ends call it: that of a decoder, or the class of the device."""
    domid: int
    """Of the front end."""
    end: str
    """Where it was recorded: "front" or "back"."""
    entries: int
    entry_bytes: int
    request_bytes: int
    response_bytes: int
    started_ns: int
    """Since 1970."""
    host: str = ""
    messages: MessagePair | None = None
    """Of a declared class, where the recorder knew it."""
    offer: Mapping[str, str] = field(default_factory=dict)
    """What the back end had published: for one that answers in its place."""

    def to_json(self) -> dict[str, Any]:
        """Of plain values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["offer"] = dict(self.offer)
        return {**values, "messages": None if self.messages is None else self.messages.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Raises `InvalidRequest`, with the name of what is wrong."""
        if not isinstance(value, dict):
            raise InvalidRequest("the description of the ring is no mapping")
        texts: dict[str, Any] = {name: value.get(name, "") for name in ("device", "protocol", "end", "host")}
        numbers: dict[str, Any] = {name: value.get(name) for name in _NUMBERS}
        for name, text in texts.items():
            if not isinstance(text, str) or len(text) > MAX_TEXT:
                raise InvalidRequest(f"{name} of the ring is {text!r:.60}")
        for name, number in numbers.items():
            least, most = (1, MAX_MESSAGE_BYTES) if name.endswith("_bytes") else (0, (1 << 63) - 1)
            if type(number) is not int or not least <= number <= most:
                raise InvalidRequest(f"{name} of the ring is {number!r:.60}")
        if texts["end"] not in ("front", "back"):
            raise InvalidRequest(f"the end of the ring is {texts['end']!r:.60}")
        described = value.get("messages")
        messages = None if described is None else MessagePair.from_json(described)
        return cls(**texts, **numbers, messages=messages, offer=_parse_offer(value.get("offer", {})))

    @property
    def summary(self) -> str:
        """For people, in one line."""
        ring = (
            f"{self.device} of domain {self.domid}, {self.protocol}, {self.entries} entries of {self.entry_bytes} bytes"
        )
        return printable(f"{ring}, recorded at its {self.end} end" + (f", on {self.host}" if self.host else ""))

    def with_messages(self, messages: MessagePair) -> Self:
        """With the layout of its messages from elsewhere."""
        return replace(self, messages=messages)

    @property
    def comment(self) -> str:
        """As it stands in the file."""
        text = json.dumps(self.to_json(), separators=(",", ":"))
        return f"paravirt-ring {VERSION} {text} {zlib.crc32(text.encode()):08x}"

    @classmethod
    def from_comment(cls, comment: str) -> Self:
        """Raises `InvalidRequest`."""
        found = _COMMENT.fullmatch(comment)
        if found is None:
            raise InvalidRequest("this capture is not a recording of a ring")
        version, text, checked = found.groups()
        if int(version) != VERSION:
            raise InvalidRequest(f"version {version} of a recording; this program reads version {VERSION}")
        if int(checked, 16) != zlib.crc32(text.encode()):
            raise InvalidRequest("the check sum of the description of the ring is wrong")
        try:
            return cls.from_json(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"the description of the ring: {error}") from error


def _parse_offer(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_OFFERED:
        raise InvalidRequest(f"the offer of the back end is {value!r:.60}")
    for name, text in value.items():
        if re.fullmatch("[A-Za-z0-9_-]{1,64}", name) is None or not isinstance(text, str) or len(text) > MAX_TEXT:
            raise InvalidRequest(f"the back end offered {name!r:.60}, {text!r:.60}")
    return value


@dataclass(frozen=True, slots=True)
class Record:
    """One message."""

    time_ns: int
    """Since 1970."""
    kind: Kind
    index: int
    """In the ring: runs freely over 32 bits."""
    message: bytes
    lost: int = 0
    """Messages that were lost before this one."""


class Writer:
    """Appends to a file that was opened for writing; the caller closes it."""

    def __init__(self, file: BinaryIO, header: Header) -> None:
        self._file, self._inbound = file, Kind.REQUEST if header.end == "back" else Kind.RESPONSE
        self.records = self.lost = 0
        self._lost_now = 0
        self._last_ns = header.started_ns
        file.write(pcapng.section({pcapng.SECTION_APPLICATION: b"paravirt ring record"}))
        file.write(pcapng.interface(header.device, header.comment))

    def write(self, time_ns: int, kind: Kind, index: int, message: bytes) -> None:
        """Append one message."""
        flags = pcapng.INBOUND if kind is self._inbound else pcapng.OUTBOUND
        data = _HEAD.pack(kind, 0, 0, index) + message
        self._file.write(pcapng.packet(0, time_ns, data, flags, dropped=self._lost_now))
        self._lost_now, self._last_ns = 0, time_ns
        self.records += 1

    def note_lost(self, n: int) -> None:
        """So many messages were lost before the next one."""
        self.lost += n
        self._lost_now += n

    def finish(self) -> None:
        """Say that this is all."""
        self._file.write(pcapng.statistics(0, self._last_ns, received=self.records, dropped=self.lost))
        self._file.flush()


class Reader:
    """Reads a recording from a file that was opened for reading; the caller closes it. Iterate once."""

    def __init__(self, file: BinaryIO) -> None:
        """Reads up to the description of the ring. Raises `DamagedFile`."""
        self._blocks = pcapng.read_blocks(file)
        self.torn: str | None = None
        """Why there is no more, when the file has no end."""
        self.lost = 0
        self.header = self._find_header()

    def _find_header(self) -> Header:
        offset = 0
        for block in self._blocks:
            offset = block.offset
            if block.kind == pcapng.INTERFACE:
                _, comment = pcapng.parse_interface(block)
                try:
                    return Header.from_comment(comment)
                except InvalidRequest as error:
                    raise DamagedFile(offset, str(error)) from error
            if block.kind != pcapng.SECTION:
                break
        raise DamagedFile(offset, "this is no recording of a ring")

    def __iter__(self) -> Iterator[Record]:
        """All records, in the order of the file. A torn tail ends them, see `torn`. Raises `DamagedFile`."""
        self.torn = "the recording was not ended: its writer was killed, or is still at it"
        try:
            for block in self._blocks:
                if block.kind == pcapng.STATISTICS:
                    self.torn = None
                elif block.kind == pcapng.PACKET:
                    yield self._record(block)
        except TornFile as error:
            self.torn = str(error)

    def _record(self, block: pcapng.Block) -> Record:
        packet = pcapng.parse_packet(block)
        if packet.interface != 0 or len(packet.data) < _HEAD.size:
            raise DamagedFile(block.offset, "a packet that is no message of the ring")
        kind, _, _, index = _HEAD.unpack_from(packet.data)
        if kind not in (Kind.REQUEST, Kind.RESPONSE):
            raise DamagedFile(block.offset, f"a record of kind {kind}")
        self.lost += packet.dropped
        return Record(packet.time_ns, Kind(kind), index, packet.data[_HEAD.size :], packet.dropped)
