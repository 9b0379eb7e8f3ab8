# SPDX-License-Identifier: MIT
"""`paravirt evtchn`: event channels as the broker and their inboxes know them."""

from typing import Any

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.hypervisor.client import Hypervisor, PortInfo, PortState, Virq
from paravirt.hypervisor.looking import Looker

COLUMNS = {
    "domid": "Domain",
    "port": "Port",
    "state": "State",
    "remote_domid": "Remote domain",
    "remote_port": "Remote port",
    "virq": "Virq",
    "pending": "Pending",
    "masked": "Masked",
    "device": "Ring",
}


@click.group()
def evtchn() -> None:
    """Look at event channels."""


@evtchn.command("list")
@click.argument("domain", required=False)
@json_option
@pass_context
def list_(context: Context, domain: str | None, as_json: bool) -> None:
    """All open event channels, or those of DOMAIN: who is bound to whom, what is pending, and whose ring uses it."""
    from paravirt.host import domains

    with context.hypervisor() as hypervisor, Looker(hypervisor) as looker:
        if domain is None:
            domids = [info.domid for info in hypervisor.list_domains()]
        else:
            domids = [domains.find(hypervisor, domain, or_dom0=True).domid]
        users = {
            (end.domid, end.port): f"{ring.name} {name}" for ring in looker.look() for name, end in ring.ends.items()
        }
        rows = [_row(info, users) for domid in domids for info in _ports(hypervisor, domid)]
        emit(rows, COLUMNS, as_json=as_json)


def _ports(hypervisor: Hypervisor, domid: int) -> list[PortInfo]:
    """None of a domain that ended meanwhile."""
    from paravirt.errors import NotFound

    try:
        return list(hypervisor.list_ports(domid))
    except NotFound:
        return []


def _row(info: PortInfo, users: dict[tuple[int, int], str]) -> dict[str, Any]:
    status = info.status
    bound = status.state is PortState.INTERDOMAIN
    return {
        "domid": info.domid,
        "port": info.port,
        "state": status.state,
        "remote_domid": status.remote_domid if bound or status.state is PortState.UNBOUND else None,
        "remote_port": status.remote_port if bound else None,
        "virq": _virq(status.virq) if status.state is PortState.VIRQ else None,
        "pending": status.pending,
        "masked": status.masked,
        "device": users.get((info.domid, info.port)),
    }


def _virq(number: int) -> str:
    return Virq(number).name.lower() if number in Virq.__members__.values() else str(number)
