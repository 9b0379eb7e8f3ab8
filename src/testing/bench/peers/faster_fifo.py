# SPDX-License-Identifier: MIT
"""faster-fifo: a byte queue in shared memory for each direction with a lock and condition; put_many and get_many.

Messages are bytes already, so nothing is pickled.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paravirt.testing.bench.peers.runner import CannotRun, Setup, main

try:
    import faster_fifo
except ImportError as error:
    missing: ImportError | None = error
else:
    missing = None

HEADER_BYTES = 16
WAIT_S = 60.0


class FasterFifoEnd:
    def __init__(self, out: Any, into: Any) -> None:
        self.put, self.get = out.put, into.get
        self._put, self._get = out.put_many, into.get_many

    def send(self, messages: Sequence[bytes]) -> None:
        self._put(messages, True, WAIT_S)

    def receive(self, most: int) -> Sequence[bytes]:
        received: Sequence[bytes] = self._get(True, WAIT_S, most)
        return received


class FasterFifoLink:
    BATCHES = True

    def __init__(self, setup: Setup, directory: Path) -> None:
        if missing is not None:
            raise CannotRun("faster-fifo is not installed (pip install faster-fifo)")
        n_bytes = (setup.largest_bytes + HEADER_BYTES) * max(setup.slots, setup.in_flight, 2 * setup.batch)
        self._requests, self._responses = (
            faster_fifo.Queue(max_size_bytes=n_bytes, loads=bytes, dumps=bytes) for _ in range(2)
        )

    def front(self) -> FasterFifoEnd:
        return FasterFifoEnd(self._requests, self._responses)

    def back(self) -> FasterFifoEnd:
        return FasterFifoEnd(self._responses, self._requests)

    def close(self) -> None:
        """Its memory has no name."""


if __name__ == "__main__":
    main(FasterFifoLink)
