# SPDX-License-Identifier: MIT
"""A domain's ring page as the engine serves it: how it begins, how it ends, what a guest may do to it."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.ring.event import from_half, make_pair
from paravirt.ring.memory import PAGE_BYTES, Mapping, create_object
from paravirt.ring.stream import XENSTORE_FRONT, ByteStream
from paravirt.xenstore.ring_page import RingError, RingPage, State
from paravirt.xenstore.wire import Op, encode
from tests.xenstore.engine import Client, engine, make_home
from tests.xenstore.test_core_state import RING, load, ring, state

REQ_PROD, RSP_CONS = 2052, 2056
"""Indexes in the page that the guest writes."""
PENDING = encode(Op.READ, 1, 0, b"x\0")


class Ring:
    """A store whose loop the test turns, and the page and port of domain 5, both ends."""

    def __init__(self) -> None:
        self.core = lib.pv_xs_new(1)
        assert lib.pv_xs_loop_open(self.core) == 0
        self.dom0 = Client(self.core)
        make_home(self.dom0, 5)
        fd = create_object("memfd", PAGE_BYTES)
        self.memory = Mapping(fd, PAGE_BYTES)
        os.close(fd)
        ours, theirs = make_pair()
        self.waiter, self.link = from_half(ours)
        self.guest_waiter, self.guest = from_half(theirs)
        self.page = RingPage(self.memory)
        self.events = ffi.new("struct pv_xs_event[16]")
        self.pointer = ffi.from_buffer("uint8_t[]", self.memory.view, require_writable=True)
        self.connection: Any = None

    def serve(self, how: int, connection: Any = None) -> None:
        self.connection = connection or self.connection or lib.pv_xs_connect(self.core, 5)
        lib.pv_xs_serve_ring(self.connection, self.pointer, self.link.core, how)

    def hear(self, spin_ns: int = 0) -> None:
        self.waiter.fileno()  # always armed
        assert lib.pv_xs_loop_waiter(self.core, self.waiter.core, spin_ns) == 0

    def poll(self, timeout_ms: int = 0, max_events: int = 16) -> list[tuple[int, int]]:
        """(kind, domid) of each event."""
        n = lib.pv_xs_poll(self.core, timeout_ms, self.events, max_events)
        return [(event.kind, event.domid) for event in self.events[0:n]]

    def stream(self) -> ByteStream:
        return ByteStream(self.memory.view, XENSTORE_FRONT, port=self.guest)

    def put(self, offset: int, value: int) -> None:
        self.memory.view[offset : offset + 4] = struct.pack("<I", value)

    def close(self) -> None:
        lib.pv_xs_free(self.core)
        ffi.release(self.pointer)
        self.waiter.close()
        self.guest_waiter.close()
        self.memory.close()


@pytest.fixture
def link() -> Iterator[Ring]:
    link = Ring()
    yield link
    link.close()


@contextmanager
def bound_anew(end: Any) -> Iterator[None]:
    """The broker has changed a binding of a port or a waiter, which nobody has looked at yet."""
    word, former = ffi.new("uint32_t *", 1), end.generation
    end.generation = word
    yield
    end.generation = former


def test_a_request_goes_through_and_the_loop_looks_as_often_as_it_must(link: Ring) -> None:
    link.serve(lib.PV_XS_RING_FRESH)
    assert lib.pv_xs_ring_of(link.core, 5) == link.connection
    link.hear(spin_ns=1_000_000_000)  # rings are watched, not waited for
    with link.stream() as stream:
        stream.write_nowait(PENDING)
        link.poll(20)
        assert b"ENOENT" in stream.read_nowait()
        for _ in range(24):
            stream.write_nowait(PENDING)
        answered = b""
        while answered.count(b"ENOENT") < 24:
            link.poll(1)
            answered += stream.read_nowait() or b""


@pytest.mark.parametrize(("features", "told"), [(15, RingError.COMMUNICATION), (13, RingError.NONE)])
def test_a_broken_ring_is_told_to_who_knows_errors(link: Ring, features: int, told: RingError) -> None:
    domain = ffi.new("struct pv_xs_domain *", {"domid": 5, "features": features})
    lib.pv_xs_set_domain(link.core, domain)
    link.serve(lib.PV_XS_RING_BROKEN)
    assert (link.page.features, link.page.error) == (features, told)
    with link.stream() as stream:
        stream.write_nowait(PENDING)
        link.poll()
        assert not stream.read_nowait()


@pytest.mark.parametrize("features", [15, 14])
def test_a_reconnection_is_for_who_knows_it(link: Ring, features: int) -> None:
    domain = ffi.new("struct pv_xs_domain *", {"domid": 5, "features": features})
    lib.pv_xs_set_domain(link.core, domain)
    link.serve(lib.PV_XS_RING_BROKEN)
    link.put(2068, 1)  # State.RECONNECT
    lib.pv_xs_ring_look(link.connection)
    link.poll()
    assert (link.page.state == State.CONNECTED) is (features == 15)


@pytest.mark.parametrize("fd", [RING, -2])
@pytest.mark.parametrize("bad_index", [False, True])
def test_a_live_update_goes_on_with_the_page(link: Ring, fd: int, bad_index: bool) -> None:
    """What the former program has served is served, what an error had ended is not."""
    link.serve(lib.PV_XS_RING_FRESH)
    with link.stream() as stream:
        stream.write_nowait(PENDING)
    lib.pv_xs_stop_ring(link.connection)
    lib.pv_xs_stop_ring(link.connection)  # twice is harmless
    lib.pv_xs_conn_free(link.connection)
    assert lib.pv_xs_ring_of(link.core, 5) == ffi.NULL
    if bad_index:
        link.put(RSP_CONS, 5000)
    assert load(link.core, state(ring(fd=fd))) == 0
    link.serve(lib.PV_XS_RING_RESUME, lib.pv_xs_ring_of(link.core, 5))
    link.poll()
    served = fd == RING and not bad_index
    assert (struct.unpack_from("<I", link.memory.view, 2060)[0] > 0) is served  # replies
    assert link.page.error == (RingError.INDEX if fd == RING and bad_index else RingError.NONE)
    again = load(link.core, state(ring(fd=fd)))
    assert again == -71  # it has a ring


@pytest.mark.parametrize(("offset", "value"), [(REQ_PROD, 5000), (RSP_CONS, 5000)])
@pytest.mark.parametrize("unsent", [False, True])
def test_impossible_indexes_end_a_ring(link: Ring, offset: int, value: int, unsent: bool) -> None:
    link.serve(lib.PV_XS_RING_FRESH)
    link.poll()
    if unsent:
        Client(link.core, connection=link.connection).feed(PENDING)
    link.put(offset, value)
    lib.pv_xs_ring_look(link.connection)
    link.poll()
    assert link.page.error == RingError.INDEX
    assert lib.pv_xs_n_output(link.connection) == 0


def test_a_request_too_long_ends_a_ring(link: Ring) -> None:
    link.serve(lib.PV_XS_RING_FRESH)
    with link.stream() as stream:
        stream.write_nowait(PENDING[:12] + b"\xff\xff\xff\xff")
        lib.pv_xs_ring_look(link.connection)
        link.poll()
    assert link.page.error == RingError.PROTOCOL


def test_a_ring_is_served_anew_in_place_of_the_former(link: Ring) -> None:
    link.serve(lib.PV_XS_RING_FRESH)
    with link.stream() as stream:
        stream.write_nowait(PENDING)
        link.serve(lib.PV_XS_RING_FRESH)
        link.poll()
    with link.stream() as stream:
        assert not stream.read_nowait()  # both streams were emptied
    lib.pv_xs_conn_free(link.connection)
    assert lib.pv_xs_ring_of(link.core, 5) == ffi.NULL


def test_a_port_that_was_bound_anew_is_the_callers_to_look_at(link: Ring) -> None:
    with bound_anew(link.link.core):
        link.serve(lib.PV_XS_RING_FRESH)  # the guest cannot be notified
        other = lib.pv_xs_connect(link.core, 6)
        assert link.poll() == [(lib.PV_XS_EVENT_STALE, 5)]
        assert link.poll() == []  # told once
        Client(link.core, connection=link.connection).feed(PENDING)
        assert link.poll() == [(lib.PV_XS_EVENT_STALE, 5)]
    before = link.link.core.sent
    lib.pv_xs_ring_bound(link.connection)
    assert link.link.core.sent == before + 1
    lib.pv_xs_stop_ring(link.connection)
    lib.pv_xs_ring_bound(link.connection)  # it has no port any more
    lib.pv_xs_conn_free(other)


def test_what_is_pending_at_the_waiter_and_no_rings_is_the_callers(link: Ring) -> None:
    link.serve(lib.PV_XS_RING_FRESH)
    link.hear()
    lib.pv_waiter_kick(link.waiter.core)
    assert link.poll(1000)[0][0] == lib.PV_XS_EVENT_FD
    assert link.events[0].fd == link.waiter.core.epoll_fd
    with bound_anew(link.waiter.core):
        lib.pv_waiter_nudge(link.waiter.core)
        link.guest.notify()
        assert lib.PV_XS_EVENT_FD in [kind for kind, _ in link.poll(1000)]
    lib.pv_xs_stop_ring(link.connection)
    link.guest.notify()
    assert link.poll(1000)[0][0] == lib.PV_XS_EVENT_FD
    assert lib.pv_xs_loop_waiter(link.core, ffi.NULL, 0) == 0
    assert link.poll() == []


def test_events_that_have_no_room_are_not_written(link: Ring) -> None:
    readers = [os.pipe() for _ in range(3)]
    for reader, writer in readers:
        assert lib.pv_xs_loop_add(link.core, reader, 1) == 0
        os.write(writer, b"x")
    assert len(link.poll(1000, max_events=2)) == 2
    assert len(link.poll(1000)) == 3  # they are told again
    for reader, writer in readers:
        assert lib.pv_xs_loop_remove(link.core, reader) == 0
        os.close(reader)
        os.close(writer)
    assert link.poll() == []


def test_no_domain_has_a_ring_that_is_not_known() -> None:
    with engine() as core:
        assert lib.pv_xs_ring_of(core, 5) == ffi.NULL
        assert lib.pv_xs_ring_of(core, 1 << 20) == ffi.NULL
