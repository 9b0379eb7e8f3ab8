# SPDX-License-Identifier: MIT
"""The table of statistics objects: which process keeps its rings in which. Pure."""

import errno

from paravirt.hypervisor.rules import DropLook, Effect, Limits, Refused


class LookTable:
    """Numbers go up and are never used again, so that Dom0 can walk while processes come and go."""

    def __init__(self) -> None:
        self._owners: dict[int, int] = {}
        self._last = 0

    def create(self, connection: int, limits: Limits) -> int:
        """A new object of a process; its number. Raises `Refused` (ENOSPC)."""
        if sum(owner == connection for owner in self._owners.values()) >= limits.max_looks:
            raise Refused(errno.ENOSPC, f"a process may have {limits.max_looks} statistics objects")
        self._last += 1
        self._owners[self._last] = connection
        return self._last

    def next(self, number: int) -> tuple[int, int] | None:
        """The object with the lowest number not below `number`, and its connection."""
        found = min((each for each in self._owners if each >= number), default=None)
        return None if found is None else (found, self._owners[found])

    def abandon(self, number: int) -> None:
        """There was no memory for it."""
        del self._owners[number]

    def forget_connection(self, connection: int) -> list[Effect]:
        """It ended."""
        gone = [number for number, owner in self._owners.items() if owner == connection]
        for number in gone:
            del self._owners[number]
        return [DropLook(number) for number in gone]
