# SPDX-License-Identifier: MIT
"""What a client's bytes go through: a byte stream to the daemon, blocking or not, that another thread can end."""

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Protocol, Self

from paravirt.errors import InvalidRequest, NotFound, PermissionRefused

READ_BYTES = 65536


class Transport(Protocol):
    """A byte stream to the daemon. `OSError`, `PeerError` or the end of the stream: the daemon is gone.

    One thread sends, one receives; they may be two. The blocking calls are for the blocking client, the others and
    `fileno` for an event loop.
    """

    polls_for_room: bool
    """Whether an event loop has to poll `fileno` for writing when `send_nowait` takes nothing; else it becomes readable
    when there is room."""

    def send(self, data: bytes, counts: list[int]) -> None:
        """Waits for room, sends at least one byte from the start of `data`, and appends to `counts` how many.

        That way it is known also when the handler of a signal raises as soon as the bytes are out.
        """

    def receive(self) -> bytes:
        """The next bytes, waiting for some; empty at the end."""

    def send_nowait(self, data: bytes) -> int:
        """How many bytes went out: 0 when there is no room."""

    def receive_nowait(self) -> bytes | None:
        """The bytes that are there; None when there are none yet, empty at the end."""

    def fileno(self) -> int:
        """Readable when `receive_nowait` has something to say."""

    def shut_down(self) -> None:
        """End the stream: calls of other threads return at once. Twice is harmless, also after `close`."""

    def close(self) -> None:
        """Let go of the descriptors; nobody uses it any more."""


class Connector(Protocol):
    """Where a client that has lost its connection gets another one."""

    def connect_nowait(self) -> Transport | None:
        """A new connection; None while it is being made: ask again soon. `ParavirtError` when it cannot be now."""


class SocketTransport:
    """A connected stream socket, which it owns."""

    polls_for_room = True

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(True)
        self._socket = connected

    @classmethod
    def connect(cls, path: str | os.PathLike[str]) -> Self:
        """To a daemon's socket. `NotFound` if nobody serves it, `PermissionRefused` if this user may not."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.connect(os.fspath(path))
        except PermissionError as error:
            connected.close()
            raise PermissionRefused(f"{path}: {error.strerror}") from error
        except OSError as error:
            connected.close()
            if error.strerror is None:
                raise InvalidRequest(f"{path}: {error}") from error
            raise NotFound(f"no xenstored serves {path}: {error.strerror}") from error
        return cls(connected)

    def send(self, data: bytes, counts: list[int]) -> None:
        # No bytecode runs between the system call and the append, so no signal handler does.
        counts.extend(map(self._socket.send, (data,)))

    def receive(self) -> bytes:
        return self._socket.recv(READ_BYTES)

    def send_nowait(self, data: bytes) -> int:
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def receive_nowait(self) -> bytes | None:
        try:
            return self._socket.recv(READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def fileno(self) -> int:
        return self._socket.fileno()

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class SocketConnector:
    """Connects to the same path again."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path

    def connect_nowait(self) -> Transport | None:
        return SocketTransport.connect(self._path)


class CallConnector:
    """Asks somebody for a connected socket, such as `Hypervisor.store_connection`."""

    def __init__(self, make: Callable[[], socket.socket]) -> None:
        self._make = make

    def connect_nowait(self) -> Transport | None:
        return SocketTransport(self._make())
