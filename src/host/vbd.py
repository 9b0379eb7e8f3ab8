# SPDX-License-Identifier: MIT
"""What a toolstack does for a block device: attach, detach, list.

Source: Xen public/io/blkif.h for the keys.
"""

from dataclasses import dataclass
from typing import get_args

from paravirt.backend.disks import absolute
from paravirt.errors import InvalidRequest, NotFound
from paravirt.host import device as devices
from paravirt.host.device import ATTACH_TIMEOUT_S, DETACH_TIMEOUT_S
from paravirt.protocol.vbd import DeviceType, Mode, VbdConfig, device_name, device_number
from paravirt.protocol.vbd_qos import QOS_KEYS, Qos
from paravirt.protocol.xenbus import DevicePath
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import Transaction, XenstoreClient


@dataclass(frozen=True, slots=True)
class VbdInfo:
    """One attached disk."""

    domid: int
    device: str  # "xvda"
    driver: str
    spec: str
    mode: str  # "r" or "w"
    size_bytes: int | None  # None until the backend has looked at it
    qos: str  # its limits, "" without
    frontend_state: str
    backend_state: str


def attach(
    store: XenstoreClient,
    domid: int,
    spec: str,
    *,
    device: str = "xvda",
    driver: str = "file",
    mode: Mode = "w",
    device_type: DeviceType = "disk",
    removable: bool = False,
    discard: bool = True,
    trusted: bool = True,
    qos: Qos | None = None,
    timeout_s: float = ATTACH_TIMEOUT_S,
) -> DevicePath:
    """Attach a disk to a domain and wait until the backend has accepted it.

    `driver` may have options and stand behind filters (`docs/disks.md`); `spec` is its argument: a path for `file`, a
    size for `memory` and `null`. `discard`: let the domain give space back, where the disk can.
    `trusted`: the domain may share memory of its programs with the backend; else it copies all data.
    `qos`: how much it may do a second; `limit` changes it.

    Raises `NotFound` (no such domain), `AlreadyExists` (device in use), `InvalidRequest` with the backend's reason,
    `TimedOut` (no backend runs).
    """
    path = DevicePath("vbd", domid, device_number(device))
    if mode not in ("r", "w"):
        raise InvalidRequest(f"mode {mode!r} is not r or w")
    try:
        f"{driver}:{spec}".encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{driver}:{spec!r} is not UTF-8, which xenstore's values are here") from error
    if device_type not in get_args(DeviceType):
        raise InvalidRequest(f"device type {device_type!r} is not disk or cdrom")
    config = VbdConfig(*absolute(driver, spec), device, mode, device_type, removable, discard)
    frontend_keys = {
        "virtual-device": str(path.device_id),
        "device-type": device_type,
        "trusted": str(int(trusted)),
    }
    name = f"disk {device}"
    backend_keys = config.to_keys() | (qos.to_keys() if qos else {})
    return devices.attach(store, path, backend_keys, name=name, frontend_keys=frontend_keys, timeout_s=timeout_s)


def detach(store: XenstoreClient, domid: int, device: str, *, timeout_s: float = DETACH_TIMEOUT_S) -> None:
    """Take a disk away; by force when the domain does not answer in time. `NotFound` when there is none."""
    path = DevicePath("vbd", domid, device_number(device))
    devices.detach(store, path, name=f"disk {device}", timeout_s=timeout_s)


def resize(store: XenstoreClient, domid: int, device: str) -> None:
    """Have the backend look at the size of the disk, which may be open; its domain hears of a new one. `NotFound` when
    there is none.
    """
    path = DevicePath("vbd", domid, device_number(device))

    def touch(transaction: Transaction) -> None:
        params = xenbus.read_key(transaction, f"{path.backend}/params")
        if params is None:
            raise NotFound(f"domain {domid} has no disk {device}")
        # What is written does not matter: the backend looks whenever something in its directory is.
        transaction.write(f"{path.backend}/params", params)

    store.transact(touch)


def limit(store: XenstoreClient, domid: int, device: str, qos: Qos) -> None:
    """How much a disk may do a second from now on, also while it is open. `NotFound` when there is none."""
    path = DevicePath("vbd", domid, device_number(device))

    def write(transaction: Transaction) -> None:
        if xenbus.read_key(transaction, f"{path.backend}/params") is None:
            raise NotFound(f"domain {domid} has no disk {device}")
        wanted = qos.to_keys()
        for key in QOS_KEYS:
            if key in wanted:
                transaction.write(f"{path.backend}/{key}", wanted[key])
            elif xenbus.read_key(transaction, f"{path.backend}/{key}") is not None:
                transaction.rm(f"{path.backend}/{key}")

    store.transact(write)


def limits_of(store: XenstoreClient, domid: int, device: str) -> Qos:
    """How much a disk may do a second. Raises `NotFound` when there is none, `InvalidRequest` for what is no limit."""
    path = DevicePath("vbd", domid, device_number(device))
    keys = xenbus.read_keys(store, path.backend, ("params", *QOS_KEYS))
    if "params" not in keys:
        raise NotFound(f"domain {domid} has no disk {device}")
    return Qos.from_keys(keys)


def list_vbds(store: XenstoreClient, domid: int | None = None) -> list[VbdInfo]:
    """All attached disks, or those of one domain."""
    infos = (_info(store, path) for path in devices.paths(store, kind="vbd", domid=domid))
    return [info for info in infos if info is not None]


def _info(store: XenstoreClient, path: DevicePath) -> VbdInfo | None:
    keys = xenbus.read_keys(store, path.backend, ("params", "mode", "sectors", "state", *QOS_KEYS))
    if "state" not in keys:
        return None  # detached between the listing and here
    driver, _, spec = keys.get("params", "").partition(":")
    sectors = keys.get("sectors", "")
    return VbdInfo(
        domid=path.frontend_domid,
        device=device_name(path.device_id),
        driver=driver,
        spec=spec,
        mode=keys.get("mode", "w"),
        size_bytes=int(sectors) * 512 if sectors.isdecimal() else None,
        qos=_show_qos(keys),
        frontend_state=devices.state_name(store, path.frontend),
        backend_state=devices.state_name(store, path.backend),
    )


def _show_qos(keys: dict[str, str]) -> str:
    try:
        return str(Qos.from_keys(keys))
    except InvalidRequest:
        return "malformed"
