# SPDX-License-Identifier: MIT
"""`paravirt domain`: create, list and destroy domains."""

from contextlib import ExitStack

import click

from paravirt.cli.context import Context, emit, json_option, pass_context

COLUMNS = {
    "domid": "Domain",
    "name": "Name",
    "isolated": "Isolated",
    "state": "State",
    "pages": "Pages",
    "ports": "Ports",
}


@click.group()
def domain() -> None:
    """Create, list and destroy domains."""


@domain.command()
@click.argument("name")
@click.option("--shared", is_flag=True, help="Its processes are not isolated: no claim is made.")
@click.option("--max-pages", type=click.IntRange(min=1), help="Most pages of 4096 bytes that it may share.")
@pass_context
def create(context: Context, name: str, shared: bool, max_pages: int | None) -> None:
    """Make a domain NAME; its domid goes to standard output."""
    from paravirt.host import domains

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        info = domains.create(hypervisor, store, name, isolated=not shared, max_pages=max_pages)
    click.echo(info.domid)


@domain.command("list")
@json_option
@pass_context
def list_(context: Context, as_json: bool) -> None:
    """All domains."""
    with context.hypervisor() as hypervisor:
        rows = hypervisor.list_domains()
    emit(rows, COLUMNS, as_json=as_json)


@domain.command()
@click.argument("name")
@pass_context
def destroy(context: Context, name: str) -> None:
    """End the domain NAME (a name or number): its processes are killed, its devices are torn down."""
    from paravirt.host import domains

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        domains.destroy(hypervisor, store, domains.find(hypervisor, name).domid)
