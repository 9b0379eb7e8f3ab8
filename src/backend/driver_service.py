# SPDX-License-Identifier: MIT
"""The service that finds the devices of a declared class and gives each a `DeviceBackend`."""

import logging
import time
from collections.abc import Callable
from functools import partial

from paravirt.backend import plugin
from paravirt.backend.connection import Connection
from paravirt.backend.device import BackendDevice, RingPolicy
from paravirt.backend.driver import DeviceBackend
from paravirt.backend.driver_engine import DriverEngine, DriverStatistics
from paravirt.backend.service import DEFAULT_SPIN_NS, DeviceService
from paravirt.errors import AlreadyExists, InvalidRequest, ParavirtError
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol.device import RESERVED, DeviceOffer, DeviceRequest, from_keys, key_names
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.waiting import Fence, Wait
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

log = logging.getLogger(__name__)

RETRY_S = 0.2  # what the device stands for is in use: look again


class DriverDevice(BackendDevice[DriverStatistics]):
    """The backend half of one device of a declared class."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        path: DevicePath,
        on_failure: Callable[[BackendDevice[DriverStatistics]], None],
        *,
        driver_class: type[DeviceBackend],
        rings: RingPolicy,
    ) -> None:
        super().__init__(hypervisor, store, path, on_failure, rings=rings)
        self._driver_class = driver_class
        self._protocol = driver_class.protocol
        self.messages = (self._protocol.request, self._protocol.response)
        self._driver: DeviceBackend | None = None
        self._offered: dict[str, str] = {}

    def _prepare(self) -> dict[str, str] | None:
        if self._driver is None and not self._open_driver():
            return None
        return self._offered

    def _check_names(self) -> None:
        """A node that the class has no configuration for is a mistake of who attached it. Once connected, the directory
        has the offer, too.
        """
        if xenbus.read_key(self._store, f"{self.path.backend}/hotplug-status") == "connected":
            return
        known = key_names(self._protocol.config)
        if unknown := sorted(set(self._store.ls(self.path.backend)) - RESERVED - set(known)):
            there = f"it has: {', '.join(known)}" if known else "it has none"
            raise InvalidRequest(f"{self._protocol.name} has no configuration {', '.join(unknown)} ({there})")

    def _open_driver(self) -> bool:
        self.retry_at = None
        protocol = self._protocol
        keys = xenbus.read_keys(self._store, self.path.backend, key_names(protocol.config))
        if self._is_refused(keys):
            return False
        try:
            self._check_names()
            driver = self._driver_class(from_keys(protocol.config, keys, InvalidRequest), self.path)
            values = driver.open()
            if not isinstance(values, protocol.offer):
                raise TypeError(f"open returned {values!r:.60}, not {protocol.offer.__name__}")
        except AlreadyExists as error:
            self._hotplug_error(error)
            self.retry_at = time.monotonic() + RETRY_S
            return False
        except (ParavirtError, OSError) as error:
            self._refuse(keys, error)
            return False
        except Exception as error:
            log.exception("%s: a defect of the driver", self.path.backend)
            self._refuse(keys, ParavirtError(f"a defect of the driver: {type(error).__name__}: {error}"))
            return False
        self._driver = driver
        self._offered = DeviceOffer(values, protocol.max_ring_page_order).to_keys(protocol)
        return True

    def _read_request(self) -> DeviceRequest:
        keys = xenbus.read_keys(self._store, self.path.frontend, DeviceRequest.NAMES)
        return DeviceRequest.from_keys(self._protocol, keys)

    def _make_engine(self, connection: Connection) -> DriverEngine:
        assert self._driver is not None
        return DriverEngine(connection, self._driver, spin_ns=self._rings.max_spin_ns, on_failure=self.fail)

    def _release(self) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            try:
                driver.close()
            except Exception:
                log.exception("%s: a defect of the driver", self.path.backend)


class DriverService(DeviceService[DriverStatistics]):
    """Serves all devices of one declared class of Dom0."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        driver_class: type[DeviceBackend],
        *,
        spin_ns: int = DEFAULT_SPIN_NS,
        fence: Fence = "full",
        wait: Wait = "adaptive",
    ) -> None:
        """`spin_ns`, `fence`, `wait`: see `RingPolicy`."""
        self.driver_class = driver_class
        rings = RingPolicy(max_spin_ns=spin_ns, fence=fence, wait=wait)
        make_device = partial(DriverDevice, driver_class=driver_class, rings=rings)
        super().__init__(hypervisor, store, driver_class.protocol.name, make_device)


def load_driver(name: str) -> type[DeviceBackend]:
    """The `DeviceBackend` that "module:Class" names, also in the directory we are in. `NotFound`, `InvalidRequest`."""
    found = plugin.load(name)
    if not (isinstance(found, type) and issubclass(found, DeviceBackend)):
        raise InvalidRequest(f"{name} is no DeviceBackend")
    return found
