# SPDX-License-Identifier: MIT
"""Disks a block backend can serve, and filters on top of them: one file each, one line in the tables below."""

import os
from collections.abc import Callable
from functools import partial

from paravirt.backend.disks.base import Disk
from paravirt.backend.disks.file import FileDisk
from paravirt.backend.disks.filters.cow import CowFilter
from paravirt.backend.disks.filters.delay import DelayFilter
from paravirt.backend.disks.filters.error import ErrorFilter
from paravirt.backend.disks.filters.rate import RateFilter
from paravirt.backend.disks.filters.readahead import ReadaheadFilter
from paravirt.backend.disks.filters.stats import StatsFilter
from paravirt.backend.disks.memory import MemoryDisk
from paravirt.backend.disks.nbd import NbdDisk
from paravirt.backend.disks.null import NullDisk
from paravirt.backend.disks.spec import Layer, Opening, Options, parse
from paravirt.errors import InvalidRequest

MAX_LAYERS = 16

Driver = Callable[[Opening], Disk]

DRIVERS: dict[str, Driver] = {
    "file": FileDisk.open,
    "memory": MemoryDisk.open,
    "nbd": NbdDisk.open,
    "null": NullDisk.open,
}

# Their argument is the disk below.
FILTERS: dict[str, Driver] = {
    "cow": CowFilter.open,
    "delay": DelayFilter.open,
    "error": ErrorFilter.open,
    "rate": RateFilter.open,
    "readahead": ReadaheadFilter.open,
    "stats": StatsFilter.open,
}

# Drivers whose argument is a path, and options that are one: the backend stands in another directory than its user.
PATHS = {"file"}
PATH_OPTIONS = {("cow", "overlay"), ("stats", "file")}


def open_disk(driver: str, spec: str, *, read_only: bool) -> Disk:
    """Open the disk `DRIVER:SPEC`, as `docs/disks.md` has it. The errors name what is wrong with it."""
    layers = _layers(f"{driver}:{spec}")
    if layers[-1].name not in DRIVERS:
        names = ", ".join([*DRIVERS, *FILTERS])
        raise InvalidRequest(f"unknown disk driver {layers[-1].name!r}; there are {names}")
    return _open(layers, read_only)


def absolute(driver: str, spec: str) -> tuple[str, str]:
    """The same disk with paths that mean the same from every directory."""
    layers = [
        Layer(
            layer.name,
            {
                name: os.path.abspath(value) if (layer.name, name) in PATH_OPTIONS else value
                for name, value in layer.options.items()
            },
            os.path.abspath(layer.argument) if layer.name in PATHS else layer.argument,
        )
        for layer in _layers(f"{driver}:{spec}")
    ]
    text = layers[-1].argument
    for layer in reversed(layers):
        text = str(Layer(layer.name, layer.options, text))
    driver, _, spec = text.partition(":")
    return driver, spec


def _layers(text: str) -> list[Layer]:
    """From the uppermost filter down to the disk."""
    layers = [parse(text)]
    while layers[-1].name in FILTERS:
        if len(layers) == MAX_LAYERS:
            raise InvalidRequest(f"{text[:80]!r} has more than {MAX_LAYERS} layers")
        layers.append(parse(layers[-1].argument))
    return layers


def _open(layers: list[Layer], read_only: bool) -> Disk:
    layer = layers[0]
    driver = (FILTERS if len(layers) > 1 else DRIVERS)[layer.name]
    options = Options(layer.name, layer.options)
    return driver(Opening(layer.argument, options, read_only, partial(_open, layers[1:])))


__all__ = [
    "DRIVERS",
    "FILTERS",
    "Disk",
    "Driver",
    "FileDisk",
    "MemoryDisk",
    "NbdDisk",
    "NullDisk",
    "absolute",
    "open_disk",
]
