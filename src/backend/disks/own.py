# SPDX-License-Identifier: MIT
"""Disks of a user's own, served beside those that are here."""

import re
from typing import Protocol

from paravirt.backend import disks, plugin
from paravirt.backend.disks.base import Disk
from paravirt.backend.disks.filters.base import Filter
from paravirt.backend.disks.spec import Opening
from paravirt.errors import AlreadyExists, InvalidRequest


class DiskClass(Protocol):
    """What a class of disks is to those who open them."""

    def open(self, opening: Opening) -> Disk: ...


def register(name: str, disk_class: DiskClass) -> None:
    """From now on `NAME:...` is opened by `disk_class.open(opening)`; a subclass of `Filter` is a filter.

    In the process that serves disks: of `paravirt.Host()` this one, of daemons `up --disk-driver`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name, re.ASCII):
        raise InvalidRequest(f"{name!r} is not the name of a disk driver: a letter, then letters, digits and -")
    if name in disks.DRIVERS or name in disks.FILTERS:
        raise AlreadyExists(f"there is a disk driver {name} already")
    is_filter = isinstance(disk_class, type) and issubclass(disk_class, Filter)
    (disks.FILTERS if is_filter else disks.DRIVERS)[name] = disk_class.open


def unregister(name: str) -> None:
    """Forget a driver; disks that are open stay."""
    disks.DRIVERS.pop(name, None)
    disks.FILTERS.pop(name, None)


def load(text: str) -> None:
    """Register what "name=module:Class" says."""
    name, equals, place = text.partition("=")
    if not equals:
        raise InvalidRequest(f"{text!r} is not of the form name=module:Class")
    disk_class = plugin.load(place)
    if not callable(getattr(disk_class, "open", None)):
        raise InvalidRequest(f"{place} is no disk: it has no method open")
    register(name, disk_class)  # type: ignore[arg-type]
