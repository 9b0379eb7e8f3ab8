# SPDX-License-Identifier: MIT
"""pyzmq: a pair of sockets over a Unix socket; a batch is one message of as many parts, which arrive together."""

from collections.abc import Callable, Sequence
from pathlib import Path

from paravirt.testing.bench.peers.runner import CannotRun, Setup, main

try:
    import zmq
except ImportError as error:
    missing: ImportError | None = error
else:
    missing = None


class ZmqEnd:
    def __init__(self, setup: Setup, path: Path, *, binds: bool) -> None:
        self._socket = socket = zmq.Context().socket(zmq.PAIR)
        socket.set_hwm(max(setup.slots, setup.in_flight))
        socket.set(zmq.LINGER, 0)
        (socket.bind if binds else socket.connect)(f"ipc://{path}")
        self.put: Callable[[bytes], object] = socket.send
        self.get: Callable[[], bytes] = socket.recv
        self._send_many = socket.send_multipart

    def send(self, messages: Sequence[bytes]) -> None:
        if len(messages) == 1:
            self.put(messages[0])
        else:
            self._send_many(messages)

    def receive(self, most: int) -> Sequence[bytes]:
        """All parts of the next message: what was sent together."""
        received: Sequence[bytes] = self._socket.recv_multipart()
        return received


class ZmqLink:
    BATCHES = True

    def __init__(self, setup: Setup, directory: Path) -> None:
        if missing is not None:
            raise CannotRun("pyzmq is not installed (pip install pyzmq)")
        self._setup, self._path = setup, directory / "zmq"

    def front(self) -> ZmqEnd:
        return ZmqEnd(self._setup, self._path, binds=True)

    def back(self) -> ZmqEnd:
        return ZmqEnd(self._setup, self._path, binds=False)

    def close(self) -> None:
        """The socket's file goes with its directory."""


if __name__ == "__main__":
    main(ZmqLink)
