# SPDX-License-Identifier: MIT
"""`paravirt device`: devices of any class, disks as well as those of one's own drivers."""

from contextlib import ExitStack

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.errors import InvalidRequest

COLUMNS = {
    "domid": "Domain",
    "kind": "Class",
    "device_id": "Number",
    "frontend_state": "Frontend",
    "backend_state": "Backend",
}

number_option = click.option(
    "--number", "device_id", type=click.IntRange(0), default=0, show_default=True, help="Its number in the domain."
)


@click.group()
def device() -> None:
    """Attach, detach and list devices of any class."""


@device.command()
@click.argument("domain")
@click.argument("kind", metavar="CLASS")
@click.argument("config", nargs=-1, metavar="[KEY=VALUE]...")
@number_option
@pass_context
def attach(context: Context, domain: str, kind: str, config: tuple[str, ...], device_id: int) -> None:
    """Give DOMAIN a device of CLASS, which a `paravirt backend --device` serves; KEY=VALUE is its configuration."""
    from paravirt.host import device as toolstack
    from paravirt.host import domains
    from paravirt.protocol.device import RESERVED
    from paravirt.protocol.xenbus import DevicePath

    keys = {}
    for item in config:
        key, equals, value = item.partition("=")
        if not (key and equals) or "/" in key:
            raise InvalidRequest(f"{item!r} is not of the form KEY=VALUE")
        if key in RESERVED:
            raise InvalidRequest(f"{key} has a meaning for every device")
        keys[key] = value
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        found = domains.find(hypervisor, domain)
        path = DevicePath(_checked(kind), found.domid, device_id)
        toolstack.attach(store, path, keys, name=f"{kind} {device_id}")
    click.echo(f"domain {found.name} has {kind} {device_id}")


@device.command()
@click.argument("domain")
@click.argument("kind", metavar="CLASS")
@number_option
@pass_context
def detach(context: Context, domain: str, kind: str, device_id: int) -> None:
    """Take a device of CLASS away from DOMAIN."""
    from paravirt.host import device as toolstack
    from paravirt.host import domains
    from paravirt.protocol.xenbus import DevicePath

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        path = DevicePath(_checked(kind), domains.find(hypervisor, domain).domid, device_id)
        toolstack.detach(store, path, name=f"{kind} {device_id}")


@device.command("list")
@click.argument("domain", required=False)
@json_option
@pass_context
def list_(context: Context, domain: str | None, as_json: bool) -> None:
    """All attached devices, or those of DOMAIN."""
    from paravirt.host import device as toolstack
    from paravirt.host import domains

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        domid = None if domain is None else domains.find(hypervisor, domain).domid
        emit(toolstack.list_devices(store, domid), COLUMNS, as_json=as_json)


def _checked(kind: str) -> str:
    if not kind.replace("_", "").isalnum():
        raise InvalidRequest(f"{kind!r} is no name of a device class")
    return kind
