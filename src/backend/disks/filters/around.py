# SPDX-License-Identifier: MIT
"""Filters that do something around each call, the same for all operations."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

from paravirt.backend.disks.base import Disk, Pause, total
from paravirt.backend.disks.filters.base import Filter

Operation = Literal["read", "write", "flush", "discard", "zeroes"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


class AroundEach(Filter):
    """Every operation of the disk below runs inside `around`."""

    @abstractmethod
    def around(self, operation: Operation, offset: int, length: int) -> AbstractContextManager[object]:
        """Entered before the operation on `length` bytes at `offset`; 0 and 0 for a flush."""

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self.around("read", offset, total(buffers)):
            self.below.preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self.around("write", offset, total(buffers)):
            self.below.pwritev(buffers, offset)

    def flush(self) -> None:
        with self.around("flush", 0, 0):
            self.below.flush()

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        with self.around("discard", offset, length):
            self.below.discard(offset, length, secure)

    def write_zeroes(self, offset: int, length: int) -> None:
        with self.around("zeroes", offset, length):
            self.below.write_zeroes(offset, length)


class WaitBeforeEach(AroundEach):
    """Operations wait as long as `wait_s` says before they are done."""

    def __init__(self, below: Disk, wait: Callable[[float], None] | None = None) -> None:
        super().__init__(below)
        self._pause = Pause()
        self._wait = self._pause.wait if wait is None else wait

    @abstractmethod
    def wait_s(self, operation: Operation, length: int) -> float:
        """Seconds for this one."""

    def around(self, operation: Operation, offset: int, length: int) -> AbstractContextManager[object]:
        if (seconds := self.wait_s(operation, length)) > 0:
            self._wait(seconds)
        return nullcontext()

    def interrupt(self) -> None:
        self._pause.interrupt()
        super().interrupt()
