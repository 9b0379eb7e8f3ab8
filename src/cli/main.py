# SPDX-License-Identifier: MIT
"""The command line: `paravirt`. Commands are loaded when they are called, so that `--help` is quick."""

import importlib
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from paravirt import __version__
from paravirt.cli.context import Context
from paravirt.errors import ParavirtError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT


class LazyGroup(click.Group):
    """A group whose commands stand in a table: name to (module:attribute, one line of help)."""

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._table:
            return None
        module, _, attribute = self._table[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self._table.items()])


BENCHMARKS = {
    "ring": ("paravirt.cli.bench_ring:bench_ring", "Request/response pairs through a ring between two processes."),
    "vbd": ("paravirt.cli.bench_vbd:bench_vbd", "Reads and writes of a domain's disk."),
    "vif": ("paravirt.cli.bench_vif:bench_vif", "Frames over network devices."),
}

bench = LazyGroup("bench", table=BENCHMARKS, help="Measure.")

COMMANDS = {
    "demo": ("paravirt.cli.demo:demo", "Start a whole host and let a guest read and write a real disk."),
    "up": ("paravirt.cli.up:up", "Start a host: hypervisor, xenstored and backends, in the foreground."),
    "hypervisor": ("paravirt.cli.up:hypervisor", "Run the hypervisor broker alone."),
    "xenstored": ("paravirt.cli.xenstored:xenstored", "Run xenstored alone."),
    "backend": (
        "paravirt.cli.up:backend",
        "Run one backend alone: of disks, network devices, or a device class of your own.",
    ),
    "domain": ("paravirt.cli.domain:domain", "Create, list and destroy domains."),
    "run": ("paravirt.cli.run:run", "Run a command as a domain, isolated from the host."),
    "vbd": ("paravirt.cli.vbd:vbd", "Attach, detach, list and use the disks of domains."),
    "vif": ("paravirt.cli.vif:vif", "Attach, detach, list and use the network devices of domains."),
    "bridge": ("paravirt.cli.bridge:bridge", "Switches between network devices and the kernel."),
    "device": ("paravirt.cli.device:device", "Attach, detach and list devices of any class."),
    "ring": ("paravirt.cli.ring:ring", "Look at live rings, record them, replay recordings."),
    "evtchn": ("paravirt.cli.evtchn:evtchn", "Look at event channels."),
    "grant": ("paravirt.cli.grant:grant", "Look at grants in use."),
    "xenstore": ("paravirt.cli.xenstore:xenstore", "Look at xenstore and change it."),
    "bench": ("paravirt.cli.main:bench", "Measure."),
    "info": ("paravirt.cli.info:info", "What this host isolates, and what the kernel offers and refuses."),
}


@click.group(cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", default="default", metavar="NAME", help="Which host, when several run side by side.")
@click.option("--run", metavar="DIR", help="Run directory of the host (else $PARAVIRT_RUN, else found by its name).")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"], case_sensitive=False),
    default="info",
    help="Least important log records to write.",
)
@click.option("--log-file", metavar="FILE", help="Write log records there instead of to standard error.")
@click.version_option(__version__, prog_name="paravirt")
@click.pass_context
def cli(ctx: click.Context, host: str, run: str | None, log_level: str, log_file: str | None) -> None:
    """Xen's paravirtual split drivers between ordinary Linux processes."""
    ctx.obj = Context(host, run, log_level, log_file)


def main() -> NoReturn:
    """Run the command line. Every mistake of the user is one line on standard error and exit code 2."""
    try:
        status = _run()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may the flush at exit complain
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _run() -> int:
    if "_PARAVIRT_COMPLETE" in os.environ:
        cli.main(prog_name="paravirt")  # what a shell asks for its completions
    try:
        with cli.make_context("paravirt", sys.argv[1:]) as context:
            status = cli.invoke(context)
    except ParavirtError as error:
        return _complain(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_BAD_INPUT
    except click.UsageError as error:
        where = f" (see: {error.ctx.command_path} --help)" if error.ctx else ""
        return _complain(f"{error.format_message().rstrip('.')}{where}")
    except click.ClickException as error:
        return _complain(error.format_message())
    except click.exceptions.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    return status if isinstance(status, int) else 0


def _complain(message: str) -> int:
    click.echo("paravirt: " + " ".join(message.split()), err=True)
    return EXIT_BAD_INPUT
