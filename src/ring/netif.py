# SPDX-License-Identifier: MIT
"""Bursts of frames, and both halves of a queue of a network device over them, in C without the GIL.

A `Burst` is memory and an array that says where each frame lies in it and what is known of it; it goes from one call to
the next without anything being made for a frame. Source: Xen public/io/netif.h.
"""

import errno
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import Closed, InvalidRequest, PeerError, ResourceLimit
from paravirt.ring._core import ffi, lib
from paravirt.ring.event import check_status
from paravirt.ring.grant import Mapper
from paravirt.ring.shared import BackRing, FrontRing

CData = Any

FRAME = np.dtype(
    [
        ("offset", "u4"),
        ("length", "u4"),
        ("flags", "u2"),
        ("gso_size", "u2"),
        ("gso_type", "u1"),
        ("hash_type", "u1"),
        ("queue", "u2"),
        ("hash", "u4"),
        ("status", "i4"),
    ]
)
"""A frame of a burst: bytes into its memory, bytes, `FrameFlag`, and how it is to be cut into segments."""

HEADROOM_BYTES: int = lib.PV_BURST_HEADROOM
_ALIGN = 64


class FrameFlag(IntFlag):
    """What is known of a frame's checksum."""

    CSUM_BLANK = lib.PV_FRAME_CSUM_BLANK
    """It is still to be filled in."""
    VALIDATED = lib.PV_FRAME_VALIDATED
    """It was found right, or need not be looked at."""
    HASH = lib.PV_FRAME_HASH
    """`hash` is there."""
    FLOODED = lib.PV_FRAME_FLOODED
    """A switch has sent it to several ports."""


