# SPDX-License-Identifier: MIT
"""A daemon that speaks the wire and answers what a test wants; for what only a daemon under load would say."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from paravirt.cli.context import Context
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.wire import Op, PacketParser
from paravirt.xenstore.wire import encode as encode_packet

Answer = Callable[[int, bytes], bytes]
"""(operation, payload) to the reply's payload; one that starts with "E" and ends with a NUL is an error."""


class FakeStore(Context):
    """The context of a host whose xenstored is fake. A context manager; one client at a time.

    `asked` has all requests, `most_at_once` how many of them came together.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__("default", None, "info", None)
        self._answer = answer
        self._threads: list[threading.Thread] = []
        self.asked: list[tuple[int, bytes]] = []
        self.most_at_once = 0

    def store(self) -> XenstoreClient:
        ours, theirs = socket.socketpair()
        self._threads.append(threading.Thread(target=self._serve, args=(ours,), daemon=True))
        self._threads[-1].start()
        return XenstoreClient.from_socket(theirs)

    def _serve(self, ours: socket.socket) -> None:
        parser = PacketParser()
        with ours, suppress(OSError):
            while data := ours.recv(65536):
                packets = parser.feed(data)
                self.most_at_once = max(self.most_at_once, len(packets))
                for op, request_id, transaction_id, payload in packets:
                    self.asked.append((op, payload))
                    reply = self._answer(op, payload)
                    is_error = reply[:1] == b"E" and reply[-1:] == b"\0"
                    ours.sendall(encode_packet(Op.ERROR if is_error else op, request_id, transaction_id, reply))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for thread in self._threads:
            thread.join(30.0)
            assert not thread.is_alive(), "the client has not gone"
