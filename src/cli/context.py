# SPDX-License-Identifier: MIT
"""What every command gets: which host is meant, connections to it, and one way to print."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from paravirt.errors import NotFound
from paravirt.host.rundir import RunDir


@dataclass
class Context:
    """The global options, and what follows from them."""

    host: str
    run: str | None
    log_level: str
    log_file: str | None
    store_socket: str | None = None
    """The socket of the store, when it is not this host's."""

    @cached_property
    def rundir(self) -> RunDir:
        return RunDir.locate(self.host, self.run)

    def hypervisor(self) -> "Hypervisor":
        """A new connection to this host's broker as Dom0; the caller closes it. `NotFound` if the host does not run."""
        from paravirt.hypervisor.client import Hypervisor

        self._require_running()
        return Hypervisor.connect(self.rundir.hypervisor_socket)

    def store(self, *, reconnect: bool = False) -> "XenstoreClient":
        """A new connection to this host's xenstored (or the one that was named) as Dom0; the caller closes it.

        `reconnect`: it outlives the daemon, for what has to go on when that is started again.
        """
        from paravirt.xenstore.client import XenstoreClient

        if self.store_socket is not None:
            return XenstoreClient.connect(self.store_socket, reconnect=reconnect)
        self._require_running()
        return XenstoreClient.connect(self.rundir.xenstored_socket, reconnect=reconnect)

    def _require_running(self) -> None:
        if os.environ.get("PARAVIRT_FD") and not self.rundir.running:
            raise NotFound("no host is in sight of this process, which is a domain's: only Dom0 may do this")
        self.rundir.require_running()


if TYPE_CHECKING:
    from rich.table import Table

    from paravirt.hypervisor.client import Hypervisor
    from paravirt.xenstore.client import XenstoreClient

F = TypeVar("F", bound=Callable[..., Any])

pass_context = click.make_pass_decorator(Context)


def json_option(command: F) -> F:
    """Give a command the option `--json`, passed to it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")(command)


def emit(rows: Iterable[Any], columns: Mapping[str, str], *, as_json: bool, dense: bool = False) -> None:
    """Print `rows` (mappings or dataclasses) as a table of `columns` (key to heading), or all of each row as JSON.

    `dense`: as narrow as it goes, all columns on the right but the first and the last.
    """
    records = [_record(row) for row in rows]
    if as_json:
        emit_json(records)
        return
    from rich.console import Console
    from rich.text import Text

    numeric = [any(type(record.get(key)) in (int, float) for record in records) for key in columns]
    if dense:
        numeric = [False, *[True] * (len(columns) - 2), False]
    table = new_table(zip(columns.values(), numeric, strict=True))
    if dense:
        table.padding, table.show_edge = (0, 0, 0, 0), False
    for record in records:
        table.add_row(*(Text(_cell(record.get(key))) for key in columns))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 1000  # a pipe has no width: never fold
    console.print(table)


def new_table(columns: Iterable[tuple[str, bool]]) -> "Table":
    """A table without rows, of headings and whether what is below is on the right: numbers.

    Each word of a heading has a line of its own, so that what is below decides how wide a column is.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading, right in columns:
        table.add_column(heading.replace(" ", "\n"), justify="right" if right else "left", overflow="fold")
    return table


def emit_json(value: Any) -> None:
    """Print one value as JSON."""
    click.echo(json.dumps(value, indent=2, default=_plain))


def _record(row: Any) -> dict[str, Any]:
    if is_dataclass(row) and not isinstance(row, type):
        row = asdict(row)
    return {key: _plain(value) for key, value in row.items()}


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(value) if isinstance(value, Path) else value
