# SPDX-License-Identifier: MIT
"""The backend service of network devices, and the bridges that they stand on.

What is to be of a bridge beside its devices stands below `/paravirt/bridge/NAME` (`protocol/bridge.py`): the service
follows it.
"""

import logging
import os
from collections.abc import Iterator
from functools import partial

from paravirt.backend.bridge import Bridge, BridgePort, Bridges
from paravirt.backend.bridge_links import add_link
from paravirt.backend.device import DEFAULT_SPIN_NS, RingPolicy
from paravirt.backend.service import DeviceService
from paravirt.backend.vif import Policy, VifBackend, VifStatistics
from paravirt.errors import InvalidRequest, NotFound, ParavirtError, XenstoreError
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol.bridge import BRIDGE_KEYS, ROOT, BridgeConfig, bridge_of_path
from paravirt.protocol.bridge_link import LinkConfig
from paravirt.protocol.vif import MAX_QUEUES, MULTICAST_KEY, bridge_name
from paravirt.ring.waiting import Fence, Wait
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import WatchEvent, XenstoreClient

log = logging.getLogger(__name__)


class _Configured:
    """A bridge that somebody has configured: it is there without devices, too."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.taps: dict[str, BridgePort] = {}
        self.links: dict[str, tuple[LinkConfig, BridgePort]] = {}
        self.keys: dict[str, str] = {}


class VifService(DeviceService[VifStatistics]):
    """Serves all vifs of Dom0."""

    watched = ("state", MULTICAST_KEY)

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        *,
        spin_ns: int = DEFAULT_SPIN_NS,
        fence: Fence = "full",
        wait: Wait = "adaptive",
        max_queues: int | None = None,
    ) -> None:
        """`spin_ns`: how long a bridge looks at a port without work before it sleeps. `max_queues`: that a frontend may
        have for a device; None: as many as there are CPUs.
        """
        if max_queues is None:
            max_queues = min(len(os.sched_getaffinity(0)), MAX_QUEUES)
        if not 1 <= max_queues <= MAX_QUEUES:
            raise InvalidRequest(f"max_queues is {max_queues}, not from 1 to {MAX_QUEUES}")
        rings = RingPolicy(max_spin_ns=spin_ns, fence=fence, wait=wait)
        self.bridges = Bridges(spin_ns=rings.max_spin_ns)
        self._configured: dict[str, _Configured] = {}
        policy = Policy(self.bridges, rings, max_queues)
        super().__init__(hypervisor, store, "vif", partial(VifBackend, policy=policy))

    def _begin(self) -> None:
        # First, so that no device comes to a wire that is taken for a switch.
        self._look_at_bridges(self._list(ROOT))
        super()._begin()
        self._queue.add(ROOT, ROOT)

    def _look_elsewhere(self, event: WatchEvent) -> None:
        """A bridge was configured, or all of them are to be looked at."""
        name = bridge_of_path(event.path)
        self._look_at_bridges([*self._list(ROOT), *self._configured] if name is None else [name])

    def _look_at_bridges(self, names: list[str]) -> None:
        for each in names:
            try:
                self._configure(each)
            except (XenstoreError, InvalidRequest) as error:
                log.warning("bridge %s: %s", each[:40], error)

    def _configure(self, name: str) -> None:
        directory = f"{ROOT}/{bridge_name(name)}"
        keys = xenbus.read_keys(self._store, directory, BRIDGE_KEYS)
        known = self._configured.get(name)
        if not keys:
            if known is not None:
                self._let_go(name)
            return
        config = BridgeConfig.from_keys(keys)
        if known is None:
            known = self._configured[name] = _Configured(self.bridges.take(name))
        if keys == known.keys:
            return
        known.keys = keys
        known.bridge.set_ageing(config.ageing_s)
        known.bridge.set_hold(config.hold_ms / 1000)
        known.bridge.set_mirror(config.mirror)
        errors = "; ".join([*self._set_ports(known, config)])
        # Our own word on it wakes us once more, and is then what it was.
        if xenbus.read_key(self._store, f"{directory}/error") != (errors or None):
            if errors:
                self._store.write(f"{directory}/error", errors)
            else:
                self._store.rm(f"{directory}/error")

    def _set_ports(self, known: _Configured, config: BridgeConfig) -> Iterator[str]:
        """Ports go and come, and it becomes a wire or a switch. What went wrong, in words."""
        for name in [tap for tap in known.taps if tap not in config.taps]:
            known.bridge.remove_port(known.taps.pop(name))
        for name in [name for name, (link, _) in known.links.items() if config.links.get(name) != link]:
            known.bridge.remove_port(known.links.pop(name)[1])
        try:
            known.bridge.set_wire(config.wire)
        except InvalidRequest as error:
            log.warning("bridge %s: %s", known.bridge.name, error)
            yield str(error)
        yield from self._set_taps(known, config)
        for name, link in config.links.items():
            try:
                if name not in known.links:
                    known.links[name] = link, add_link(known.bridge, name, link)
            except ParavirtError as error:
                log.warning("bridge %s: %s", known.bridge.name, error)
                yield str(error)

    def _set_taps(self, known: _Configured, config: BridgeConfig) -> Iterator[str]:
        for name, port_config in config.taps.items():
            try:
                if name not in known.taps:
                    known.taps[name] = known.bridge.add_tap(name, offloads=config.offloads)
                known.bridge.configure(known.taps[name], port_config)
            except (ParavirtError, OSError) as error:
                log.warning("bridge %s: %s", known.bridge.name, error)
                yield str(error)

    def _let_go(self, name: str) -> None:
        known = self._configured.pop(name)
        for port in (*known.taps.values(), *(port for _, port in known.links.values())):
            known.bridge.remove_port(port)
        known.bridge.set_mirror(None)
        known.bridge.set_wire(False)
        self.bridges.give_back(known.bridge)

    def _close_all(self) -> None:
        super()._close_all()
        for name in list(self._configured):
            self._let_go(name)

    def bridge(self, name: str) -> Bridge:
        """One that is there: `NotFound`."""
        for bridge in self.bridges.all():
            if bridge.name == name:
                return bridge
        raise NotFound(f"there is no bridge {name}")
