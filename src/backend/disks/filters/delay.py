# SPDX-License-Identifier: MIT
"""A disk that takes its time."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Self

from paravirt.backend.disks.base import Disk
from paravirt.backend.disks.filters.around import OPERATIONS, AroundEach, Operation
from paravirt.backend.disks.spec import Opening


class DelayFilter(AroundEach):
    """`delay,read=1ms,write=2ms:DISK`: wait before each call of an operation; `all` is for those not named."""

    def __init__(self, below: Disk, seconds: Mapping[Operation, float]) -> None:
        super().__init__(below)
        self._seconds = dict(seconds)

    @classmethod
    def open(cls, opening: Opening) -> Self:
        given = {operation: opening.options.duration_s(operation) for operation in OPERATIONS}
        everything = opening.options.duration_s("all") or 0.0
        opening.options.end()
        seconds = {operation: everything if value is None else value for operation, value in given.items()}
        return cls(opening.below(opening.read_only), seconds)

    def around(self, operation: Operation, offset: int, length: int) -> AbstractContextManager[object]:
        if seconds := self._seconds.get(operation, 0.0):
            time.sleep(seconds)
        return nullcontext()
