# SPDX-License-Identifier: MIT
"""A domain as its own processes see it: who it is and which devices it has."""

import os
import socket
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

from paravirt.errors import AlreadyExists, Closed, HypervisorGone, NotFound, ParavirtError, XenstoreError
from paravirt.frontend.device import RESUME_TIMEOUT_S
from paravirt.frontend.driver import DeviceFrontend
from paravirt.frontend.vbd import CONNECT_TIMEOUT_S, DEFAULT_RING_PAGE_ORDER, DEFAULT_SPIN_NS, Disk
from paravirt.frontend.vif import Vif
from paravirt.hypervisor.client import Hypervisor, PortState
from paravirt.protocol.blkif import DEFAULT_INDIRECT_SEGMENTS
from paravirt.protocol.vbd import device_name, device_number
from paravirt.protocol.xenbus import DevicePath, XenbusState
from paravirt.ring.waiting import Wait
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

F = TypeVar("F", bound=DeviceFrontend)

_IN_USE = tuple(str(int(state)) for state in (XenbusState.INITIALISED, XenbusState.CONNECTED, XenbusState.CLOSING))

STORE_PATIENCE_S = 10.0
"""How long calls wait for the next xenstored when there is none; then they raise `StoreGone`."""

STORE_START_S = 3.0
"""How long a process that comes while xenstored is being replaced waits for it; then it hears `NotFound`."""
STORE_PAUSE_S = 0.02


def _first_store(hypervisor: Hypervisor) -> socket.socket:
    deadline = time.monotonic() + STORE_START_S
    while True:
        try:
            return hypervisor.store_connection()
        except NotFound:
            if time.monotonic() >= deadline:
                raise
            time.sleep(STORE_PAUSE_S)


