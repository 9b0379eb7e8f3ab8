# SPDX-License-Identifier: MIT
"""What a client's bytes go through: a blocking byte stream that another thread can end."""

import contextlib
import os
import socket
from typing import Protocol, Self

from paravirt.errors import InvalidRequest, NotFound, PermissionRefused

READ_BYTES = 65536


class Transport(Protocol):
    """A byte stream to the daemon. `OSError`, `PeerError` or the end of the stream: the daemon is gone."""

    def send(self, data: bytes) -> None:
        """All of `data`; waits for room. One thread at a time."""

    def receive(self) -> bytes:
        """The next bytes, waiting for some; empty at the end. One thread at a time."""

    def shut_down(self) -> None:
        """End the stream: `receive` of another thread returns at once. Twice is harmless."""

    def close(self) -> None:
        """Let go of the descriptors; nobody uses it any more."""


class SocketTransport:
    """A connected stream socket, which it owns."""

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

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> bytes:
        return self._socket.recv(READ_BYTES)

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
