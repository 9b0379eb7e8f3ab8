# SPDX-License-Identifier: MIT
"""`paravirt xenstored`: the store daemon, of a host or by itself."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from paravirt.cli.context import Context, pass_context
from paravirt.cli.up import daemon_role
from paravirt.host.daemon import READY_FD, serve

if TYPE_CHECKING:
    from paravirt.hypervisor.client import Hypervisor
    from paravirt.xenstore.update import Handover

QUOTA_FIELDS: Final = {
    "nodes": "nodes",
    "watches": "watches",
    "outstanding": "outstanding",
    "memory": "memory_bytes",
    "soft-memory": "soft_memory_bytes",
    "transactions": "transactions",
    "transaction-nodes": "transaction_nodes",
    "node-permissions": "node_permissions",
    "path-max": "path_bytes",
    "node-size": "node_bytes",
}
"""The name of a quota on the wire, and the field of `Limits` that has it."""

_log = logging.getLogger("paravirt")


@dataclass(frozen=True, slots=True)
class Choice:
    """What the command line says about the store itself; what it does not say is the server's to choose."""

    journal: Path | None = None
    sync: bool = False
    access_log: Path | None = None
    watch_event_timeout_s: float | None = None
    quotas: tuple[tuple[str, int], ...] = ()

    def server_options(self) -> dict[str, Any]:
        """As keyword arguments of `XenstoreServer`."""
        from paravirt.xenstore.limits import Limits

        limits = {QUOTA_FIELDS[name]: value for name, value in self.quotas}
        if self.watch_event_timeout_s is not None:
            limits["watch_event_timeout_ms"] = round(self.watch_event_timeout_s * 1000)
        options: dict[str, Any] = {}
        if limits:
            options["limits"] = Limits(**limits)
        if self.journal is not None:
            options.update(journal=self.journal, sync=self.sync)
        if self.access_log is not None:
            options["access_log"] = self.access_log
        return options


def parse_quotas(
    _context: click.Context, _parameter: click.Parameter, words: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    """(name, value) of each NAME=VALUE; a name that comes again counts as it came last."""
    quotas = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in QUOTA_FIELDS:
            raise click.BadParameter(f"there is no quota {name!r}, only: {' '.join(QUOTA_FIELDS)}")
        if not (value.isascii() and value.isdigit()):
            raise click.BadParameter(f"{name} wants a number, not {value!r}")
        quotas[name] = int(value)
    return tuple(quotas.items())


@click.command(epilog="\b\nExample:\n  paravirt xenstored --socket ./store.sock --quota nodes=2000")
@click.option("--socket", "path", metavar="PATH", help="Where clients of Dom0 connect (else in the run directory).")
@click.option(
    "--hypervisor",
    "broker",
    metavar="SOCKET",
    help="Dom0's socket of the hypervisor whose domains are served too (else the host's; with --socket: none).",
)
@click.option("--journal", type=Path, metavar="DIR", help="Keep the tree there, over restarts.")
@click.option("--memory", is_flag=True, help="Keep the tree in memory alone; so it is without --journal.")
@click.option("--sync", is_flag=True, help="Acknowledge a change when it is on the disk, not when it is written.")
@click.option("--access-log", type=Path, metavar="FILE", help="Append a line for each request.")
@click.option(
    "--watch-event-timeout",
    "watch_event_timeout_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Drop an event that a domain does not read for so long; 0: never.",
)
@click.option(
    "--quota",
    "quotas",
    multiple=True,
    metavar="NAME=VALUE",
    callback=parse_quotas,
    help="What a domain may have, such as nodes=2000; 0: no limit; repeatable. A journal keeps what was set in it.",
)
@pass_context
def xenstored(
    context: Context,
    path: str | None,
    broker: str | None,
    journal: Path | None,
    memory: bool,
    sync: bool,
    access_log: Path | None,
    watch_event_timeout_s: float | None,
    quotas: tuple[tuple[str, int], ...],
) -> None:
    """Run xenstored alone.

    With a hypervisor it also serves the domains. One line on standard output says that it is ready. Ctrl-C or SIGTERM
    stops it.
    """
    if memory and journal is not None:
        raise click.UsageError("--memory and --journal exclude each other")
    if sync and journal is None:
        raise click.UsageError("--sync is of no use without --journal")
    choice = Choice(journal, sync, access_log, watch_event_timeout_s, quotas)
    with daemon_role(context, "xenstored", needs_place=path is None) as request, ExitStack() as stack:
        from paravirt.xenstore.server import XenstoreServer
        from paravirt.xenstore.update import Handover

        hypervisor = _hypervisor(context, broker, alone=path is not None)
        if hypervisor is not None:
            stack.enter_context(hypervisor)
        place = path or context.rundir.xenstored_socket
        handover = Handover.from_environment()
        options = choice.server_options()
        server = XenstoreServer(place, hypervisor, **options, replace=_Next(), handover=handover)
        stack.callback(server.stop)
        if READY_FD not in os.environ and handover is None:
            click.echo(f"xenstored serves {place}; Ctrl-C stops it")
            sys.stdout.flush()
        serve(server, request)


def _hypervisor(context: Context, broker: str | None, *, alone: bool) -> Hypervisor | None:
    """The connection to whose domains are to be served, if any."""
    from paravirt.hypervisor.client import Hypervisor

    if broker is not None:
        return Hypervisor.connect(broker)
    if alone:
        return None
    if context.rundir.running:
        return context.hypervisor()
    _log.warning("no hypervisor: only clients of Dom0 are served")
    return None


class _Next:
    """Goes on as another program, with this one's command line unless there is another."""

    def why_not(self, program: str, command_line: str | None, timeout_s: float) -> str | None:
        """Has the program read the command line, and say no more than its help."""
        try:
            words = [*self._words(program, command_line), "--help"]
            done = subprocess.run(words, capture_output=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False)
        except subprocess.TimeoutExpired:
            return f"{program} does not answer to --help"
        except (OSError, ValueError) as error:
            return f"{program} cannot be run: {error}"
        if done.returncode == 0:
            return None if b"xenstored" in done.stdout else f"{program} is no xenstored"
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return f"{program} does not start (status {done.returncode}): {said[-1] if said else 'it does not say why'}"

    def become(self, program: str, command_line: str | None, handover: Handover) -> None:
        words = self._words(program, command_line)
        sys.stdout.flush()
        os.execve(words[0], words, {**os.environ, **handover.inherit()})

    def _words(self, program: str, command_line: str | None) -> list[str]:
        arguments = shlex.split(command_line) if command_line is not None else sys.argv[1:]
        path = shutil.which(program) or program
        words = [path, "-P", "-m", "paravirt"] if os.path.samefile(path, sys.executable) else [path]
        return [*words, *arguments]
