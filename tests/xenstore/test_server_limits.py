# SPDX-License-Identifier: MIT
"""The daemon wakes those up whose turn has come: guests that were held back, and events that are too old."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from paravirt.xenstore.limits import Limits
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.wire import Op, Packet, PacketParser, encode

DEADLINE_S = 30.0


class Client:
    """A raw client that reads only when it is told to."""

    def __init__(self, server: XenstoreServer, domid: int) -> None:
        self._socket = server.connect(domid)
        self._socket.settimeout(DEADLINE_S)
        self._parser = PacketParser()
        self._packets: list[Packet] = []

    def send(self, *requests: bytes) -> None:
        self._socket.sendall(b"".join(requests))

    def receive(self, n_packets: int) -> list[tuple[int, bytes]]:
        while len(self._packets) < n_packets:
            data = self._socket.recv(65536)
            assert data, "the daemon closed the connection"
            self._packets += self._parser.feed(data)
        taken, self._packets = self._packets[:n_packets], self._packets[n_packets:]
        return [(op, payload) for op, _, _, payload in taken]

    def close(self) -> None:
        self._socket.close()


OK = (int(Op.WRITE), b"OK\0")
WRITE = encode(Op.WRITE, 1, 0, b"/shared\0x")


@pytest.fixture
def server() -> Iterator[XenstoreServer]:
    with XenstoreServer(limits=Limits(watch_event_timeout_ms=20)) as server:
        yield server.start()


Connect = Callable[[int], Client]


@pytest.fixture
def connect(server: XenstoreServer) -> Iterator[Connect]:
    with ExitStack() as stack:
        yield lambda domid: stack.enter_context(closing(Client(server, domid)))


def make_shared(dom0: Client) -> None:
    dom0.send(encode(Op.MKDIR, 1, 0, b"/shared\0"), encode(Op.SET_PERMS, 1, 0, b"/shared\0b0\0"))
    dom0.receive(2)


def test_a_guest_in_debt_goes_on_by_itself(connect: Connect) -> None:
    dom0, guest = connect(0), connect(5)
    make_shared(dom0)
    dom0.send(encode(Op.TRANSACTION_START, 1, 0, b"\0"))
    dom0.receive(1)
    guest.send(*[WRITE] * 60)
    assert guest.receive(60) == [OK] * 60
    guest.send(*[WRITE] * 5)  # also those that were not read before
    assert guest.receive(5) == [OK] * 5


def test_a_guest_goes_on_when_another_has_read_its_events(connect: Connect) -> None:
    dom0, guest, same = connect(0), connect(5), connect(5)
    make_shared(dom0)
    dom0.send(encode(Op.WATCH, 1, 0, b"/shared\0" + b"t" * 3000 + b"\0"))
    dom0.receive(2)
    buffer_bytes = dom0._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    n_requests = 40 + buffer_bytes // 1000  # more events than fit between the daemon and a client that does not read
    guest.send(*[encode(Op.WRITE, 1, 0, b"/shared/%d\0x" % i) for i in range(n_requests)])
    same.send(encode(Op.READ, 1, 0, b"/shared\0"))
    assert len(dom0.receive(n_requests)) == n_requests
    assert guest.receive(n_requests) == [OK] * n_requests
    assert same.receive(1) == [(int(Op.READ), b"")]


def test_events_that_a_guest_does_not_read_are_dropped_while_nothing_else_happens(connect: Connect) -> None:
    dom0, guest, writer = connect(0), connect(5), connect(6)
    make_shared(dom0)
    guest.send(encode(Op.WATCH, 1, 0, b"/shared\0" + b"t" * 3000 + b"\0"))
    guest.receive(2)
    n_requests = 400
    writer.send(*[encode(Op.WRITE, 1, 0, b"/shared/%d\0x" % i) for i in range(n_requests)])
    assert writer.receive(n_requests) == [OK] * n_requests  # it waits until the guest's events are given up
