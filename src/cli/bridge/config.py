# SPDX-License-Identifier: MIT
"""`paravirt bridge list`, `set` and `remove`."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from paravirt.cli.context import Context, emit, json_option, pass_context
from paravirt.errors import NotFound

COLUMNS = {
    "name": "Bridge",
    "vifs": "Devices",
    "taps": "Interfaces",
    "links": "Links",
    "wire": "Wire",
    "mirror": "Mirror",
    "ageing_s": "Ageing/s",
    "hold_ms": "Hold/ms",
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
        rows = [{**row, **{name: " ".join(row[name]) for name in ("vifs", "taps", "links")}} for row in rows]
    emit(rows, COLUMNS, as_json=as_json)


@click.command("set")
@click.argument("name")
@click.option("--tap", "taps", multiple=True, metavar="NAME", help="Make this interface of the kernel a port of it.")
@click.option("--no-tap", "no_taps", multiple=True, metavar="NAME", help="Take this one away.")
@click.option("--null", "nulls", multiple=True, metavar="PORT", help="A port that takes everything and gives nothing.")
@click.option("--pcap", "pcaps", multiple=True, metavar="[PORT=]FILE", help="A port whose frames are written to FILE.")
@click.option("--snaplen", type=click.IntRange(0), default=0, metavar="BYTES", help="Of --pcap: keep so much.")
@click.option("--replay", "replays", multiple=True, metavar="[PORT=]FILE", help="A port that frames of FILE come from.")
@click.option("--rate", type=click.IntRange(0), default=0, metavar="N", help="Of --replay: frames a second.")
@click.option("--as-recorded", is_flag=True, help="Of --replay: with the pauses of the file.")
@click.option("--loop", "loops", type=click.IntRange(0), default=1, metavar="N", help="Of --replay: so often; 0: ever.")
@click.option("--no-link", "no_links", multiple=True, metavar="PORT", help="Take such a port away.")
@click.option("--wire/--no-wire", default=None, help="No switch: two ports, what comes from one goes to the other.")
@click.option("--mirror", metavar="PORT", help="Which port gets copies (vif1.0, or an interface); '': none.")
@click.option("--ageing", type=click.IntRange(0), metavar="SECONDS", help="Forget silent stations then; 0: never.")
@click.option("--hold", type=click.IntRange(0), metavar="MS", help="Hold back so long who is too fast; 0: drop frames.")
@click.option("--offloads/--no-offloads", default=None, help="Whether interfaces made from now on take large packets.")
@pass_context
def set_(
    context: Context,
    name: str,
    taps: tuple[str, ...],
    no_taps: tuple[str, ...],
    nulls: tuple[str, ...],
    pcaps: tuple[str, ...],
    snaplen: int,
    replays: tuple[str, ...],
    rate: int,
    as_recorded: bool,
    loops: int,
    no_links: tuple[str, ...],
    wire: bool | None,
    mirror: str | None,
    ageing: int | None,
    hold: int | None,
    offloads: bool | None,
) -> None:
    """Make or change the bridge NAME: interfaces, files, wire, mirror, ageing, hold.

    PORT is what a port is called, "pcap" or "replay" unless it is said. FILE of --pcap is written beside what is there
    already: FILE.1 and so on. What could not be done stands in `bridge list`.
    """
    from paravirt.host import bridge as toolstack
    from paravirt.protocol.bridge import BridgeConfig
    from paravirt.protocol.bridge_link import LinkConfig, Timing
    from paravirt.protocol.vif_port import PortConfig

    with context.store() as store:
        try:
            config = toolstack.config_of(store, name)
        except NotFound:
            config = BridgeConfig()
        kept = {tap: port for tap, port in config.taps.items() if tap not in no_taps}
        config = replace(config, taps={**{tap: PortConfig() for tap in taps}, **kept})
        links = {name: LinkConfig("null") for name in nulls}
        links |= {port: LinkConfig("pcap", file, snaplen=snaplen) for port, file in _files("pcap", pcaps)}
        timing: Timing = "recorded" if as_recorded else "fast"
        for port, file in _files("replay", replays):
            links[port] = LinkConfig("replay", file, timing=timing, rate=rate, loops=loops)
        left = {port: link for port, link in config.links.items() if port not in no_links}
        config = replace(config, links=left | links, wire=config.wire if wire is None else wire)
        if mirror is not None:
            config = replace(config, mirror=mirror or None)
        if ageing is not None:
            config = replace(config, ageing_s=ageing)
        if hold is not None:
            config = replace(config, hold_ms=hold)
        if offloads is not None:
            config = replace(config, offloads=offloads)
        toolstack.set_bridge(store, name, config)


def _files(port: str, given: tuple[str, ...]) -> list[tuple[str, str]]:
    """Port and absolute path of each "[PORT=]FILE"."""
    pairs = [text.partition("=") if "=" in text.split("/", 1)[0] else (port, "=", text) for text in given]
    return [(name, str(Path(file).absolute())) for name, _, file in pairs]


@click.command()
@click.argument("name")
@pass_context
def remove(context: Context, name: str) -> None:
    """Forget what was said of the bridge NAME: its interfaces go."""
    from paravirt.host import bridge as toolstack

    with context.store() as store:
        toolstack.remove(store, name)
