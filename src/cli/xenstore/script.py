# SPDX-License-Identifier: MIT
"""The command transaction: a script of requests that is done as a whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO, Final

import click

from paravirt.cli.context import Context, emit_json, json_option, pass_context
from paravirt.cli.xenstore.change import check_permissions
from paravirt.cli.xenstore.group import EXIT_NO, example, xenstore
from paravirt.cli.xenstore.values import json_value, printable, unescaped
from paravirt.errors import InvalidRequest, ParavirtError, XenstoreError
from paravirt.xenstore.calls import StoreCalls
from paravirt.xenstore.client import ATTEMPTS

_ONLY_A_PATH: Final = ("read", "mkdir", "rm", "exists")
_WITH_VALUE: Final = ("write", "expect")
OPERATIONS: Final = (*_ONLY_A_PATH, *_WITH_VALUE, "chmod")


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a script."""

    line: int
    operation: str
    path: str
    value: bytes = b""
    permissions: tuple[str, ...] = ()


class Unmet(ParavirtError):
    """An `expect` or `exists` does not hold."""


def parse(script: bytes) -> list[Step]:
    """The steps of a script. Raises `InvalidRequest` that names the line."""
    steps = []
    for number, line in enumerate(script.split(b"\n"), start=1):
        if line.strip() and not line.lstrip().startswith(b"#"):
            try:
                steps.append(_parse_line(number, line.decode().lstrip().removesuffix("\r")))
            except UnicodeDecodeError:
                raise InvalidRequest(f"line {number}: is no UTF-8") from None
            except InvalidRequest as error:
                raise InvalidRequest(f"line {number}: {error}") from None
    return steps


def _parse_line(number: int, line: str) -> Step:
    operation, _, rest = line.partition(" ")
    if operation.rstrip() not in OPERATIONS:
        raise InvalidRequest(f"{operation.rstrip()!r} is none of: {' '.join(OPERATIONS)}")
    operation = operation.rstrip()
    path, _, rest = rest.lstrip().partition(" ")
    if not path or not path.isascii():
        raise InvalidRequest(f"{operation} wants a path")
    if operation in _WITH_VALUE:
        return Step(number, operation, path, value=unescaped(rest))
    words = tuple(rest.split())
    if operation == "chmod":
        if not words:
            raise InvalidRequest("chmod wants a path and permissions")
        check_permissions(words)
        return Step(number, operation, path, permissions=words)
    if words:
        raise InvalidRequest(f"{operation} wants a path and nothing else")
    return Step(number, operation, path)


def perform(store: StoreCalls, steps: list[Step]) -> list[tuple[Step, bytes]]:
    """Do all steps; returns what `read` steps have read. Errors name the line; `Unmet` too."""
    read = []
    for step in steps:
        try:
            value = _perform(store, step)
        except XenstoreError as error:
            raise type(error)(f"line {step.line}: {error}", error.name) from error
        if step.operation == "read":
            read.append((step, value))
    return read


def _perform(store: StoreCalls, step: Step) -> bytes:
    match step.operation:
        case "read":
            return store.read(step.path)
        case "write":
            store.write(step.path, step.value)
        case "mkdir":
            store.mkdir(step.path)
        case "rm":
            store.rm(step.path)
        case "chmod":
            store.set_perms(step.path, step.permissions)
        case "exists":
            if not store.exists(step.path):
                raise Unmet(f"line {step.line}: {step.path} does not exist")
        case "expect":
            _expect(store, step)
    return b""


def _expect(store: StoreCalls, step: Step) -> None:
    wanted = f'line {step.line}: {step.path} is not "{printable(step.value)}"'
    if not store.exists(step.path):
        raise Unmet(f"{wanted}: it does not exist")
    value = store.read(step.path)
    if value != step.value:
        raise Unmet(f'{wanted} but "{printable(value)}"')


@xenstore.command(epilog=example("transaction --attempts 5 changes.txt"))
@click.argument("script", metavar="[FILE]", type=click.File("rb"), default="-")
@click.option(
    "--attempts",
    type=click.IntRange(min=1),
    default=ATTEMPTS,
    show_default=True,
    help="How often to try while others change what it has seen.",
)
@json_option
@pass_context
def transaction(context: Context, script: BinaryIO, attempts: int, as_json: bool) -> int:
    """Do the lines of a script in one transaction.

    The script is FILE, else standard input. Its lines:

    \b
    read PATH             print the value, when all is done
    write PATH VALUE      VALUE: the rest of the line, with escapes as read shows them
    mkdir PATH
    rm PATH
    chmod PATH PERMISSION...
    exists PATH           give up unless it exists
    expect PATH VALUE     give up unless that is the value

    Empty lines and lines that start with # are nothing. Whatever fails, nothing is done. Exit status 1: an exists or
    expect did not hold.
    """
    steps = parse(script.read())
    with context.store() as store:
        try:
            read = store.transact(lambda transaction: perform(transaction, steps), attempts=attempts)
        except Unmet as error:
            click.echo(f"paravirt: {error}", err=True)
            return EXIT_NO
    if as_json:
        emit_json([{"line": step.line, "path": step.path, "value": json_value(value)} for step, value in read])
        return 0
    for _, value in read:
        click.echo(printable(value))
    return 0
