# SPDX-License-Identifier: MIT
"""The backend half of one network device: its offer, its queues as legs of a bridge.

Source: Xen public/io/netif.h; order of events and what is fatal as in Linux' xen-netback.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from paravirt.backend.bridge import Bridge, BridgePort, Bridges
from paravirt.backend.connection import Connection, Engine
from paravirt.backend.device import BackendDevice, RingPlaces, RingPolicy
from paravirt.backend.vif_control import VifControl
from paravirt.errors import AlreadyExists, Closed, InvalidRequest, ParavirtError, PeerError
from paravirt.hypervisor.client import EventChannel, Hypervisor, MappedPages
from paravirt.protocol import netif
from paravirt.protocol.keys import RingRequest
from paravirt.protocol.vif import (
    CONFIG_KEYS,
    MULTICAST_KEY,
    REQUEST_KEYS,
    Rate,
    VifConfig,
    VifOffer,
    VifQueue,
    VifRequest,
    queue_keys,
)
from paravirt.protocol.vif_port import PORT_KEYS, PortConfig
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.netctrl import NetHash
from paravirt.ring.netif import Feature, NetBack, NetCounters, total_counters
from paravirt.ring.netloop import Leg, LegState
from paravirt.ring.shared import BackRing, RingStatistics
from paravirt.ring.waiting import Fence
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

log = logging.getLogger(__name__)

TX_LAYOUTS = (netif.TX_REQUEST, netif.TX_RESPONSE)
RX_LAYOUTS = (netif.RX_REQUEST, netif.RX_RESPONSE)
CTRL_LAYOUTS = (netif.CTRL_REQUEST, netif.CTRL_RESPONSE)


@dataclass(frozen=True, slots=True)
class VifStatistics:
    """Of the queues of a device together."""

    counters: NetCounters
    tx_ring: RingStatistics
    rx_ring: RingStatistics
    queues: int


@dataclass(frozen=True, slots=True)
class Policy:
    """What all devices of a service share."""

    bridges: Bridges
    rings: RingPolicy
    max_queues: int = 1
    max_ring_page_order: int = netif.MAX_RING_PAGE_ORDER


@dataclass(slots=True)
class VifConnection(Connection):
    """A queue: what stands in `Connection` is of the transmit ring."""

    rx_ring: BackRing | None = None
    rx_port: EventChannel | None = None
    rx_pages: MappedPages | None = None

    def close(self) -> None:
        """Unbind and unmap; once."""
        if self.rx_ring is not None:
            self.rx_ring.close()
        if self.rx_port is not None and self.rx_port is not self.port:
            self.rx_port.close()
        if self.rx_pages is not None:
            self.rx_pages.close()
        Connection.close(self)


class QueueEngine:
    """A queue as a leg of its bridge."""

    def __init__(
        self,
        connection: VifConnection,
        back: NetBack,
        port: BridgePort,
        fail: Callable[[ParavirtError], None],
        net_hash: NetHash | None = None,
        control: VifControl | None = None,
    ):
        """`control`: of the device, for its first queue."""
        assert connection.rx_ring is not None
        assert connection.rx_port is not None
        self._connection = connection
        self._back = back
        self._port = port
        self._fail = fail
        self._hash = net_hash
        self._control = control
        self._leg: Leg | None = None
        self._stopped = False

    def start(self) -> None:
        connection = self._connection
        assert connection.rx_port is not None
        events = (connection.port, connection.rx_port)
        self._leg = self._port.bridge.add_back(self._port, self._back, events, self._hear, self._hash)
        if self._control is not None:
            self._control.start()

    def stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._leg is not None:
            self._port.bridge.remove_leg(self._port, self._leg)
            self._leg = None
        self._stopped = True
        self._back.close()

    def statistics(self) -> VifStatistics:
        connection = self._connection
        if self._stopped or connection.rx_ring is None:
            raise Closed("this queue is closed")
        return VifStatistics(
            self._back.counters(), connection.ring.statistics(), connection.rx_ring.statistics(), queues=1
        )

    def set_rate(self, rate: Rate | None) -> None:
        """What the guest may send, from now on."""
        if self._leg is None:
            return
        with self._leg.loop.still():
            self._back.set_rate(*((rate.bytes, rate.window_us) if rate else (0, 0)))
        self._leg.revive()

    def filter_multicast(self, on: bool) -> None:
        """Whether the guest gets the groups that it asks for alone, from now on."""
        if self._leg is not None:
            with self._leg.loop.still():
                self._back.filter_multicast(on)

    def _hear(self, leg: Leg) -> None:
        """From the bridge's thread: what has become of the leg."""
        if leg.state is LegState.PEER:
            reason = self._back.fatal
            what = netif.FATAL_REASONS[netif.Fatal(reason)] if reason else "an index of a ring is out of range"
            self._tell_once(PeerError(f"the frontend broke the protocol: {what}"))
        elif leg.state is LegState.FAILED:
            self._tell_once(ParavirtError(f"the queue failed: {leg.error}"))
        elif leg.stale:
            self._back.core.stale = 0
            leg.revive()
            for port in {self._connection.port, self._connection.rx_port}:
                if port is not None:
                    port.notify_stale()

    def _tell_once(self, error: ParavirtError) -> None:
        if not self._stopped:
            self._stopped = True
            self._fail(error)


