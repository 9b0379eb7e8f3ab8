# SPDX-License-Identifier: MIT
"""A disk that fails as it is told, for tests of what is above it."""

import errno
import os
import random
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

from paravirt.backend.disks.base import Disk
from paravirt.backend.disks.filters.around import OPERATIONS, AroundEach, Operation
from paravirt.backend.disks.spec import Opening, Options

ERRNOS = {name: code for code, name in errno.errorcode.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Which calls fail: those of `operations` that touch `place` are counted from 1 on, and of these one fails if any
    of `call`, `every` and `probability` says so; all, if none of the three is given. At most `times` in all.
    """

    operations: Collection[Operation] = OPERATIONS
    place: range | None = None  # bytes; None: anywhere, flushes too
    call: int | None = None  # the call with this number
    every: int | None = None  # calls whose number is a multiple
    probability: float | None = None
    seed: int = 0
    times: int | None = None
    code: int = errno.EIO

    @classmethod
    def from_options(cls, options: Options) -> Self:
        failures = cls(
            operations=_operations(options),
            place=_place(options),
            call=options.count("call"),
            every=options.count("every"),
            probability=options.number("probability", 0, 1),
            seed=options.count("seed") or 0,
            times=options.count("times"),
            code=_errno(options),
        )
        options.end()
        return failures


class ErrorFilter(AroundEach):
    """`error,on=write,every=3,errno=ENOSPC:DISK`. A call that fails does nothing below."""

    def __init__(self, below: Disk, failures: Failures) -> None:
        super().__init__(below)
        self._failures = failures
        self._random = random.Random(failures.seed)
        self.calls = 0  # that could have failed
        self.failed = 0

    @classmethod
    def open(cls, opening: Opening) -> Self:
        failures = Failures.from_options(opening.options)
        return cls(opening.below(opening.read_only), failures)

    def around(self, operation: Operation, offset: int, length: int) -> AbstractContextManager[object]:
        if self._fails(operation, offset, length):
            self.failed += 1
            code = self._failures.code
            raise OSError(code, f"{os.strerror(code)} (the error filter: call {self.calls}, {operation})")
        return nullcontext()

    def _fails(self, operation: Operation, offset: int, length: int) -> bool:
        wanted = self._failures
        if operation not in wanted.operations or not _touches(wanted.place, offset, length):
            return False
        self.calls += 1
        if wanted.times is not None and self.failed >= wanted.times:
            return False
        reasons = []
        if wanted.call is not None:
            reasons.append(self.calls == wanted.call)
        if wanted.every is not None:
            reasons.append(self.calls % wanted.every == 0)
        if wanted.probability is not None:
            reasons.append(self._random.random() < wanted.probability)
        return any(reasons) or not reasons


def _touches(place: range | None, offset: int, length: int) -> bool:
    return place is None or (offset < place.stop and offset + length > place.start)


def _operations(options: Options) -> Collection[Operation]:
    text = options.text("on")
    if text is None:
        return OPERATIONS
    names = text.split("+")
    if not set(names) <= set(OPERATIONS):
        raise options.wrong("on", text, f"of {', '.join(OPERATIONS)}, joined by +")
    return [operation for operation in OPERATIONS if operation in names]


def _place(options: Options) -> range | None:
    text = options.text("range")
    if text is None:
        return None
    first, dash, end = text.partition("-")
    if not (dash and first.isascii() and first.isdecimal() and end.isascii() and end.isdecimal()):
        raise options.wrong("range", text, "FIRST-END in bytes, such as 4096-8192")
    return range(int(first[:20]), int(end[:20]))


def _errno(options: Options) -> int:
    name = options.text("errno") or "EIO"
    if name not in ERRNOS:
        raise options.wrong("errno", name, "the name of an error, such as ENOSPC")
    return ERRNOS[name]
