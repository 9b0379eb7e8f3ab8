# SPDX-License-Identifier: MIT
"""multiprocessing.Pipe: a socket pair, a message and a system call each; who has nothing to do sleeps."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from paravirt.testing.bench.peers.runner import Setup, main


class PipeEnd:
    def __init__(self, connection: "Connection[bytes, bytes]") -> None:
        self.put, self.get = connection.send_bytes, connection.recv_bytes

    def send(self, messages: Sequence[bytes]) -> None:
        send = self.put
        for message in messages:
            send(message)

    def receive(self, most: int) -> Sequence[bytes]:
        """One: to look whether there is another costs more than to sleep for it."""
        return (self.get(),)


class PipeLink:
    BATCHES = False

    def __init__(self, setup: Setup, directory: Path) -> None:
        self._front, self._back = multiprocessing.Pipe()

    def front(self) -> PipeEnd:
        return PipeEnd(self._front)

    def back(self) -> PipeEnd:
        return PipeEnd(self._back)

    def close(self) -> None:
        """A pipe has no name."""


if __name__ == "__main__":
    main(PipeLink)
