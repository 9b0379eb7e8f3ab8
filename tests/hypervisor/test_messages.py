# SPDX-License-Identifier: MIT
"""Messages to and from the broker in C: signals, replies that are none, descriptors that nobody asked for."""

import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.ring.memory import map_new

from ..faults import failing


@pytest.fixture
def link() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, broker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, broker:
        yield ours, broker


def message(seq: int, n_fds: int = 0) -> Any:
    return ffi.new("struct pv_hv_message *", {"header": {"seq": seq, "n_fds": n_fds}})


def receive(ours: socket.socket, seq: int, max_fds: int = 4) -> tuple[int, list[int]]:
    fds = ffi.new("int[4]")
    n = lib.pv_hv_receive(ours.fileno(), seq, message(0), fds, max_fds)
    return n, list(fds[0 : max(n, 0)])


def test_a_call_goes_on_after_signals(link: tuple[socket.socket, socket.socket]) -> None:
    ours, broker = link
    broker.send(bytes(ffi.buffer(message(7))))
    with failing("sendmsg", errno.EINTR, times=2) as sends, failing("recvmsg", errno.EINTR, times=2) as receives:
        assert lib.pv_hv_call(ours.fileno(), message(7), -1, message(0), ffi.new("int[4]"), 4) == 0
    assert (sends.calls, receives.calls) == (3, 3)
    assert len(broker.recv(4096)) == ffi.sizeof("struct pv_hv_message")
    broker.close()
    assert lib.pv_hv_call(ours.fileno(), message(8), -1, message(0), ffi.new("int[4]"), 4) == -errno.EPIPE
    assert receive(ours, 8) == (-errno.EPIPE, [])


@pytest.mark.parametrize(
    ("seq", "extra", "told", "allowed"),
    [(7, b"x", 1, 4), (8, b"", 1, 4), (7, b"", 0, 4), (7, b"", 1, 0)],
    ids=["too long", "a later one", "more descriptors than it says", "more than were asked for"],
)
def test_a_reply_that_is_none(
    link: tuple[socket.socket, socket.socket], seq: int, extra: bytes, told: int, allowed: int
) -> None:
    """Refused, and the descriptor that came with it is closed."""
    ours, broker = link
    before = set(os.listdir("/proc/self/fd"))
    socket.send_fds(broker, [bytes(ffi.buffer(message(seq, told))) + extra], [broker.fileno()])
    assert receive(ours, 7, allowed) == (-errno.EPROTO, [])
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_comes_beside_a_reply_is_no_descriptor(link: tuple[socket.socket, socket.socket]) -> None:
    ours, broker = link
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    broker.send(bytes(ffi.buffer(message(7, 1))))
    assert receive(ours, 7) == (0, [])


def test_a_page_that_is_none() -> None:
    fd, mapping = map_new("memfd", 4096)
    with mapping, failing("mmap", errno.EACCES):
        assert lib.pv_hv_deliver(fd, 0, -1) == -errno.EACCES
    os.close(fd)
