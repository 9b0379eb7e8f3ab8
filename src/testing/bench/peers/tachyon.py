# SPDX-License-Identifier: MIT
"""tachyon-ipc: a byte ring in shared memory for each direction; a flush and a drain a batch. Both ends spin.

There are no wheels: it wants clang 17 with lld, or gcc 14, to be built (CC=clang-19 CXX=clang++-19
LDFLAGS=-fuse-ld=lld-19 pip install tachyon-ipc).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paravirt.testing.bench.peers.runner import CannotRun, Setup, main

try:
    import tachyon
except ImportError as error:
    missing: ImportError | None = error
else:
    missing = None

HEADER_BYTES = 64
SPINS = 1 << 30
PATIENCE_S = 10


class TachyonEnd:
    def __init__(self, out: Any, into: Any) -> None:
        self._out, self._into = out, into

    def put(self, message: bytes) -> None:
        self.send((message,))

    def get(self) -> bytes:
        with self._into.acquire_rx(SPINS) as message:
            return bytes(message)

    def send(self, messages: Sequence[bytes]) -> None:
        acquire = self._out.acquire_tx
        for message in messages:
            n = len(message)
            with self._slot(acquire, n) as slot:
                with memoryview(slot) as view:
                    view[:n] = message
                slot.actual_size = n
        self._out.flush()

    def _slot(self, acquire: Any, n: int) -> Any:
        while True:
            try:
                return acquire(n)
            except tachyon.TachyonError:  # full
                self._out.flush()

    def receive(self, most: int) -> Sequence[bytes]:
        with self._into.drain_batch(most, SPINS) as batch:
            return [bytes(batch[i]) for i in range(len(batch))]


class TachyonLink:
    BATCHES = True

    def __init__(self, setup: Setup, directory: Path) -> None:
        if missing is not None:
            raise CannotRun("tachyon-ipc is not installed (it has to be built, with clang 17 or gcc 14)")
        self._paths = str(directory / "requests"), str(directory / "responses")
        messages = max(setup.slots, 2 * setup.in_flight, 2 * setup.batch)
        self._bytes = 1 << ((setup.largest_bytes + HEADER_BYTES) * messages).bit_length()

    def _listen(self, path: str) -> Any:
        bus = tachyon.TachyonBus()
        bus.listen(path, self._bytes)
        return bus

    @staticmethod
    def _connect(path: str) -> Any:
        """Whoever sends listens, and waits for this."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                bus = tachyon.TachyonBus()
                bus.connect(path)
            except (ConnectionError, OSError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
            else:
                return bus

    def front(self) -> TachyonEnd:
        requests, responses = self._paths
        return TachyonEnd(self._listen(requests), self._connect(responses))

    def back(self) -> TachyonEnd:
        requests, responses = self._paths
        into = self._connect(requests)
        return TachyonEnd(self._listen(responses), into)

    def close(self) -> None:
        """Its sockets stand in the directory; its memory has no name."""


if __name__ == "__main__":
    main(TachyonLink)
