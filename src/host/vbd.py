# SPDX-License-Identifier: MIT
"""What a toolstack does for a block device: attach, detach, list.

Source: Xen public/io/blkif.h for the keys; the unplug sequence (online=0 and state=5 in one transaction, wait for 6,
then remove, by force after ten seconds) is libxl's.
"""

import os
import time
from dataclasses import dataclass

from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, ParavirtError, PeerError, TimedOut, XenstoreError
from paravirt.protocol.vbd import Mode, VbdConfig, device_name, device_number
from paravirt.protocol.xenbus import DevicePath, XenbusState
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import Transaction, XenstoreClient

ATTACH_TIMEOUT_S = 10.0
DETACH_TIMEOUT_S = 10.0
BACKENDS = "/local/domain/0/backend/vbd"


@dataclass(frozen=True, slots=True)
class VbdInfo:
    """One attached disk."""

    domid: int
    device: str  # "xvda"
    driver: str
    spec: str
    mode: str  # "r" or "w"
    size_bytes: int | None  # None until the backend has looked at it
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
    timeout_s: float = ATTACH_TIMEOUT_S,
) -> DevicePath:
    """Attach a disk to a domain and wait until the backend has accepted it.

    `spec` is the driver's argument: a path for `file`, a size for `memory` and `null`. Raises `NotFound` (no such
    domain), `AlreadyExists` (device in use), `InvalidRequest` with the backend's reason, `TimedOut` (no backend runs).
    """
    path = DevicePath("vbd", domid, device_number(device))
    if mode not in ("r", "w"):
        raise InvalidRequest(f"mode {mode!r} is not r or w")
    try:
        spec.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{spec!r} is not UTF-8, which xenstore's values are here") from error
    config = VbdConfig(driver, os.path.abspath(spec) if driver == "file" else spec, device, mode)
    queue = store.watch_queue()
    try:
        store.transact(lambda transaction: _create(transaction, path, config))
        queue.add(f"{path.backend}/hotplug-status")
        deadline = time.monotonic() + timeout_s
        while (status := xenbus.read_key(store, f"{path.backend}/hotplug-status")) not in ("connected", "error"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimedOut(f"no backend took up {device} of domain {domid} in {timeout_s:g} s; is one running?")
            queue.get(timeout_s=left)
        if status == "error":
            reason = xenbus.read_key(store, f"{path.backend}/hotplug-error") or "the backend refused the disk"
            raise InvalidRequest(reason)
    except AlreadyExists:
        raise
    except ParavirtError:
        _forget(store, path)
        raise
    finally:
        queue.close()
    return path


def detach(store: XenstoreClient, domid: int, device: str, *, timeout_s: float = DETACH_TIMEOUT_S) -> None:
    """Take a disk away; by force when the domain does not answer in time. `NotFound` when there is none."""
    path = DevicePath("vbd", domid, device_number(device))

    def unplug(transaction: Transaction) -> None:
        if xenbus.read_state(transaction, path.backend) is XenbusState.UNKNOWN:
            raise NotFound(f"domain {domid} has no disk {device}")
        transaction.write(f"{path.backend}/online", "0")
        if xenbus.read_state(transaction, path.backend) is not XenbusState.CLOSED:
            transaction.write(f"{path.backend}/state", str(int(XenbusState.CLOSING)))

    queue = store.watch_queue()
    try:
        store.transact(unplug)
        queue.add(f"{path.backend}/state")
        deadline = time.monotonic() + timeout_s
        closed = (XenbusState.CLOSED, XenbusState.UNKNOWN)
        while xenbus.read_state(store, path.backend) not in closed and time.monotonic() < deadline:
            queue.get(timeout_s=max(0.0, deadline - time.monotonic()))
    finally:
        queue.close()
    _forget(store, path)


def list_vbds(store: XenstoreClient, domid: int | None = None) -> list[VbdInfo]:
    """All attached disks, or those of one domain."""
    found = []
    for guest in sorted(_children(store, BACKENDS), key=int):
        if domid is None or int(guest) == domid:
            for number in sorted(_children(store, f"{BACKENDS}/{guest}"), key=int):
                info = _info(store, DevicePath("vbd", int(guest), int(number)))
                if info is not None:
                    found.append(info)
    return found


def _create(transaction: Transaction, path: DevicePath, config: VbdConfig) -> None:
    guest, backend = path.frontend_domid, path.backend_domid
    if guest == 0 or xenbus.read_key(transaction, f"/local/domain/{guest}/domid") is None:
        raise NotFound(f"there is no domain {guest}")
    if xenbus.read_state(transaction, path.backend) is not XenbusState.UNKNOWN:
        raise AlreadyExists(f"domain {guest} has a disk {config.device} already")
    initialising = str(int(XenbusState.INITIALISING))
    frontend_keys = {
        "backend": path.backend,
        "backend-id": str(backend),
        "state": initialising,
        "virtual-device": str(path.device_id),
        "device-type": "disk",
        "trusted": "1",
    }
    backend_keys = {
        **config.to_keys(),
        "frontend": path.frontend,
        "frontend-id": str(guest),
        "online": "1",
        "state": initialising,
    }
    for directory, permissions, keys in (
        (path.frontend, [f"n{guest}", f"r{backend}"], frontend_keys),
        (path.backend, [f"n{backend}", f"r{guest}"], backend_keys),
    ):
        transaction.mkdir(directory)
        transaction.set_perms(directory, permissions)
        for name, value in keys.items():
            transaction.write(f"{directory}/{name}", value)


def _forget(store: XenstoreClient, path: DevicePath) -> None:
    """Both directories."""
    xenbus.remove(store, path.frontend)
    xenbus.remove_backend(store, path.backend)


def _children(store: XenstoreClient, path: str) -> list[str]:
    try:
        return [name for name in store.ls(path) if name.isascii() and name.isdigit()]
    except XenstoreError as error:
        if error.name != "ENOENT":
            raise
        return []


def _info(store: XenstoreClient, path: DevicePath) -> VbdInfo | None:
    keys = xenbus.read_keys(store, path.backend, ("params", "mode", "sectors", "state"))
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
        frontend_state=_state_name(store, path.frontend),
        backend_state=_state_name(store, path.backend),
    )


def _state_name(store: XenstoreClient, directory: str) -> str:
    try:
        return xenbus.read_state(store, directory).name.lower()
    except PeerError:
        return "invalid"  # whatever a guest writes there, the others are listed
