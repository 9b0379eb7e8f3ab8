# SPDX-License-Identifier: MIT
"""`paravirt ring record`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paravirt.cli.context import Context, pass_context
from paravirt.cli.ring.given import asked_to_stop, messages_of, messages_option, opened_output
from paravirt.errors import ParavirtError

if TYPE_CHECKING:
    from paravirt.hypervisor.looking import LiveRing


@click.command()
@click.argument("ring")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to; '-' for standard output.",
)
@click.option(
    "--seconds", metavar="SECONDS", type=click.FloatRange(0.01), help="How long; else until Ctrl-C or the ring's end."
)
@click.option("--force", is_flag=True, help="Write over FILE if there is one.")
@messages_option
@pass_context
def record(context: Context, ring: str, output: Path, seconds: float | None, force: bool, driver: str | None) -> None:
    """Record all requests and responses of RING into FILE, with their times, while it goes on.

    A capture file (pcapng): `ring show` decodes it, `ring replay` sends it again, programs for network captures open
    it. Contents of pages are not in it. What comes faster than the recorder can write is lost, never waited for, and
    counted.
    """
    from paravirt.hypervisor.looking import Looker
    from paravirt.looking.recorder import Recorder

    messages = messages_of(driver)
    with context.hypervisor() as hypervisor, Looker(hypervisor) as looker:
        found = looker.find(ring)
        offer = _offer(context, found)
        recorder = Recorder(looker, found, messages=messages, offer=offer, host=os.uname().nodename)
        with opened_output(output, force=force) as file, asked_to_stop() as asked:
            done = recorder.run(file, seconds=seconds, stop=lambda: bool(asked))
    lost = f", {done.lost} lost" if done.lost else ""
    click.echo(f"{done.requests} requests, {done.responses} responses{lost}; ended: {done.ended}", err=True)


def _offer(context: Context, ring: "LiveRing") -> dict[str, str]:
    """What the back end had published; nothing without a store, which recording does not need."""
    from paravirt.looking.recorder import offer_of

    try:
        with context.store() as store:
            return offer_of(store, ring)
    except ParavirtError:
        return {}
