# SPDX-License-Identifier: MIT
"""`paravirt vif stat`."""

from dataclasses import asdict, replace
from typing import Any

import click

from paravirt.cli.context import Context, emit, emit_json, json_option, pass_context
from paravirt.errors import NotFound, ParavirtError
from paravirt.host import bridge_client
from paravirt.host.vif_statistics import LiveVif, choose, vifs_of
from paravirt.hypervisor.client import Hypervisor
from paravirt.protocol.bridge_state import BridgeState
from paravirt.testing.report import short

COLUMNS = {
    "device": "Device",
    "bridge": "Bridge",
    "sent": "Packets sent",
    "sent_bytes": "Bytes sent",
    "received": "Packets received",
    "received_bytes": "Bytes received",
    "waiting": "Wait- ing",
    "wakeups": "Wake- ups",
    "drops": "Drops",
    "state": "State",
}
COUNTERS = {"sent": "tx_packets", "sent_bytes": "tx_bytes", "received": "rx_packets", "received_bytes": "rx_bytes"}
"""Of the guest, and as its backend calls them."""


@click.command()
@click.argument("devices", nargs=-1, metavar="[DEVICE]...")
@click.option("--queues", is_flag=True, help="A line for each queue.")
@json_option
@pass_context
def stat(context: Context, devices: tuple[str, ...], queues: bool, as_json: bool) -> None:
    """What each DEVICE (guest/0, vif1.0), or each of this host, has sent and received since it was connected.

    As its backend counts; what was dropped is counted by reason in --json and `vif watch`. Waiting are packets that the
    guest has no buffers for.
    """
    with context.hypervisor() as hypervisor:
        names = domain_names(hypervisor)
    known = attached(context)
    found = vifs_of(look(context, must=not known), names, known)
    if devices:
        found = [choose(name, found) for name in devices]
    if as_json:
        emit_json([row_json(vif) for vif in found])
        return
    emit([line for vif in found for line in _lines(vif, queues=queues)], COLUMNS, as_json=False, dense=True)


def domain_names(hypervisor: Hypervisor) -> dict[int, str]:
    """Of all domains, those too that are going."""
    return {info.domid: info.name for info in hypervisor.list_domains(dying=True)}


def attached(context: Context) -> list[tuple[int, int, str]]:
    """Domain, number and bridge of what the store knows; nothing while it does not answer."""
    from paravirt.host.vif import list_vifs

    try:
        with context.store() as store:
            return [(info.domid, info.handle, info.bridge) for info in list_vifs(store)]
    except ParavirtError:
        return []


def look(context: Context, *, must: bool = True) -> list[BridgeState]:
    """The state of all bridges, without their addresses. `must`: raises `NotFound` without a backend, else nothing."""
    try:
        return bridge_client.look(context.rundir.network_socket, stations=False)
    except NotFound:
        if must:
            raise
        return []


def drops_text(drops: dict[str, int]) -> str:
    """All together, and the most frequent reason."""
    if not drops:
        return "0"
    reason = max(drops, key=lambda name: drops[name])
    more = ", ..." if len(drops) > 1 else ""
    return f"{short(sum(drops.values()))} ({reason}{more})"


def _lines(vif: LiveVif, *, queues: bool) -> list[dict[str, Any]]:
    if vif.port is None or not queues or len(vif.port.queues) < 2:
        return [_line(vif.name, vif)]
    parts = enumerate(vif.port.split())
    return [_line(f"{vif.name} q{i}", replace(vif, port=part)) for i, part in parts]


def _line(name: str, vif: LiveVif) -> dict[str, Any]:
    line: dict[str, Any] = {"device": name, "bridge": vif.bridge, "state": vif.state}
    if vif.port is not None:
        port = vif.port
        line.update({column: short(port.netback(counter)) for column, counter in COUNTERS.items()})
        line["waiting"] = short(sum(queue.waiting_frames for queue in port.queues))
        line["wakeups"], line["drops"] = short(port.total("wakeups")), drops_text(port.drops)
    return line


def row_json(vif: LiveVif) -> dict[str, Any]:
    """All that is known."""
    port = vif.shown
    return {
        "device": vif.name,
        "domid": vif.domid,
        "domain": vif.domain,
        "handle": vif.handle,
        "bridge": vif.bridge,
        "port": port.name or None,
        "state": vif.state,
        **{column: port.netback(counter) for column, counter in COUNTERS.items()},
        "drops": port.drops,
        "waiting": sum(queue.waiting_frames for queue in port.queues),
        "wakeups": port.total("wakeups"),
        "switch": dict(port.switch),
        "queues": [asdict(queue) for queue in port.queues],
    }
