# SPDX-License-Identifier: MIT
"""`paravirt vif capture`."""

import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from paravirt.cli.context import Context, pass_context
from paravirt.cli.ring.given import opened_output
from paravirt.errors import InvalidRequest
from paravirt.host.bridge_client import RemoteCapture, RemoteReplay
from paravirt.protocol.bridge_state import CaptureRequest, CaptureWish


@click.command()
@click.argument("device", required=False)
@click.option(
    "-o",
    "--out",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to; '-' for standard output.",
)
@click.option("--bridge", metavar="NAME", help="Of this bridge: all its ports, or the one named.")
@click.option("--port", metavar="NAME", help="A port by its name: vif1.0, an interface, a file.")
@click.option(
    "--direction",
    type=click.Choice(["both", "in", "out"]),
    help="in: from what is at the port; out: to it [both; of a whole bridge in: each frame once].",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="Stop after so many packets.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Stop after so long.")
@click.option("--snaplen", type=click.IntRange(1, 262_144), metavar="BYTES", help="Keep so much of a packet [all].")
@click.option("--pcap", "is_pcap", is_flag=True, help="Write pcap, not pcapng: without directions and places.")
@click.option(
    "--buffer", type=click.IntRange(1, 256), default=4, show_default=True, metavar="MIB", help="That wait for FILE."
)
@click.option("--force", is_flag=True, help="Write over FILE if there is one.")
@pass_context
def capture(
    context: Context,
    device: str | None,
    out: Path,
    bridge: str | None,
    port: str | None,
    direction: str | None,
    count: int | None,
    seconds: float | None,
    snaplen: int | None,
    is_pcap: bool,
    buffer: int,
    force: bool,
) -> None:
    """Capture what passes DEVICE (guest/0, vif1.0), a port or a bridge into FILE, for Wireshark or tcpdump.

    `--out - | tcpdump -n -r -` shows it live. What comes faster than FILE takes it is dropped from the capture, never
    waited for, and counted. Ends with Ctrl-C, and when the port goes away.
    """
    if device is not None and port is not None:
        raise InvalidRequest("a capture is of a DEVICE or of a --port, not both")
    if device is None and port is None and bridge is None:
        raise InvalidRequest("what is to be captured? a DEVICE, a --port or a --bridge")
    name = port if device is None else _port_of(context, device)
    wish = CaptureWish(
        name,
        direction or ("both" if name else "in"),  # type: ignore[arg-type]
        count or 0,
        snaplen or 0,
        "pcap" if is_pcap else "pcapng",
        1 << ((buffer << 20) - 1).bit_length(),
    )
    context.rundir.require_running()
    with RemoteCapture(context.rundir.network_socket, CaptureRequest(bridge, wish)) as remote:
        with opened_output(out, force=force) as file, stopped_by_signals(remote, seconds):
            threading.Thread(target=_stop_without_reader, args=(remote, file.fileno()), daemon=True).start()
            for chunk in remote.chunks():
                file.write(chunk)
                file.flush()
        report = remote.report
    assert report is not None
    lost = f", {report.dropped} dropped as {out} took them too slowly" if report.dropped else ""
    click.echo(f"{report.captured} packets captured{lost}; ended: {report.ended}", err=True)


def _port_of(context: Context, device: str) -> str:
    """The name of a device's port. Raises `NotFound`."""
    from paravirt.cli.vif.stat import attached, domain_names, look
    from paravirt.host.vif_statistics import choose, vifs_of

    with context.hypervisor() as hypervisor:
        names = domain_names(hypervisor)
    found = choose(device, vifs_of(look(context), names, attached(context)))
    return f"vif{found.domid}.{found.handle}"


def _stop_without_reader(remote: RemoteCapture, fd: int) -> None:
    """Whoever reads a pipe may go while there is nothing to be written."""
    poller = select.poll()
    poller.register(fd, 0)
    poller.poll()
    remote.stop()


@contextmanager
def stopped_by_signals(remote: RemoteCapture | RemoteReplay, seconds: float | None) -> Iterator[None]:
    """Ctrl-C, what ends a service, and the end of `seconds` end it in good order."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: remote.stop()) for number in numbers}
    timer = None if seconds is None else threading.Timer(seconds, remote.stop)
    try:
        if timer is not None:
            timer.daemon = True
            timer.start()
        yield
    finally:
        if timer is not None:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
