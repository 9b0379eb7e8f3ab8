# SPDX-License-Identifier: MIT
"""What replay changes in a message: its id and its grant references, which are of another life."""

import struct
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from paravirt.errors import InvalidRequest
from paravirt.protocol import blkif
from paravirt.protocol.decode.entry import Entry
from paravirt.protocol.layout import MessagePair
from paravirt.protocol.recording import Header

_BLKIF_ID = struct.Struct("<Q")
_GREF = struct.Struct("<I")
_REQUEST_ID_AT, _SEGMENTS_AT, _SEGMENT_BYTES = 8, 24, 8


class Rewriter(ABC):
    """Of the messages of one protocol."""

    pages: int
    """Most that a request carries."""
    messages: MessagePair

    @abstractmethod
    def request(self, message: bytes, identity: int, grefs: list[int]) -> bytes:
        """With another id, and other pages in the place of those it has."""

    @abstractmethod
    def response(self, message: bytes, identity: int) -> bytes:
        """With another id."""

    def is_read_only(self, entry: Entry) -> bool:
        """Whether a back end only reads the pages of this request."""
        return False

    def is_read(self, entry: Entry) -> bool:
        """Whether it fills the pages of this request."""
        return False

    def can_replay(self, entry: Entry) -> bool:
        """Whether such a request can be sent again."""
        return True


class BlkifRewriter(Rewriter):
    """Block devices."""

    pages = blkif.MAX_SEGMENTS
    messages = MessagePair(blkif.REQUEST, blkif.RESPONSE)

    def request(self, message: bytes, identity: int, grefs: list[int]) -> bytes:
        changed = bytearray(message)
        _BLKIF_ID.pack_into(changed, _REQUEST_ID_AT, identity)
        for i, gref in enumerate(grefs):
            _GREF.pack_into(changed, _SEGMENTS_AT + i * _SEGMENT_BYTES, gref)
        return bytes(changed)

    def response(self, message: bytes, identity: int) -> bytes:
        return _BLKIF_ID.pack(identity) + message[_BLKIF_ID.size :]

    def is_read_only(self, entry: Entry) -> bool:
        return entry.kind in ("write", "barrier")

    def is_read(self, entry: Entry) -> bool:
        return entry.kind == "read"

    def can_replay(self, entry: Entry) -> bool:
        return not entry.kind.startswith("indirect")  # its segments stand in a page that was not recorded


class DeclaredRewriter(Rewriter):
    """Devices of a declared class."""

    def __init__(self, messages: MessagePair) -> None:
        """Raises `InvalidRequest` for messages without an id."""
        for message in (messages.request, messages.response):
            kind = message["id"].kind if message.names and "id" in message.names else ""
            if kind != "u":
                raise InvalidRequest("the messages of this recording have no id, so that answers cannot be told apart")
        self.messages = messages
        grefs = messages.request["gref"] if "gref" in (messages.request.names or ()) else None
        self.pages = 0 if grefs is None or grefs.subdtype is None else int(grefs.subdtype[1][0])

    def request(self, message: bytes, identity: int, grefs: list[int]) -> bytes:
        changed = self._changed(message, self.messages.request, identity)
        if self.pages:
            changed["gref"][0, : len(grefs)] = grefs
        return bytes(changed.tobytes())

    def response(self, message: bytes, identity: int) -> bytes:
        return bytes(self._changed(message, self.messages.response, identity).tobytes())

    @staticmethod
    def _changed(message: bytes, dtype: "np.dtype[Any]", identity: int) -> Any:
        changed = np.frombuffer(bytearray(message), dtype, 1)
        changed["id"] = identity % (1 << 8 * dtype["id"].itemsize)
        return changed


def rewriter_for(header: Header) -> Rewriter:
    """For the messages of a recording. Raises `InvalidRequest` when they cannot be replayed."""
    if header.protocol in (blkif.NAME, "vbd"):
        made: Rewriter = BlkifRewriter()
    elif header.messages is not None:
        made = DeclaredRewriter(header.messages)
    else:
        raise InvalidRequest(f"the layout of {header.protocol} is not in the recording; name its driver with --driver")
    sizes = (made.messages.request.itemsize, made.messages.response.itemsize)
    if sizes != (header.request_bytes, header.response_bytes):
        raise InvalidRequest(f"messages of {sizes} bytes do not fit the recording of {header.protocol}")
    return made
