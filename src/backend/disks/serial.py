# SPDX-License-Identifier: MIT
"""A disk that is called by one thread at a time, as engines of several queues see it."""

import threading
from collections.abc import Sequence

from paravirt.backend.disks.base import Disk, Transfer
from paravirt.backend.disks.filters.base import Filter


class SerialDisk(Filter):
    """Calls wait for each other. Where the disk says that it is memory or a file, no call is made for that."""

    def __init__(self, below: Disk) -> None:
        super().__init__(below)
        self.memory, self.fd = below.memory, below.fd
        self.many_in_flight = below.many_in_flight
        self.many_threads = True
        self._lock = threading.Lock()

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._lock:
            self.below.preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._lock:
            self.below.pwritev(buffers, offset)

    def preadv_many(self, transfers: Sequence[Transfer]) -> list[int]:
        with self._lock:
            return self.below.preadv_many(transfers)

    def pwritev_many(self, transfers: Sequence[Transfer]) -> list[int]:
        with self._lock:
            return self.below.pwritev_many(transfers)

    def flush(self) -> None:
        with self._lock:
            self.below.flush()

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        with self._lock:
            self.below.discard(offset, length, secure)

    def write_zeroes(self, offset: int, length: int) -> None:
        with self._lock:
            self.below.write_zeroes(offset, length)
