# SPDX-License-Identifier: MIT
"""`paravirt run`: a command as a domain."""

import os
import signal
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from paravirt.cli.context import Context, pass_context
from paravirt.errors import AlreadyExists, Closed, InvalidRequest, PeerGone
from paravirt.host.sandbox import FORWARDED

if TYPE_CHECKING:
    from paravirt.host.launch import DomainProcess
    from paravirt.hypervisor.client import DomainInfo, Hypervisor
    from paravirt.xenstore.client import XenstoreClient


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
    """Run a command as a domain, isolated from the host.

    DOMAIN is a name or a number. Its first command is its init: when that ends, the domain does. The exit status is the
    command's, or 128 plus the number of the signal that killed it.
    """
    from paravirt.host import domains
    from paravirt.host.launch import launch

    if command[0] == "--":
        command = command[1:]
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        store = stack.enter_context(context.store())
        info = domains.find(hypervisor, domain)
        _check_level(info, shared)
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
                domain_socket=context.rundir.domain_socket(info.domid),
            )
        )
        _hand_on_signals(process)
        try:
            hypervisor.set_init(info.domid, process.pidfd)
        except AlreadyExists:
            _end_with_domain(hypervisor, store, info.domid, process)
            status = process.wait()
        else:
            status = process.wait()
            with suppress(PeerGone):
                domains.tidy(store, info.domid)
    sys.exit(status)


def _end_with_domain(hypervisor: "Hypervisor", store: "XenstoreClient", domid: int, process: "DomainProcess") -> None:
    """Kill a command that is not the domain's init when the domain ends."""
    queue = store.watch_queue()
    queue.add("@releaseDomain")

    def watch() -> None:
        from paravirt.hypervisor.client import DomainState

        with suppress(PeerGone, Closed):  # without them nobody can tell
            while any(info.domid == domid for info in hypervisor.list_domains() if info.state is not DomainState.DYING):
                queue.get()
            process.kill()

    threading.Thread(target=watch, name="domain", daemon=True).start()


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
