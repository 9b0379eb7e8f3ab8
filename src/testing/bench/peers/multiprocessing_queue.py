# SPDX-License-Identifier: MIT
"""multiprocessing.Queue, one for each direction: pickled, through a thread, a lock and a pipe."""

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from paravirt.testing.bench.peers.runner import Setup, main

if TYPE_CHECKING:
    from multiprocessing.queues import Queue


class QueueEnd:
    def __init__(self, out: "Queue[bytes]", into: "Queue[bytes]") -> None:
        self.put, self.get = out.put, into.get

    def send(self, messages: Sequence[bytes]) -> None:
        send = self.put
        for message in messages:
            send(message)

    def receive(self, most: int) -> Sequence[bytes]:
        return (self.get(),)


class QueueLink:
    BATCHES = False

    def __init__(self, setup: Setup, directory: Path) -> None:
        context = multiprocessing.get_context("fork")
        self._requests: Queue[bytes] = context.Queue(max(setup.slots, setup.in_flight))
        self._responses: Queue[bytes] = context.Queue(max(setup.slots, setup.in_flight))

    def front(self) -> QueueEnd:
        return QueueEnd(self._requests, self._responses)

    def back(self) -> QueueEnd:
        return QueueEnd(self._responses, self._requests)

    def close(self) -> None:
        """Its semaphores lose their names when they are made."""


if __name__ == "__main__":
    main(QueueLink)
