# SPDX-License-Identifier: MIT
"""What a toolstack says of a bridge in xenstore, below `/paravirt/bridge/NAME`. Pure.

A bridge that devices name is there without any of this.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from paravirt.errors import InvalidRequest
from paravirt.protocol.bridge_link import LinkConfig
from paravirt.protocol.keys import Keys
from paravirt.protocol.vif_port import PORT_KEYS, PortConfig

ROOT = "/paravirt/bridge"
BRIDGE_KEYS = ("ageing-s", "hold-ms", "mirror", "taps", "offloads", "links", "wire")
DEFAULT_AGEING_S = 300
MAX_AGEING_S = 10_000_000
DEFAULT_HOLD_MS = 10
MAX_HOLD_MS = 60_000
_PORT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}", re.ASCII)


def bridge_of_path(path: str) -> str | None:
    """The name of the bridge that a node below `ROOT` belongs to."""
    rest = path.removeprefix(f"{ROOT}/")
    return rest.split("/")[0] if rest != path and rest else None


@dataclass(frozen=True, slots=True)
class BridgeConfig:
    """A bridge, beside the devices that are on it."""

    ageing_s: int = DEFAULT_AGEING_S
    """When stations that say nothing are forgotten; 0: never."""
    hold_ms: int = DEFAULT_HOLD_MS
    """How long a sender is held back at most whose frames wait for receivers, before they are dropped; 0: not."""
    mirror: str | None = None
    """Name of the port that gets copies of what mirrored ports send and are sent."""
    taps: Mapping[str, PortConfig] = field(default_factory=dict)
    """Interfaces of the kernel that are ports of it, by name."""
    offloads: bool = True
    """They hand over large packets and blank checksums, and take them."""
    links: Mapping[str, LinkConfig] = field(default_factory=dict)
    """Ports that are nothing or files, by name."""
    wire: bool = False
    """It has two ports, and what comes from one goes to the other: no switch."""

    def to_keys(self) -> Keys:
        taps = {name: port.to_keys() for name, port in self.taps.items()}
        keys = {"ageing-s": str(self.ageing_s), "hold-ms": str(self.hold_ms)}
        keys |= {"taps": json.dumps(taps), "offloads": str(int(self.offloads))}
        if self.mirror:
            keys["mirror"] = self.mirror
        if self.links:
            keys["links"] = json.dumps({name: link.to_json() for name, link in self.links.items()})
        return keys | ({"wire": "1"} if self.wire else {})

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """Written by Dom0, still checked: `InvalidRequest`."""
        ageing_s = _count(keys, "ageing-s", "seconds", DEFAULT_AGEING_S, MAX_AGEING_S)
        hold_ms = _count(keys, "hold-ms", "milliseconds", DEFAULT_HOLD_MS, MAX_HOLD_MS)
        mirror = keys.get("mirror") or None
        if mirror is not None and not _PORT.fullmatch(mirror):
            raise InvalidRequest(f"mirror is {mirror[:40]!r}, no name of a port")
        taps, links = _taps(keys.get("taps", "{}")), _links(keys.get("links", "{}"))
        if twice := sorted({*taps} & {*links}):
            raise InvalidRequest(f"{twice[0]} is an interface and a link")
        offloads, wire = keys.get("offloads", "1") != "0", keys.get("wire", "0") != "0"
        return cls(ageing_s, hold_ms, mirror, taps, offloads, links, wire)


def _count(keys: Mapping[str, str], key: str, unit: str, default: int, most: int) -> int:
    text = keys.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) <= most):
        raise InvalidRequest(f"{key} is {text[:40]!r}, not a number of {unit} up to {most}")
    return int(text)


def _mapping(text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} is {text[:40]!r}, not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise InvalidRequest(f"{what} is {text[:40]!r}, not a mapping of names of ports to what they are")
    return found


def _links(text: str) -> dict[str, LinkConfig]:
    links = _mapping(text, "links")
    for name in links:
        if not _PORT.fullmatch(name):
            raise InvalidRequest(f"{name[:40]!r} is no name of a port")
    return {name: LinkConfig.from_json(name, said) for name, said in links.items()}


def _taps(text: str) -> dict[str, PortConfig]:
    found = {}
    for name, keys in _mapping(text, "taps").items():
        if not _PORT.fullmatch(name):
            raise InvalidRequest(f"{name[:40]!r} is no name of an interface")
        if not all(key in PORT_KEYS and isinstance(value, str) for key, value in keys.items()):
            raise InvalidRequest(f"{name}: keys of a port are {', '.join(PORT_KEYS)}, with texts")
        found[name] = PortConfig.from_keys(keys)
    return found
