# SPDX-License-Identifier: MIT
"""xenstored's link to the broker: sockets of processes, each labelled with its domain."""

import contextlib
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Self

from paravirt.errors import Closed, HypervisorGone, PeerError, ResourceLimit
from paravirt.hypervisor import sockets
from paravirt.hypervisor.messages import Op, new_message, parse, to_bytes


class StoreRegistration:
    """While it is open the broker sends every process that asks for xenstore here. A context manager.

    One thread takes connections; `released` and `close` may be called from any.
    """

    def __init__(self, link_fd: int, on_close: Callable[["StoreRegistration"], None]) -> None:
        """From the broker's reply; made by `Hypervisor`."""
        self._socket: socket.socket | None = socket.socket(fileno=link_fd)
        self._on_close = on_close

    def fileno(self) -> int:
        """Readable when `next` will not wait."""
        return self._open_socket().fileno()

    def next(self) -> tuple[int, socket.socket]:
        """Wait for the next connection: (domid of its process, stream socket, the caller's).

        Raises `HypervisorGone` when the broker died, `ResourceLimit` when this process could not hold its socket.
        """
        connected = self._open_socket()
        # Wait without taking, so that the message is taken by the one function that knows its form.
        with contextlib.suppress(ConnectionError):
            connected.recv(1, socket.MSG_PEEK)
        try:
            received = sockets.receive(connected)
        except OSError:
            received = None
        if received is None:
            raise HypervisorGone("the hypervisor is gone: no new process can reach xenstored")
        if received.lost_fds:
            raise ResourceLimit("this process can hold no more descriptors: a connection is lost")
        message = parse(received.data)
        if message.header.op != Op.STORE_CONNECTION or len(received.fds) != 1:
            sockets.close_all(received.fds)
            raise PeerError("the hypervisor does not speak our protocol")
        return message.domain.domid, socket.socket(fileno=received.fds[0])

    def released(self, domid: int) -> None:
        """Say that a dead domain is forgotten: until then its domid is not used again."""
        message = new_message(Op.STORE_RELEASED)
        message.domain.domid = domid
        with contextlib.suppress(OSError):
            self._open_socket().send(to_bytes(message), socket.MSG_NOSIGNAL)

    def _open_socket(self) -> socket.socket:
        if self._socket is None:
            raise Closed("this registration is closed")
        return self._socket

    def end(self) -> None:
        """Processes that ask from now on hear that there is no xenstored. Those that the broker has sent are still
        there for `next`; then it raises `HypervisorGone`."""
        with contextlib.suppress(OSError):
            self._open_socket().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Processes that ask from now on hear that there is no xenstored. Harmless when repeated."""
        connected, self._socket = self._socket, None
        if connected is not None:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
            connected.close()
            self._on_close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<StoreRegistration{' closed' if self._socket is None else ''}>"
