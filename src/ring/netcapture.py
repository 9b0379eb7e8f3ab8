# SPDX-License-Identifier: MIT
"""What passes legs of a loop, as the bytes of a capture file, in C (pv_netcapture.h)."""

import errno
import os
from enum import IntEnum, IntFlag
from typing import Any

from paravirt.errors import InvalidRequest, ResourceLimit
from paravirt.ring._core import ffi, lib
from paravirt.ring.netloop import Leg, NetLoop

CData = Any

DEFAULT_BYTES = 4 << 20
MIN_BYTES: int = lib.PV_NETCAPTURE_MIN_BYTES
MAX_BYTES: int = lib.PV_NETCAPTURE_MAX_BYTES
READ_BYTES = 262_144


class Format(IntEnum):
    """Of the file."""

    PCAPNG = lib.PV_NETCAPTURE_PCAPNG
    PCAP = lib.PV_NETCAPTURE_PCAP


class Direction(IntFlag):
    """As a leg's counters: in is what came from it, out what went to it."""

    IN = lib.PV_NETCAPTURE_IN
    OUT = lib.PV_NETCAPTURE_OUT
    BOTH = lib.PV_NETCAPTURE_BOTH


class CaptureRing:
    """Packets on their way from a loop to one reader; what finds no room is counted. Headers are the caller's."""

    def __init__(
        self,
        loop: NetLoop,
        *,
        snaplen: int = 0,
        format: Format = Format.PCAPNG,
        most: int = 0,
        n_bytes: int = DEFAULT_BYTES,
    ) -> None:
        """`snaplen`: bytes that are kept of a frame, 0: all. `most`: packets, then it is over; 0: any number.
        `n_bytes`: that wait for the reader, a power of two. Raises `InvalidRequest`, `ResourceLimit`.
        """
        if not MIN_BYTES <= n_bytes <= MAX_BYTES or n_bytes & (n_bytes - 1):
            raise InvalidRequest(
                f"a capture has {MIN_BYTES} to {MAX_BYTES} bytes waiting, a power of two, not {n_bytes}"
            )
        made = ffi.new("struct pv_netcapture **")
        if status := lib.pv_netcapture_new(n_bytes, snaplen, int(format), most, made):
            raise ResourceLimit(f"no memory for a capture: {os.strerror(-status)}")
        self._loop = loop
        self._core: CData = ffi.gc(made[0], lib.pv_netcapture_free)
        self._legs: list[Leg] = []
        self._buffer = bytearray(READ_BYTES)
        self._room = ffi.from_buffer("uint8_t[]", self._buffer)

    def add_interface(self, description: bytes = b"") -> int:
        """One more place where packets come from, and the block that says so. Its number. `ResourceLimit`."""
        with self._loop.still():
            if description and lib.pv_netcapture_put(self._core, description, len(description)):
                raise ResourceLimit("the reader of a capture is too slow for one more interface")
            return _checked(lib.pv_netcapture_add_interface(self._core))

    def put(self, content: bytes) -> None:
        """Bytes of the file that are no packets. `ResourceLimit`."""
        with self._loop.still():
            if lib.pv_netcapture_put(self._core, content, len(content)):
                raise ResourceLimit("there is no room in a capture")

    def attach(self, leg: Leg, interface: int, directions: Direction) -> None:
        """What passes the leg is of this interface from now on. `ResourceLimit`."""
        with self._loop.still():
            _checked(lib.pv_netcapture_attach(self._core, leg.core, interface, int(directions)))
        self._legs.append(leg)

    def forget(self, leg: Leg) -> None:
        """It was removed."""
        if leg in self._legs:
            self._legs.remove(leg)

    def finish(self) -> None:
        """No more packets; those that are there can be read. Harmless when repeated."""
        legs, self._legs = self._legs, []
        with self._loop.still():
            for leg in legs:
                lib.pv_netcapture_detach(self._core, leg.core)
            lib.pv_netcapture_finish(self._core)

    def count(self, interface: int) -> tuple[int, int]:
        """Frames that passed, and those of them that found no room."""
        seen, dropped = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        with self._loop.still():
            _checked(lib.pv_netcapture_count(self._core, interface, seen, dropped))
        return seen[0], dropped[0]

    # -- the reader

    def read(self) -> memoryview:
        """Bytes of the file that are there, perhaps none; good until the next call."""
        n: int = lib.pv_netcapture_read(self._core, self._room, READ_BYTES)
        return memoryview(self._buffer)[:n]

    @property
    def is_over(self) -> bool:
        """Nothing comes any more, and all was read."""
        return bool(lib.pv_netcapture_is_over(self._core))

    def sleep(self) -> bool:
        """Whether there is nothing to be read: then `fileno` becomes readable when there is, and `awake` follows."""
        return bool(lib.pv_netcapture_sleep(self._core))

    def awake(self) -> None:
        lib.pv_netcapture_awake(self._core)

    def fileno(self) -> int:
        fd: int = lib.pv_netcapture_fd(self._core)
        return fd


def _checked(status: int) -> int:
    if status == -errno.EINVAL:
        raise InvalidRequest("a capture of a leg that was removed, or of no interface")
    if status < 0:
        raise ResourceLimit(f"a capture: {os.strerror(-status)}")
    return status
