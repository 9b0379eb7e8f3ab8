# SPDX-License-Identifier: MIT
"""A network device of a domain: bursts of frames sent and received, or a TAP interface of the kernel on top of it.

Source: Xen public/io/netif.h. Calls may come from any thread.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from paravirt.errors import Closed, InvalidRequest, ParavirtError, PeerError, PeerGone
from paravirt.frontend.async_vif import AsyncVif
from paravirt.frontend.device import FrontendDevice
from paravirt.frontend.suspend import Suspendable
from paravirt.frontend.vif_control import VifControl
from paravirt.frontend.vif_groups import BROADCAST, VifGroups
from paravirt.frontend.vif_queue import QueueStatistics, VifQueueEnd, features_of
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol.keys import FENCE_KEY, RingRequest
from paravirt.protocol.netif import MAX_RING_PAGE_ORDER, Mac
from paravirt.protocol.vif import (
    DEFAULT_MTU,
    MAX_HEADROOM,
    MAX_QUEUES,
    MULTICAST_KEY,
    OFFER_KEYS,
    VifOffer,
    VifRequest,
    parse_mac,
)
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.netif import Burst
from paravirt.ring.waiting import Wait, fence_for, spin_limit
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

log = logging.getLogger(__name__)

DEFAULT_SPIN_NS = 50_000
CONNECT_TIMEOUT_S = 10.0
MAX_DEFAULT_QUEUES = 4
RARP_TYPE = b"\x80\x35"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VifStatistics:
    """Of a device, queue by queue."""

    queues: tuple[QueueStatistics, ...]
    reconnects: int


def announcement(mac: Mac) -> bytes:
    """A broadcast by which switches learn where an address is now: a reverse ARP request for itself (RFC 903)."""
    body = bytes.fromhex("0001080006040003") + mac + bytes(4) + mac + bytes(4)
    return (BROADCAST + mac + RARP_TYPE + body).ljust(60, b"\0")


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


class Vif(Suspendable):
    """An open network device.

    Frames are Ethernet frames without checksum of their own, 14 to 65,535 bytes. All calls raise `Closed`, `PeerGone`,
    `PeerError`. While the backend is away they wait for the next one; frames in flight at that moment are lost.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        path: DevicePath,
        *,
        ring_page_order: int = 0,
        spin_ns: int = DEFAULT_SPIN_NS,
        wait: Wait = "adaptive",
        queues: int | None = 1,
        offloads: bool = True,
        multicast: Iterable[bytes] | None = None,
        xdp_headroom: int = 0,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        """Connect to the backend; errors as `FrontendDevice.start`.

        `ring_page_order`: rings have 2**order pages (256 entries each) if the backend takes that many. `queues`: None:
        one for each CPU of this process, at most 4. `offloads`: take large packets and blank checksums as they are;
        without it, each frame comes whole and fits the MTU. `multicast`: groups to get, no others
        (`join`, `leave`); None: all.
        `xdp_headroom`: bytes that the backend leaves free before what it writes to a page, up to 2048.
        """
        if not 0 <= ring_page_order <= MAX_RING_PAGE_ORDER:
            raise InvalidRequest(f"ring_page_order is {ring_page_order}, not from 0 to {MAX_RING_PAGE_ORDER}")
        if queues is None:
            queues = min(len(os.sched_getaffinity(0)), MAX_DEFAULT_QUEUES)
        if not 1 <= queues <= MAX_QUEUES:
            raise InvalidRequest(f"queues is {queues}, not from 1 to {MAX_QUEUES}")
        self._hypervisor = hypervisor
        self._store = store
        self._path = path
        self._wanted_order = ring_page_order
        self._wanted_queues = queues
        self._max_spin_ns = spin_limit(wait, spin_ns)
        self._offloads = offloads
        if not 0 <= xdp_headroom <= MAX_HEADROOM:
            raise InvalidRequest(f"xdp_headroom is {xdp_headroom}, not from 0 to {MAX_HEADROOM}")
        self._xdp_headroom = xdp_headroom
        self._control: VifControl | None = None
        self._groups = VifGroups(multicast)
        self.mac = self._read_mac()
        self.mtu = self._read_mtu()
        self._queues = [VifQueueEnd(hypervisor, path, 0, None, self._max_spin_ns)]
        self.aio = AsyncVif(self)
        """The same calls for an event loop."""
        self._offer = VifOffer()
        self._lock = threading.Lock()
        self._closed = False
        self._connects = 0
        self._device = FrontendDevice(store, path, self)
        try:
            self._device.start(timeout_s)
        except BaseException:
            self.close()
            raise

    def _read_mac(self) -> Mac:
        text = xenbus.read_key(self._store, f"{self._path.frontend}/mac")
        if text is None:
            raise PeerError(f"{self._path.frontend} has no mac")
        try:
            return parse_mac(text)
        except InvalidRequest as error:
            raise PeerError(f"{self._path.frontend}/mac: {error}") from error

    def _read_mtu(self) -> int:
        text = xenbus.read_key(self._store, f"{self._path.frontend}/mtu") or ""
        return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else DEFAULT_MTU

    # -- what the caller sees

    @property
    def n_queues(self) -> int:
        """Queues that it has, agreed on with its first backend."""
        return len(self._queues)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def send(self, packets: Iterable[bytes] | Burst, *, queue: int = 0, timeout_s: float | None = None) -> int:
        """Frames to the backend, in order; how many, all unless the time is up. One that cannot be sent (too short, too
        long, no packet that its flags could be true of) is passed over: its `status` in the burst says so.
        """
        burst = packets if isinstance(packets, Burst) else Burst.of(packets)
        if not len(burst):
            return 0
        return self._guard(lambda: self._queue(queue).send(burst, _deadline(timeout_s)))

    def receive_burst(
        self, burst: Burst, max_packets: int = 64, *, queue: int = 0, timeout_s: float | None = None
    ) -> int:
        """Packets to the end of `burst`, at least one unless the time is up; how many."""
        return self._guard(lambda: self._queue(queue).receive(burst, max_packets, _deadline(timeout_s)))

    def receive(self, max_packets: int = 64, *, queue: int = 0, timeout_s: float | None = None) -> list[bytes]:
        """Packets, at least one; [] when the time is up."""
        burst = Burst(max_packets, max(262_144, max_packets * 2048))
        self.receive_burst(burst, max_packets, queue=queue, timeout_s=timeout_s)
        return list(burst)

    @property
    def groups(self) -> tuple[Mac, ...]:
        """Those that it has joined."""
        return self._groups.all()

    def join(self, group: bytes, *, timeout_s: float | None = None) -> None:
        """Get the frames to a group, where `filter_multicast` keeps others away. Harmless when repeated.

        `InvalidRequest` for what is no group, and for a backend that knows nothing of groups; `ResourceLimit` beyond 64
        groups; `TimedOut`.
        """
        self._check_multicast()
        self._guard(lambda: self._groups.join(self._queues[0], group, _deadline(timeout_s)))

    def leave(self, group: bytes, *, timeout_s: float | None = None) -> None:
        """The frames to a group no more. Harmless when it is not joined; errors as `join`."""
        self._check_multicast()
        self._guard(lambda: self._groups.leave(self._queues[0], group, _deadline(timeout_s)))

    def filter_multicast(self, on: bool) -> None:
        """Whether only the groups that are joined come, or all. It takes a moment until the backend has heard it.

        `InvalidRequest` for a backend that is told once, when it connects, or never.
        """
        self._check_multicast()
        if not self._offer.dynamic_multicast:
            raise InvalidRequest("the backend of this network device takes that when it connects only")
        self._groups.is_filtered = on
        self._store.write(f"{self._path.frontend}/{MULTICAST_KEY}", str(int(on)))

    def _check_multicast(self) -> None:
        if not self._offer.multicast_control:
            raise InvalidRequest("the backend of this network device knows nothing of groups")

    def announce(self) -> None:
        """Have switches learn where this device is now."""
        self.send([announcement(self.mac)], timeout_s=1.0)

    def statistics(self) -> VifStatistics:
        """Live; `Closed` while it is not connected."""
        return VifStatistics(tuple(queue.statistics() for queue in self._queues), max(0, self._connects - 1))

    @property
    def control(self) -> VifControl:
        """Its control ring. `InvalidRequest` for a backend that has none."""
        if self._control is None or not self._offer.ctrl_ring:
            raise InvalidRequest("the backend of this network device has no control ring")
        return self._control

    def queue_end(self, queue: int = 0) -> VifQueueEnd:
        """For who moves the frames of a queue himself."""
        return self._queue(queue)

    def fail(self, error: ParavirtError) -> None:
        """The backend broke the protocol: it is left, and calls end with this."""
        self._device.fail(error)

    def _queue(self, queue: int) -> VifQueueEnd:
        if not 0 <= queue < len(self._queues):
            raise InvalidRequest(f"there is no queue {queue}, only {len(self._queues)}")
        return self._queues[queue]

    def _guard(self, call: Callable[[], T]) -> T:
        """A backend that breaks the protocol is left, and the caller hears why."""
        try:
            return call()
        except PeerError as error:
            self._device.fail(error)
            raise

    def close(self) -> None:
        """Close the device and free everything; calls of other threads end with `Closed`. Harmless when repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._give_up(Closed(f"network device {self._path.device_id} is closed"))
        self._device.close()
        self.pause()
        self.aio.close()
        if self._control is not None:
            self._control.close()
        for queue in reversed(self._queues):
            queue.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._queues)} queues"
        return f"<Vif {self._path.device_id} of domain {self._path.frontend_domid}, {self.mac}, {state}>"

    # -- the driver's part of xenbus: called from the device's thread

    def negotiate(self, backend: str) -> dict[str, str]:
        """New rings and ports for each queue, as the backend's offer allows."""
        offer = self._offer = VifOffer.from_keys(xenbus.read_keys(self._store, backend, OFFER_KEYS))
        if self._queues[0].tx_end.arena is None:
            n_queues = min(self._wanted_queues, offer.max_queues)
            self._queues += [
                VifQueueEnd(self._hypervisor, self._path, i, self._queues[0], self._max_spin_ns)
                for i in range(1, n_queues)
            ]
        elif offer.max_queues < len(self._queues):
            raise PeerError(f"a new backend takes {offer.max_queues} queues, the last one {len(self._queues)}")
        word = xenbus.read_key(self._store, f"{backend}/{FENCE_KEY}") or ""
        fence = fence_for(word)
        made = tuple(queue.make(offer, len(self._queues), self._wanted_order, fence) for queue in self._queues)
        on = self._offloads
        request = VifRequest(
            made,
            ctrl=self._make_control(offer),
            xdp_headroom=self._xdp_headroom if offer.xdp_headroom else 0,
            gso_tcpv4=on,
            gso_tcpv6=on,
            no_csum=not on,
            ipv6_csum=on,
            multicast_control=self._groups.is_filtered and offer.multicast_control,
        )
        keys = request.to_keys()
        return {**keys, FENCE_KEY: "full" if fence == "full" else word} if word else keys

    def _make_control(self, offer: VifOffer) -> RingRequest | None:
        if not offer.ctrl_ring:
            return None
        if self._control is None:
            self._control = VifControl(self._hypervisor, self._path, self._queues[0].tx_end, self._max_spin_ns)
        return self._control.make()

    def connect(self, backend: str) -> None:
        """Go."""
        groups = self._groups.all() if self._offer.multicast_control else ()
        for queue in self._queues:
            queue.connect(features_of(self._offer), groups)
            groups = ()  # the first tells of them for all
        self._connects += 1
        if self._control is not None and self._offer.ctrl_ring:
            try:
                self._control.connect()
            except ParavirtError as error:
                log.warning("%s: what was said on the control ring is not said again: %s", self._path.frontend, error)

    def refresh(self, backend: str) -> None:
        """Nothing of a vif changes while it is connected."""

    def pause(self) -> None:
        """Let go of rings and ports."""
        if self._control is not None:
            self._control.pause()
        for queue in self._queues:
            queue.pause()

    def closed(self, error: ParavirtError | None) -> None:
        """Nothing will come any more."""
        self._give_up(error or PeerGone(f"the backend of network device {self._path.device_id} has closed"))

    def _give_up(self, error: ParavirtError) -> None:
        for queue in self._queues:
            queue.give_up(error)
