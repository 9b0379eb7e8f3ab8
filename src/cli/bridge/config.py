# SPDX-License-Identifier: MIT
"""`paravirt bridge list`, `set` and `remove`."""

from dataclasses import asdict, replace
from typing import Any

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.errors import NotFound

COLUMNS = {
    "name": "Bridge",
    "vifs": "Devices",
    "taps": "Interfaces",
    "mirror": "Mirror",
    "ageing_s": "Ageing/s",
    "error": "Error",
}


@click.command("list")
@json_option
@pass_context
def list_(context: Context, as_json: bool) -> None:
    """Bridges that were configured, and those that devices are on."""
    from paravirt.host import bridge as toolstack

    with context.store() as store:
        rows: list[dict[str, Any]] = [asdict(info) for info in toolstack.list_bridges(store)]
    if not as_json:
        rows = [{**row, "vifs": " ".join(row["vifs"]), "taps": " ".join(row["taps"])} for row in rows]
    emit(rows, COLUMNS, as_json=as_json)


@click.command("set")
@click.argument("name")
@click.option("--tap", "taps", multiple=True, metavar="NAME", help="Make this interface of the kernel a port of it.")
@click.option("--no-tap", "no_taps", multiple=True, metavar="NAME", help="Take this one away.")
@click.option("--mirror", metavar="PORT", help="Which port gets copies (vif1.0, or an interface); '': none.")
@click.option("--ageing", type=click.IntRange(0), metavar="SECONDS", help="Forget silent stations then; 0: never.")
@click.option("--offloads/--no-offloads", default=None, help="Whether interfaces made from now on take large packets.")
@pass_context
def set_(
    context: Context,
    name: str,
    taps: tuple[str, ...],
    no_taps: tuple[str, ...],
    mirror: str | None,
    ageing: int | None,
    offloads: bool | None,
) -> None:
    """Make or change the bridge NAME."""
    from paravirt.host import bridge as toolstack
    from paravirt.protocol.bridge import BridgeConfig
    from paravirt.protocol.vif_port import PortConfig

    with context.store() as store:
        try:
            config = toolstack.config_of(store, name)
        except NotFound:
            config = BridgeConfig()
        kept = {tap: port for tap, port in config.taps.items() if tap not in no_taps}
        config = replace(config, taps={**{tap: PortConfig() for tap in taps}, **kept})
        if mirror is not None:
            config = replace(config, mirror=mirror or None)
        if ageing is not None:
            config = replace(config, ageing_s=ageing)
        if offloads is not None:
            config = replace(config, offloads=offloads)
        toolstack.set_bridge(store, name, config)


@click.command()
@click.argument("name")
@pass_context
def remove(context: Context, name: str) -> None:
    """Forget what was said of the bridge NAME: its interfaces go."""
    from paravirt.host import bridge as toolstack

    with context.store() as store:
        toolstack.remove(store, name)
