# SPDX-License-Identifier: MIT
"""`paravirt ring kick`."""

import click

from paravirt.cli.context import Context, pass_context
from paravirt.errors import NotFound
from paravirt.hypervisor.looking import Looker


@click.command()
@click.argument("ring")
@click.option(
    "--end", "which", type=click.Choice(["front", "back", "both"]), default="both", show_default=True, help="Which end."
)
@pass_context
def kick(context: Context, ring: str, which: str) -> None:
    """Wake an end of RING, as if its peer had notified it: it looks at the ring and goes on, or sleeps again.

    Harmless. When a ring goes on after this that stood still, a notification was lost.
    """
    with context.hypervisor() as hypervisor, Looker(hypervisor) as looker:
        found = looker.find(ring)
        ends = {name: end for name, end in found.ends.items() if which in (name, "both")}
        if not ends:
            raise NotFound(f"ring {found.name} has no {which} end")
        for name, end in ends.items():
            looker.kick(end)
            click.echo(f"woke the {name} end of {found.name}: port {end.port} of domain {end.domid}")
