# SPDX-License-Identifier: MIT
"""The group that all commands of `paravirt xenstore` belong to, and which store they mean."""

from __future__ import annotations

import os
from typing import Final

import click
from click.core import ParameterSource

from paravirt.cli.context import Context, pass_context

EXIT_NO: Final = 1
"""The answer is no, or what was waited for did not come: nobody's mistake."""


@click.group()
@click.option("--socket", "path", metavar="PATH", help="The socket of any xenstored, instead of a host's.")
@pass_context
def xenstore(context: Context, path: str | None) -> None:
    """Look at xenstore and change it.

    Which store: that of --socket; else, if --host or --run is given, that host's; else the socket that the environment
    names in XENSTORED_PATH; else that of the host found without options.
    """
    if path is None and not _host_is_chosen():
        path = os.environ.get("XENSTORED_PATH") or None
    context.store_socket = path


def _host_is_chosen() -> bool:
    root = click.get_current_context().find_root()
    return any(root.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in ("host", "run"))


def example(arguments: str) -> str:
    """The end of a command's help: one line that can be typed."""
    return f"\b\nExample:\n  paravirt xenstore {arguments}"


def store_path(value: str) -> str:
    """The type of a path as an argument; whether the store takes it is for the store to say."""
    if not value.isascii():
        raise click.BadParameter(f"{value!r} has characters that no path has")
    return value


def text(value: str) -> str:
    """The type of an argument that may be any text, but not the bytes of another encoding."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise click.BadParameter(f"{value!r} is no UTF-8") from None
    return value
