# SPDX-License-Identifier: MIT
"""Bridges: a switch with a thread that moves the frames of its ports, in C (`ring/netloop.py`).

A bridge is there as long as somebody uses it: devices of guests, or whoever configured it. Ports have names: `vif1.0`
for number 0 of domain 1, else what they were called.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from paravirt.backend.capture import Capture
from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, TimedOut
from paravirt.protocol.bridge import DEFAULT_HOLD_MS, MAX_HOLD_MS
from paravirt.protocol.bridge_state import BridgeState, CaptureWish, PortKind, PortState, QueueState, Station
from paravirt.protocol.netif import Mac
from paravirt.protocol.vif_port import PortConfig
from paravirt.ring.event import EventPort
from paravirt.ring.netctrl import NetCtrl, NetHash
from paravirt.ring.netif import NetBack
from paravirt.ring.netloop import Leg, LegCounters, NetLoop
from paravirt.ring.switch import Address, Limit, PortStatistics
from paravirt.ring.tap import Tap

log = logging.getLogger(__name__)

NEWS_TIMEOUT_S = 3600.0
MAX_HOLD_S = MAX_HOLD_MS / 1000


@dataclass(frozen=True, slots=True)
class PortView:
    """What a bridge says of a port."""

    name: str
    number: int
    legs: tuple[LegCounters, ...]
    switch: PortStatistics


class BridgePort:
    """A named port; a device with several queues has one with several legs. Used under its bridge's lock."""

    def __init__(
        self, bridge: "Bridge", name: str, number: int, kind: PortKind, close: Callable[[], None] | None = None
    ) -> None:
        self.bridge = bridge
        self.name = name
        self.number = number
        self.kind = kind
        self.detail: Callable[[], str] = str
        """What there is to say of it."""
        self.stop: Callable[[], None] | None = None
        """Before its legs go."""
        self.legs: list[Leg] = []
        self.close = close
        self.config = PortConfig()


