# SPDX-License-Identifier: MIT
"""The fields of a domain's xenstore page beside its two byte streams.

Sources: Xen public/io/xs_wire.h, docs/misc/xenstore-ring.txt.
Both sides may write the page at any time: each field is read once and is only a hint of what the other side wants.
"""

import struct
from enum import IntEnum, IntFlag
from typing import Final

from paravirt.ring.memory import Mapping

_INDEXES: Final = struct.Struct("<4I")
_INDEXES_AT: Final = 2048
_WORD: Final = struct.Struct("<I")
_FEATURES_AT: Final = 2064
_CONNECTION_AT: Final = 2068
_ERROR_AT: Final = 2072
_UPDATING_AT: Final = 2080
"""After all that Xen has there: a word of ours, which other guests do not look at."""


class Feature(IntFlag):
    """What the server can do, told to the guest."""

    RECONNECTION = 1
    ERROR = 2
    WATCH_DEPTH = 4
    DOMID_ANY = 8


class State(IntEnum):
    """The connection field."""

    CONNECTED = 0
    RECONNECT = 1
    """Asked for by the guest: start anew with empty streams."""


class RingError(IntEnum):
    """Why the server does not serve this guest any longer."""

    NONE = 0
    COMMUNICATION = 1
    INDEX = 2
    PROTOCOL = 3


class RingPage:
    """One mapped page."""

    def __init__(self, mapping: Mapping | memoryview) -> None:
        self.view = mapping.view if isinstance(mapping, Mapping) else mapping

    def _get(self, offset: int) -> int:
        return int(_WORD.unpack_from(self.view, offset)[0])

    @property
    def features(self) -> int:
        return self._get(_FEATURES_AT)

    @features.setter
    def features(self, value: int) -> None:
        _WORD.pack_into(self.view, _FEATURES_AT, value)

    @property
    def state(self) -> int:
        return self._get(_CONNECTION_AT)

    @state.setter
    def state(self, value: int) -> None:
        _WORD.pack_into(self.view, _CONNECTION_AT, value)

    @property
    def error(self) -> int:
        return self._get(_ERROR_AT)

    @error.setter
    def error(self, value: int) -> None:
        _WORD.pack_into(self.view, _ERROR_AT, value)

    @property
    def updating(self) -> bool:
        """The daemon is replacing itself: its event channel is gone for a moment, the streams stay as they are."""
        return self._get(_UPDATING_AT) != 0

    @updating.setter
    def updating(self, value: bool) -> None:
        _WORD.pack_into(self.view, _UPDATING_AT, int(value))

    def empty_streams(self) -> None:
        """Both streams start again at index 0. The server's alone, while the guest waits for it."""
        _INDEXES.pack_into(self.view, _INDEXES_AT, 0, 0, 0, 0)
