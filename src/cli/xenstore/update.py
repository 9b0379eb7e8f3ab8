# SPDX-License-Identifier: MIT
"""The command live-update: the daemon goes on as another program."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final

import click

from paravirt.cli.context import Context, pass_context
from paravirt.cli.xenstore.group import example, text, xenstore
from paravirt.errors import PeerError, TimedOut

if TYPE_CHECKING:
    from paravirt.xenstore.client import XenstoreClient

BUSY: Final = "BUSY"
PAUSE_S: Final = 0.1


@xenstore.command("live-update", epilog=example("live-update"))
@click.argument("program", default=sys.executable, type=text)
@click.option(
    "-c",
    "--command-line",
    metavar="WORDS",
    type=text,
    help="What the new program is started with, in one argument (else what the daemon was).",
)
@click.option("-F", "--force", is_flag=True, help="Also while transactions are open: they end in a conflict.")
@click.option(
    "-t",
    "--timeout",
    "timeout_s",
    type=click.IntRange(min=0),
    default=60,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for open transactions to end.",
)
@pass_context
def live_update(context: Context, program: str, command_line: str | None, force: bool, timeout_s: int) -> None:
    """Have the daemon go on as PROGRAM: a newer paravirt, or the Python that has one (else this one).

    Connections, watches and rings stay; clients notice a pause. If the program does not start, the daemon goes on as it
    is, and says why.
    """
    with context.store() as store:
        _step(store, "-f", program)
        try:
            if command_line is not None:
                _step(store, "-c", command_line)
            _start(store, force, timeout_s)
        except (TimedOut, PeerError):
            store.control("live-update", "-a")
            raise
        store.control("help")  # answered by whoever serves now


def _start(store: XenstoreClient, force: bool, timeout_s: int) -> None:
    words = ["-s", *(["-F"] if force else []), "-t", str(timeout_s)]
    deadline = time.monotonic() + timeout_s
    while not _step(store, *words):
        if time.monotonic() >= deadline:
            raise TimedOut("transactions are open all the time: --force ends them")
        time.sleep(PAUSE_S)


def _step(store: XenstoreClient, *words: str) -> bool:
    """Whether it is done; False: the daemon is busy. `PeerError` with its reason."""
    answer = store.control("live-update", *words)
    if answer not in ("OK", BUSY):
        raise PeerError(f"no live update: {answer}")
    return answer == "OK"
