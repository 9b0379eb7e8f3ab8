# SPDX-License-Identifier: MIT
"""What a disk is to a backend."""

import re
from collections.abc import Sequence
from typing import Protocol

from paravirt.errors import InvalidRequest

SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Disk(Protocol):
    """Storage a backend serves. Offsets and lengths are in bytes and inside the disk: the backend has checked them.

    A call does all of it or raises `OSError`; the guest then sees an I/O error and other requests go on. One thread
    calls at a time.
    """

    size_bytes: int  # a multiple of sector_size
    sector_size: int  # bytes, a power of two from 512
    read_only: bool

    # Two kinds of disk are served in C, a batch in one call, and need none of the methods below but `close`: one that
    # is plain memory says where, one that is a file (its own `preadv` would do just that) gives the descriptor.
    memory: memoryview | None
    fd: int | None

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill all buffers from `offset` on."""

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all buffers at `offset`."""

    def flush(self) -> None:
        """Return when everything written before is on stable storage."""

    def close(self) -> None:
        """Free it; harmless when repeated."""


def parse_size(text: str, what: str) -> int:
    """Bytes of "4096", "64k", "16M", "1G"; a positive multiple of 512 or `InvalidRequest` naming `what`."""
    match = re.fullmatch(r"([0-9]{1,15})([kmgt]?)", text.strip().lower())
    size = int(match[1]) * SUFFIXES[match[2]] if match else 0
    if size <= 0 or size % 512:
        raise InvalidRequest(f"{what} {text!r} is not a positive multiple of 512 bytes (such as 64M)")
    return size
