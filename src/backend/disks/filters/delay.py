# SPDX-License-Identifier: MIT
"""A disk that takes its time."""

from collections.abc import Callable, Mapping
from typing import Self

from paravirt.backend.disks.base import Disk
from paravirt.backend.disks.filters.around import OPERATIONS, Operation, WaitBeforeEach
from paravirt.backend.disks.spec import Opening


class DelayFilter(WaitBeforeEach):
    """`delay,read=1ms,write=2ms:DISK`: wait before each call of an operation; `all` is for those not named."""

    def __init__(
        self, below: Disk, seconds: Mapping[Operation, float], *, wait: Callable[[float], None] | None = None
    ) -> None:
        super().__init__(below, wait)
        self._seconds = dict(seconds)

    @classmethod
    def open(cls, opening: Opening) -> Self:
        given = {operation: opening.options.duration_s(operation) for operation in OPERATIONS}
        everything = opening.options.duration_s("all") or 0.0
        opening.options.end()
        seconds = {operation: everything if value is None else value for operation, value in given.items()}
        return cls(opening.below(opening.read_only), seconds)

    def wait_s(self, operation: Operation, length: int) -> float:
        return self._seconds.get(operation, 0.0)
