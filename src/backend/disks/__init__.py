# SPDX-License-Identifier: MIT
"""Disks a block backend can serve: one file each, one line in the table below."""

from collections.abc import Callable

from paravirt.backend.disks.base import Disk
from paravirt.backend.disks.file import FileDisk
from paravirt.backend.disks.memory import MemoryDisk
from paravirt.backend.disks.null import NullDisk
from paravirt.errors import InvalidRequest

DRIVERS: dict[str, Callable[[str, bool], Disk]] = {"file": FileDisk, "memory": MemoryDisk, "null": NullDisk}


def open_disk(driver: str, spec: str, *, read_only: bool) -> Disk:
    """Open a disk of a driver. The errors name what is wrong with `spec`."""
    try:
        factory = DRIVERS[driver]
    except KeyError:
        raise InvalidRequest(f"unknown disk driver {driver!r}; there are {', '.join(DRIVERS)}") from None
    return factory(spec, read_only)


__all__ = ["DRIVERS", "Disk", "FileDisk", "MemoryDisk", "NullDisk", "open_disk"]
