# SPDX-License-Identifier: MIT
"""How a disk is written: `NAME[,OPTION=VALUE...]:ARGUMENT`.

ARGUMENT is what the driver makes of it, taken as it is (a path may have any characters); that of a filter is the disk
below. In a VALUE "%2C" is a comma, "%3A" a colon and "%25" a percent sign.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

from paravirt.backend.disks.base import SECTOR_SIZES, Disk, parse_size
from paravirt.errors import InvalidRequest

SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
FLAGS = {"1": True, "0": False}


class Options:
    """The options of one layer: each is asked for once, by what it must be, and then `end` refuses those left."""

    def __init__(self, driver: str, values: Mapping[str, str]) -> None:
        self._driver = driver
        self._left = dict(values)
        self._known: list[str] = []

    def text(self, name: str) -> str | None:
        """The value as it is; None when it is not given."""
        self._known.append(name)
        return self._left.pop(name, None)

    def choice(self, name: str, *choices: str) -> str | None:
        value = self.text(name)
        if value is not None and value not in choices:
            raise self.wrong(name, value, " or ".join(choices))
        return value

    def flag(self, name: str) -> bool:
        """`1` or `0`, which is the default."""
        value = self.text(name)
        if value is not None and value not in FLAGS:
            raise self.wrong(name, value, "0 or 1")
        return value is not None and FLAGS[value]

    def count(self, name: str, default: int | None = None) -> int | None:
        """A whole number from 1 on."""
        value = self.text(name)
        if value is None:
            return default
        if not re.fullmatch(r"[1-9][0-9]{0,17}", value, re.ASCII):
            raise self.wrong(name, value, "a whole number from 1 on")
        return int(value)

    def number(self, name: str, lowest: float, highest: float) -> float | None:
        value = self.text(name)
        if value is None:
            return None
        if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,15})?", value, re.ASCII) or not lowest <= float(value) <= highest:
            raise self.wrong(name, value, f"a number from {lowest:g} to {highest:g}")
        return float(value)

    def size(self, name: str, multiple: int = 512) -> int | None:
        """Bytes, such as `64k`."""
        value = self.text(name)
        return None if value is None else parse_size(value, f"option {name} of {self._driver}:", multiple)

    def duration_s(self, name: str) -> float | None:
        """Seconds of `500us`, `1.5ms`, `2s`."""
        value = self.text(name)
        if value is None:
            return None
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(us|ms|s)", value, re.ASCII)
        if match is None or float(match[1]) * SECONDS[match[2]] > 3600:
            raise self.wrong(name, value, "a time such as 500us, 1.5ms or 2s, at most 3600s")
        return float(match[1]) * SECONDS[match[2]]

    def sector_size(self) -> int | None:
        value = self.choice("sector-size", *map(str, SECTOR_SIZES))
        return None if value is None else int(value)

    def end(self) -> None:
        """Refuse what was never asked for."""
        if self._left:
            known = ", ".join(self._known) or "none"
            raise InvalidRequest(f"{self._driver}: has no option {next(iter(self._left))!r}; there are {known}")

    def wrong(self, name: str, value: str, wanted: str) -> InvalidRequest:
        return InvalidRequest(f"option {name} of {self._driver}: is {value!r}, not {wanted}")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, taken apart."""

    name: str
    options: dict[str, str]
    argument: str

    def __str__(self) -> str:
        options = "".join(f",{name}={quote(value, safe='/+ ')}" for name, value in self.options.items())
        return f"{self.name}{options}:{self.argument}"


@dataclass(frozen=True, slots=True)
class Opening:
    """What a driver is asked to open."""

    argument: str
    options: Options
    read_only: bool
    below: Callable[[bool], Disk]  # opens the disk below a filter, read-only or not


def parse(text: str) -> Layer:
    """The first layer of `text`; its argument is left as it is."""
    head, colon, argument = text.partition(":")
    if not colon:
        raise InvalidRequest(f"{text[:80]!r} is not a disk: DRIVER:ARGUMENT is wanted, such as file:/disk.img")
    name, *pairs = head.split(",")
    options: dict[str, str] = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not (equals and option):
            raise InvalidRequest(f"{pair!r} in {head!r} is not of the form OPTION=VALUE")
        if option in options:
            raise InvalidRequest(f"option {option} stands twice in {head!r}")
        options[option] = unquote(value)
    return Layer(name, options, argument)
