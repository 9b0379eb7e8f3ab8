# SPDX-License-Identifier: MIT
"""Keys of a device directory that are the same for every device class, and how numbers in them are read.

Pure: `to_keys()` gives relative node names and texts, `from_keys()` takes the other end's and trusts none of it.
Source: Xen public/io/blkif.h and ring.h users: `ring-ref`, `ring-page-order`, `ring-refN`, `event-channel`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from paravirt.errors import PeerError

Keys = dict[str, str]

MAX_RING_PAGE_ORDER = 4

RING_KEYS = (
    "ring-page-order",
    "ring-ref",
    *(f"ring-ref{i}" for i in range(1 << MAX_RING_PAGE_ORDER)),
    "event-channel",
)
"""What `RingRequest.from_keys` looks at."""

ABSENT_FOR_ONE = (
    "ring-page-order",
    "multi-queue-num-queues",
    "ctrl-ring-ref",
    "event-channel-ctrl",
    "xdp-headroom",
)
"""What a frontend says only of several pages, or queues, or of what not all have. One that has none removes what
another before it has left in the same directory, which would be taken for its own."""

FENCE_KEY = "paravirt-fence"
"""Ours: the backend offers not to have a barrier in every push, the frontend repeats the offer if it does its part, or
says "full". Absent: full, as with any other peer. When they connect the backend removes both, so that neither is taken
for the word of whoever comes next."""


def number(keys: Mapping[str, str], name: str, default: int | None = None, maximum: int = 0xFFFFFFFF) -> int:
    """A decimal key of the other end. Missing without a default, malformed or too large is a `PeerError`."""
    text = keys.get(name)
    if text is None:
        if default is None:
            raise PeerError(f"{name} is missing")
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and int(text) <= maximum):
        raise PeerError(f"{name} is {text[:40]!r}, not a number up to {maximum}")
    return int(text)


@dataclass(frozen=True, slots=True)
class RingRequest:
    """What a frontend publishes with INITIALISED: its ring and port."""

    ring_refs: tuple[int, ...]  # 1, 2, 4, 8 or 16 grant references
    event_channel: int

    @property
    def queues(self) -> tuple[Self, ...]:
        """A device with one ring has one queue."""
        return (self,)

    def to_keys(self) -> Keys:
        keys = {"event-channel": str(self.event_channel)}
        if len(self.ring_refs) == 1:
            return {"ring-ref": str(self.ring_refs[0]), **keys}
        order = len(self.ring_refs).bit_length() - 1
        refs = {f"ring-ref{i}": str(ref) for i, ref in enumerate(self.ring_refs)}
        return {"ring-page-order": str(order), **refs, **keys}

    @classmethod
    def from_keys(cls, keys: Mapping[str, str], *, max_ring_page_order: int = MAX_RING_PAGE_ORDER) -> Self:
        """What a backend makes of the frontend's directory: `PeerError` for anything it cannot serve."""
        if "ring-page-order" in keys:
            # Present means the ring-refN names, even for order 0.
            order = number(keys, "ring-page-order", maximum=max_ring_page_order)
            refs = tuple(number(keys, f"ring-ref{i}") for i in range(1 << order))
        else:
            refs = (number(keys, "ring-ref"),)
        if len(set(refs)) != len(refs):
            raise PeerError(f"the ring names one page twice: its references are {', '.join(map(str, refs))}")
        port = number(keys, "event-channel")
        if port == 0:
            raise PeerError("event-channel is 0, which is no port")
        return cls(refs, port)
