# SPDX-License-Identifier: MIT
"""A filter that does something around each call, the same for all operations."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, get_args

from paravirt.backend.disks.base import total
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
