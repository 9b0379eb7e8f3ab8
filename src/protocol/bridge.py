# SPDX-License-Identifier: MIT
"""What a toolstack says of a bridge in xenstore, below `/paravirt/bridge/NAME`. Pure.

A bridge that devices name is there without any of this.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from paravirt.errors import InvalidRequest
from paravirt.protocol.keys import Keys
from paravirt.protocol.vif_port import PORT_KEYS, PortConfig

ROOT = "/paravirt/bridge"
BRIDGE_KEYS = ("ageing-s", "mirror", "taps", "offloads")
DEFAULT_AGEING_S = 300
MAX_AGEING_S = 10_000_000
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
    mirror: str | None = None
    """Name of the port that gets copies of what mirrored ports send and are sent."""
    taps: Mapping[str, PortConfig] = field(default_factory=dict)
    """Interfaces of the kernel that are ports of it, by name."""
    offloads: bool = True
    """They hand over large packets and blank checksums, and take them."""

    def to_keys(self) -> Keys:
        taps = {name: port.to_keys() for name, port in self.taps.items()}
        keys = {"ageing-s": str(self.ageing_s), "taps": json.dumps(taps), "offloads": str(int(self.offloads))}
        return keys | ({"mirror": self.mirror} if self.mirror else {})

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """Written by Dom0, still checked: `InvalidRequest`."""
        ageing = keys.get("ageing-s", str(DEFAULT_AGEING_S))
        if not (ageing.isascii() and ageing.isdigit() and len(ageing) < 9 and int(ageing) <= MAX_AGEING_S):
            raise InvalidRequest(f"ageing-s is {ageing[:40]!r}, not a number of seconds up to {MAX_AGEING_S}")
        mirror = keys.get("mirror") or None
        if mirror is not None and not _PORT.fullmatch(mirror):
            raise InvalidRequest(f"mirror is {mirror[:40]!r}, no name of a port")
        return cls(int(ageing), mirror, _taps(keys.get("taps", "{}")), keys.get("offloads", "1") != "0")


def _taps(text: str) -> dict[str, PortConfig]:
    try:
        taps = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"taps is {text[:40]!r}, not JSON: {error}") from None
    if not isinstance(taps, dict) or not all(isinstance(keys, dict) for keys in taps.values()):
        raise InvalidRequest(f"taps is {text[:40]!r}, not a mapping of names to keys of a port")
    found = {}
    for name, keys in taps.items():
        if not _PORT.fullmatch(name):
            raise InvalidRequest(f"{name[:40]!r} is no name of an interface")
        if not all(key in PORT_KEYS and isinstance(value, str) for key, value in keys.items()):
            raise InvalidRequest(f"{name}: keys of a port are {', '.join(PORT_KEYS)}, with texts")
        found[name] = PortConfig.from_keys(keys)
    return found
