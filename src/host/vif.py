# SPDX-License-Identifier: MIT
"""What a toolstack does for a network device: attach, configure, detach, list.

Source: Xen public/io/netif.h and docs/misc/xenstore-paths.pandoc for the keys.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from paravirt.errors import InvalidRequest, NotFound
from paravirt.host import device as devices
from paravirt.host.device import ATTACH_TIMEOUT_S, DETACH_TIMEOUT_S
from paravirt.protocol.netif import Mac
from paravirt.protocol.vif import DEFAULT_BRIDGE, DEFAULT_MTU, Rate, VifConfig, default_mac, parse_mac
from paravirt.protocol.vif_port import PORT_KEYS, PortConfig
from paravirt.protocol.xenbus import DevicePath
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import Transaction, XenstoreClient

MAX_HANDLE = 255


@dataclass(frozen=True, slots=True)
class VifInfo:
    """One attached network device."""

    domid: int
    handle: int
    mac: str
    bridge: str
    mtu: int | None
    rate: str
    """"bytes,microseconds"; "": as much as it likes."""
    port: str
    """How the switch treats it, where that is not the usual; "malformed" for what is none."""
    frontend_state: str
    backend_state: str


def _path(domid: int, handle: int) -> DevicePath:
    if not 0 <= handle <= MAX_HANDLE:
        raise InvalidRequest(f"the number of a network device is {handle}, not from 0 to {MAX_HANDLE}")
    return DevicePath("vif", domid, handle)


def attach(
    store: XenstoreClient,
    domid: int,
    *,
    handle: int = 0,
    mac: str | Mac | None = None,
    bridge: str = DEFAULT_BRIDGE,
    mtu: int = DEFAULT_MTU,
    rate: Rate | None = None,
    port: PortConfig | None = None,
    timeout_s: float = ATTACH_TIMEOUT_S,
) -> DevicePath:
    """Give a domain a network device on a bridge, and wait until the backend has accepted it.

    `mac`: None: one in Xen's range, of domain and number. `rate`: how much the guest may send. `port`: how the switch
    treats it.

    Raises `NotFound` (no such domain), `AlreadyExists` (number in use), `InvalidRequest` with the backend's reason,
    `TimedOut` (no backend runs).
    """
    path = _path(domid, handle)
    address = default_mac(domid, handle) if mac is None else mac if isinstance(mac, Mac) else parse_mac(mac)
    config = VifConfig(address, bridge, handle, mtu, rate)
    keys = VifConfig.from_keys(config.to_keys()).to_keys() | (port.to_keys() if port else {})
    frontend_keys = {"mac": str(address), "handle": str(handle), "mtu": str(mtu), "trusted": "1"}
    return devices.attach(
        store, path, keys, name=f"network device {handle}", frontend_keys=frontend_keys, timeout_s=timeout_s
    )


def detach(store: XenstoreClient, domid: int, handle: int = 0, *, timeout_s: float = DETACH_TIMEOUT_S) -> None:
    """Take it away; by force when the domain does not answer in time. `NotFound` when there is none."""
    devices.detach(store, _path(domid, handle), name=f"network device {handle}", timeout_s=timeout_s)


def set_rate(store: XenstoreClient, domid: int, handle: int, rate: Rate | None) -> None:
    """How much the guest may send from now on; None: as much as it likes. `NotFound`."""
    _replace(store, _path(domid, handle), ("rate",), {"rate": str(rate)} if rate else {})


def set_port(store: XenstoreClient, domid: int, handle: int, port: PortConfig) -> None:
    """How the switch treats it from now on. `NotFound`."""
    _replace(store, _path(domid, handle), PORT_KEYS, port.to_keys())


def port_of(store: XenstoreClient, domid: int, handle: int) -> PortConfig:
    """How the switch treats it. `NotFound`, `InvalidRequest` for what is malformed."""
    path = _path(domid, handle)
    keys = xenbus.read_keys(store, path.backend, ("mac", *PORT_KEYS))
    if "mac" not in keys:
        raise NotFound(f"domain {domid} has no network device {handle}")
    return PortConfig.from_keys(keys)


def _replace(store: XenstoreClient, path: DevicePath, names: tuple[str, ...], keys: Mapping[str, str]) -> None:
    def write(transaction: Transaction) -> None:
        if xenbus.read_key(transaction, f"{path.backend}/mac") is None:
            raise NotFound(f"domain {path.frontend_domid} has no network device {path.device_id}")
        for name in names:
            if name in keys:
                transaction.write(f"{path.backend}/{name}", keys[name])
            elif xenbus.read_key(transaction, f"{path.backend}/{name}") is not None:
                transaction.rm(f"{path.backend}/{name}")

    store.transact(write)


def list_vifs(store: XenstoreClient, domid: int | None = None) -> list[VifInfo]:
    """All attached network devices, or those of one domain."""
    infos = (_info(store, path) for path in devices.paths(store, kind="vif", domid=domid))
    return [info for info in infos if info is not None]


def _info(store: XenstoreClient, path: DevicePath) -> VifInfo | None:
    keys = xenbus.read_keys(store, path.backend, ("mac", "bridge", "mtu", "rate", "state", *PORT_KEYS))
    if "state" not in keys:
        return None  # detached between the listing and here
    mtu = keys.get("mtu", "")
    return VifInfo(
        domid=path.frontend_domid,
        handle=path.device_id,
        mac=keys.get("mac", ""),
        bridge=keys.get("bridge", DEFAULT_BRIDGE),
        mtu=int(mtu) if mtu.isascii() and mtu.isdigit() else None,
        rate=keys.get("rate", ""),
        port=_show_port(keys),
        frontend_state=devices.state_name(store, path.frontend),
        backend_state=devices.state_name(store, path.backend),
    )


def _show_port(keys: Mapping[str, str]) -> str:
    try:
        said = PortConfig.from_keys(keys).to_keys()
    except InvalidRequest:
        return "malformed"
    return ", ".join(f"{name.removeprefix('paravirt-')} {value}" for name, value in said.items())
