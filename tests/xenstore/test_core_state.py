# SPDX-License-Identifier: MIT
"""What a live update hands over: connections as they were, and nothing that is not such a state."""

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.xenstore.wire import Op, encode
from tests.xenstore.engine import Client, engine, make_home, wrong

HEAD = struct.Struct("<Ii6I")
WATCH = struct.Struct("<4Hi")
MAGIC, VERSION, RING, ENDED_RING = b"PVXSSTAT", 1, -1, -2
EPROTO = -71


def save(core: Any) -> bytes:
    pointer = ffi.new("uint8_t **")
    n = lib.pv_xs_state_save(core, pointer)
    state = bytes(ffi.buffer(pointer[0], n))
    lib.pv_xs_state_free(pointer[0])
    return state


def load(core: Any, state: bytes) -> int:
    return int(lib.pv_xs_state_load(core, state, len(state)))


def state(*connections: bytes, number: int = 9, version: int = VERSION, magic: bytes = MAGIC) -> bytes:
    return magic + struct.pack("<2I", version, number) + b"".join(connections)


def ring(*watches: bytes, domid: int = 5, fd: int = RING, transactions: tuple[int, ...] = (), cut: int = 0) -> bytes:
    """A connection with watches and open transactions; `cut`: more bytes were to come than there are."""
    head = HEAD.pack(domid, fd, 3, 7, cut, 0, len(watches), len(transactions))
    return head + b"".join(watches) + b"".join(struct.pack("<I", number) for number in transactions)


def watch(path: bytes, token: bytes = b"t", n_prefix: int = 0, n_path: int | None = None) -> bytes:
    return WATCH.pack(len(path) if n_path is None else n_path, len(token), n_prefix, 0, -1) + path + token


@pytest.fixture
def other() -> Iterator[Any]:
    """A hub to load into."""
    with engine(seed=2) as core:
        make_home(Client(core), 5)
        yield core


def test_a_client_does_not_notice(other: Any) -> None:
    with ExitStack() as stack:
        core = stack.enter_context(engine())
        make_home(Client(core), 5)
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        for hub in (core, other):
            assert lib.pv_xs_loop_open(hub) == 0
        guest = Client(core, 5)
        assert lib.pv_xs_serve_socket(guest.connection, theirs.detach()) == 0
        guest.do(Op.WATCH, b"a\0relative\0")
        guest.do(Op.WATCH, b"/local/domain/5/b\0deep\0000\0")
        guest.events()
        open_transaction = guest.begin()
        guest.do(Op.WRITE, b"a\0in", open_transaction)
        Client(core).do(Op.WRITE, b"/local/domain/5/a\0unsent")
        request = encode(Op.WRITE, 8, 0, b"a\0whole")
        guest.feed(request[:10])
        handed = save(core)
        fd = ffi.new("int32_t[4]")
        assert lib.pv_xs_sockets(core, fd, 4) == 1
        assert lib.pv_xs_sockets(core, ffi.NULL, 0) == 1
        moved = os.dup(fd[0])  # the former hub closes its own
        handed = handed[:20] + struct.pack("<i", moved) + handed[24:]
        assert load(other, handed) == 0
        new = Client(other, connection=lib.pv_xs_next_dirty(other))
        assert lib.pv_xs_number(new.connection) == lib.pv_xs_number(guest.connection)
        assert new.events() == [(b"a", b"relative")]
        new.feed(request[10:])
        assert [packet[:2] for packet in new.receive()] == [(Op.WATCH_EVENT, 0), (Op.WRITE, 8)]
        assert new.commit(open_transaction) == b"! EAGAIN\0"
        assert new.begin() == open_transaction + 1
        Client(other).do(Op.WRITE, b"/local/domain/5/b/below\0")
        assert new.events() == []  # its depth is 0
        Client(other).do(Op.WRITE, b"/local/domain/5/b\0")
        assert new.events() == [(b"/local/domain/5/b", b"deep")]
        assert lib.pv_xs_number(Client(other).connection) > lib.pv_xs_number(new.connection)
        ours.close()


def test_who_cannot_be_served_is_not_handed_over(other: Any) -> None:
    with engine() as core:
        broken = Client(core, 5)
        ours, theirs = socket.socketpair()
        with ours:
            assert lib.pv_xs_loop_open(core) == 0
            assert lib.pv_xs_serve_socket(broken.connection, theirs.detach()) == 0
            Client(core)  # the caller's own
            lib.pv_xs_give_up(broken.connection, ffi.NULL)
            n = len(save(core))
            why = ffi.new("char[]", b"a reason")
            lib.pv_xs_give_up(broken.connection, why)
            assert len(save(core)) == n - HEAD.size == len(state())
            assert lib.pv_xs_sockets(core, ffi.NULL, 0) == 0


def test_a_store_without_clients_has_only_its_numbers(other: Any) -> None:
    with engine() as core:
        assert save(core) == state(number=0)
        assert load(other, save(core)) == 0


def test_rings_are_handed_over_served_or_ended(other: Any) -> None:
    assert load(other, state(ring(watch(b"/a"), transactions=(4, 3)), ring(domid=6, fd=ENDED_RING), number=7)) == 0
    for domid in (5, 6):
        assert lib.pv_xs_domid(lib.pv_xs_ring_of(other, domid)) == domid
    assert wrong(other) is None
    guest = Client(other, connection=lib.pv_xs_ring_of(other, 5))
    assert [guest.commit(number) for number in (3, 4, 5)] == [b"! EAGAIN\0"] * 2 + [b"! ENOENT\0"]
    assert lib.pv_xs_number(lib.pv_xs_connect(other, 0)) == 8


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        state()[:-1],
        state(version=2),
        state(magic=b"PVXSSTAR"),
        state(ring(domid=0x10000)),
        state(ring(), ring()),
        state(ring(cut=1)),
        state(ring(watch(b"/a"))[:-1]),
        state(ring(watch(b"/a"))[:-3]),
        state(ring(watch(b"/a"))[: HEAD.size + 5]),
        state(ring(watch(b""))),
        state(ring(watch(b"/a", n_prefix=3))),
        state(ring(watch(b"/a//b"))),
        state(ring(watch(b"/a/"), watch(b"/a"), transactions=(1,))),
        state(ring(watch(b"/" + b"a" * 3072))),
        state(ring(transactions=(1,))[:-1]),
        state(ring())[:-1],
    ],
)
def test_what_is_no_state_is_refused(other: Any, bad: bytes) -> None:
    assert load(other, bad) == EPROTO
    assert wrong(other) is None


def test_a_socket_that_cannot_be_served_is_an_error(other: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        assert load(other, state(ring(fd=theirs.detach()))) == -9  # its loop is not open: EBADF
        assert ours.recv(1) == b""


def test_the_number_of_a_transaction_wraps(other: Any) -> None:
    """After 2^32 - 1 comes 1: 0 is none, and those that are open are left out."""
    head = HEAD.pack(5, RING, 3, 0xFFFFFFFF, 0, 0, 0, 1) + struct.pack("<I", 1)
    assert load(other, state(head)) == 0
    guest = Client(other, connection=lib.pv_xs_ring_of(other, 5))
    assert [guest.begin() for _ in range(3)] == [0xFFFFFFFF, 2, 3]
