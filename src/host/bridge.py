# SPDX-License-Identifier: MIT
"""What a toolstack says of bridges: their interfaces of the kernel, mirrors, ageing."""

from dataclasses import dataclass

from paravirt.errors import InvalidRequest, NotFound, XenstoreError
from paravirt.host import vif as vifs
from paravirt.protocol.bridge import BRIDGE_KEYS, ROOT, BridgeConfig
from paravirt.protocol.vif import bridge_name
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import Transaction, XenstoreClient


@dataclass(frozen=True, slots=True)
class BridgeInfo:
    """A bridge that was configured, or that a device is on."""

    name: str
    vifs: tuple[str, ...]
    taps: tuple[str, ...]
    links: tuple[str, ...]
    """Ports that are nothing or files."""
    wire: bool
    mirror: str
    ageing_s: int
    hold_ms: int
    error: str
    """What the backend could not do of it."""


def set_bridge(store: XenstoreClient, name: str, config: BridgeConfig) -> None:
    """A bridge is to be so from now on. `InvalidRequest`."""
    directory = f"{ROOT}/{bridge_name(name)}"
    keys = BridgeConfig.from_keys(config.to_keys()).to_keys()

    def write(transaction: Transaction) -> None:
        for key in BRIDGE_KEYS:
            if key in keys:
                transaction.write(f"{directory}/{key}", keys[key])
            elif xenbus.read_key(transaction, f"{directory}/{key}") is not None:
                transaction.rm(f"{directory}/{key}")

    store.transact(write)


def config_of(store: XenstoreClient, name: str) -> BridgeConfig:
    """`NotFound` for one that nobody has configured, `InvalidRequest` for what is malformed."""
    keys = xenbus.read_keys(store, f"{ROOT}/{bridge_name(name)}", BRIDGE_KEYS)
    if not keys:
        raise NotFound(f"bridge {name} was not configured")
    return BridgeConfig.from_keys(keys)


def remove(store: XenstoreClient, name: str) -> None:
    """Nothing is said of it any more: its interfaces go; with devices on it, it stays. `NotFound`."""
    config_of(store, name)
    store.rm(f"{ROOT}/{name}")


def list_bridges(store: XenstoreClient) -> list[BridgeInfo]:
    """Those that were configured, and those that devices are on."""
    on: dict[str, list[str]] = {}
    for info in vifs.list_vifs(store):
        on.setdefault(info.bridge, []).append(f"vif{info.domid}.{info.handle}")
    try:
        configured = store.ls(ROOT)
    except XenstoreError as error:
        if error.name != "ENOENT":
            raise
        configured = []
    return [_info(store, name, on.get(name, [])) for name in sorted({*on, *configured})]


def _info(store: XenstoreClient, name: str, on: list[str]) -> BridgeInfo:
    error = xenbus.read_key(store, f"{ROOT}/{name}/error") or ""
    try:
        config = config_of(store, name)
    except NotFound:
        config = BridgeConfig()
    except InvalidRequest as failure:
        config, error = BridgeConfig(), str(failure)
    links = tuple(f"{port} ({link.kind})" for port, link in config.links.items())
    taps, mirror = tuple(config.taps), config.mirror or ""
    return BridgeInfo(name, tuple(on), taps, links, config.wire, mirror, config.ageing_s, config.hold_ms, error)
