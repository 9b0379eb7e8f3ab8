# SPDX-License-Identifier: MIT
"""netif, the network protocol: message layouts and constants.

The numpy dtypes *are* the wire layout. Source: Xen public/io/netif.h. A packet takes one or more entries of a ring; the
size in the first request of one is that of the whole packet. The flags of receive responses are not those of transmit
requests: the two bits about checksums are swapped.
"""

from enum import IntEnum, IntFlag
from typing import Any

import numpy as np

Layout = np.dtype[Any]

TX_NAME = "netif-tx"
RX_NAME = "netif-rx"
PAGE_BYTES = 4096
MIN_FRAME_BYTES = 14
MAX_FRAME_BYTES = 65535
MIN_SLOTS = 18
"""Entries of one packet that every backend takes."""
MAX_RING_PAGE_ORDER = 4
"""Of a ring with ours; Xen's have one page."""


class TxFlag(IntFlag):
    """`flags` of a transmit request."""

    CSUM_BLANK = 1
    DATA_VALIDATED = 2
    MORE_DATA = 4
    EXTRA_INFO = 8


class RxFlag(IntFlag):
    """`flags` of a receive response."""

    DATA_VALIDATED = 1
    CSUM_BLANK = 2
    MORE_DATA = 4
    EXTRA_INFO = 8
    GSO_PREFIX = 16


class Status(IntEnum):
    """`status` of a transmit response; of a receive response where it is not a length."""

    DROPPED = -2
    ERROR = -1
    OKAY = 0
    NULL = 1


class Extra(IntEnum):
    """`type` of a slot of extra information."""

    NONE = 0
    GSO = 1
    MCAST_ADD = 2
    MCAST_DEL = 3
    HASH = 4
    XDP = 5


class GsoType(IntEnum):
    """Protocols whose large packets can be cut into segments."""

    NONE = 0
    TCPV4 = 1
    TCPV6 = 2


class Fatal(IntEnum):
    """Why a frontend's chain of requests ends its device, as Linux' netback has it."""

    SHORT = 1
    SLOTS = 2
    PAGE = 3
    NO_EXTRA = 4
    EXTRA = 5
    GSO_SIZE = 6
    GSO_TYPE = 7


FATAL_REASONS = {
    Fatal.SHORT: "more data was announced than there are requests",
    Fatal.SLOTS: "a packet has too many requests",
    Fatal.PAGE: "a request crosses its page",
    Fatal.NO_EXTRA: "extra information was announced and is missing",
    Fatal.EXTRA: "extra information of an unknown type",
    Fatal.GSO_SIZE: "segments of no bytes",
    Fatal.GSO_TYPE: "segments of an unknown protocol",
}


class CtrlType(IntEnum):
    """`type` of a request on the control ring."""

    GET_HASH_FLAGS = 1
    SET_HASH_FLAGS = 2
    SET_HASH_KEY = 3
    GET_MAPPING_SIZE = 4
    SET_MAPPING_SIZE = 5
    SET_MAPPING = 6
    SET_HASH_ALGORITHM = 7
    GET_GREF_MAPPING_SIZE = 8
    ADD_GREF_MAPPING = 9
    DEL_GREF_MAPPING = 10


class CtrlStatus(IntEnum):
    """`status` of a response on the control ring."""

    SUCCESS = 0
    NOT_SUPPORTED = 1
    INVALID_PARAMETER = 2
    BUFFER_OVERFLOW = 3


class HashAlgorithm(IntEnum):
    """How packets are hashed."""

    NONE = 0
    TOEPLITZ = 1


class HashFlag(IntFlag):
    """What is hashed: addresses, and the ports of TCP where that is asked for. The number of its bit is the `hash_type`
    of a frame.
    """

    IPV4 = 1
    IPV4_TCP = 2
    IPV6 = 4
    IPV6_TCP = 8


HASH_KEY_BYTES = 40
HASH_MAPPING_ENTRIES = 128
CTRL_NAME = "netif-ctrl"
GREF_ENTRY = np.dtype([("gref", "<u4"), ("flags", "<u2"), ("status", "<u2")])
"""An entry of a list of references to be mapped or unmapped."""
GREF_READONLY = 1
GREF_MAPPING_ENTRIES = 512
"""References that a backend of ours keeps mapped for a queue; a list of one page has as many."""
CTRL_REQUEST = np.dtype([("id", "<u2"), ("type", "<u2"), ("data", "<u4", (3,))])
CTRL_RESPONSE = np.dtype([("id", "<u2"), ("type", "<u2"), ("status", "<u4"), ("data", "<u4")])
TX_REQUEST = np.dtype([("gref", "<u4"), ("offset", "<u2"), ("flags", "<u2"), ("id", "<u2"), ("size", "<u2")])
TX_RESPONSE = np.dtype([("id", "<u2"), ("status", "<i2")])
RX_REQUEST = np.dtype([("id", "<u2"), ("pad", "<u2"), ("gref", "<u4")])
RX_RESPONSE = np.dtype([("id", "<u2"), ("offset", "<u2"), ("flags", "<u2"), ("status", "<i2")])
EXTRA_INFO = np.dtype([("type", "u1"), ("flags", "u1"), ("content", "u1", (6,))])
TX_ENTRY_BYTES = 12
RX_ENTRY_BYTES = 8

EXTRA_MORE = 1
"""Bit of `flags` of extra information: another slot of it follows."""


MAX_GROUPS = 64
"""That a backend filters by."""


class Mac(bytes):
    """An Ethernet address."""

    def __str__(self) -> str:
        return self.hex(":")

    @property
    def is_group(self) -> bool:
        """Of several stations: multicast or broadcast."""
        return bool(self[0] & 1)
