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
from paravirt.protocol.blkif import (
    DEFAULT_INDIRECT_SEGMENTS,
    MAX_INDIRECT_SEGMENTS,
    MAX_RING_PAGE_ORDER,
    MAX_SEGMENTS,
    SECTOR_BYTES,
    Info,
)
from paravirt.protocol.keys import RING_KEYS, Keys, RingRequest, number

XVD_MAJOR = 202
EXTENDED = 1 << 28
NATIVE_ABI = "x86_64-abi"
X86_32_ABI = "x86_32-abi"
MAX_QUEUES = 256
"""Of one device; blkif.h gives no limit."""
ABIS = (NATIVE_ABI, "arm-abi", X86_32_ABI)  # arm-abi has the layout of x86_64-abi

Mode = Literal["r", "w"]
DeviceType = Literal["disk", "cdrom"]


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

    driver: str  # "file", "memory", "null"
    spec: str  # the driver's argument: a path, a size
    device: str  # "xvda"
    mode: Mode = "w"
    device_type: DeviceType = "disk"
    removable: bool = False
    discard: bool = True  # where the disk can

    def to_keys(self) -> Keys:
        """Nodes of the backend directory besides the xenbus ones."""
        return {
            "params": f"{self.driver}:{self.spec}",
            "type": "qdisk",
            "dev": self.device,
            "device-type": self.device_type,
            "mode": self.mode,
            "removable": str(int(self.removable)),
            "bootable": "1",
            "discard-enable": str(int(self.discard)),
        }

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """The wish in a backend directory. Written by Dom0, still checked: `InvalidRequest`."""
        driver, colon, spec = keys.get("params", "").partition(":")
        if not colon:
            raise InvalidRequest(f"params is {keys.get('params', '')!r}, not DRIVER:SPEC")
        mode, device_type = keys.get("mode", "w"), keys.get("device-type", "disk")
        if device_type not in ("disk", "cdrom"):
            raise InvalidRequest(f"device-type is {device_type[:40]!r}, not disk or cdrom")
        return cls(
            driver,
            spec,
            keys.get("dev", ""),
            # As Linux reads it: anything without a w is read-only, so that a typing error never makes a disk writable.
            "w" if "w" in mode else "r",
            "cdrom" if device_type == "cdrom" else "disk",
            removable=keys.get("removable", "0") == "1",
            discard=keys.get("discard-enable", "1") != "0",
        )


@dataclass(frozen=True, slots=True)
class VbdOffer:
    """What the backend publishes before INIT_WAIT."""

    sectors: int  # of 512 bytes
    sector_size: int  # bytes
    read_only: bool = False
    flush: bool = True
    max_ring_page_order: int = MAX_RING_PAGE_ORDER
    barrier: bool = False
    discard: bool = False
    discard_granularity: int = 0  # bytes; 0: sector_size
    discard_alignment: int = 0  # bytes
    discard_secure: bool = False
    max_indirect_segments: int = DEFAULT_INDIRECT_SEGMENTS  # of one request; 0: none of that kind
    physical_sector_size: int = 0  # bytes; 0: sector_size
    removable: bool = False
    cdrom: bool = False
    max_queues: int = 1
    persistent: bool = False

    def to_keys(self) -> Keys:
        info = Info.READONLY * self.read_only | Info.REMOVABLE * self.removable | Info.CDROM * self.cdrom
        keys = {
            "feature-flush-cache": str(int(self.flush)),
            "feature-barrier": str(int(self.barrier)),
            "feature-discard": str(int(self.discard)),
            "feature-persistent": str(int(self.persistent)),
            "feature-max-indirect-segments": str(self.max_indirect_segments),
            "max-ring-page-order": str(self.max_ring_page_order),
            "multi-queue-max-queues": str(self.max_queues),
            "info": str(info),
            "sector-size": str(self.sector_size),
            "physical-sector-size": str(self.physical_sector_size or self.sector_size),
            "sectors": str(self.sectors),
        }
        if self.discard:
            keys["discard-granularity"] = str(self.discard_granularity or self.sector_size)
            keys["discard-alignment"] = str(self.discard_alignment)
            keys["discard-secure"] = str(int(self.discard_secure))
        return keys

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """What a frontend makes of the backend's directory; defaults as blkif.h gives them."""
        sector_size = _sector_size(keys, "sector-size", SECTOR_BYTES)
        sectors = number(keys, "sectors", maximum=(1 << 55) - 1)
        if sectors * SECTOR_BYTES % sector_size:
            raise PeerError(f"sectors is {sectors}, not a whole number of {sector_size}-byte sectors")
        info = number(keys, "info", 0)
        discard = _flag(keys, "feature-discard") and _flag(keys, "discard-enable", 1)
        indirect = min(number(keys, "feature-max-indirect-segments", 0), MAX_INDIRECT_SEGMENTS)
        return cls(
            sectors=sectors,
            sector_size=sector_size,
            read_only=bool(info & Info.READONLY) or keys.get("mode", "w") == "r",
            flush=_flag(keys, "feature-flush-cache"),
            max_ring_page_order=min(number(keys, "max-ring-page-order", 0), MAX_RING_PAGE_ORDER),
            barrier=_flag(keys, "feature-barrier"),
            discard=discard,
            discard_granularity=number(keys, "discard-granularity", sector_size) if discard else 0,
            discard_alignment=number(keys, "discard-alignment", 0) if discard else 0,
            discard_secure=discard and _flag(keys, "discard-secure"),
            # As many as a direct request can have are no gain.
            max_indirect_segments=indirect if indirect > MAX_SEGMENTS else 0,
            physical_sector_size=_sector_size(keys, "physical-sector-size", sector_size),
            removable=bool(info & Info.REMOVABLE),
            cdrom=bool(info & Info.CDROM) or keys.get("device-type") == "cdrom",
            max_queues=max_queues(keys),
            persistent=_flag(keys, "feature-persistent"),
        )


