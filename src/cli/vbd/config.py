# SPDX-License-Identifier: MIT
"""`paravirt vbd attach`, `detach`, `resize`, `limit` and `list`."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.errors import InvalidRequest

if TYPE_CHECKING:
    from paravirt.protocol.vbd_qos import Qos

COLUMNS = {
    "domid": "Domain",
    "device": "Device",
    "mode": "Mode",
    "driver": "Driver",
    "spec": "Image",
    "size_bytes": "Bytes",
    "qos": "Limits",
    "frontend_state": "Frontend",
    "backend_state": "Backend",
}

LIMITS = (
    click.option("--iops", type=click.IntRange(1), metavar="N", help="Requests a second, at most."),
    click.option("--iops-burst", type=click.IntRange(1), metavar="N", help="At once, after a rest [--iops / 10]."),
    click.option("--bytes", "n_bytes", metavar="SIZE", help="Bytes a second, at most, such as 50M."),
    click.option("--bytes-burst", metavar="SIZE", help="At once, after a rest [--bytes / 10]."),
)


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How much a disk may do."""
    for option in reversed(LIMITS):
        command = option(command)
    return command


def make_qos(iops: int | None, iops_burst: int | None, n_bytes: str | None, bytes_burst: str | None) -> "Qos":
    """Of those options. Raises `InvalidRequest`."""
    from paravirt.backend.disks.base import parse_size
    from paravirt.protocol.vbd_qos import Qos

    return Qos(
        iops or 0,
        iops_burst or 0,
        parse_size(n_bytes, "--bytes", 1) if n_bytes else 0,
        parse_size(bytes_burst, "--bytes-burst", 1) if bytes_burst else 0,
    )


@click.command()
@click.argument("domain")
@click.argument("image")
@click.option("--dev", "device", default="xvda", show_default=True, help="Its name in the domain: xvda, xvdb ...")
@click.option("--mode", type=click.Choice(["r", "w"]), default="w", show_default=True, help="Read-only or writable.")
@click.option(
    "--driver",
    default="file",
    show_default=True,
    help="What IMAGE is: a path (file), a size such as 64M (memory, null), unix:/PATH or HOST:PORT/EXPORT (nbd); with "
    "options and behind filters, too: file,direct=1 or delay,read=1ms:file (docs/disks.md).",
)
@click.option("--cdrom", is_flag=True, help="It is to be taken for a CD-ROM.")
@click.option("--removable", is_flag=True, help="Its medium can be taken out.")
@click.option("--no-discard", is_flag=True, help="The domain cannot give space back.")
@click.option("--untrusted-backend", is_flag=True, help="The domain copies all data, and lends no memory in use.")
@limit_options
@pass_context
def attach(
    context: Context,
    domain: str,
    image: str,
    device: str,
    mode: str,
    driver: str,
    cdrom: bool,
    removable: bool,
    no_discard: bool,
    untrusted_backend: bool,
    iops: int | None,
    iops_burst: int | None,
    n_bytes: str | None,
    bytes_burst: str | None,
) -> None:
    """Give DOMAIN (a name or number) the disk IMAGE."""
    from paravirt.host import domains
    from paravirt.host import vbd as toolstack

    qos = make_qos(iops, iops_burst, n_bytes, bytes_burst)
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        found = domains.find(hypervisor, domain)
        toolstack.attach(
            store,
            found.domid,
            image,
            device=device,
            driver=driver,
            mode="r" if mode == "r" else "w",
            device_type="cdrom" if cdrom else "disk",
            removable=removable,
            discard=not no_discard,
            trusted=not untrusted_backend,
            qos=qos,
        )
    click.echo(f"{device} of domain {found.name} is {driver}:{image}")


@click.command()
@click.argument("domain")
@click.argument("device")
@pass_context
def detach(context: Context, domain: str, device: str) -> None:
    """Take DEVICE (xvda, xvdb ...) away from DOMAIN."""
    from paravirt.host import domains
    from paravirt.host import vbd as toolstack

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        toolstack.detach(store, domains.find(hypervisor, domain).domid, device)


@click.command()
@click.argument("domain")
@click.argument("device")
@pass_context
def resize(context: Context, domain: str, device: str) -> None:
    """Tell DOMAIN, which may be using it, that the image of DEVICE (xvda, xvdb ...) has another size."""
    from paravirt.host import domains
    from paravirt.host import vbd as toolstack

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        toolstack.resize(store, domains.find(hypervisor, domain).domid, device)


@click.command()
@click.argument("domain")
@click.argument("device")
@limit_options
@click.option("--none", "no_limits", is_flag=True, help="As much as it can.")
@pass_context
def limit(
    context: Context,
    domain: str,
    device: str,
    iops: int | None,
    iops_burst: int | None,
    n_bytes: str | None,
    bytes_burst: str | None,
    no_limits: bool,
) -> None:
    """How much DEVICE (xvda, xvdb ...) of DOMAIN may do a second, all its queues, reads and writes together.

    Options replace all limits it has, also while it is in use; without any, those it has are shown.
    """
    from paravirt.host import domains
    from paravirt.host import vbd as toolstack

    wanted = make_qos(iops, iops_burst, n_bytes, bytes_burst)
    if no_limits and str(wanted):
        raise InvalidRequest("--none leaves no other limits")
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        found = domains.find(hypervisor, domain)
        if no_limits or str(wanted):
            toolstack.limit(store, found.domid, device, wanted)
        shown = str(toolstack.limits_of(store, found.domid, device)) or "no limits"
    click.echo(f"{device} of domain {found.name}: {shown}")


@click.command("list")
@click.argument("domain", required=False)
@json_option
@pass_context
def list_(context: Context, domain: str | None, as_json: bool) -> None:
    """All attached disks, or those of DOMAIN."""
    from paravirt.host import domains
    from paravirt.host import vbd as toolstack

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        domid = None if domain is None else domains.find(hypervisor, domain).domid
        emit(toolstack.list_vbds(store, domid), COLUMNS, as_json=as_json)
