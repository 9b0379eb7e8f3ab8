# SPDX-License-Identifier: MIT
"""Options that several commands of `paravirt ring` share."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

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
