# SPDX-License-Identifier: MIT
"""vbd negotiation as values: what each side writes to xenstore, and what it makes of the other side's keys.

Pure: `to_keys()` gives relative node names and texts, `from_keys()` takes the other end's and trusts none of it.
Source: Xen public/io/blkif.h; order of events after QEMU's xen-block.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from paravirt.errors import InvalidRequest, PeerError
from paravirt.protocol.blkif import MAX_RING_PAGE_ORDER, SECTOR_BYTES, Info
from paravirt.protocol.keys import Keys, RingRequest, number

XVD_MAJOR = 202
EXTENDED = 1 << 28
NATIVE_ABI = "x86_64-abi"

Mode = Literal["r", "w"]


def device_number(name: str) -> int:
    """The virtual device number of a name such as `xvda` or `xvdb3`.

    202<<8 | n<<4 | p while disk and partition numbers are below 16, else 1<<28 | n<<8 | p. `InvalidRequest` otherwise.
    """
    match = re.fullmatch(r"xvd([a-z]{1,3})([0-9]{0,3})", name)
    if match is None:
        raise InvalidRequest(f"device name {name!r} is not of the form xvda, xvdb ... or xvda1")
    disk = 0
    for letter in match[1]:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    disk -= 1
    partition = int(match[2] or 0)
    if partition > 255 or disk >= 1 << 20:
        raise InvalidRequest(f"device name {name!r} is out of range")
    if disk < 16 and partition < 16:
        return XVD_MAJOR << 8 | disk << 4 | partition
    return EXTENDED | disk << 8 | partition


def device_name(virtual_device: int) -> str:
    """The name of a virtual device number; `device_number` the other way round."""
    if virtual_device & EXTENDED:
        disk, partition = (virtual_device & ~EXTENDED) >> 8, virtual_device & 255
    elif virtual_device >> 8 == XVD_MAJOR:
        disk, partition = virtual_device >> 4 & 15, virtual_device & 15
    else:
        raise InvalidRequest(f"{virtual_device} is not the number of an xvd device")
    letters, rest = "", disk + 1
    while rest:
        rest, digit = divmod(rest - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return f"xvd{letters}{partition or ''}"


@dataclass(frozen=True, slots=True)
class VbdConfig:
    """What the toolstack writes into the backend's directory: the wish."""

    driver: str  # "file", "memory", perhaps with options: "file,direct=1"
    spec: str  # the driver's argument: a path, a size, the disk below a filter
    device: str  # "xvda"
    mode: Mode = "w"

    def to_keys(self) -> Keys:
        """Nodes of the backend directory besides the xenbus ones."""
        return {
            "params": f"{self.driver}:{self.spec}",
            "type": "qdisk",
            "dev": self.device,
            "device-type": "disk",
            "mode": self.mode,
            "removable": "0",
            "bootable": "1",
            "discard-enable": "0",
        }

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """The wish in a backend directory. Written by Dom0, still checked: `InvalidRequest`."""
        driver, colon, spec = keys.get("params", "").partition(":")
        if not colon:
            raise InvalidRequest(f"params is {keys.get('params', '')!r}, not DRIVER:SPEC")
        mode = keys.get("mode", "w")
        # As Linux reads it: anything without a w is read-only, so that a typing error never makes a disk writable.
        return cls(driver, spec, keys.get("dev", ""), "w" if "w" in mode else "r")


@dataclass(frozen=True, slots=True)
class VbdOffer:
    """What the backend publishes before INIT_WAIT."""

    sectors: int  # of 512 bytes
    sector_size: int  # bytes
    read_only: bool = False
    flush: bool = True
    max_ring_page_order: int = MAX_RING_PAGE_ORDER

    def to_keys(self) -> Keys:
        return {
            "feature-flush-cache": str(int(self.flush)),
            "feature-barrier": "0",
            "feature-discard": "0",
            "feature-persistent": "0",
            "max-ring-page-order": str(self.max_ring_page_order),
            "info": str(int(Info.READONLY) if self.read_only else 0),
            "sector-size": str(self.sector_size),
            "physical-sector-size": str(self.sector_size),
            "sectors": str(self.sectors),
        }

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """What a frontend makes of the backend's directory; defaults as blkif.h gives them."""
        sector_size = number(keys, "sector-size", SECTOR_BYTES)
        if sector_size < SECTOR_BYTES or sector_size > 65536 or sector_size & (sector_size - 1):
            raise PeerError(f"sector-size is {sector_size}, not a power of two from 512 to 65536")
        sectors = number(keys, "sectors", maximum=(1 << 55) - 1)
        if sectors * SECTOR_BYTES % sector_size:
            raise PeerError(f"sectors is {sectors}, not a whole number of {sector_size}-byte sectors")
        return cls(
            sectors=sectors,
            sector_size=sector_size,
            read_only=bool(number(keys, "info", 0) & Info.READONLY) or keys.get("mode", "w") == "r",
            flush=number(keys, "feature-flush-cache", 0) != 0,
            max_ring_page_order=min(number(keys, "max-ring-page-order", 0), MAX_RING_PAGE_ORDER),
        )


@dataclass(frozen=True, slots=True)
class VbdRequest:
    """What the frontend publishes with INITIALISED: its ring and port."""

    ring_refs: tuple[int, ...]  # 1, 2, 4, 8 or 16 grant references
    event_channel: int
    protocol: str = NATIVE_ABI

    def to_keys(self) -> Keys:
        ring = RingRequest(self.ring_refs, self.event_channel).to_keys()
        return {**ring, "protocol": self.protocol, "feature-persistent": "0"}

    @classmethod
    def from_keys(cls, keys: Mapping[str, str], *, max_ring_page_order: int = MAX_RING_PAGE_ORDER) -> Self:
        """What a backend makes of the frontend's directory: `PeerError` for anything it cannot serve."""
        protocol = keys.get("protocol", NATIVE_ABI)
        if protocol not in (NATIVE_ABI, "arm-abi"):  # arm-abi has the same layout
            raise PeerError(f"protocol is {protocol[:40]!r}; this backend speaks {NATIVE_ABI}")
        if number(keys, "multi-queue-num-queues", 1) != 1:
            raise PeerError("multi-queue-num-queues is not 1, and no multi-queue-max-queues was offered")
        ring = RingRequest.from_keys(keys, max_ring_page_order=max_ring_page_order)
        return cls(ring.ring_refs, ring.event_channel, protocol)
