# SPDX-License-Identifier: MIT
"""How a switch treats one of its ports, as keys of a device directory or of a bridge's. Pure.

`locking-mode`, `ipv4-allowed` and `ipv6-allowed` are XenServer's names; the others are ours.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Literal, Self, get_args

from paravirt.errors import InvalidRequest
from paravirt.protocol.keys import Keys

Locking = Literal["unlocked", "locked", "disabled"]
_LOCKING: tuple[Locking, ...] = get_args(Locking)
MAX_VLAN = 4094
MAX_FRAMES = (1 << 32) - 1

VLAN_KEY = "paravirt-vlan"
LIMITS_KEY = "paravirt-limits"
MIRRORED_KEY = "paravirt-mirrored"
ADDRESSES_KEY = "paravirt-max-addresses"
PORT_KEYS = ("locking-mode", "ipv4-allowed", "ipv6-allowed", VLAN_KEY, LIMITS_KEY, MIRRORED_KEY, ADDRESSES_KEY)

LIMITS = ("broadcast", "multicast", "unknown")


def _number(text: str, most: int, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= most):
        raise InvalidRequest(f"{what} is {text[:40]!r}, not a number up to {most}")
    return int(text)


@dataclass(frozen=True, slots=True)
class Vlans:
    """Which VLANs a port is in: an access port of one, or a trunk of some (None: all) with one of them untagged."""

    access: int | None = None
    trunk: tuple[int, ...] | None = None
    native: int | None = 0

    def __str__(self) -> str:
        if self.access is not None:
            return str(self.access)
        vlans = "all" if self.trunk is None else ",".join(map(str, self.trunk)) or "none"
        native = "none" if self.native is None else str(self.native)
        return f"trunk {vlans} native {native}"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """ "10": an access port; "trunk 10,20 native 1", "trunk all", "trunk 10 native none". `InvalidRequest`."""
        if text.isascii() and text.isdigit():
            return cls(access=_number(text, MAX_VLAN, "the VLAN"))
        match = re.fullmatch(r"trunk (all|none|[0-9]+(?:,[0-9]+)*)(?: native (none|[0-9]+))?", text, re.ASCII)
        if match is None:
            raise InvalidRequest(f"VLANs are {text[:60]!r}, neither a number nor 'trunk 10,20 native 1'")
        trunk = None
        if match[1] != "all":
            listed = [] if match[1] == "none" else match[1].split(",")
            trunk = tuple(sorted({_number(vlan, MAX_VLAN, "a VLAN") for vlan in listed}))
        native = None if match[2] == "none" else _number(match[2] or "0", MAX_VLAN, "the native VLAN")
        return cls(None, trunk, native)


@dataclass(frozen=True, slots=True)
class PortConfig:
    """How a switch treats a port."""

    locking: Locking = "unlocked"
    ipv4: tuple[str, ...] = ()
    ipv6: tuple[str, ...] = ()
    vlans: Vlans = field(default_factory=Vlans)
    limits: Mapping[str, int] = field(default_factory=dict)
    """Frames a second that it may send of each of `LIMITS`."""
    mirrored: bool = False
    max_addresses: int = 0
    """Stations behind it; 0: as many as there are."""

    def to_keys(self) -> Keys:
        """What differs from a port that nothing was said of."""
        keys: Keys = {}
        if self.locking != "unlocked":
            keys["locking-mode"] = self.locking
        if self.ipv4:
            keys["ipv4-allowed"] = ",".join(self.ipv4)
        if self.ipv6:
            keys["ipv6-allowed"] = ",".join(self.ipv6)
        if self.vlans != Vlans():
            keys[VLAN_KEY] = str(self.vlans)
        if self.limits:
            keys[LIMITS_KEY] = ",".join(f"{name}={n}" for name, n in sorted(self.limits.items()))
        if self.mirrored:
            keys[MIRRORED_KEY] = "1"
        if self.max_addresses:
            keys[ADDRESSES_KEY] = str(self.max_addresses)
        return keys

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """Written by Dom0, still checked: `InvalidRequest`."""
        return cls(
            _locking(keys.get("locking-mode", "unlocked")),
            _addresses(keys.get("ipv4-allowed", ""), IPv4Address, "ipv4-allowed"),
            _addresses(keys.get("ipv6-allowed", ""), IPv6Address, "ipv6-allowed"),
            Vlans.from_text(keys[VLAN_KEY]) if keys.get(VLAN_KEY) else Vlans(),
            _limits(keys.get(LIMITS_KEY, "")),
            keys.get(MIRRORED_KEY, "0") == "1",
            _number(keys.get(ADDRESSES_KEY, "0"), MAX_FRAMES, ADDRESSES_KEY),
        )


def _locking(text: str) -> Locking:
    for mode in _LOCKING:
        if text == mode:
            return mode
    raise InvalidRequest(f"locking-mode is {text[:40]!r}, not one of {', '.join(_LOCKING)}")


def _addresses(text: str, kind: type[IPv4Address] | type[IPv6Address], key: str) -> tuple[str, ...]:
    found = []
    for part in filter(None, text.replace(" ", "").split(",")):
        try:
            found.append(str(kind(part)))
        except ValueError as error:
            raise InvalidRequest(f"{key}: {error}") from None
    return tuple(found)


def _limits(text: str) -> dict[str, int]:
    found = {}
    for part in filter(None, text.split(",")):
        name, _, n = part.partition("=")
        if name not in LIMITS:
            raise InvalidRequest(f"a limit of {name[:40]!r}; there are {', '.join(LIMITS)}")
        found[name] = _number(n, MAX_FRAMES, f"the limit of {name}")
    return found
