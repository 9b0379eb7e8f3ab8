# SPDX-License-Identifier: MIT
"""A xenstored that says what a test tells it to, and calls that wait in a thread meanwhile."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

from paravirt.xenstore.wire import ACK, HEADER, HEADER_BYTES, Op, Packet, encode

DEADLINE_S = 30.0
T = TypeVar("T")


class Peer:
    """The daemon's end of one connection."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(DEADLINE_S)
        self.socket = connected

    def next(self, op: Op | None = None) -> Packet:
        """The next request, which must be `op`."""
        header = self._read(HEADER_BYTES)
        kind, request_id, transaction_id, length = HEADER.unpack(header)
        packet = (kind, request_id, transaction_id, self._read(length))
        assert op is None or kind == op, packet
        return packet

    def _read(self, n_bytes: int) -> bytes:
        data = b""
        while len(data) < n_bytes:
            part = self.socket.recv(n_bytes - len(data))
            assert part, "the client has closed"
            data += part
        return data

    def answer(self, packet: Packet, payload: bytes = ACK, *, op: int | None = None) -> None:
        self.raw(encode(packet[0] if op is None else op, packet[1], packet[2], payload))

    def refuse(self, packet: Packet, name: str) -> None:
        self.answer(packet, name.encode() + b"\0", op=Op.ERROR)

    def event(self, path: bytes, token: bytes) -> None:
        self.raw(encode(Op.WATCH_EVENT, 0, 0, path + b"\0" + token + b"\0"))

    def raw(self, data: bytes) -> None:
        self.socket.sendall(data)

    def close(self) -> None:
        self.socket.close()


class FakeStore:
    """Listens; each `accept` is one connection of a client."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(8)
        self._listener.settimeout(DEADLINE_S)
        self._peers: list[Peer] = []

    def accept(self) -> Peer:
        peer = Peer(self._listener.accept()[0])
        self._peers.append(peer)
        return peer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for peer in self._peers:
            peer.close()
        self._listener.close()
        self.path.unlink()


class Background(Generic[T]):
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """What it returned or raised; waits for it."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "still waiting"
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]
