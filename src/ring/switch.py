# SPDX-License-Identifier: MIT
"""A learning Ethernet switch: where a frame goes, in C (pv_switch.h). For configuration, lists and tests.

MAC and IP addresses are texts. Sources: IEEE 802.1D and 802.1Q; Open vSwitch for access and trunk ports; XenServer's
setup-vif-rules for locked ports; Xen public/io/netif.h for lists of multicast groups.
"""

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Self

from paravirt.errors import InvalidRequest, NotFound, ResourceLimit
from paravirt.ring._core import ffi, lib

CData = Any

MAX_PORTS: int = lib.PV_SWITCH_PORTS
MAX_ADDRESSES: int = lib.PV_SWITCH_ADDRESSES
"""Learnt at most, unless told otherwise."""
AGEING_S: float = lib.PV_SWITCH_AGEING_NS / 1e9
MAX_GROUPS: int = lib.PV_SWITCH_GROUPS
"""Multicast groups of a port."""
MAX_LOCKED_ADDRESSES: int = lib.PV_SWITCH_LOCKED_ADDRESSES
"""IPv4 and IPv6 addresses of a locked port, of each."""
MAX_VID: int = lib.PV_SWITCH_MOST_VID
DROPS: tuple[str, ...] = tuple(ffi.string(lib.pv_switch_drop_name(i)).decode() for i in range(lib.PV_SWITCH_DROPS))
"""The reasons to drop a frame, by number; the first is none."""


class Kind(IntEnum):
    """What becomes of a frame."""

    DROP = lib.PV_SWITCH_DROP
    UNICAST = lib.PV_SWITCH_UNICAST
    FLOOD = lib.PV_SWITCH_FLOOD


class Tag(IntEnum):
    """What is done with the VLAN tag for a port: nothing, taken out, put in, or `vid` written into one of vid 0."""

    KEEP = lib.PV_SWITCH_TAG_KEEP
    STRIP = lib.PV_SWITCH_TAG_STRIP
    INSERT = lib.PV_SWITCH_TAG_INSERT
    SET = lib.PV_SWITCH_TAG_SET


