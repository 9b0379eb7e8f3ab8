# SPDX-License-Identifier: MIT
"""`paravirt vif tap`: the kernel's end of a domain's network device."""

import signal
import threading
from types import FrameType

import click


@click.command()
@click.argument("name", default="eth0")
@click.option("--dev", "handle", type=int, default=0, show_default=True, metavar="N", help="Number of the device.")
@click.option("--no-offloads", is_flag=True, help="Every frame whole, with its checksum, no larger than the MTU.")
def tap(name: str, handle: int, no_offloads: bool) -> None:
    """In a domain (`paravirt run DOMAIN -- paravirt vif tap eth0`), or any process that is given one: make its network
    device the interface NAME of this network namespace, until Ctrl-C.

    It has the device's address and MTU and is down: `ip addr add ... dev NAME`, `ip link set NAME up`.
    """
    from paravirt.frontend.domain import Domain
    from paravirt.frontend.vif_tap import VifTap

    stop = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    with Domain.from_environment() as domain:
        vif = domain.open_vif(handle, offloads=not no_offloads)
        with VifTap(vif, name, offloads=not no_offloads):
            click.echo(f"{name} is network device {handle} of domain {domain.domid}, {vif.mac}; Ctrl-C ends it")
            while not stop.wait(0.5) and not vif.is_closed:
                pass
