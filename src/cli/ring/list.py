# SPDX-License-Identifier: MIT
"""`paravirt ring list`."""

from typing import Any

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.hypervisor.looking import LiveRing, Looker

COLUMNS = {
    "name": "Ring",
    "place": "Domain :gref",
    "front_pid": "Front pid",
    "back_domid": "Back domain",
    "back_pid": "Back pid",
    "protocol": "Protocol",
    "size": "Size",
    "pages": "Pages",
    "in_flight": "In flight",
    "requests": "Requests",
    "state": "State",
}


@click.command("list")
@click.argument("domain", required=False)
@json_option
@pass_context
def list_(context: Context, domain: str | None, as_json: bool) -> None:
    """All live rings, or those of DOMAIN's devices: one line a ring, with the process of each end.

    A ring is named by its device (vbd/1/51712, vif/1/0/ctrl) or by the domain and the grant reference of its first page
    (1:8).
    """
    from paravirt.host import domains

    with context.hypervisor() as hypervisor, Looker(hypervisor) as looker:
        domid = None if domain is None else domains.find(hypervisor, domain, or_dom0=True).domid
        rings = [ring for ring in looker.look() if domid in (None, ring.domid)]
        emit([row(ring) for ring in rings], COLUMNS, as_json=as_json)


def row(ring: LiveRing) -> dict[str, Any]:
    """What is said of a ring in one line."""
    end, front, back = ring.end, ring.front, ring.back
    counted = (front or end).statistics
    return {
        "name": ring.name,
        "place": ring.place,
        "domid": ring.domid,
        "kind": end.kind,
        "device_id": end.device_id,
        "queue": end.queue,
        "protocol": end.protocol,
        "front_pid": front and front.pid,
        "back_domid": back and back.domid,
        "back_pid": back and back.pid,
        "size": end.size,
        "entry_bytes": end.entry_bytes,
        "pages": len(ring.refs),
        "refs": list(ring.refs),
        "in_flight": (front or end).outstanding,
        "requests": counted.requests,
        "responses": counted.responses,
        "state": state(ring),
        "age_s": round(end.age_s, 3),
    }


def state(ring: LiveRing) -> str:
    """In a word."""
    if any(end.dead for end in ring.ends.values()):
        return "dead"
    if len(ring.ends) < 2:
        return "no back" if ring.back is None else "no front"
    return "live"
