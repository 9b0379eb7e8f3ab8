# SPDX-License-Identifier: MIT
"""`paravirt vbd`: the disks of domains."""

from contextlib import ExitStack

import click

from paravirt.cli.context import Context, emit, json_option, pass_context

COLUMNS = {
    "domid": "Domain",
    "device": "Device",
    "mode": "Mode",
    "driver": "Driver",
    "spec": "Image",
    "size_bytes": "Bytes",
    "frontend_state": "Frontend",
    "backend_state": "Backend",
}


@click.group()
def vbd() -> None:
    """Attach, detach and list the disks of domains."""


@vbd.command()
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
) -> None:
    """Give DOMAIN (a name or number) the disk IMAGE."""
    from paravirt.host import domains
    from paravirt.host import vbd as toolstack

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
        )
    click.echo(f"{device} of domain {found.name} is {driver}:{image}")


@vbd.command()
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


@vbd.command()
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


@vbd.command("list")
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
