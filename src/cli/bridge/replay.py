# SPDX-License-Identifier: MIT
"""`paravirt bridge replay`."""

from pathlib import Path

import click

from paravirt.cli.context import Context, pass_context


@click.command()
@click.argument("name")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--rate", type=click.IntRange(1), metavar="N", help="Frames a second [as fast as they are taken].")
@click.option("--as-recorded", is_flag=True, help="With the pauses of the file.")
@click.option("--loop", "loops", type=click.IntRange(0), default=1, metavar="N", help="So often; 0: until Ctrl-C.")
@pass_context
def replay(context: Context, name: str, file: Path, rate: int | None, as_recorded: bool, loops: int) -> None:
    """Send the frames of FILE (pcap or pcapng) into the bridge NAME, from a port that is there meanwhile."""
    from paravirt.cli.vif.capture import stopped_by_signals
    from paravirt.host.bridge_client import RemoteReplay
    from paravirt.protocol.bridge_link import LinkConfig
    from paravirt.protocol.bridge_state import ReplayRequest

    timing = "recorded" if as_recorded else "fast"
    link = LinkConfig("replay", str(file.absolute()), timing=timing, rate=rate or 0, loops=loops)  # type: ignore[arg-type]
    context.rundir.require_running()
    with RemoteReplay(context.rundir.network_socket, ReplayRequest(name, link)) as remote:
        with stopped_by_signals(remote, None):
            sent = remote.wait()
    click.echo(f"{sent} frames sent, {remote.n_frames} in {file}")
