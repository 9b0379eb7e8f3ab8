# SPDX-License-Identifier: MIT
"""What a toolstack does for a device of any class: attach, detach, list.

Source: Xen public/io/xenbus.h and docs/misc/xenstore-paths.pandoc for the keys; the unplug sequence (online=0 and
state=5 in one transaction, wait for 6, then remove, by force after ten seconds) is libxl's.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, ParavirtError, PeerError, TimedOut, XenstoreError
from paravirt.protocol.xenbus import DevicePath, XenbusState
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import Transaction, XenstoreClient

ATTACH_TIMEOUT_S = 10.0
DETACH_TIMEOUT_S = 10.0
BACKENDS = "/local/domain/0/backend"


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One attached device."""

    kind: str
    domid: int
    device_id: int
    frontend_state: str
    backend_state: str


def attach(
    store: XenstoreClient,
    path: DevicePath,
    config: Mapping[str, str],
    *,
    name: str,
    frontend_keys: Mapping[str, str] | None = None,
    timeout_s: float = ATTACH_TIMEOUT_S,
) -> DevicePath:
    """Make both directories of a device and wait until a backend has accepted it.

    `config`: nodes for the backend; `name`: what messages call it. Raises `NotFound` (no such domain), `AlreadyExists`
    (device in use), `InvalidRequest` with the backend's reason, `TimedOut` (no backend runs).
    """
    queue = store.watch_queue()
    try:
        store.transact(lambda transaction: _create(transaction, path, config, frontend_keys or {}, name))
        queue.add(f"{path.backend}/hotplug-status")
        deadline = time.monotonic() + timeout_s
        while (status := xenbus.read_key(store, f"{path.backend}/hotplug-status")) not in ("connected", "error"):
            left = deadline - time.monotonic()
            if left <= 0:
                guest = path.frontend_domid
                raise TimedOut(f"no backend took up {name} of domain {guest} in {timeout_s:g} s; is one running?")
            queue.get(timeout_s=left)
        if status == "error":
            reason = xenbus.read_key(store, f"{path.backend}/hotplug-error")
            raise InvalidRequest(reason or f"the backend refused {name}")
    except AlreadyExists:
        raise
    except ParavirtError:
        forget(store, path)
        raise
    finally:
        queue.close()
    return path


def detach(store: XenstoreClient, path: DevicePath, *, name: str, timeout_s: float = DETACH_TIMEOUT_S) -> None:
    """Take a device away; by force when the domain does not answer in time. `NotFound` when there is none."""

    def unplug(transaction: Transaction) -> None:
        if xenbus.read_state(transaction, path.backend) is XenbusState.UNKNOWN:
            raise NotFound(f"domain {path.frontend_domid} has no {name}")
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
    forget(store, path)


def paths(store: XenstoreClient, *, kind: str | None = None, domid: int | None = None) -> list[DevicePath]:
    """All attached devices, or those of one class, of one domain; by class, domain and number."""
    found = []
    for each in sorted(_children(store, BACKENDS)) if kind is None else [kind]:
        for guest in _numbers(store, f"{BACKENDS}/{each}"):
            if domid is None or guest == domid:
                numbers = _numbers(store, f"{BACKENDS}/{each}/{guest}")
                found += [DevicePath(each, guest, number) for number in numbers]
    return found


def list_devices(store: XenstoreClient, domid: int | None = None) -> list[DeviceInfo]:
    """All attached devices, or those of one domain."""
    return [
        DeviceInfo(
            kind=path.kind,
            domid=path.frontend_domid,
            device_id=path.device_id,
            frontend_state=state_name(store, path.frontend),
            backend_state=state_name(store, path.backend),
        )
        for path in paths(store, domid=domid)
    ]


def state_name(store: XenstoreClient, directory: str) -> str:
    """In lower case; "invalid" for what is none: whatever a guest writes there, the others are listed."""
    try:
        return xenbus.read_state(store, directory).name.lower()
    except PeerError:
        return "invalid"


def forget(store: XenstoreClient, path: DevicePath) -> None:
    """Remove both directories."""
    xenbus.remove(store, path.frontend)
    xenbus.remove_backend(store, path.backend)


def _create(
    transaction: Transaction,
    path: DevicePath,
    config: Mapping[str, str],
    frontend_keys: Mapping[str, str],
    name: str,
) -> None:
    guest, backend = path.frontend_domid, path.backend_domid
    if guest == 0 or xenbus.read_key(transaction, f"/local/domain/{guest}/domid") is None:
        raise NotFound(f"there is no domain {guest}")
    if xenbus.read_state(transaction, path.backend) is not XenbusState.UNKNOWN:
        raise AlreadyExists(f"domain {guest} has a {name} already")
    other = xenbus.read_key(transaction, f"{path.frontend}/backend")
    if other not in (None, path.backend) and xenbus.read_state(transaction, str(other)) is not XenbusState.UNKNOWN:
        raise AlreadyExists(f"domain {guest} has a {name} already, of another backend")
    initialising = str(int(XenbusState.INITIALISING))
    of_frontend = {"backend": path.backend, "backend-id": str(backend), "state": initialising, **frontend_keys}
    of_backend = {
        **config,
        "frontend": path.frontend,
        "frontend-id": str(guest),
        "online": "1",
        "state": initialising,
    }
    for directory, permissions, keys in (
        (path.frontend, [f"n{guest}", f"r{backend}"], of_frontend),
        (path.backend, [f"n{backend}", f"r{guest}"], of_backend),
    ):
        transaction.mkdir(directory)
        transaction.set_perms(directory, permissions)
        for node, value in keys.items():
            transaction.write(f"{directory}/{node}", value)


def _children(store: XenstoreClient, path: str) -> list[str]:
    try:
        return store.ls(path)
    except XenstoreError as error:
        if error.name != "ENOENT":
            raise
        return []


def _numbers(store: XenstoreClient, path: str) -> list[int]:
    return sorted(int(name) for name in _children(store, path) if name.isascii() and name.isdigit())
