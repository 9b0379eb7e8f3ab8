# SPDX-License-Identifier: MIT
"""posix_ipc: slots in a mapped POSIX shared memory object, and two semaphores for each direction that count them."""

import mmap
import os
from pathlib import Path
from typing import Any

from paravirt.testing.bench.peers.runner import CannotRun, Setup, SingleEnd, main

try:
    import posix_ipc
except ImportError as error:
    missing: ImportError | None = error
else:
    missing = None


class Direction:
    """A ring of slots: `free` counts those to fill, `filled` those to read."""

    def __init__(self, n_bytes: int, slots: int) -> None:
        self.n_bytes, self.slots = n_bytes, slots
        name = f"/paravirt-peer-{os.getpid()}"
        memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, size=n_bytes * slots)
        memory.unlink()
        self.view = memoryview(mmap.mmap(memory.fd, n_bytes * slots))
        memory.close_fd()
        self.free, self.filled = (self._semaphore(name, count) for count in (slots, 0))

    @staticmethod
    def _semaphore(name: str, count: int) -> Any:
        semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX, initial_value=count)
        semaphore.unlink()
        return semaphore


class PosixIpcEnd(SingleEnd):
    def __init__(self, out: Direction, into: Direction) -> None:
        super().__init__(self._put, self._get)
        self._out, self._into = out, into
        self._sent = self._received = 0

    def _put(self, message: bytes) -> None:
        out, n = self._out, self._out.n_bytes
        out.free.acquire()
        at = self._sent % out.slots * n
        out.view[at : at + n] = message
        self._sent += 1
        out.filled.release()

    def _get(self) -> bytes:
        into, n = self._into, self._into.n_bytes
        into.filled.acquire()
        at = self._received % into.slots * n
        received = bytes(into.view[at : at + n])
        self._received += 1
        into.free.release()
        return received


class PosixIpcLink:
    BATCHES = False

    def __init__(self, setup: Setup, directory: Path) -> None:
        if missing is not None:
            raise CannotRun("posix_ipc is not installed (pip install posix_ipc)")
        slots = max(setup.slots, setup.in_flight)
        self._requests = Direction(setup.request_bytes, slots)
        self._responses = Direction(setup.response_bytes, slots)

    def front(self) -> PosixIpcEnd:
        return PosixIpcEnd(self._requests, self._responses)

    def back(self) -> PosixIpcEnd:
        return PosixIpcEnd(self._responses, self._requests)

    def close(self) -> None:
        """Memory and semaphores lost their names when they were made."""


if __name__ == "__main__":
    main(PosixIpcLink)
