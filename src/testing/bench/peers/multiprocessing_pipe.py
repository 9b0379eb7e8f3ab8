# SPDX-License-Identifier: MIT
"""multiprocessing.Pipe: a socket pair, a message and a system call each; who has nothing to do sleeps."""

import multiprocessing
from pathlib import Path

from paravirt.testing.bench.peers.runner import Setup, SingleEnd, main


class PipeLink:
    BATCHES = False

    def __init__(self, setup: Setup, directory: Path) -> None:
        self._front, self._back = multiprocessing.Pipe()

    def front(self) -> SingleEnd:
        return SingleEnd(self._front.send_bytes, self._front.recv_bytes)

    def back(self) -> SingleEnd:
        return SingleEnd(self._back.send_bytes, self._back.recv_bytes)

    def close(self) -> None:
        """A pipe has no name."""


if __name__ == "__main__":
    main(PipeLink)
