# SPDX-License-Identifier: MIT
"""The client's end of a connection, in C and in Python, against replies that are not what it waits for."""

import os
import socket

import pytest

from paravirt.errors import PeerError
from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.messages import MAGIC, VERSION, Op, new_message, to_bytes
from paravirt.ring._core import ffi, lib
from paravirt.ring.memory import PAGE_BYTES, create_object

from .conftest import World, settle


def test_replies_with_foreign_numbers_end_a_clients_call() -> None:
    """The client checks seq, size and descriptors of what a broker sends."""
    for reply, fds, expected in [
        (to_bytes(new_message(Op.INFO, 5)), [], 0),
        (to_bytes(new_message(Op.INFO, 6)), [], -71),
        (b"short", [], -71),
        (to_bytes(new_message(Op.INFO, 5)), [0], -71),
    ]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            socket.send_fds(theirs, [to_bytes(new_message(Op.INFO, 4))], [0, 1])  # of a call that was given up
            socket.send_fds(theirs, [reply], fds)
            theirs.shutdown(socket.SHUT_WR)
            answer, got = new_message(0), ffi.new("int[4]")
            before = len(os.listdir("/proc/self/fd"))
            assert lib.pv_hv_receive(ours.fileno(), 5, answer, got, 4) == expected
            assert len(os.listdir("/proc/self/fd")) == before


def test_a_call_that_a_signal_ends_does_not_confuse_the_next(world: World) -> None:
    """Its late reply is dropped, with its descriptors."""
    connected = socket.socket(fileno=world.broker.connect(0))
    with Hypervisor(connected) as hypervisor:
        message = new_message(Op.DOMAIN_CONNECT, hypervisor.link._seq + 1)
        hypervisor.link._seq += 1
        before = len(os.listdir("/proc/self/fd"))
        assert lib.pv_hv_send(connected.fileno(), message, -1) == 0
        assert hypervisor.info().domains == 1
        settle(world)
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("version", "complaint"), [(VERSION + 1, "our protocol$"), (VERSION, "bindings page")])
def test_a_broker_of_another_version_is_refused(version: int, complaint: str) -> None:
    """By its greeting, or by the shared page that comes with it."""
    hello = new_message(Op.HELLO, 1)
    hello.header.n_fds, hello.hello.magic, hello.hello.version = 1, MAGIC, version
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    blank = create_object("memfd", PAGE_BYTES)
    with theirs:
        socket.send_fds(theirs, [to_bytes(hello)], [blank])
        with pytest.raises(PeerError, match=complaint):
            Hypervisor(ours)
    os.close(blank)
    assert len(os.listdir("/proc/self/fd")) == before


def test_c_client_call(world: World) -> None:
    """The whole exchange as a program without Python does it."""
    connected = world.broker.connect(0)
    request, reply, fds = new_message(Op.HELLO, 1), new_message(0), ffi.new("int[4]")
    request.hello.magic, request.hello.version = MAGIC, VERSION
    assert lib.pv_hv_call(connected, request, -1, reply, fds, 4) == 1
    assert (reply.header.status, reply.hello.domid) == (0, 0)
    assert not os.get_inheritable(fds[0])
    os.close(fds[0])
    world.broker.stop()
    request.header.op, request.header.seq = Op.INFO, 2
    assert lib.pv_hv_call(connected, request, -1, reply, fds, 4) in (-32, -104)
    os.close(connected)
