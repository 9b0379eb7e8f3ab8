# SPDX-License-Identifier: MIT
"""blkif, the block protocol: message layouts and constants.

The numpy dtypes *are* the wire layout of the x86_64 ABI. Source: Xen public/io/blkif.h. Sector numbers and segment
bounds are always in units of 512 bytes, whatever the disk's `sector-size`.
"""

from enum import IntEnum

import numpy as np

from paravirt.protocol.keys import MAX_RING_PAGE_ORDER as MAX_RING_PAGE_ORDER

NAME = "blkif"
SECTOR_BYTES = 512
PAGE_BYTES = 4096
MAX_SEGMENTS = 11
MAX_REQUEST_BYTES = MAX_SEGMENTS * PAGE_BYTES
INDIRECT_PAGE_SEGMENTS = 512
MAX_INDIRECT_SEGMENTS = 8 * INDIRECT_PAGE_SEGMENTS
DEFAULT_INDIRECT_SEGMENTS = 256
DISCARD_SECURE = 1


class Operation(IntEnum):
    """`operation` of a request."""

    READ = 0
    WRITE = 1
    WRITE_BARRIER = 2
    FLUSH_DISKCACHE = 3
    RESERVED = 4
    DISCARD = 5
    INDIRECT = 6


class Status(IntEnum):
    """`status` of a response."""

    OKAY = 0
    ERROR = -1
    EOPNOTSUPP = -2


class Info(IntEnum):
    """Bits of the backend's `info` key."""

    CDROM = 1
    REMOVABLE = 2
    READONLY = 4


SEGMENT = np.dtype(
    {
        "names": ["gref", "first_sect", "last_sect"],
        "formats": ["<u4", "u1", "u1"],
        "offsets": [0, 4, 5],
        "itemsize": 8,
    }
)

REQUEST = np.dtype(
    {
        "names": ["operation", "nr_segments", "handle", "id", "sector", "seg"],
        "formats": ["u1", "u1", "<u2", "<u8", "<u8", (SEGMENT, (MAX_SEGMENTS,))],
        "offsets": [0, 1, 2, 8, 16, 24],
        "itemsize": 112,
    }
)

DISCARD_REQUEST = np.dtype(
    {
        "names": ["operation", "flag", "handle", "id", "sector", "nr_sectors"],
        "formats": ["u1", "u1", "<u2", "<u8", "<u8", "<u8"],
        "offsets": [0, 1, 2, 8, 16, 24],
        "itemsize": 112,
    }
)

INDIRECT_REQUEST = np.dtype(
    {
        "names": ["operation", "indirect_op", "nr_segments", "id", "sector", "handle", "indirect_grefs"],
        "formats": ["u1", "u1", "<u2", "<u8", "<u8", "<u2", ("<u4", (8,))],
        "offsets": [0, 1, 2, 8, 16, 24, 28],
        "itemsize": 112,
    }
)

X86_32_REQUEST = np.dtype(
    {
        "names": ["operation", "nr_segments", "handle", "id", "sector", "seg"],
        "formats": ["u1", "u1", "<u2", "<u8", "<u8", (SEGMENT, (MAX_SEGMENTS,))],
        "offsets": [0, 1, 2, 4, 12, 20],
        "itemsize": 108,
    }
)
"""Of a frontend of 32 bits on x86. Responses are the same, in slots of that size."""

RESPONSE = np.dtype(
    {
        "names": ["id", "operation", "status"],
        "formats": ["<u8", "u1", "<i2"],
        "offsets": [0, 8, 10],
        "itemsize": 16,
    }
)


def ring_entries(page_order: int) -> int:
    """Slots of a blkif ring of 2**page_order pages: 32, 64, 128, 256, 512 for orders 0-4."""
    return 32 << page_order
