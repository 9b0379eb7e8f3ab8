# SPDX-License-Identifier: MIT
"""Moves the bytes of one connection through a socket."""

import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Final, Protocol

from paravirt.xenstore.loop import READABLE, WRITABLE, Loop
from paravirt.xenstore.session import Connection

log = logging.getLogger(__name__)

READ_BYTES: Final = 16384


class Link(Protocol):
    """What carries a connection's bytes."""

    def flush(self) -> None:
        """Offer what the connection has to send, without blocking."""

    def close(self) -> None:
        """Let go of the descriptors. Twice is harmless."""


def feed_guarded(connection: Connection, data: bytes) -> None:
    """Handle what a client sent. Should that meet a mistake of ours, it is the end of this client and of no other."""
    try:
        connection.feed(data)
    except Exception:
        log.exception("a request of domain %d met an error in xenstored", connection.domain.domid)
        connection.give_up("its request met an error in xenstored")


class SocketLink:
    """A stream socket. `on_end` is called once when the client is gone or cannot be served any longer."""

    def __init__(
        self, client: socket.socket, connection: Connection, loop: Loop, on_end: Callable[[Connection], None]
    ) -> None:
        client.setblocking(False)
        self._client = client
        self._connection = connection
        self._loop = loop
        self._on_end = on_end
        self._fd = client.fileno()
        self._events = READABLE
        loop.add(self._fd, self._on_events, READABLE)

    def _on_events(self, events: int) -> None:
        connection = self._connection
        if events & WRITABLE:
            connection.hub.dirty.add(connection)
        if events & ~WRITABLE:
            try:
                data = self._client.recv(READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                feed_guarded(connection, data)
            else:
                self._on_end(connection)

    def flush(self) -> None:
        connection = self._connection
        connection.resume()
        while connection.n_output_bytes:
            data = connection.output()
            try:
                n_bytes = self._client.send(data)
            except BlockingIOError:
                n_bytes = 0
            except OSError:
                self._on_end(connection)
                return
            connection.sent(n_bytes)
            if n_bytes < len(data):
                break
            connection.resume()
        if connection.broken is not None:
            self._on_end(connection)
            return
        events = (READABLE if connection.wants_input else 0) | (WRITABLE if connection.n_output_bytes else 0)
        if events != self._events:
            self._events = events
            self._loop.modify(self._fd, events)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._loop.remove(fd)
            with contextlib.suppress(OSError):
                self._client.close()