class Burst:
    """Room for frames, and the frames in it. Not for several threads at once."""

    def __init__(self, max_frames: int = 64, n_bytes: int = 262_144) -> None:
        """`n_bytes`: of memory for all of them; each takes its length, 64 bytes before it, rounded up to 64."""
        if not 0 < max_frames <= 65536 or not 128 <= n_bytes <= 1 << 28:
            raise InvalidRequest(f"a burst of {max_frames} frames in {n_bytes} bytes")
        self.memory: NDArray[np.uint8] = np.zeros(n_bytes, np.uint8)
        self._frames = np.zeros(max_frames, FRAME)
        self.core: CData = ffi.new("struct pv_burst *")
        self._kept = (ffi.from_buffer("uint8_t[]", self.memory), ffi.from_buffer("struct pv_frame[]", self._frames))
        self.core.memory, self.core.capacity = self._kept[0], n_bytes
        self.core.frames, self.core.max = self._kept[1], max_frames

    @classmethod
    def of(cls, packets: Iterable[bytes]) -> "Burst":
        """With these frames, and no room for more."""
        every = list(packets)
        n_bytes = sum(-(-len(packet) // _ALIGN) * _ALIGN + HEADROOM_BYTES for packet in every)
        burst = cls(max(1, len(every)), max(128, n_bytes))
        for packet in every:
            burst.add(packet)
        return burst

    @property
    def frames(self) -> NDArray[Any]:
        """Those that are there, of dtype `FRAME`: a view, to be read and changed in place."""
        return self._frames[: self.core.n]

    def clear(self) -> None:
        """Take all frames out."""
        self.core.n = self.core.used = 0

    def add(self, packet: bytes, *, flags: int = 0, gso_size: int = 0, gso_type: int = 0) -> None:
        """One more frame at the end; `flags`: of `FrameFlag`. `ResourceLimit` when there is no room."""
        frame = lib.pv_burst_next(self.core, len(packet))
        if frame == ffi.NULL:
            raise ResourceLimit(f"a burst has no room for {len(packet)} bytes more")
        frame.flags, frame.gso_size, frame.gso_type = flags, gso_size, gso_type
        self.memory[frame.offset : frame.offset + len(packet)] = np.frombuffer(packet, np.uint8)
        lib.pv_burst_keep(self.core, frame)

    def __len__(self) -> int:
        n: int = self.core.n
        return n

    def __getitem__(self, i: int) -> bytes:
        frame = self.frames[i]
        start = int(frame["offset"])
        return self.memory[start : start + int(frame["length"])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<Burst {len(self)} of {len(self._frames)} frames>"


@dataclass(frozen=True, slots=True)
class NetCounters:
    """What a queue has counted, at the backend. Packets and bytes are the guest's: tx from it, rx to it."""

    tx_packets: int
    tx_bytes: int
    tx_errors: int
    """Malformed, and answered so."""
    tx_copy_errors: int
    """Pages that could not be copied."""
    tx_checksums: int
    """Dropped: there was no checksum to fill in, or nothing to cut."""
    tx_delayed: int
    """Times that the rate was used up."""
    rx_packets: int
    rx_bytes: int
    rx_copy_errors: int
    rx_full: int
    """Dropped: the guest has no buffers, and enough waits already."""
    rx_expired: int
    """Dropped: waited too long for buffers."""
    rx_stalled: int
    """Dropped: the guest takes nothing."""
    rx_too_large: int
    """Dropped: cannot be brought into a form that the guest takes."""
    rx_filtered: int
    """Multicast that the guest has not asked for."""
    rx_segmented: int
    """Large packets that were cut for it."""
    rx_checksums: int
    """Filled in for it."""
    rx_waited: int
    """Had to wait for buffers."""
    stalls: int
    mcast_changes: int


def _counters(core: CData) -> NetCounters:
    return NetCounters(**{name: getattr(core, name) for name in NetCounters.__slots__})


def total_counters(parts: Iterable[NetCounters]) -> NetCounters:
    """Of several queues."""
    every = list(parts)
    return NetCounters(**{name: sum(getattr(part, name) for part in every) for name in NetCounters.__slots__})


class Feature(IntFlag):
    """What a frontend can do with what it gets."""

    SG = lib.PV_NETBACK_SG
    GSO4 = lib.PV_NETBACK_GSO4
    GSO6 = lib.PV_NETBACK_GSO6
    NO_CSUM = lib.PV_NETBACK_NO_CSUM
    CSUM6 = lib.PV_NETBACK_CSUM6
    MCAST_CONTROL = lib.PV_NETBACK_MCAST_CONTROL
    RX_NOTIFY = lib.PV_NETBACK_RX_NOTIFY


DRAIN_S = 10.0
DRAIN_WITHOUT_NOTIFY_S = 0.03
STALL_S = 60.0


class NetBack:
    """The backend's half of one queue. One thread uses it; counters may be read by any."""

    def __init__(
        self,
        tx: BackRing,
        rx: BackRing,
        mapper: Mapper,
        features: Feature,
        *,
        drain_s: float | None = None,
        stall_s: float | None = None,
        beside: "NetBack | None" = None,
    ) -> None:
        """Rings and mapper stay the caller's and must outlive this. `drain_s`: how long a frame waits for buffers;
        `stall_s`: how long the guest may have none before nothing is kept for it. None: as Linux' netback. `beside`:
        another queue of the same device, in the same thread: both have the groups that the guest asks for at either.
        """
        self._rings = tx, rx
        self._beside = beside
        self._kept = mapper
        self.core: CData = ffi.new("struct pv_netback *")
        lib.pv_netback_init(self.core, tx.core, rx.core, mapper.core, int(features))
        if beside is not None:
            lib.pv_netback_share_groups(self.core, beside.core)
        notifies = Feature.RX_NOTIFY in features
        if drain_s is None:
            drain_s = DRAIN_S if notifies else DRAIN_WITHOUT_NOTIFY_S
        if stall_s is None:
            stall_s = STALL_S if notifies else 0
        self.core.drain_ns, self.core.stall_ns = int(drain_s * 1e9), int(stall_s * 1e9)
        self._closed = False

    def set_rate(self, n_bytes: int, window_us: int) -> None:
        """What the guest may send; 0: as much as it likes."""
        lib.pv_netback_set_rate(self._usable(), n_bytes, window_us)

    def filter_multicast(self, on: bool) -> None:
        """Whether it gets the groups that it asks for alone, from now on."""
        lib.pv_netback_filter(self._usable(), on)

    def take(self, burst: Burst, max_packets: int = 64, *, now_ns: int | None = None) -> int:
        """Packets of the guest to the end of `burst`; how many. `PeerError` (`fatal` says more), `Closed`."""
        now = lib.pv_now_ns() if now_ns is None else now_ns
        return checked(lib.pv_netback_take(self._usable(), burst.core, max_packets, now), "frontend")

    def send(self, burst: Burst, *, now_ns: int | None = None) -> None:
        """All frames of a burst to the guest, or to wait for its buffers. `PeerError`, `Closed`."""
        now = lib.pv_now_ns() if now_ns is None else now_ns
        core = burst.core
        checked(lib.pv_netback_send(self._usable(), core.memory, core.frames, core.n, now), "frontend")

    def deliver(self, *, now_ns: int | None = None) -> None:
        """What waits, as far as there are buffers by now. `PeerError`, `Closed`."""
        now = lib.pv_now_ns() if now_ns is None else now_ns
        checked(lib.pv_netback_deliver(self._usable(), now), "frontend")

    @property
    def due_ns(self) -> int:
        """When `take` or `deliver` has something to do without an event of the guest; 0: never."""
        due: int = lib.pv_netback_due(self.core)
        return due

    @property
    def fatal(self) -> int:
        """`protocol.netif.Fatal`: how the frontend broke the protocol; 0."""
        reason: int = self.core.fatal
        return reason

    @property
    def waiting(self) -> tuple[int, int]:
        """Frames and bytes that wait for buffers."""
        return self.core.waiting_frames, self.core.waiting_bytes

    @property
    def stalled(self) -> bool:
        """The guest takes nothing, so nothing is kept for it."""
        return bool(self.core.stalled)

    def counters(self) -> NetCounters:
        """Live."""
        return _counters(self.core.counters)

    def close(self) -> None:
        """Let frames go that wait. Harmless when repeated."""
        if not self._closed:
            self._closed = True
            lib.pv_netback_destroy(self.core)

    def _usable(self) -> CData:
        if self._closed:
            raise Closed("this queue is closed")
        return self.core


class Takes(IntFlag):
    """What a backend takes."""

    SG = lib.PV_NETFRONT_SG
    GSO4 = lib.PV_NETFRONT_GSO4
    GSO6 = lib.PV_NETFRONT_GSO6
    CSUM6 = lib.PV_NETFRONT_CSUM6


class NetFront:
    """The frontend's half of one queue. One thread sends, one receives."""

    def __init__(
        self, tx: FrontRing, rx: FrontRing, tx_pages: tuple[CData, int], rx_pages: tuple[CData, int], features: Takes
    ) -> None:
        """`tx_pages`, `rx_pages`: pointer to as many pages as the ring has entries, and the reference of the first,
        granted. `features`: of the backend.
        """
        self._kept = tx, rx, tx_pages, rx_pages
        self.core: CData = ffi.new("struct pv_netfront *")
        status = lib.pv_netfront_init(self.core, tx.core, rx.core, tx_pages[0], tx_pages[1], rx_pages[0], rx_pages[1])
        if status:
            raise ResourceLimit("no memory for a queue of a network device")
        self.core.features = int(features)
        self._closed = False

    def post_all(self) -> None:
        """Offer all receive buffers."""
        checked(lib.pv_netfront_post_all(self.usable), "backend")

    def send(self, burst: Burst, start: int = 0) -> int:
        """Frames of a burst from `start`: how many were dealt with (`status` of each: 0, or an error)."""
        core = burst.core
        return checked(lib.pv_netfront_send(self.usable, core.memory, core.frames + start, core.n - start), "backend")

    def wish(self, address: bytes, *, join: bool) -> bool:
        """Ask for what goes to a group, or no more; False when there is no room. See `wishes`."""
        kind = lib.PV_NETIF_EXTRA_MCAST_ADD if join else lib.PV_NETIF_EXTRA_MCAST_DEL
        return bool(checked(lib.pv_netfront_wish(self.usable, kind, address), "backend"))

    @property
    def wishes(self) -> tuple[int, int]:
        """How many have no answer yet, and how many were refused."""
        return self.core.wishes_out, self.core.wishes_refused

    def reap(self) -> None:
        """Take answers to what was sent."""
        checked(lib.pv_netfront_reap(self.usable), "backend")

    def take(self, burst: Burst, max_packets: int = 64) -> int:
        """Packets of the backend to the end of `burst`; how many."""
        return checked(lib.pv_netfront_take(self.usable, burst.core, max_packets), "backend")

    def take_untold(self) -> bool:
        """Whether the backend could not be notified since the last time this was asked."""
        untold, self.core.untold = self.core.untold, 0
        return bool(untold)

    @property
    def counters(self) -> CData:
        """`struct pv_netfront_counters`, live."""
        return self.core.counters

    @property
    def in_flight(self) -> int:
        """Transmit requests without an answer."""
        n: int = self.core.tx.size - self.core.n_free if not self._closed else 0
        return n

    def close(self) -> None:
        """Nobody may be inside a call. Harmless when repeated."""
        if not self._closed:
            self._closed = True
            lib.pv_netfront_destroy(self.core)

    @property
    def usable(self) -> CData:
        """For calls of the core. `Closed`."""
        if self._closed:
            raise Closed("this queue is closed")
        return self.core


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a packet: `n_bytes` of a granted page, from `offset` on."""

    gref: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Chain:
    """What one chain of transmit requests says. Of a wish and of a packet that is dropped nothing is known but what it
    takes.
    """

    n_requests: int
    """Entries of the ring, the `n_extras` of extra information included."""
    n_extras: int
    status: int = 0
    """Of `protocol.netif.Status`: OKAY; ERROR: to be dropped and answered so."""
    n_bytes: int = 0
    flags: int = 0
    """Of the first request."""
    gso_size: int = 0
    gso_type: int = 0
    pieces: tuple[Piece, ...] = ()
    mcast: int = 0
    """MCAST_ADD or MCAST_DEL: not a packet but a wish."""
    mcast_address: bytes = b""
    hash: tuple[int, int] | None = None
    """Type and value of a hash that the frontend has made."""


def parse_chain(requests: NDArray[Any]) -> Chain | int:
    """What a backend makes of the packet that begins with the first of `requests`, of dtype `TX_REQUEST` of
    `protocol.netif`. 0: it does not end within them, of which none is taken; another number: `Fatal`, of the same.
    """
    packet = ffi.new("struct pv_netif_packet *")
    kept = ffi.new("struct pv_netif_tx_request[]", max(1, len(requests)))
    ffi.memmove(kept, requests.tobytes(), requests.nbytes)
    result = lib.pv_netif_parse(kept, len(requests), packet)
    if result <= 0:
        return int(-result)
    if packet.mcast:
        return Chain(packet.n_requests, packet.n_extras, mcast=packet.mcast, mcast_address=bytes(packet.mcast_address))
    if packet.status:
        return Chain(packet.n_requests, packet.n_extras, status=packet.status)
    return Chain(
        packet.n_requests,
        packet.n_extras,
        n_bytes=packet.bytes,
        flags=packet.flags,
        gso_size=packet.gso_size,
        gso_type=packet.gso_type,
        hash=(packet.hash_type, packet.hash) if packet.has_hash else None,
        pieces=tuple(Piece(one.gref, one.offset, one.size) for one in packet.data[0 : packet.n_data]),
    )


def checked(status: int, peer: str) -> int:
    """What a call of the core returned, or its error: `PeerError`, or as `ring.event.check_status`."""
    if status >= 0:
        return status
    if status == -errno.EPROTO:
        raise PeerError(f"the {peer} broke the protocol of network devices")
    return check_status(status, "queue")
