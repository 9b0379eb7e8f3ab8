# SPDX-License-Identifier: MIT
"""`paravirt run`: a command as a domain."""

import os
import select
import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from paravirt.cli.context import Context, pass_context
from paravirt.errors import InvalidRequest, PeerGone
from paravirt.host.sandbox import FORWARDED

if TYPE_CHECKING:
    from paravirt.host.launch import DomainProcess
    from paravirt.hypervisor.client import DomainInfo


class RunCommand(click.Command):
    """Options may also stand behind DOMAIN, where a `--` says where they end and the command begins."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if len(args) > 2 and not args[0].startswith("-") and args[1].startswith("-") and "--" in args[2:]:
            end = args.index("--")
            args = [*args[1:end], args[0], *args[end:]]
        return super().parse_args(ctx, args)


@click.command(cls=RunCommand, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("domain")
@click.option("--shared", is_flag=True, help="Do not isolate: no claim is made. For domains created with --shared.")
@click.option(
    "--expose",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="Let the isolated command see PATH, read-only, where it would not by itself. May be repeated.",
)
@click.option(
    "--net",
    is_flag=True,
    help="Let the isolated command administer a network of its own: `paravirt vif tap eth0` in it.",
)
@click.option("--init", is_flag=True, help="Make it the domain's init: when the command ends, the domain does.")
@click.argument("command", nargs=-1, required=True)
@pass_context
def run(
    context: Context,
    domain: str,
    shared: bool,
    net: bool,
    init: bool,
    expose: tuple[Path, ...],
    command: tuple[str, ...],
) -> None:
    """Run a command as a domain, isolated from the host.

    DOMAIN is a name or a number. The exit status is the command's, or 128 plus the number of the signal that killed it.
    When the domain ends, so does the command.
    """
    from paravirt.host import domains
    from paravirt.host.launch import launch

    if command[0] == "--":
        command = command[1:]
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        info = domains.find(hypervisor, domain)
        _check_level(info, shared)
        if shared and net:
            raise InvalidRequest(
                "--net is for isolated commands: a shared one is in the network that it was started in"
            )
        socket_fd = hypervisor.domain_socket(info.domid)
        stack.callback(os.close, socket_fd)
        process = stack.enter_context(
            launch(
                command,
                domid=info.domid,
                hypervisor_fd=socket_fd,
                isolated=not shared,
                network=net,
                hide=context.rundir.hidden,
                expose=[path.absolute() for path in expose],
                domain_socket=context.rundir.domain_socket(info.domid),
            )
        )
        signals = catch_signals()
        (hypervisor.set_init if init else hypervisor.add_process)(info.domid, process.pidfd)
        hand_on(signals, process)
        status = process.wait()
        if init:
            with suppress(PeerGone), context.store() as store:
                domains.tidy(store, info.domid)
    sys.exit(status)


def _check_level(info: "DomainInfo", shared: bool) -> None:
    if shared and info.isolated:
        raise InvalidRequest(f"domain {info.name} is isolated; --shared is for domains created with --shared")
    if not shared and not info.isolated:
        raise InvalidRequest(f"domain {info.name} was created with --shared: nothing isolates it, run it with --shared")


def catch_signals() -> int:
    """From here on Ctrl-C and its kin are bytes in a pipe, whose reading end this is: none is lost before a wait."""
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: None)
    return read


def hand_on(signals: int, process: "DomainProcess") -> None:
    """Send signals on to the command, which runs in a session of its own, until it ends."""
    poller = select.poll()
    poller.register(signals, select.POLLIN)
    poller.register(process.pidfd, select.POLLIN)
    while process.pidfd not in {fd for fd, _ in poller.poll()}:
        for number in os.read(signals, 64):
            process.send_signal(number)
