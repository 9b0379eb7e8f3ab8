# SPDX-License-Identifier: MIT
"""A store without the rest of a host, and how tests ask `paravirt xenstore` about it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner, Result

from paravirt.cli.context import Context
from paravirt.cli.xenstore import xenstore
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer

DEADLINE_S = 30.0


class StandIn(Context):
    """The context of a host of which only the store runs."""

    def __init__(self, server: XenstoreServer) -> None:
        super().__init__("default", None, "info", None)
        self._server = server

    def store(self) -> XenstoreClient:
        return XenstoreClient.from_socket(self._server.connect())


def run(context: Context, *arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(xenstore, list(arguments), obj=context, standalone_mode=False, input=stdin)


def output(context: Context, *arguments: str, stdin: bytes | None = None) -> str:
    """What a command prints that must not fail."""
    result = run(context, *arguments, stdin=stdin)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def ask(context: Context, *arguments: str, stdin: bytes | None = None) -> Any:
    """The same, of a command that prints JSON."""
    return json.loads(output(context, *arguments, "--json", stdin=stdin))


def mistake(context: Context, *arguments: str, stdin: bytes | None = None) -> str:
    """The message of a command that must fail with one line and print nothing."""
    result = run(context, *arguments, stdin=stdin)
    assert result.exception is not None, result.output
    assert result.output == ""
    error = result.exception
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    assert "\n" not in message
    return message


@contextmanager
def beside(path: Path, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`paravirt xenstore` as a process of its own, on the store at `path`; its output in pipes. Killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "paravirt", "xenstore", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "XENSTORED_PATH": str(path)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()