class Bridge:
    """One switch and its thread."""

    def __init__(self, name: str, *, spin_ns: int) -> None:
        """Raises `ResourceLimit`."""
        self.name = name
        self.users = 0
        self._lock = threading.RLock()
        self._ports: dict[str, BridgePort] = {}
        self._watched: dict[Leg, Callable[[Leg], None]] = {}
        self._mirror: str | None = None
        self._is_wire = False
        self.hold_s = DEFAULT_HOLD_MS / 1000
        self._captures: set[Capture] = set()
        self._loop = NetLoop(spin_ns=spin_ns)
        self._loop.start()
        self._thread = threading.Thread(target=self._hear, name=f"bridge-{name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ports of its own go; those of devices are gone."""
        with self._lock:
            for capture in list(self._captures):
                capture.finish(f"bridge {self.name} is gone")
            for port in list(self._ports.values()):
                self.remove_port(port)
        self._loop.stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- ports

    def add_port(self, name: str, close: Callable[[], None] | None = None, *, kind: PortKind = "vif") -> BridgePort:
        """A port without legs. `AlreadyExists`, `InvalidRequest` for a third one of a wire, `ResourceLimit`."""
        with self._lock:
            if name in self._ports:
                raise AlreadyExists(f"bridge {self.name} has a port {name} already")
            if self._is_wire and len(self._ports) > 1:
                raise InvalidRequest(
                    f"bridge {self.name} is a wire between {' and '.join(self._ports)}: no third port {name}"
                )
            with self._loop.still():
                number = self._loop.switch.add_port()
            port = self._ports[name] = BridgePort(self, name, number, kind, close)
            self._apply_mirror()
            self._apply_wire()
            for capture in list(self._captures):
                capture.add_port(port)
            return port

    def remove_port(self, port: BridgePort) -> None:
        """With its legs. Harmless when repeated."""
        with self._lock:
            if self._ports.get(port.name) is not port:
                return
            del self._ports[port.name]
            if port.stop is not None:
                port.stop()
            for capture in list(self._captures):
                capture.port_gone(port)
            for leg in list(port.legs):
                self.remove_leg(port, leg)
            with self._loop.still():
                self._loop.switch.remove_port(port.number)
            self._apply_wire()
            if port.close is not None:
                port.close()

    def add_ctrl(self, port: BridgePort, ctrl: NetCtrl, event: EventPort, on_news: Callable[[Leg], None]) -> Leg:
        """The control ring of the device of a port. `on_news`: as `add_back`."""
        with self._lock:
            leg = self._loop.add_ctrl(ctrl, event)
            self._watched[leg] = on_news
            return leg

    def add_back(
        self,
        port: BridgePort,
        back: NetBack,
        events: tuple[EventPort, EventPort],
        on_news: Callable[[Leg], None],
        net_hash: NetHash | None = None,
    ) -> Leg:
        """A queue of a guest's device. `on_news`: told from the bridge's thread that its state has changed. `net_hash`:
        what the guest wants of hashes.
        """
        with self._lock:
            leg = self._plug(port, self._loop.add_back(back, events, port.number, net_hash))
            self._watched[leg] = on_news
            return leg

    def _plug(self, port: BridgePort, leg: Leg) -> Leg:
        port.legs.append(leg)
        for capture in list(self._captures):
            capture.add_leg(port, leg)
        return leg

    def remove_leg(self, port: BridgePort, leg: Leg) -> None:
        """Nothing of it is touched any more."""
        with self._lock:
            self._watched.pop(leg, None)
            leg.remove()
            for capture in list(self._captures):
                capture.leg_gone(leg)
            if leg in port.legs:
                port.legs.remove(leg)

    def add_tap(self, name: str, *, offloads: bool = True) -> BridgePort:
        """An interface of the kernel, as a port of that name. Errors as `Tap`."""
        with self._lock:
            if name in self._ports:
                raise AlreadyExists(f"bridge {self.name} has a port {name} already")
            tap = Tap(name, offloads=offloads)
            try:
                port = self.add_port(name, tap.close, kind="tap")
            except BaseException:
                tap.close()
                raise
            self._plug(port, self._loop.add_tap(tap.fd, tap.vnet_bytes, port.number))
            return port

    def add_user(self, name: str) -> tuple[BridgePort, Leg]:
        """A port of this program, with its `give` and `get`."""
        with self._lock:
            port = self.add_port(name, kind="program")
            return port, self._plug(port, self._loop.add_user(port.number))

    def add_null(self, name: str, station: Mac | None = None) -> BridgePort:
        """A port that takes everything and gives nothing. `station`: one that the switch takes to be there, as long as
        old addresses are not forgotten.
        """
        with self._lock:
            port = self.add_port(name, kind="null")
            self._plug(port, self._loop.add_null(port.number))
            if station is not None:
                with self._loop.still():
                    self._loop.switch.forward(port.number, station + station + bytes(2), time.monotonic_ns())
            return port

    def wire(self, one: Leg, other: Leg | None) -> None:
        """All that comes from one goes to the other, past the switch, and back; of a leg to itself: comes back.

        None: by the switch again.
        """
        with self._lock:
            self._loop.wire(one, other)

    @property
    def thread(self) -> int:
        """Of the kernel: the one that moves the frames."""
        return self._loop.thread

    def port(self, name: str) -> BridgePort:
        """`NotFound`."""
        with self._lock:
            if name not in self._ports:
                raise NotFound(f"bridge {self.name} has no port {name}")
            return self._ports[name]

    # -- configuration

    def configure(self, port: BridgePort, config: PortConfig, mac: Mac | None = None) -> None:
        """How the switch treats a port. `mac`: the address it is locked to. Raises `InvalidRequest`."""
        with self._lock:
            if config == port.config or self._ports.get(port.name) is not port:
                return
            switch, number = self._loop.switch, port.number
            self.check(config)
            if config.locking == "locked" and mac is None:
                raise InvalidRequest(f"port {port.name} has no address of its own that it could be locked to")
            with self._loop.still():
                if config.vlans.access is not None:
                    switch.set_access(number, config.vlans.access)
                else:
                    switch.set_trunk(number, config.vlans.trunk, native=config.vlans.native)
                for limit in Limit:
                    switch.set_limit(number, limit, config.limits.get(limit.name.lower(), 0))
                switch.set_address_limit(number, config.max_addresses)
                switch.set_mirrored(number, config.mirrored)
                if config.locking == "locked":
                    switch.lock(number, str(mac), config.ipv4, config.ipv6)
                elif config.locking == "disabled":
                    switch.disable(number)
                else:
                    switch.unlock(number)
            port.config = config

    def check(self, config: PortConfig) -> None:
        """Raises `InvalidRequest` for what a wire does not do."""
        if self._is_wire and config != PortConfig():
            said = ", ".join(f"{name.removeprefix('paravirt-')} {value}" for name, value in config.to_keys().items())
            raise InvalidRequest(f"bridge {self.name} is a wire, which does not look at frames: no {said}")

    def set_wire(self, on: bool) -> None:
        """Whether it is a wire: two ports, what comes from one goes to the other. Raises `InvalidRequest` for one that
        has more ports, or some whose frames are to be looked at; then it stays a switch.
        """
        with self._lock:
            if on and len(self._ports) > 2:
                raise InvalidRequest(f"bridge {self.name} has ports {', '.join(self._ports)}: a wire has two")
            before, self._is_wire = self._is_wire, on
            try:
                for port in self._ports.values():
                    self.check(port.config)
            except InvalidRequest:
                self._is_wire = before
                raise
            self._apply_wire()

    def _apply_wire(self) -> None:
        ends: list[int | None] = [port.number for port in self._ports.values()] + [None, None]
        self._loop.set_wire(self._is_wire, (ends[0], ends[1]))

    def set_ageing(self, ageing_s: float) -> None:
        """When stations that say nothing are forgotten; 0: never."""
        with self._loop.still():
            self._loop.switch.set_ageing(ageing_s)

    def set_hold(self, hold_s: float) -> None:
        """How long a sender is held back at most whose frames wait for receivers, before they are dropped; 0: not."""
        if not 0 <= hold_s <= MAX_HOLD_S:
            raise InvalidRequest(f"a sender is held back for 0 to {MAX_HOLD_S:g} s, not {hold_s:g}")
        self.hold_s = hold_s
        self._loop.set_hold(hold_s)

    def set_mirror(self, name: str | None) -> None:
        """Which port gets copies of what mirrored ones send and are sent; one that is not there yet will."""
        with self._lock:
            self._mirror = name
            self._apply_mirror()

    def _apply_mirror(self) -> None:
        port = self._ports.get(self._mirror) if self._mirror else None
        with self._loop.still():
            self._loop.switch.set_mirror(None if port is None else port.number)

    # -- looking

    def capture(self, wish: CaptureWish) -> Capture:
        """What passes ports of it from now on, for one reader; to be given to `uncapture`. Raises `NotFound`,
        `InvalidRequest`, `ResourceLimit`.
        """
        with self._lock:
            if wish.port is not None:
                self.port(wish.port)
            capture = Capture(self._loop, wish)
            for port in self._ports.values():
                capture.add_port(port)
            self._captures.add(capture)
            return capture

    def uncapture(self, capture: Capture) -> None:
        """Nobody reads it any more. Takes no lock of the bridge: a reader that is waited for may call it."""
        self._captures.discard(capture)
        capture.finish("it was stopped")

    def state(self, *, stations: bool = True) -> BridgeState:
        """All that there is to say of it. `stations`: with the addresses that were learnt."""
        with self._lock:
            found, now = self.addresses() if stations else [], time.monotonic_ns()
            ports = tuple(self._port_state(port) for port in self._ports.values())
            return BridgeState(
                self.name,
                self._is_wire,
                self._mirror,
                self.sleeps,
                now,
                len(self._captures),
                ports,
                tuple(Station(one.mac, one.vid, name, max(0, now - one.seen_ns) / 1e9) for name, one in found),
            )

    def _port_state(self, port: BridgePort) -> PortState:
        detail = port.detail()
        # For each port anew: of thousands the loop would stand still for long.
        with self._loop.still():
            counters = asdict(self._loop.switch.statistics(port.number))
            queues = tuple(_queue_state(leg) for leg in port.legs)
        refused = counters.pop("drops")
        return PortState(port.name, port.kind, detail, port.number, counters, refused, queues)

    def ports(self) -> list[PortView]:
        """Counters of every port."""
        with self._lock, self._loop.still():
            return [
                PortView(
                    port.name,
                    port.number,
                    tuple(leg.counters() for leg in port.legs),
                    self._loop.switch.statistics(port.number),
                )
                for port in self._ports.values()
            ]

    def addresses(self) -> list[tuple[str, Address]]:
        """Stations that were learnt, each with the name of its port."""
        with self._lock:
            names = {port.number: port.name for port in self._ports.values()}
            with self._loop.still():
                found = self._loop.switch.addresses(time.monotonic_ns())
        return [(names.get(address.port, "?"), address) for address in found]

    @property
    def sleeps(self) -> int:
        """Times that its thread had nothing to do."""
        return self._loop.sleeps

    # -- its thread

    def _hear(self) -> None:
        while True:
            try:
                if not self._loop.wait_news(NEWS_TIMEOUT_S):
                    return
            except TimedOut:
                continue
            with self._lock:
                news = [(leg, tell) for leg, tell in self._watched.items() if leg.state or leg.stale]
            for leg, tell in news:
                try:
                    tell(leg)
                except Exception:
                    log.exception("bridge %s: what a port has to say could not be dealt with", self.name)


def _queue_state(leg: Leg) -> QueueState:
    state, counters, back = leg.state.name.lower(), asdict(leg.counters()), leg.back
    if back is None:
        return QueueState(state, leg.error, counters)
    return QueueState(state, leg.error, counters, asdict(back.counters()), *back.waiting, back.stalled)


class Bridges:
    """Those of a process, by name. For any thread."""

    def __init__(self, *, spin_ns: int) -> None:
        self._spin_ns = spin_ns
        self._lock = threading.Lock()
        self._bridges: dict[str, Bridge] = {}

    def take(self, name: str) -> Bridge:
        """The bridge of this name, made if there is none; to be given back. `ResourceLimit`."""
        with self._lock:
            bridge = self._bridges.get(name)
            if bridge is None:
                bridge = self._bridges[name] = Bridge(name, spin_ns=self._spin_ns)
            bridge.users += 1
            return bridge

    def give_back(self, bridge: Bridge) -> None:
        """The last one closes it."""
        with self._lock:
            bridge.users -= 1
            if bridge.users:
                return
            del self._bridges[bridge.name]
        bridge.close()

    def all(self) -> list[Bridge]:
        """Those that are there."""
        with self._lock:
            return list(self._bridges.values())