class Limit(IntEnum):
    """What a port may send so much of only: broadcast, multicast, unicast to stations that were not heard of."""

    BROADCAST = lib.PV_SWITCH_LIMIT_BROADCAST
    MULTICAST = lib.PV_SWITCH_LIMIT_MULTICAST
    UNKNOWN = lib.PV_SWITCH_LIMIT_UNKNOWN


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where a frame goes."""

    kind: Kind
    reason: str
    """Of a drop, one of `DROPS`."""
    ports: tuple[tuple[int, Tag], ...]
    mirror: int | None
    """A port that gets one copy more, as the frame came in."""
    vid: int
    """For `Tag.INSERT` and `Tag.SET`."""


@dataclass(frozen=True, slots=True)
class Address:
    """A station that was learnt."""

    mac: str
    vid: int
    port: int
    seen_ns: int
    """When it was last heard, to a 256th of the ageing time."""


@dataclass(frozen=True, slots=True)
class PortStatistics:
    """Of a port, since it was added."""

    rx_frames: int
    """That the port gave to the switch, with those that were dropped."""
    rx_bytes: int
    tx_frames: int
    """That verdicts sent to the port, mirrored ones too."""
    tx_bytes: int
    """As they are after their tag was dealt with."""
    flooded: int
    """Of those received."""
    moved: int
    """Stations that came here from another port."""
    addresses: int
    """Learnt here, now; some may be too old and not yet forgotten."""
    drops: dict[str, int]
    """Of those received, by reason; without those that never happened."""


def mac_bytes(mac: str) -> bytes:
    """The six bytes of "00:16:3e:00:00:01". Raises `InvalidRequest`."""
    parts = mac.split(":")
    if len(parts) != 6 or not all(len(part) == 2 and part.isascii() and part.isalnum() for part in parts):
        raise InvalidRequest(f"{mac!r} is no MAC address like 00:16:3e:00:00:01")
    try:
        return bytes(int(part, 16) for part in parts)
    except ValueError:
        raise InvalidRequest(f"{mac!r} is no MAC address like 00:16:3e:00:00:01") from None


def mac_text(mac: bytes) -> str:
    """The other way round."""
    return mac.hex(":")


class Switch:
    """One thread at a time. Times are the caller's, in nanoseconds; they do not go back.

    Every method with a port raises `NotFound` where there is none.
    """

    def __init__(self, max_addresses: int = MAX_ADDRESSES, *, seed: int = 0) -> None:
        """Without ports. `seed` of the hash: 0 for a random one, others for tests.

        Raises `InvalidRequest` for less than 1 or too many addresses, `ResourceLimit`.
        """
        if not 0 < max_addresses <= lib.PV_SWITCH_MOST_ADDRESSES:
            raise InvalidRequest(f"a switch learns 1 to {lib.PV_SWITCH_MOST_ADDRESSES} addresses, not {max_addresses}")
        self.core: CData = ffi.new("struct pv_switch *")
        if status := lib.pv_switch_init(self.core, max_addresses, seed):
            raise ResourceLimit(f"cannot make a switch of {max_addresses} addresses: {os.strerror(-status)}")
        self.core = ffi.gc(self.core, lib.pv_switch_destroy)
        self._verdict: CData = ffi.new("struct pv_switch_verdict *")
        self._owner: object = None

    @classmethod
    def borrow(cls, core: CData, owner: object) -> Self:
        """One that belongs to a loop, as long as `owner` lives; used while the loop stands still."""
        switch = cls.__new__(cls)
        switch.core, switch._owner = core, owner
        switch._verdict = ffi.new("struct pv_switch_verdict *")
        return switch

    # -- ports

    def add_port(self) -> int:
        """The lowest free number: a trunk for all VLANs; frames without a tag are of VLAN 0. Raises `ResourceLimit`."""
        port: int = lib.pv_switch_add_port(self.core)
        if port == -errno.ENOSPC:
            raise ResourceLimit(f"a switch has at most {MAX_PORTS} ports")
        if port < 0:
            raise ResourceLimit("no memory for a port")
        return port

    def remove_port(self, port: int) -> None:
        """With its statistics, and what was learnt there."""
        self._check(lib.pv_switch_remove_port(self.core, _number(port)), port)

    @property
    def ports(self) -> list[int]:
        """The numbers there are."""
        return [port for port in range(self.core.n_slots) if self.core.ports[port] != ffi.NULL]

    def set_access(self, port: int, vid: int) -> None:
        """The port belongs to one VLAN, 0 to `MAX_VID`, without tags. Forgets its addresses.

        Raises `InvalidRequest`.
        """
        self._check(lib.pv_switch_set_access(self.core, _number(port), _vid(vid)), port)

    def set_trunk(self, port: int, vids: Iterable[int] | None = None, *, native: int | None = 0) -> None:
        """The port carries `vids` (None: all) with tags, and `native` (None: nothing) without. Forgets its addresses.

        Raises `InvalidRequest` for a vid there is not.
        """
        map_: CData = ffi.NULL
        if vids is not None:
            map_ = ffi.new("uint8_t[]", lib.PV_SWITCH_MAP_BYTES)
            for vid in vids:
                map_[_vid(vid) // 8] |= 1 << vid % 8
        native_vid = lib.PV_SWITCH_NO_VID if native is None else _vid(native)
        self._check(lib.pv_switch_set_trunk(self.core, _number(port), map_, native_vid), port)

    def set_limit(self, port: int, kind: Limit, frames_per_s: int, burst: int = 0) -> None:
        """Frames of a kind that are let in. 0: no limit. `burst`, at once after a rest; 0: a tenth of a second's worth.

        Raises `InvalidRequest` for what is not in 32 bits.
        """
        for value in (frames_per_s, burst):
            if not 0 <= value < 1 << 32:
                raise InvalidRequest(f"a limit is 0 to {(1 << 32) - 1} frames, not {value}")
        self._check(lib.pv_switch_set_limit(self.core, _number(port), kind, frames_per_s, burst), port)

    def set_address_limit(self, port: int, most: int) -> None:
        """The port has at most so many stations, 0: as many as there are; frames of others are dropped.

        Raises `InvalidRequest` for what is not in 32 bits.
        """
        if not 0 <= most < 1 << 32:
            raise InvalidRequest(f"a port has 0 to {(1 << 32) - 1} addresses, not {most}")
        self._check(lib.pv_switch_set_address_limit(self.core, _number(port), most), port)

    # -- who may send

    def lock(self, port: int, mac: str, ipv4: Iterable[str] = (), ipv6: Iterable[str] = ()) -> None:
        """Only frames of `mac` and of these IP addresses are taken from the port, as from a locked VIF of XenServer.

        Raises `InvalidRequest` for what is no address, or no station's, or more than `MAX_LOCKED_ADDRESSES`.
        """
        try:
            v4 = [IPv4Address(address).packed for address in ipv4]
            v6 = [IPv6Address(address).packed for address in ipv6]
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        if max(len(v4), len(v6)) > MAX_LOCKED_ADDRESSES:
            raise InvalidRequest(f"a locked port has at most {MAX_LOCKED_ADDRESSES} addresses of a kind")
        locking = ffi.new("struct pv_switch_locking *", {"mode": lib.PV_SWITCH_LOCKED, "mac": mac_bytes(mac)})
        locking.n_ipv4, locking.n_ipv6 = len(v4), len(v6)
        ffi.buffer(locking.ipv4)[: 4 * len(v4)] = b"".join(v4)
        ffi.buffer(locking.ipv6)[: 16 * len(v6)] = b"".join(v6)
        self._set_locking(port, locking, f"{mac} is not the address of a station")

    def unlock(self, port: int) -> None:
        """Any frame is taken from it."""
        self._set_locking(port, ffi.new("struct pv_switch_locking *", {"mode": lib.PV_SWITCH_UNLOCKED}))

    def disable(self, port: int) -> None:
        """Nothing is taken from it nor sent to it, until it is unlocked or locked."""
        self._set_locking(port, ffi.new("struct pv_switch_locking *", {"mode": lib.PV_SWITCH_DISABLED}))

    def _set_locking(self, port: int, locking: CData, what: str = "") -> None:
        self._check(lib.pv_switch_set_locking(self.core, _number(port), locking), port, what)

    # -- multicast, mirror

    def set_multicast_filter(self, port: int, on: bool) -> None:
        """The port gets of multicast only the groups that were added."""
        self._check(lib.pv_switch_set_multicast_filter(self.core, _number(port), on), port)

    def add_group(self, port: int, mac: str) -> None:
        """Raises `InvalidRequest` for what is no group's address, `ResourceLimit` beyond `MAX_GROUPS`."""
        status = lib.pv_switch_mcast_add(self.core, _number(port), mac_bytes(mac))
        self._check(status, port, f"{mac} is not the address of a group")

    def remove_group(self, port: int, mac: str) -> None:
        """Raises `NotFound`, also for a group that was not added."""
        if lib.pv_switch_mcast_del(self.core, _number(port), mac_bytes(mac)):
            raise NotFound(f"port {port} has no group {mac}")

    def set_mirror(self, port: int | None) -> None:
        """The port that gets copies, and nothing else, of what mirrored ports send and are sent. None: no port."""
        number = lib.PV_SWITCH_NO_PORT if port is None else min(_number(port), MAX_PORTS)
        self._check(lib.pv_switch_set_mirror(self.core, number), port)

    def set_mirrored(self, port: int, on: bool) -> None:
        """Whether the mirror port hears what this one does."""
        self._check(lib.pv_switch_set_mirrored(self.core, _number(port), on), port)

    # -- addresses

    def set_ageing(self, ageing_s: float) -> None:
        """When stations that say nothing are forgotten; 0: never. Raises `InvalidRequest` for less."""
        if not 0 <= ageing_s < 1e9:
            raise InvalidRequest(f"addresses age in 0 to 1e9 seconds, not {ageing_s}")
        lib.pv_switch_set_ageing(self.core, int(ageing_s * 1e9))

    def age(self, now_ns: int) -> int:
        """Forget what is too old; how many."""
        return int(lib.pv_switch_age(self.core, now_ns))

    def forget(self, port: int) -> None:
        """What was learnt at a port."""
        self._check(lib.pv_switch_forget(self.core, _number(port)), port)

    def find(self, mac: str, now_ns: int, vid: int = 0) -> int | None:
        """The port of a station, or None."""
        port = lib.pv_switch_find(self.core, mac_bytes(mac), _vid(vid), now_ns)
        return None if port < 0 else int(port)

    def addresses(self, now_ns: int) -> list[Address]:
        """What was learnt and is not too old, from the oldest on."""
        most = self.core.n_addresses
        found = ffi.new("struct pv_switch_address[]", most)
        n = lib.pv_switch_list(self.core, found, most, now_ns)
        return [Address(mac_text(bytes(found[i].mac)), found[i].vid, found[i].port, found[i].seen_ns) for i in range(n)]

    @property
    def evicted(self) -> int:
        """Addresses that were forgotten because there was no place."""
        return int(self.core.evicted)

    # -- frames

    def forward(
        self, port: int, frame: bytes, now_ns: int, *, header_bytes: int | None = None, frame_bytes: int | None = None
    ) -> Verdict:
        """Where a frame goes that came from a port; learns its source.

        `header_bytes`: only so many of `frame` are looked at; `frame_bytes`: it is that long, which may be more than
        there is of it. A port there is not: a drop for "no_port".
        """
        header_bytes = len(frame) if header_bytes is None else min(header_bytes, len(frame))
        frame_bytes = len(frame) if frame_bytes is None else frame_bytes
        verdict = self._verdict
        kind = lib.pv_switch_forward(self.core, _number(port), frame, header_bytes, frame_bytes, now_ns, verdict)
        return Verdict(
            kind=Kind(kind),
            reason=DROPS[verdict.reason],
            ports=tuple((out.port, Tag(out.tag)) for out in verdict.ports[0 : verdict.n_ports]),
            mirror=None if verdict.mirror == lib.PV_SWITCH_NO_PORT else verdict.mirror,
            vid=verdict.vid,
        )

    def statistics(self, port: int) -> PortStatistics:
        """The counters of a port."""
        counted = ffi.new("struct pv_switch_statistics *")
        self._check(lib.pv_switch_statistics(self.core, _number(port), counted), port)
        numbers: dict[str, Any] = {name: getattr(counted, name) for name in PortStatistics.__slots__ if name != "drops"}
        numbers["drops"] = {name: n for name, n in zip(DROPS, counted.drops, strict=True) if n}
        return PortStatistics(**numbers)

    def _check(self, status: int, port: int | None, what: str = "") -> None:
        if status == -errno.ENOENT:
            raise NotFound(f"the switch has no port {port}")
        if status == -errno.ENOSPC:
            raise ResourceLimit(f"port {port} has {MAX_GROUPS} groups, and no more")
        if status:
            raise InvalidRequest(what)

    def __repr__(self) -> str:
        return f"<Switch of {self.core.n_ports} ports, {self.core.n_addresses} addresses>"


def _number(port: int) -> int:
    """For C: one that is none there either, for what is no number of a port."""
    return port if 0 <= port < MAX_PORTS else MAX_PORTS


def _vid(vid: int) -> int:
    if not 0 <= vid <= MAX_VID:
        raise InvalidRequest(f"a VLAN is 0 to {MAX_VID}, not {vid}")
    return vid
