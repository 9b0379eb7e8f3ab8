# SPDX-License-Identifier: MIT
"""Options that several commands of `paravirt ring` share."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from paravirt.errors import InvalidRequest, ParavirtError

if TYPE_CHECKING:
    from paravirt.protocol.layout import MessagePair

F = TypeVar("F", bound=Callable[..., Any])


def messages_option(command: F) -> F:
    """Give a command `--driver`, passed to it as `driver`: whose messages these are, for `messages_of`."""
    return click.option(
        "--driver",
        metavar="MODULE:CLASS",
        help="The DeviceBackend whose protocol names the fields, when the ring does not.",
    )(command)


def messages_of(driver: str | None) -> "MessagePair | None":
    """The layouts of a driver that was named."""
    if driver is None:
        return None
    from paravirt.backend.driver_service import load_driver
    from paravirt.protocol.layout import MessagePair

    return MessagePair.of(load_driver(driver).protocol)


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Ctrl-C, and what ends a service, end the work in good order: the list has something in it then."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: asked.append(number)) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def opened_output(output: Path, *, force: bool) -> Iterator[BinaryIO]:
    if str(output) == "-":
        yield sys.stdout.buffer
        return
    try:
        with output.open("wb" if force else "xb") as file:
            yield file
    except ParavirtError:
        raise  # not the file: some of these are an OSError, too
    except FileExistsError:
        raise InvalidRequest(f"{output} exists already; --force writes over it") from None
    except OSError as error:
        raise InvalidRequest(f"{output}: {error.strerror}") from error
