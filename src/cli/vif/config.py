# SPDX-License-Identifier: MIT
"""`paravirt vif attach`, `detach`, `set` and `list`."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.errors import InvalidRequest

if TYPE_CHECKING:
    from paravirt.protocol.vif import Rate
    from paravirt.protocol.vif_port import PortConfig

COLUMNS = {
    "domid": "Domain",
    "handle": "Device",
    "mac": "Address",
    "bridge": "Bridge",
    "mtu": "MTU",
    "rate": "Rate",
    "port": "Port",
    "frontend_state": "Frontend",
    "backend_state": "Backend",
}

PORT_OPTIONS = (
    click.option("--vlan", metavar="VLANS", help="10 (access port), or 'trunk 10,20 native 1' ['trunk all']."),
    click.option(
        "--locking",
        type=click.Choice(["unlocked", "locked", "disabled"]),
        help="locked: it may send from its own addresses only; disabled: nothing.",
    ),
    click.option("--ipv4", metavar="LIST", help="With --locking locked: addresses that it may use; '': any."),
    click.option("--ipv6", metavar="LIST", help="The same of IPv6."),
    click.option("--limit", metavar="LIST", help="Frames a second: broadcast=100,multicast=100,unknown=100."),
    click.option("--mirrored/--not-mirrored", default=None, help="The bridge's mirror gets copies of all of it."),
    click.option("--max-addresses", type=click.IntRange(0), metavar="N", help="Stations behind it; 0: any number."),
)


def port_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How a switch treats a port."""
    for option in reversed(PORT_OPTIONS):
        command = option(command)
    return command


def make_port(before: "PortConfig", options: dict[str, Any]) -> "PortConfig":
    """What those options change. Raises `InvalidRequest`."""
    from paravirt.protocol.vif_port import (
        ADDRESSES_KEY,
        LIMITS_KEY,
        MIRRORED_KEY,
        VLAN_KEY,
        PortConfig,
    )

    names = {
        "locking": "locking-mode",
        "ipv4": "ipv4-allowed",
        "ipv6": "ipv6-allowed",
        "vlan": VLAN_KEY,
        "limit": LIMITS_KEY,
        "mirrored": MIRRORED_KEY,
        "max_addresses": ADDRESSES_KEY,
    }
    changed = {
        names[name]: str(int(value)) if isinstance(value, bool) else str(value)
        for name, value in options.items()
        if value is not None
    }
    return PortConfig.from_keys(before.to_keys() | changed)


def make_rate(text: str) -> "Rate | None":
    """ "10M": bytes a second; "BYTES,MICROSECONDS": as in xenstore; "none". Raises `InvalidRequest`."""
    from paravirt.backend.disks.base import parse_size
    from paravirt.protocol.vif import Rate

    if text == "none":
        return None
    return Rate.from_text(text) if "," in text else Rate.per_second(parse_size(text, "--rate", 1))


@click.command()
@click.argument("domain")
@click.option("--dev", "handle", type=int, default=0, show_default=True, metavar="N", help="Its number in the domain.")
@click.option("--mac", metavar="MAC", help="Its address [one of Xen's range].")
@click.option("--bridge", default="xenbr0", show_default=True, help="The switch it is on; made if there is none.")
@click.option("--mtu", type=int, default=1500, show_default=True, help="Bytes of a packet.")
@click.option("--rate", metavar="RATE", help="What the guest may send: 10M bytes a second, or BYTES,MICROSECONDS.")
@port_options
@pass_context
def attach(
    context: Context,
    /,
    domain: str,
    handle: int,
    mac: str | None,
    bridge: str,
    mtu: int,
    rate: str | None,
    **port: Any,
) -> None:
    """Give DOMAIN (a name or number) a network device."""
    from paravirt.host import domains
    from paravirt.host import vif as toolstack
    from paravirt.protocol.vif_port import PortConfig

    config, limit = make_port(PortConfig(), port), make_rate(rate) if rate else None
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        found = domains.find(hypervisor, domain)
        path = toolstack.attach(
            store, found.domid, handle=handle, mac=mac, bridge=bridge, mtu=mtu, rate=limit, port=config
        )
    click.echo(f"domain {found.domid} has network device {path.device_id} on {bridge}")


@click.command()
@click.argument("domain")
@click.option("--dev", "handle", type=int, default=0, show_default=True, metavar="N", help="Its number in the domain.")
@pass_context
def detach(context: Context, domain: str, handle: int) -> None:
    """Take a network device away from DOMAIN."""
    from paravirt.host import domains
    from paravirt.host import vif as toolstack

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        toolstack.detach(store, domains.find(hypervisor, domain).domid, handle)


@click.command("set")
@click.argument("domain")
@click.option("--dev", "handle", type=int, default=0, show_default=True, metavar="N", help="Its number in the domain.")
@click.option("--rate", metavar="RATE", help="10M bytes a second, BYTES,MICROSECONDS, or none.")
@port_options
@pass_context
def set_(context: Context, /, domain: str, handle: int, rate: str | None, **port: Any) -> None:
    """Change what the guest of DOMAIN may send, or how the switch treats its device, while it is used."""
    from paravirt.host import domains
    from paravirt.host import vif as toolstack

    wants_port = any(value is not None for value in port.values())
    if rate is None and not wants_port:
        raise InvalidRequest("nothing is to be changed (see: paravirt vif set --help)")
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        domid = domains.find(hypervisor, domain).domid
        config = make_port(toolstack.port_of(store, domid, handle), port)
        if rate is not None:
            toolstack.set_rate(store, domid, handle, make_rate(rate))
        if wants_port:
            toolstack.set_port(store, domid, handle, config)


@click.command("list")
@click.argument("domain", required=False)
@json_option
@pass_context
def list_(context: Context, domain: str | None, as_json: bool) -> None:
    """All network devices, or those of DOMAIN."""
    from paravirt.host import domains
    from paravirt.host import vif as toolstack

    with ExitStack() as stack:
        domid = None
        if domain is not None:
            domid = domains.find(stack.enter_context(context.hypervisor()), domain).domid
        store = stack.enter_context(context.store())
        emit(toolstack.list_vifs(store, domid), COLUMNS, as_json=as_json)