class Domain:
    """One process' part in a domain: its connection to the hypervisor and to xenstore. A context manager."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        """Over a connection that the broker labelled with this domain; it is owned, and closed with this object."""
        self.hypervisor = hypervisor
        self.domid: int = hypervisor.domid
        self._open: list[Disk | Vif | DeviceFrontend] = []
        try:
            self.store = XenstoreClient.from_socket(
                _first_store(hypervisor), again=self._next_store, reconnect_timeout_s=STORE_PATIENCE_S
            )
        except BaseException:
            hypervisor.close()
            raise

    def _next_store(self) -> socket.socket:
        """A connection to the xenstored that took the place of a dead one."""
        try:
            return self.hypervisor.store_connection()
        except (HypervisorGone, Closed):
            self.store.stop_reconnecting()  # nobody can give us another one
            raise

    @classmethod
    def from_environment(cls) -> Self:
        """The domain this process was started in (`paravirt run`); `NotFound` outside of one."""
        if not {"PARAVIRT_FD", "PARAVIRT_SOCKET"} & set(os.environ):
            raise NotFound("this process is not in a domain: start it with `paravirt run DOMAIN -- command`")
        return cls(Hypervisor.from_environment())

    @property
    def name(self) -> str:
        """As given when the domain was created; empty if the toolstack has not said."""
        return xenbus.read_key(self.store, f"/local/domain/{self.domid}/name") or ""

    def disks(self) -> list[str]:
        """Names of the disks attached to this domain, such as `xvda`."""
        return sorted(device_name(number) for number in self.devices("vbd"))

    def devices(self, kind: str) -> list[int]:
        """Numbers of the devices of a class attached to this domain."""
        try:
            devices = self.store.ls(f"/local/domain/{self.domid}/device/{kind}")
        except XenstoreError as error:
            if error.name != "ENOENT":
                raise
            return []
        return sorted(int(device) for device in devices if device.isdigit())

    def open_disk(
        self,
        name: str = "xvda",
        *,
        ring_page_order: int = DEFAULT_RING_PAGE_ORDER,
        spin_ns: int = DEFAULT_SPIN_NS,
        wait: Wait = "adaptive",
        max_segments: int = DEFAULT_INDIRECT_SEGMENTS,
        persistent: bool = True,
        queues: int | None = None,
        merge: bool = True,
        buffer_bytes: int = 0,
        on_resize: Callable[[int], None] | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> Disk:
        """Connect to a disk; see `Disk` for the arguments and errors.

        `NotFound` when there is none of that name, `AlreadyExists` while it is open (in any process of this domain).
        """
        path = self._claim("vbd", device_number(name), f"disk {name}", self.disks)
        disk = Disk(
            self.hypervisor,
            self.store,
            path,
            name=name,
            ring_page_order=ring_page_order,
            spin_ns=spin_ns,
            wait=wait,
            max_segments=max_segments,
            persistent=persistent,
            queues=queues,
            merge=merge,
            buffer_bytes=buffer_bytes,
            on_resize=on_resize,
            timeout_s=timeout_s,
        )
        self._keep(disk)
        return disk

    def vifs(self) -> list[int]:
        """Numbers of the network devices attached to this domain."""
        return self.devices("vif")

    def open_vif(self, handle: int = 0, **options: Any) -> Vif:
        """Connect to a network device; `options` and errors as `Vif`.

        `NotFound` when there is none of that number, `AlreadyExists` while it is open (in any process of this domain).
        """
        path = self._claim("vif", handle, f"network device {handle}", lambda: map(str, self.vifs()))
        vif = Vif(self.hypervisor, self.store, path, **options)
        self._keep(vif)
        return vif

    def open(self, driver: type[F], device_id: int = 0, **options: Any) -> F:
        """Connect to a device with a driver of one's own; `options` and errors as its constructor's.

        `NotFound` when there is none of that number, `AlreadyExists` while it is open (in any process of this domain).
        """
        kind = driver.protocol.name
        path = self._claim(kind, device_id, f"{kind} {device_id}", lambda: map(str, self.devices(kind)))
        device = driver(self.hypervisor, self.store, path, **options)
        self._keep(device)
        return device

    def locate(self, kind: str, device_id: int) -> DevicePath:
        """Where a device of this domain stands, for a driver that is not made by `open`. Raises as that."""
        return self._claim(kind, device_id, f"{kind} {device_id}", lambda: map(str, self.devices(kind)))

    def _claim(self, kind: str, device_id: int, what: str, there: Callable[[], Iterable[str]]) -> DevicePath:
        """Where the device stands, which must be there and not open."""
        frontend = f"/local/domain/{self.domid}/device/{kind}/{device_id}"
        backend_domid = xenbus.read_key(self.store, f"{frontend}/backend-id")
        if backend_domid is None or not backend_domid.isdecimal():
            raise NotFound(f"domain {self.domid} has no {what} (it has: {', '.join(there()) or 'none'})")
        if self._is_open(frontend):
            raise AlreadyExists(f"{what} of domain {self.domid} is open already")
        return DevicePath(kind, self.domid, device_id, int(backend_domid))

    def _keep(self, device: "Disk | Vif | DeviceFrontend") -> None:
        self._open = [other for other in self._open if not other.is_closed]
        self._open.append(device)

    def _is_open(self, frontend: str) -> bool:
        """A port lives as long as the process that has it: what a killed process left in xenstore is not taken for
        it.
        """
        several = xenbus.read_key(self.store, f"{frontend}/multi-queue-num-queues") not in (None, "1")
        places = [f"{'queue-0/' if several else ''}event-channel{ring}" for ring in ("", "-tx")]
        keys = xenbus.read_keys(self.store, frontend, ("state", *places))
        ports = [int(keys[place]) for place in places if keys.get(place, "").isdigit()]
        if keys.get("state") not in _IN_USE:
            return False
        return any(self.hypervisor.port_state(port) is not PortState.CLOSED for port in ports)

    def suspend(self) -> None:
        """Suspend all devices that are open here, as a domain does before it is moved or saved. Their calls wait."""
        for device in self._open:
            if not device.is_closed:
                device.suspend()

    def resume(self, *, timeout_s: float = RESUME_TIMEOUT_S) -> None:
        """Connect them again, with new rings and ports; what was in flight is sent again. `timeout_s`: for each.

        Raises the first error of a device, when all have been told.
        """
        errors = []
        for device in self._open:
            try:
                if not device.is_closed:
                    device.resume(timeout_s=timeout_s)
            except ParavirtError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Close what is still open, devices first. Harmless when repeated."""
        for device in self._open:
            device.close()
        self.store.close()
        self.hypervisor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Domain {self.domid}>"
