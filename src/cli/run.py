# SPDX-License-Identifier: MIT
"""`paravirt run`: a command as a domain."""

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from paravirt.cli.context import Context, pass_context
from paravirt.errors import InvalidRequest
from paravirt.host.sandbox import FORWARDED

if TYPE_CHECKING:
    from paravirt.host.launch import DomainProcess
    from paravirt.hypervisor.client import DomainInfo


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("domain")
@click.option("--shared", is_flag=True, help="Do not isolate: no claim is made. For domains created with --shared.")
@click.option(
    "--expose",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="Let the isolated command see PATH, read-only, where it would not by itself. May be repeated.",
)
@click.argument("command", nargs=-1, required=True)
@pass_context
def run(context: Context, domain: str, shared: bool, expose: tuple[Path, ...], command: tuple[str, ...]) -> None:
    """Run COMMAND as DOMAIN (a name or number), isolated from the host unless --shared.

    The first command of a domain is its init: when it ends, the domain does. The exit status is the command's, or 128
    plus the number of the signal that killed it.
    """
    from paravirt.host import domains
    from paravirt.host.launch import launch

    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        info = domains.find(hypervisor, domain)
        _check_level(info, shared)
        door = context.rundir.domain_socket(info.domid)
        socket_fd = hypervisor.domain_socket(info.domid)
        stack.callback(os.close, socket_fd)
        process = stack.enter_context(
            launch(
                command,
                domid=info.domid,
                hypervisor_fd=socket_fd,
                isolated=not shared,
                hide=context.rundir.hidden,
                expose=[path.absolute() for path in expose],
                domain_socket=door,
            )
        )
        hypervisor.set_init(info.domid, process.pidfd)
        _hand_on_signals(process)
        status = process.wait()
    sys.exit(status)


def _check_level(info: "DomainInfo", shared: bool) -> None:
    if shared and info.isolated:
        raise InvalidRequest(f"domain {info.name} is isolated; --shared is for domains created with --shared")
    if not shared and not info.isolated:
        raise InvalidRequest(f"domain {info.name} was created with --shared: nothing isolates it, run it with --shared")


def _hand_on_signals(process: "DomainProcess") -> None:
    """Ctrl-C and its kin are for the command, which runs in a session of its own."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, hand_on)
