# SPDX-License-Identifier: MIT
"""The C engine alone, as its caller sees it: requests and replies of connections whose bytes the test moves."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from paravirt.ring._core import ffi, lib
from paravirt.xenstore.wire import ACK, Op, Packet, PacketParser, encode

HEADER = struct.Struct("<4I")
ERROR = int(Op.ERROR)


class Client:
    """A connection; what has come for it that nobody has asked for is in `inbox`."""

    def __init__(self, core: Any, domid: int = 0, connection: Any = None) -> None:
        self.core = core
        self.connection = connection or lib.pv_xs_connect(core, domid)
        self.inbox: list[Packet] = []
        self._parser = PacketParser()

    def feed(self, data: bytes) -> int:
        return int(lib.pv_xs_feed(self.connection, data, len(data)))

    def output(self) -> bytes:
        """Take all that is to be sent."""
        n = lib.pv_xs_n_output(self.connection)
        data = ffi.new("uint8_t[]", max(n, 1))
        assert lib.pv_xs_output(self.connection, data, n) == n
        lib.pv_xs_sent(self.connection, n)
        return bytes(ffi.buffer(data, n))

    def receive(self) -> list[Packet]:
        self.inbox += self._parser.feed(self.output())
        taken, self.inbox = self.inbox, []
        return taken

    def ask(self, op: int, payload: bytes = b"\0", transaction: int = 0) -> bytes:
        """The payload of the reply to a request, b"! " before that of an error."""
        self.feed(encode(op, 1, transaction, payload))
        packets = self.receive()
        replies = [packet for packet in packets if packet[0] != Op.WATCH_EVENT]
        self.inbox += [packet for packet in packets if packet[0] == Op.WATCH_EVENT]
        assert len(replies) == 1, packets
        return b"! " * (replies[0][0] == ERROR) + replies[0][3]

    def do(self, op: int, payload: bytes, transaction: int = 0) -> None:
        assert self.ask(op, payload, transaction) == ACK

    def begin(self) -> int:
        return int(self.ask(Op.TRANSACTION_START)[:-1])

    def commit(self, transaction: int) -> bytes:
        return self.ask(Op.TRANSACTION_END, b"T\0", transaction)

    def events(self) -> list[tuple[bytes, bytes]]:
        """(path, token) of each."""
        self.inbox = self.receive()
        taken, self.inbox = self.inbox, []
        return [(packet[3].split(b"\0")[0], packet[3].split(b"\0")[1]) for packet in taken]

    def leave(self) -> None:
        lib.pv_xs_conn_free(self.connection)


@contextmanager
def engine(seed: int = 1) -> Iterator[Any]:
    """A hub, whose books are right at the end."""
    core = lib.pv_xs_new(seed)
    try:
        yield core
        assert wrong(core) is None
    finally:
        lib.pv_xs_free(core)


def wrong(core: Any) -> str | None:
    """What does not agree in a hub's books."""
    problem = lib.pv_xs_check(core)
    return ffi.string(problem).decode() if problem else None


def make_home(dom0: Client, domid: int) -> None:
    """A directory that a domain may write to; the domain is known."""
    lib.pv_xs_conn_free(lib.pv_xs_connect(dom0.core, domid))
    dom0.do(Op.WRITE, b"/local/domain/%d\0" % domid)
    dom0.do(Op.SET_PERMS, b"/local/domain/%d\0n%d\0" % (domid, domid))
