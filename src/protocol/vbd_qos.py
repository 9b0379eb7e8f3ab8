# SPDX-License-Identifier: MIT
"""How much a disk may do a second, as the toolstack writes it into the backend's directory.

The keys are this project's own (`paravirt-`): public/io/blkif.h of Xen has none for it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Self

from paravirt.errors import InvalidRequest
from paravirt.protocol.keys import Keys

MAX_RATE: Final = 10**15

_KEYS: Final = {
    "requests": "paravirt-qos-iops",
    "requests_burst": "paravirt-qos-iops-burst",
    "bytes": "paravirt-qos-bytes",
    "bytes_burst": "paravirt-qos-bytes-burst",
}
QOS_KEYS: Final = tuple(_KEYS.values())


@dataclass(frozen=True, slots=True)
class Qos:
    """Limits of one disk, all its queues together, reads and writes together.

    A flush or a discard is a request of no bytes. 0: no limit; for a burst, a tenth of a second's worth.
    """

    requests: int = 0
    """A second."""
    requests_burst: int = 0
    """At once, after a rest."""
    bytes: int = 0
    """A second."""
    bytes_burst: int = 0

    def __post_init__(self) -> None:
        """Raises `InvalidRequest`."""
        for name, value in asdict(self).items():
            if not 0 <= value <= MAX_RATE:
                raise InvalidRequest(f"{_KEYS[name]} is {value}, not 0 to {MAX_RATE}")
        for rate, burst in (("requests", "requests_burst"), ("bytes", "bytes_burst")):
            if getattr(self, burst) and not getattr(self, rate):
                raise InvalidRequest(f"{_KEYS[burst]} needs {_KEYS[rate]}: a burst is of what is limited")

    def to_keys(self) -> Keys:
        """Nodes of the backend directory: those that limit something."""
        return {key: str(getattr(self, name)) for name, key in _KEYS.items() if getattr(self, name)}

    @classmethod
    def from_keys(cls, keys: Mapping[str, str]) -> Self:
        """Of a backend directory. Raises `InvalidRequest` with the key that is wrong."""
        found = {}
        for name, key in _KEYS.items():
            text = keys.get(key, "0")
            if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_RATE))):
                raise InvalidRequest(f"{key} is {text[:40]!r}, not a number from 0 to {MAX_RATE}")
            found[name] = int(text)
        return cls(**found)

    def __str__(self) -> str:
        """As people read it: "1000 IOPS (burst 2000), 10485760 B/s"; "" without limits."""
        parts = []
        for rate, burst, unit in (
            (self.requests, self.requests_burst, "IOPS"),
            (self.bytes, self.bytes_burst, "B/s"),
        ):
            if rate:
                parts.append(f"{rate} {unit}" + (f" (burst {burst})" if burst else ""))
        return ", ".join(parts)