OFFER_KEYS = (
    *VbdOffer(0, SECTOR_BYTES, discard=True).to_keys(),
    "mode",
    "device-type",
    "discard-enable",
)
"""What `VbdOffer.from_keys` looks at."""


QUEUES_KEY = "multi-queue-max-queues"
"""Read by a frontend before it makes its rings, with `max_queues`."""


def max_queues(keys: Mapping[str, str]) -> int:
    """Queues that a backend takes; 1 when it does not say, or says 0."""
    return min(max(number(keys, QUEUES_KEY, 1), 1), MAX_QUEUES)


def _flag(keys: Mapping[str, str], name: str, default: int = 0) -> bool:
    return number(keys, name, default) != 0


def _sector_size(keys: Mapping[str, str], name: str, default: int) -> int:
    size = number(keys, name, default)
    if size < SECTOR_BYTES or size > 65536 or size & (size - 1):
        raise PeerError(f"{name} is {size}, not a power of two from 512 to 65536")
    return size


_NUM_QUEUES = "multi-queue-num-queues"
_ORDER = "ring-page-order"

REQUEST_KEYS = (*RING_KEYS, "protocol", "feature-persistent", _NUM_QUEUES)
"""What `VbdRequest.from_keys` looks at first; with several queues also at `queue_keys`."""


def queue_keys(n_queues: int) -> tuple[str, ...]:
    """Where the rings and ports of several queues stand: each in a directory of its own."""
    return tuple(f"queue-{queue}/{name}" for queue in range(n_queues) for name in RING_KEYS if name != _ORDER)


@dataclass(frozen=True, slots=True)
class VbdRequest:
    """What the frontend publishes with INITIALISED: its queues, each a ring and a port."""

    queues: tuple[RingRequest, ...]  # 1 or more, with as many pages each
    protocol: str = NATIVE_ABI
    persistent: bool = False

    @classmethod
    def single(cls, ring_refs: tuple[int, ...], event_channel: int, protocol: str = NATIVE_ABI) -> Self:
        """Of a frontend with one queue."""
        return cls((RingRequest(ring_refs, event_channel),), protocol)

    def to_keys(self) -> Keys:
        keys = {"protocol": self.protocol, "feature-persistent": str(int(self.persistent))}
        if len(self.queues) == 1:
            return {**self.queues[0].to_keys(), **keys}
        keys[_NUM_QUEUES] = str(len(self.queues))
        for i, queue in enumerate(self.queues):
            ring = queue.to_keys()
            if _ORDER in ring:  # the same one for all of them
                keys[_ORDER] = ring.pop(_ORDER)
            keys |= {f"queue-{i}/{name}": text for name, text in ring.items()}
        return keys

    @staticmethod
    def count_queues(keys: Mapping[str, str], max_queues: int) -> int:
        """How many a frontend wants. `PeerError` for none, and for more than were offered."""
        n_queues = number(keys, _NUM_QUEUES, 1)
        if not 1 <= n_queues <= max_queues:
            raise PeerError(f"{_NUM_QUEUES} is {n_queues}, not from 1 to the {max_queues} that are offered")
        return n_queues

    @classmethod
    def from_keys(
        cls, keys: Mapping[str, str], *, max_ring_page_order: int = MAX_RING_PAGE_ORDER, max_queues: int = 1
    ) -> Self:
        """What a backend makes of the frontend's directory: `PeerError` for anything it cannot serve."""
        protocol = keys.get("protocol", NATIVE_ABI)
        if protocol not in ABIS:
            raise PeerError(f"protocol is {protocol[:40]!r}; this backend speaks {', '.join(ABIS)}")
        n_queues = cls.count_queues(keys, max_queues)
        each = [keys] if n_queues == 1 else [_of_queue(keys, queue) for queue in range(n_queues)]
        queues = []
        for queue, own in enumerate(each):
            try:
                queues.append(RingRequest.from_keys(own, max_ring_page_order=max_ring_page_order))
            except PeerError as error:
                if n_queues == 1:
                    raise
                raise PeerError(f"queue {queue}: {error}") from error
        _check_distinct("ring page", [ref for queue in queues for ref in queue.ring_refs])
        _check_distinct("event channel", [queue.event_channel for queue in queues])
        return cls(tuple(queues), protocol, _flag(keys, "feature-persistent"))


def _of_queue(keys: Mapping[str, str], queue: int) -> Keys:
    """The keys of one of several queues, as they are called where there is one."""
    prefix = f"queue-{queue}/"
    own = {name.removeprefix(prefix): text for name, text in keys.items() if name.startswith(prefix)}
    return own | ({_ORDER: keys[_ORDER]} if _ORDER in keys else {})


def _check_distinct(what: str, numbers: list[int]) -> None:
    seen: set[int] = set()
    for each in numbers:
        if each in seen:
            raise PeerError(f"two queues name the same {what}, {each}")
        seen.add(each)
