# SPDX-License-Identifier: MIT
"""multiprocessing.Queue, one for each direction: pickled, through a thread, a lock and a pipe."""

import multiprocessing
from pathlib import Path
from typing import TYPE_CHECKING

from paravirt.testing.bench.peers.runner import Setup, SingleEnd, main

if TYPE_CHECKING:
    from multiprocessing.queues import Queue


class QueueLink:
    BATCHES = False

    def __init__(self, setup: Setup, directory: Path) -> None:
        context = multiprocessing.get_context("fork")
        self._requests: Queue[bytes] = context.Queue(max(setup.slots, setup.in_flight))
        self._responses: Queue[bytes] = context.Queue(max(setup.slots, setup.in_flight))

    def front(self) -> SingleEnd:
        return SingleEnd(self._requests.put, self._responses.get)

    def back(self) -> SingleEnd:
        return SingleEnd(self._responses.put, self._requests.get)

    def close(self) -> None:
        """Its semaphores lose their names when they are made."""


if __name__ == "__main__":
    main(QueueLink)
