# SPDX-License-Identifier: MIT
"""`paravirt vif tap`: the kernel's end of a domain's network device."""

import signal
import subprocess
import sys
import threading
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from types import FrameType
from typing import TYPE_CHECKING

import click

from paravirt.errors import NotFound, PermissionRefused

if TYPE_CHECKING:
    from paravirt.frontend.vif import Vif

Address = IPv4Interface | IPv6Interface


def _address(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[Address]:
    """IP addresses with the length of their network."""
    try:
        return [ip_interface(value) for value in values]
    except ValueError as error:
        raise click.BadParameter(f"{error}; an address is such as 10.0.0.1/24 or fd00::1/64") from error


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument("name", default="eth0")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--dev", "handle", type=int, default=0, show_default=True, metavar="N", help="Number of the device.")
@click.option(
    "--ip", "addresses", callback=_address, multiple=True, metavar="ADDRESS/BITS", help="Its address. It is up then."
)
@click.option("--no-offloads", is_flag=True, help="Every frame whole, with its checksum, no larger than the MTU.")
def tap(
    name: str,
    command: tuple[str, ...],
    handle: int,
    addresses: list[Address],
    no_offloads: bool,
) -> None:
    """In a domain (`paravirt run --net DOMAIN -- paravirt vif tap eth0`), or any process that is given one: make its
    network device the interface NAME of this network namespace, until Ctrl-C, or while COMMAND runs (`-- COMMAND ...`).

    It has the device's address and MTU. Without --ip it is down: `ip addr add ... dev NAME`, `ip link set NAME up`.
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
        with VifTap(vif, name, offloads=not no_offloads) as interface:
            for address in addresses:
                interface.tap.add_address(address)
            if addresses:
                interface.tap.bring_up()
            if command:
                status = _run(command, stop)
            else:
                click.echo(f"{name} is network device {handle} of domain {domain.domid}, {vif.mac}; Ctrl-C ends it")
                status = _wait(vif, stop)
    sys.exit(status)


def _wait(vif: "Vif", stop: threading.Event) -> int:
    while not stop.wait(0.5) and not vif.is_closed:
        pass
    return 0


def _run(command: tuple[str, ...], stop: threading.Event) -> int:
    """The command's exit status, as a shell gives it. Ctrl-C is its own affair; SIGTERM is handed on."""
    try:
        process = subprocess.Popen(command)
    except FileNotFoundError as error:
        raise NotFound(f"command not found: {command[0]}") from error
    except OSError as error:
        raise PermissionRefused(f"cannot run {command[0]}: {error.strerror}") from error
    told = False
    while True:
        try:
            code = process.wait(0.2)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if stop.is_set() and not told:
                told = True
                process.terminate()
