# SPDX-License-Identifier: MIT
"""`paravirt grant`: pages that domains let each other use."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from paravirt.cli.context import Context, emit, json_option, pass_context

if TYPE_CHECKING:
    from paravirt.looking.grants import Grant

COLUMNS = {
    "domid": "Domain",
    "gref": "Reference",
    "peer": "For",
    "pid": "Pid",
    "device": "Device",
    "page": "Page",
    "use": "Use",
    "age": "Age",
    "recalled": "Recalled",
}


@click.group()
def grant() -> None:
    """Look at grants in use."""


@grant.command("list")
@click.argument("domain", required=False)
@click.option("--leaked", is_flag=True, help="Only those that their owner wants back, and that the peer keeps.")
@json_option
@pass_context
def list_(context: Context, domain: str | None, leaked: bool, as_json: bool) -> None:
    """Grants in use: all, or those of DOMAIN's pages.

    "reading" and "writing": the peer has the page mapped. "recalled": its owner wanted it back and could not have it,
    for the time in the last column; after a minute it is called leaked. All of it is what the two domains themselves
    say in their grant entries; ages are exact to a clock tick.
    """
    from paravirt.host import domains
    from paravirt.hypervisor.looking import Looker
    from paravirt.looking.grants import all_grants

    with context.hypervisor() as hypervisor, Looker(hypervisor) as looker:
        if domain is None:
            domids = [info.domid for info in hypervisor.list_domains(dying=True)]
        else:
            domids = [domains.find(hypervisor, domain, or_dom0=True).domid]
        found = all_grants(looker, domids)
        rows = [_row(grant) for grant in found if not leaked or grant.recalled_s is not None]
        emit(rows, COLUMNS, as_json=as_json)


def _row(grant: "Grant") -> dict[str, Any]:
    return {
        **asdict(grant),
        "leaked": grant.leaked,
        "page": "ring" if grant.is_ring else "data",
        "use": grant.use,
        "age": None if grant.age_s is None else f"{grant.age_s:.3f} s",
        "recalled": None if grant.recalled_s is None else f"{grant.recalled_s:.1f} s",
    }
