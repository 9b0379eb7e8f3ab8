# SPDX-License-Identifier: MIT
"""`paravirt bridge ports` and `addresses`."""

from dataclasses import asdict
from typing import Any

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.cli.vif.stat import drops_text
from paravirt.host import bridge_client
from paravirt.protocol.bridge_state import BridgeState, PortState
from paravirt.testing.report import short

PORTS = {
    "port": "Port",
    "kind": "Kind",
    "queues": "Queues",
    "in": "Packets in",
    "in_bytes": "Bytes in",
    "out": "Packets out",
    "out_bytes": "Bytes out",
    "wakeups": "Wake- ups",
    "drops": "Drops",
    "detail": "Detail",
}
ADDRESSES = {"mac": "Address", "vid": "VLAN", "port": "Port", "age_s": "Age/s"}


def _look(context: Context, name: str) -> BridgeState:
    context.rundir.require_running()
    return bridge_client.look(context.rundir.network_socket, name)[0]


@click.command()
@click.argument("name")
@json_option
@pass_context
def ports(context: Context, name: str, as_json: bool) -> None:
    """What each port of the bridge NAME has passed: in from what is at it, out to it; what was dropped, and why."""
    state = _look(context, name)
    if as_json:
        rows: list[dict[str, Any]] = [asdict(port) | {"drops": port.drops} for port in state.ports]
    else:
        rows = [_line(port) for port in state.ports]
    emit(rows, PORTS, as_json=as_json, dense=True)


def _line(port: PortState) -> dict[str, Any]:
    failed = next((f"{queue.state}: {queue.error}" for queue in port.queues if queue.state != "running"), "")
    return {
        "port": port.name,
        "kind": port.kind,
        "queues": len(port.queues),
        "in": short(port.total("in_packets")),
        "in_bytes": short(port.total("in_bytes")),
        "out": short(port.total("out_packets")),
        "out_bytes": short(port.total("out_bytes")),
        "wakeups": short(port.total("wakeups")),
        "drops": drops_text(port.drops),
        "detail": failed or port.detail,
    }


@click.command()
@click.argument("name")
@json_option
@pass_context
def addresses(context: Context, name: str, as_json: bool) -> None:
    """The stations that the bridge NAME has heard, and where: the longest silent one first."""
    rows = [asdict(station) | {"age_s": round(station.age_s, 1)} for station in _look(context, name).stations]
    emit(rows, ADDRESSES, as_json=as_json)