class VifBackend(BackendDevice[VifStatistics]):
    """The backend half of one vif."""

    messages = TX_LAYOUTS
    message_protocol = netif.TX_NAME

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        path: DevicePath,
        on_failure: Callable[[BackendDevice[VifStatistics]], None],
        *,
        policy: Policy,
    ) -> None:
        super().__init__(hypervisor, store, path, on_failure, rings=policy.rings)
        self._policy = policy
        self._config: VifConfig | None = None
        self._bridge: Bridge | None = None
        self._port: BridgePort | None = None
        self._request: VifRequest | None = None
        self._hash: NetHash | None = None
        self._first: NetBack | None = None  # of the queues
        self._filters = False
        self._control: VifControl | None = None
        self._rate_text: str | None = None
        self._port_keys: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """Of its port, as Linux calls the interface."""
        return f"vif{self.path.frontend_domid}.{self.path.device_id}"

    # -- what a class of devices says

    def _prepare(self) -> dict[str, str] | None:
        if self._port is None and not self._take_port():
            return None
        self._look_at_port_keys()
        return self._offer_of().to_keys() | {"vifname": self.name}

    def _offer_of(self) -> VifOffer:
        return VifOffer(max_queues=self._policy.max_queues, max_ring_page_order=self._policy.max_ring_page_order)

    def _take_port(self) -> bool:
        keys = xenbus.read_keys(self._store, self.path.backend, (*CONFIG_KEYS, *PORT_KEYS))
        if self._is_refused(keys):
            return False
        try:
            self._config = VifConfig.from_keys(keys)
            port_config = PortConfig.from_keys(keys)
            self._bridge = self._policy.bridges.take(self._config.bridge)
            self._bridge.check(port_config)
            self._port = self._bridge.add_port(self.name)
        except (InvalidRequest, AlreadyExists, ParavirtError) as error:
            self._release()
            self._refuse(keys, error)
            return False
        return True

    def _read_request(self) -> VifRequest:
        max_queues, directory = self._policy.max_queues, self.path.frontend
        keys = xenbus.read_keys(self._store, directory, REQUEST_KEYS)
        n_queues = VifRequest.count_queues(keys, max_queues)
        if n_queues > 1:
            keys |= xenbus.read_keys(self._store, directory, queue_keys(n_queues))
        request = VifRequest.from_keys(
            keys, max_queues=max_queues, max_ring_page_order=self._policy.max_ring_page_order
        )
        self._request = request
        return request

    def _map(self, request: RingPlaces, queue: int, fence: Fence) -> VifConnection:
        """Both rings, data and ports of one queue; after a failure nothing of it is kept."""
        place = request.queues[queue]
        assert isinstance(place, VifQueue)
        with ExitStack() as stack:
            arena = stack.enter_context(self._hypervisor.foreign_arena(self.path.frontend_domid, place.tx_refs[0]))
            tx_pages = stack.enter_context(arena.map_pages(place.tx_refs))
            rx_pages = stack.enter_context(arena.map_pages(place.rx_refs))
            waiter = self._hypervisor.waiter()
            stack.callback(waiter.close)
            tx_port = self._bind(waiter, place.tx_port)
            rx_port = tx_port if place.rx_port == place.tx_port else self._bind(waiter, place.rx_port)
            tx = self._attach_end(place.of_tx, tx_pages, TX_LAYOUTS, tx_port, fence, queue, netif.TX_NAME)
            stack.callback(tx.close)
            rx = self._attach_end(place.of_rx, rx_pages, RX_LAYOUTS, rx_port, fence, queue, netif.RX_NAME)
            stack.pop_all()
        return VifConnection(tx, arena, waiter, tx_port, tx_pages, queue, rx, rx_port, rx_pages)

    def _attach_end(
        self,
        place: RingRequest,
        pages: MappedPages,
        layouts: tuple[netif.Layout, netif.Layout],
        port: EventChannel,
        fence: Fence,
        queue: int,
        protocol: str,
    ) -> BackRing:
        return self._attach(pages, layouts, port, fence, self._label(place, port.port, queue, protocol))

    def _make_engine(self, connection: Connection) -> Engine[VifStatistics]:
        assert isinstance(connection, VifConnection)
        assert connection.rx_ring is not None
        assert self._request is not None
        assert self._port is not None
        features, beside = features_of(self._request), None if connection.queue == 0 else self._first
        back = NetBack(connection.ring, connection.rx_ring, connection.mapper, features, beside=beside)
        back.core.headroom = self._request.xdp_headroom
        rate = self._config.rate if self._config else None
        if rate:
            back.set_rate(rate.bytes, rate.window_us)
        control = None
        if connection.queue == 0:
            self._first, self._filters = back, self._request.multicast_control
            self._hash = NetHash(len(self._request.queues)) if self._request.ctrl else None
            control = self._control = self._make_control()
        if self._control is not None:
            self._control.add_queue(connection.queue, back)
        return QueueEngine(connection, back, self._port, self.fail, self._hash, control)

    def _make_control(self) -> VifControl | None:
        place = self._request.ctrl if self._request else None
        if place is None or self._hash is None or self._port is None:
            return None
        with ExitStack() as stack:
            arena = stack.enter_context(self._hypervisor.foreign_arena(self.path.frontend_domid, place.ring_refs[0]))
            pages = stack.enter_context(arena.map_pages(place.ring_refs))
            waiter = self._hypervisor.waiter()
            stack.callback(waiter.close)
            port = self._bind(waiter, place.event_channel)
            ring = self._attach_end(place, pages, CTRL_LAYOUTS, port, "full", 0, netif.CTRL_NAME)
            stack.pop_all()
        connection = Connection(ring, arena, waiter, port, pages, 0)
        return VifControl(connection, self._hash, self._port, self.fail)

    def _total(self, queues: Sequence[VifStatistics]) -> VifStatistics:
        return VifStatistics(
            total_counters(queue.counters for queue in queues),
            queues[0].tx_ring,
            queues[0].rx_ring,
            queues=len(queues),
        )

    def _look_again(self) -> None:
        """Take over what the toolstack has changed: the rate, how the switch treats the port."""
        self._look_at_port_keys()
        self._look_at_multicast()
        text = xenbus.read_key(self._store, f"{self.path.backend}/rate") or ""
        if text == self._rate_text:
            return
        first, self._rate_text = self._rate_text is None, text
        try:
            rate = Rate.from_text(text) if text else None
        except InvalidRequest as error:
            log.warning("%s: %s; it stays as it was", self.path.backend, error)
            return
        if first and self._config is not None and rate == self._config.rate:
            return
        for engine in self._engines:
            if isinstance(engine, QueueEngine):
                engine.set_rate(rate)
        log.info("%s: %s", self.path.backend, f"rate {rate}" if rate else "no rate")

    def _look_at_multicast(self) -> None:
        """The frontend may change its mind at any time; a word that is none changes nothing."""
        wish = xenbus.read_key(self._store, f"{self.path.frontend}/{MULTICAST_KEY}")
        if wish not in ("0", "1") or (filters := wish == "1") == self._filters:
            return
        self._filters = filters
        for engine in self._engines:
            if isinstance(engine, QueueEngine):
                engine.filter_multicast(filters)

    def _look_at_port_keys(self) -> None:
        """What is not well leaves the port as it was."""
        keys = xenbus.read_keys(self._store, self.path.backend, PORT_KEYS)
        if keys == self._port_keys or self._port is None or self._bridge is None or self._config is None:
            return
        self._port_keys = keys
        try:
            self._bridge.configure(self._port, PortConfig.from_keys(keys), self._config.mac)
        except InvalidRequest as error:
            log.warning("%s: %s; the port stays as it was", self.path.backend, error)

    def _release(self) -> None:
        bridge, port = self._bridge, self._port
        self._bridge = self._port = self._port_keys = self._rate_text = None
        if bridge is not None:
            if port is not None:
                bridge.remove_port(port)
            self._policy.bridges.give_back(bridge)


def features_of(request: VifRequest) -> Feature:
    """What a frontend can do with what it gets, as its keys say."""
    said = {
        Feature.SG: request.sg,
        Feature.GSO4: request.gso_tcpv4 and request.sg,
        Feature.GSO6: request.gso_tcpv6 and request.sg,
        Feature.NO_CSUM: request.no_csum,
        Feature.CSUM6: request.ipv6_csum,
        Feature.MCAST_CONTROL: request.multicast_control,
        Feature.RX_NOTIFY: request.rx_notify,
    }
    features = Feature(0)
    for feature, is_there in said.items():
        if is_there:
            features |= feature
    return features
