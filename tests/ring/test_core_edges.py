# SPDX-License-Identifier: MIT
"""The C core by itself: calls that the Python classes never make, or only at moments that a test cannot choose."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.ring.event import EventPort, EventWaiter, WaitResult, from_half, make_pair
from paravirt.ring.shared import FrontRing

from ..forked import in_child
from .support import DEADLINE_S, REQUEST, RESPONSE, Pair, answers, requests, ring_pair
from .test_event import new_inbox, until_asleep
from .test_refused import started

MS = 1_000_000
End = tuple[EventWaiter, EventPort]


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    first, second = make_pair("eventfd")
    one, two = from_half(first), from_half(second)
    with one[0], two[0]:
        yield one, two


@contextmanager
def stale_port() -> Iterator[Any]:
    """A port whose binding has changed since it learnt it."""
    generation = ffi.new("uint32_t *", 1)
    with EventWaiter(generation) as waiter, EventPort(waiter, None, 0) as port:
        generation[0] = 2
        yield port.core


# Rings.


def create(ring: Any, memory: Any, *, entry: int = 112, request: int = 112, response: int = 16) -> int:
    return int(lib.pv_ring_create(ring, memory, 4096, entry, request, response, ffi.NULL, 0))


@pytest.mark.parametrize(
    "sizes",
    [{"entry": 0}, {"entry": 8192}, {"request": 0}, {"response": 0}, {"request": 113}, {"response": 113}],
)
def test_a_ring_of_sizes_that_cannot_be(sizes: dict[str, int]) -> None:
    ring, memory = ffi.new("struct pv_ring *"), ffi.new("uint64_t[]", 512)
    assert create(ring, memory, **sizes) == -errno.EINVAL
    assert create(ring, ffi.cast("char *", memory) + 4) == -errno.EINVAL, "words must be aligned"
    assert lib.pv_ring_attach_at(ring, memory, 64, 112, 112, 16, ffi.NULL, 1, 0) == -errno.EINVAL
    assert lib.pv_ring_attach(ring, memory, 64, 112, 112, 16, ffi.NULL, 1) == -errno.EINVAL
    assert create(ring, memory) == 0


def ring_calls(ring: Any) -> list[Callable[[], int]]:
    message, slots = ffi.new("char[112]"), ffi.new("struct pv_ring_slots *")
    return [
        lambda: lib.pv_ring_push(ring, message, 1),
        lambda: lib.pv_ring_push_quiet(ring, message, 1),
        lambda: lib.pv_ring_notify(ring),
        lambda: lib.pv_ring_reserve(ring, 1, slots),
        lambda: lib.pv_ring_commit(ring, 1),
        lambda: lib.pv_ring_take(ring, message, 1),
        lambda: lib.pv_ring_take_spin(ring, message, 1, MS),
        lambda: lib.pv_ring_unconsumed(ring),
        lambda: lib.pv_ring_poll(ring),
        lambda: lib.pv_ring_final_check(ring),
        lambda: lib.pv_ring_wait(ring, 0, -1),
    ]


def test_nothing_works_on_a_dead_ring() -> None:
    with ring_pair() as pair:
        pair.set_header(0, 1000)
        assert lib.pv_ring_poll(pair.back.core) == -errno.EPROTO
        before = pair.header()
        assert {call() for call in ring_calls(pair.back.core)} == {-errno.EPROTO}
        pair.set_header(2, 1000)
        message = ffi.new("char[112]")
        assert lib.pv_ring_exchange(pair.front.core, message, message, MS) == -errno.EPROTO
        assert lib.pv_ring_exchange(pair.back.core, message, message, 0) == -errno.EINVAL, "a question of front ends"
        assert pair.header()[1:2] + pair.header()[3:] == before[1:2] + before[3:]


def test_nothing_works_in_a_forked_child() -> None:
    with ring_pair() as pair:

        def child() -> None:
            for end in (pair.front, pair.back):
                assert {call() for call in ring_calls(end.core)} == {-errno.ECHILD}

        assert in_child(child) == 0
        assert pair.header() == [0, 1, 0, 1]


def test_messages_of_a_size_of_their_own() -> None:
    """One at a time and in batches, where the core has no copy made for the size."""
    ring, other, memory = ffi.new("struct pv_ring *"), ffi.new("struct pv_ring *"), ffi.new("uint64_t[]", 512)
    assert lib.pv_ring_create(ring, memory, 4096, 24, 24, 20, ffi.NULL, 0) == 0
    assert lib.pv_ring_attach(other, memory, 4096, 24, 24, 20, ffi.NULL, 0) == 0
    out = ffi.new("char[]", 24 * 3)
    for turn in range(200):
        for n in (1, 3, 2):
            asked, answered = os.urandom(24 * n), os.urandom(20 * n)
            assert lib.pv_ring_push(ring, asked, n) & 0xFFFFFFFF == n, turn
            assert lib.pv_ring_take(other, out, n) == n
            assert ffi.buffer(out, 24 * n)[:] == asked
            assert lib.pv_ring_push(other, answered, n) & 0xFFFFFFFF == n
            assert lib.pv_ring_take(ring, out, n) == n
            assert ffi.buffer(out, 20 * n)[:] == answered


def test_an_exchange_whose_peer_could_not_be_told() -> None:
    ring, memory, message = ffi.new("struct pv_ring *"), ffi.new("uint64_t[]", 512), ffi.new("char[112]")
    with stale_port() as port:
        assert lib.pv_ring_create(ring, memory, 4096, 112, 112, 16, port, 0) == 0
        assert lib.pv_ring_exchange(ring, message, message, MS) == lib.PV_RING_STALE << 32
    assert ring.prod == 1, "the request is in the ring"
    assert lib.pv_ring_exchange(ring, message, message, MS) == -errno.EBUSY


@pytest.mark.parametrize(
    ("front", "policy", "threshold", "delay_ns", "result"),
    [
        (True, lib.PV_EVENT_RATE + 1, 1, 0, -errno.EINVAL),
        (True, lib.PV_EVENT_RATE, 0, 0, -errno.EINVAL),
        (True, lib.PV_EVENT_RATE, 1, -1, -errno.EINVAL),
        (True, lib.PV_EVENT_RATE, 1, 0, 0),
        (True, lib.PV_EVENT_HALF, 0, 0, 0),
        (False, lib.PV_EVENT_HALF, 0, 0, -errno.EINVAL),
        (False, lib.PV_EVENT_RATE, 1, 0, -errno.EINVAL),
        (False, lib.PV_EVENT_NEXT, 0, 0, 0),
    ],
)
def test_policies(front: bool, policy: int, threshold: int, delay_ns: int, result: int) -> None:
    with ring_pair() as pair:
        ring = (pair.front if front else pair.back).core
        assert lib.pv_ring_set_event_policy(ring, policy, threshold, delay_ns) == result
        assert ring.event_policy == (lib.PV_EVENT_NEXT if result else policy)


def test_a_rate_is_measured_once_a_window() -> None:
    with ring_pair() as pair:
        ring = pair.front.core
        assert lib.pv_ring_set_event_policy(ring, lib.PV_EVENT_RATE, 1, MS) == 0
        pair.front.push(requests(0, 4))
        ring.event_ahead = 3
        began = ring.window_start_ns = lib.pv_now_ns() + 60_000 * MS
        assert lib.pv_ring_final_check(ring) == 0
        assert (ring.window_start_ns, pair.header()[3]) == (began, 3), "what the last window said"
        ring.window_start_ns = lib.pv_now_ns() - 2 * lib.PV_EVENT_WINDOW_NS
        assert lib.pv_ring_final_check(ring) == 0
        assert (pair.header()[3], ring.event_ahead) == (1, 1), "nothing came: the next one wakes"


SPUN: list[tuple[Callable[[Pair], object], int]] = [
    (lambda pair: pair.front.push(requests(0, 1)), lib.PV_WAIT_EVENT),
    (lambda pair: pair.set_header(0, 1000), -errno.EPROTO),
    (lambda pair: pair.back_waiter.kick(), lib.PV_WAIT_KICKED),
]


@pytest.mark.parametrize(("what", "result"), SPUN)
def test_what_ends_a_spin(what: Callable[[Pair], object], result: int) -> None:
    """A thread spins, slice by slice, until something happens; it never sleeps."""
    with ring_pair() as pair:
        ring, results, spinning = pair.back.core, [], threading.Event()

        def spin() -> None:
            while not results or results[-1] == lib.PV_WAIT_INTERRUPTED:
                spinning.set()
                results.append(lib.pv_ring_wait(ring, lib.PV_SPIN_SLICE_NS + 1, -1))

        thread = started(spin)
        assert spinning.wait(DEADLINE_S)
        what(pair)
        thread.join(DEADLINE_S)
        assert results[-1] == result
        assert pair.back_waiter.statistics().sleeps == 0


def test_a_ring_without_a_waiter_spins_only() -> None:
    with ring_pair() as pair, FrontRing.attach(pair.mapping, REQUEST, RESPONSE) as alone:
        assert lib.pv_ring_wait(alone.core, 0, MS) == lib.PV_WAIT_TIMEOUT
        pair.front.push(requests(0, 1))
        pair.back.push(answers(pair.back.take_batch()))
        alone.core.prod = 1
        assert lib.pv_ring_wait(alone.core, 0, -1) == lib.PV_WAIT_EVENT


# Events.


def test_a_page_of_another_version_is_no_inbox() -> None:
    fd, mapping = new_inbox()
    os.close(fd)
    with mapping:
        inbox = mapping.pointer("struct pv_inbox *")
        inbox.version += 1
        assert lib.pv_inbox_check(inbox) == -errno.EPROTO
        with EventWaiter() as waiter:
            assert lib.pv_waiter_add(waiter.core, inbox, 0) == -errno.EPROTO


def test_nothing_wakes_or_waits_in_a_forked_child(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi()
    port, core = receiver.core, waiter.core

    def child() -> None:
        calls = [
            lib.pv_notify(sender.core), lib.pv_notify_learnt(sender.core), lib.pv_port_eoi(port, 0),
            lib.pv_waiter_add(core, port.rx, 0), lib.pv_waiter_remove(core, port.rx, 0), lib.pv_waiter_arm_always(core),
            lib.pv_waiter_drain(core), lib.pv_wait(core, port, 0, -1), lib.pv_wait(core, ffi.NULL, 0, -1),
        ]  # fmt: skip
        assert set(calls) == {-errno.ECHILD}
        lib.pv_waiter_kick(core)
        assert core.kicked == 0
        core.eoi_due_ns = 1
        lib.pv_waiter_run_eois(core)
        assert core.eoi_due_ns == 1, "the parent's ports are not touched"
        lib.pv_waiter_destroy(core)
        assert core.epoll_fd == -1, "without a look at inboxes, which are not mapped here"
        assert lib.pv_home_mark() == os.getpid()
        assert lib.pv_home_is_here(lib.pv_home_mark())

    assert in_child(child) == 0
    assert waiter.wait(receiver, timeout_s=0) is WaitResult.TIMEOUT


def test_an_end_that_only_sends_has_no_events() -> None:
    with EventWaiter() as waiter, EventPort(waiter, None, 3) as port:
        core = port.core
        assert lib.pv_wait(waiter.core, core, 0, MS) == lib.PV_WAIT_TIMEOUT
        lib.pv_port_set_pending(core)
        lib.pv_port_mask(core)
        assert lib.pv_port_unmask(core) == 0
        lib.pv_port_late_eoi(core, 0)
        lib.pv_port_delivered(core)
        lib.pv_port_discard(core)
        lib.pv_port_end_eoi(core)
        assert lib.pv_port_take_pending(core) == 0
        assert lib.pv_port_eoi(core, 1) == -errno.EINVAL
        assert core.masked_for == 0


def test_an_end_without_a_waiter_has_its_events_all_the_same() -> None:
    """Zeroed memory and an inbox: what a driver has that polls."""
    fd, mapping = new_inbox()
    os.close(fd)
    with mapping:
        inbox, port = mapping.pointer("struct pv_inbox *"), ffi.new("struct pv_port *")
        lib.pv_port_init(port, ffi.NULL, inbox, 70)
        lib.pv_port_late_eoi(port, 0)
        inbox.asleep = 1
        for turn in range(3):
            lib.pv_port_set_pending(port)
            assert lib.pv_port_take_pending(port) == 1, turn
            lib.pv_port_set_pending(port)
            assert lib.pv_port_take_pending(port) == 0, "not before the end of the last one"
            delay_ns = lib.pv_port_eoi(port, 1)
            assert delay_ns == lib.PV_JIFFY_NS << turn
            assert port.masked_for == 0, "nobody could unmask it later"
            assert lib.pv_port_take_pending(port) == 1
            assert lib.pv_port_eoi(port, 0) == 0
            port.spurious_row = turn + 1
        lib.pv_port_close(port)
        assert (port.rx, port.tx) == (ffi.NULL, ffi.NULL)


def test_a_sleeper_without_a_bell_is_not_rung(ends: tuple[End, End]) -> None:
    (_, sender), (_, receiver) = ends
    fd, mapping = new_inbox()
    sender.set_peer(mapping, 5, -1, 0)
    inbox = sender.core.tx
    inbox.asleep = 1
    assert lib.pv_notify(sender.core) == lib.PV_NOTIFY_SUPPRESSED
    assert inbox.pending[0] == 1 << 5
    assert not receiver.take_pending()
    os.close(fd)


def delayed(waiter: EventWaiter, eoi_class: int, n: int, due_ns: int) -> list[Any]:
    """Ports whose EOIs are delayed in one class, due one after another."""
    ports = []
    for i in range(n):
        port = ffi.new("struct pv_port *")
        lib.pv_port_init(port, waiter.core, ffi.NULL, 0)
        port.eoi_at_ns = due_ns + i
        assert lib.pv_waiter_delay_eoi(waiter.core, port, eoi_class) == 0
        ports.append(port)
    return ports


@pytest.mark.parametrize("forgotten", range(3))
def test_a_delayed_eoi_is_forgotten_wherever_it_stands(forgotten: int) -> None:
    now_ns = lib.pv_now_ns()
    with EventWaiter() as waiter:
        late = delayed(waiter, 5, 3, now_ns + 60_000 * MS)
        delayed_first = delayed(waiter, 2, 3, now_ns - MS)
        assert waiter.core.eoi_due_ns == now_ns - MS, "the timer is for the first of all classes"
        lib.pv_port_close(delayed_first.pop(forgotten))
        lib.pv_waiter_run_eois(waiter.core)
        assert [port.eoi_at_ns for port in delayed_first] == [0, 0], "ended"
        assert waiter.core.eoi_due_ns == late[0].eoi_at_ns
        lib.pv_port_close(late[forgotten])
        lib.pv_port_close(late[forgotten])
        kept = [port for i, port in enumerate(late) if i != forgotten]
        assert (waiter.core.delayed[5].first, waiter.core.delayed[5].last) == tuple(kept)
        assert (kept[0].eoi_next, kept[1].eoi_before) == tuple(reversed(kept))
        for port in kept:
            lib.pv_port_close(port)
        assert (waiter.core.delayed[5].first, waiter.core.delayed[5].last) == (ffi.NULL, ffi.NULL)


def test_how_a_wait_ends(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    core, port = waiter.core, receiver.core
    assert lib.pv_wait(core, port, MS, 10) == lib.PV_WAIT_TIMEOUT, "a spin is no longer than the wait"
    assert lib.pv_wait(core, port, lib.PV_SPIN_SLICE_NS + 1, -1) == lib.PV_WAIT_INTERRUPTED
    core.waiting = 1
    assert lib.pv_wait(core, port, 0, -1) == -errno.EBUSY
    assert lib.pv_waiter_remove(core, port.rx, -1) == -errno.EBUSY
    core.waiting = 0
    results: list[int] = []
    thread = started(lambda: results.append(lib.pv_wait(core, port, 0, 2**62)))
    until_asleep(waiter)
    sender.notify()
    thread.join(DEADLINE_S)
    assert results == [lib.PV_WAIT_EVENT]
    receiver.close()
    assert lib.pv_wait(core, port, 0, -1) == -errno.EBADF


def test_a_storm_is_told_by_its_delay() -> None:
    """While the waiter is in a storm an event without work costs 10 jiffies, or more if it is at more by itself."""
    first, second = make_pair("eventfd")
    (one, sender), (waiter, receiver) = from_half(first), from_half(second)
    with one, waiter:
        receiver.late_eoi(spurious_threshold=100)
        delays = []
        for row in (0, 10):
            sender.notify()
            assert receiver.take_pending()
            receiver.core.spurious_row = row
            receiver.core.spurious_threshold = 100 if row == 0 else 0
            waiter.core.storming = 1
            delays.append(lib.pv_port_eoi(receiver.core, 1))
            lib.pv_waiter_forget_eoi(waiter.core, receiver.core)
            lib.pv_port_end_eoi(receiver.core)
        assert delays[0] == lib.PV_STORM_DELAY_JIFFIES * lib.PV_JIFFY_NS
        assert delays[1] == lib.PV_JIFFIES_PER_S * lib.PV_JIFFY_NS


# Byte streams and flex rings.

LAYOUT = {
    "out": 0, "out_size": 1024, "out_cons": 2048, "out_prod": 2052,
    "in": 1024, "in_size": 1024, "in_cons": 2056, "in_prod": 2060,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out_size", 0), ("in_size", 0), ("out_size", 1000), ("in_size", 24), ("out_size", 8192), ("in_size", 8192),
        ("out", 3073), ("in", 4000), ("in", 2**32 - 4), ("out_cons", 2049), ("out_prod", 4096), ("in_cons", 4094),
        ("in_prod", 2**32 - 4),
    ],
)  # fmt: skip
def test_a_layout_that_leaves_the_page(name: str, value: int) -> None:
    stream, page = ffi.new("struct pv_stream *"), ffi.new("uint32_t[]", 1024)
    wrong = ffi.new("struct pv_stream_layout *", {**LAYOUT, name: value})
    assert lib.pv_stream_attach(stream, page, 4096, wrong, ffi.NULL) == -errno.EINVAL
    right = ffi.new("struct pv_stream_layout *", LAYOUT)
    assert lib.pv_stream_attach(stream, ffi.cast("char *", page) + 2, 4000, right, ffi.NULL) == -errno.EINVAL
    assert lib.pv_stream_attach(stream, page, 4096, right, ffi.NULL) == 0


def stream_pair(port: Any = ffi.NULL) -> tuple[Any, Any, Any]:
    page, back_names = ffi.new("uint32_t[]", 1024), {"out": "in", "in": "out"}
    front, back = ffi.new("struct pv_stream *"), ffi.new("struct pv_stream *")
    mirrored = {back_names[key.split("_")[0]] + key[len(key.split("_")[0]) :]: value for key, value in LAYOUT.items()}
    layout = ffi.new("struct pv_stream_layout *", LAYOUT)
    assert lib.pv_stream_attach(front, page, 4096, layout, port) == 0
    layout = ffi.new("struct pv_stream_layout *", mirrored)
    assert lib.pv_stream_attach(back, page, 4096, layout, ffi.NULL) == 0
    return front, back, page


def test_as_many_bytes_of_a_stream_as_there_are() -> None:
    front, back, page = stream_pair()
    out = ffi.new("uint8_t[2048]")
    assert lib.pv_stream_read(back, out, 10) == 0
    assert lib.pv_stream_write(front, bytes(range(256)) * 8, 2000) == 1024
    assert lib.pv_stream_write(front, b"x", 1) == 0, "full"
    assert lib.pv_stream_write(back, b"x", 0) == lib.pv_stream_read(back, out, 0) == 0
    assert lib.pv_stream_read(back, out, 2048) == 1024
    assert ffi.buffer(out, 1024)[:] == bytes(range(256)) * 4
    page[2060 // 4] = 5000
    assert lib.pv_stream_read(front, out, 1) == -errno.EPROTO
    assert lib.pv_stream_write(front, b"x", 1) == -errno.EPROTO
    layout = ffi.new("struct pv_stream_layout *", LAYOUT)
    assert lib.pv_stream_attach(front, page, 4096, layout, ffi.NULL) == -errno.EPROTO


def test_a_stream_whose_peer_could_not_be_told() -> None:
    with stale_port() as port:
        front, back, _ = stream_pair(port)
        assert lib.pv_stream_write(front, b"abc", 3) == 3 | lib.PV_STREAM_STALE << 32
        assert lib.pv_stream_write(back, b"defg", 4) == 4
        assert lib.pv_stream_read(front, ffi.new("uint8_t[10]"), 10) == 4 | lib.PV_STREAM_STALE << 32

    def child() -> None:
        assert lib.pv_stream_readable(back) == lib.pv_stream_writable(back) == -errno.ECHILD
        assert lib.pv_stream_write(back, b"x", 1) == -errno.ECHILD

    assert in_child(child) == 0


def test_flex_rings_that_cannot_be() -> None:
    flex, indexes, data = ffi.new("struct pv_flex *"), ffi.new("uint32_t[]", 1024), ffi.new("uint8_t[]", 8192)
    refs = ffi.new("uint32_t[]", 2048)
    askew = ffi.cast("char *", indexes) + 2
    assert lib.pv_flex_bytes(lib.PV_FLEX_MAX_ORDER + 1) == 0
    for where, order in ((indexes, lib.PV_FLEX_MAX_ORDER + 1), (askew, 0)):
        assert lib.pv_flex_create(flex, where, data, order, ffi.NULL, ffi.NULL, 0) == -errno.EINVAL
        assert lib.pv_flex_attach(flex, where, data, order, ffi.NULL) == -errno.EINVAL
    indexes[128 // 4] = lib.PV_FLEX_MAX_ORDER + 1
    for most in (0, 100):
        assert lib.pv_flex_look(indexes, most, refs) == -errno.EPROTO
    indexes[64 // 4] = 5000
    assert lib.pv_flex_attach(flex, indexes, data, 1, ffi.NULL) == -errno.EPROTO


def test_packets_that_no_flex_ring_has_room_for() -> None:
    flex, indexes, data = ffi.new("struct pv_flex *"), ffi.new("uint32_t[]", 1024), ffi.new("uint8_t[]", 4096)
    out = ffi.new("uint8_t[4096]")
    with stale_port() as port:
        back = ffi.new("struct pv_flex *")
        assert lib.pv_flex_create(flex, indexes, data, 0, ffi.NULL, ffi.NULL, 0) == 0
        assert lib.pv_flex_attach(back, indexes, data, 0, port) == 0
        for call in (lib.pv_flex_read, lib.pv_flex_write, lib.pv_flex_peek):
            assert call(flex, out, 2049) == -errno.EMSGSIZE
        assert lib.pv_flex_set_error(flex, 1, -5) == -errno.EINVAL, "the back end's word"
        assert lib.pv_flex_set_error(back, 1, -5) == lib.PV_STREAM_STALE
        assert (lib.pv_flex_error(flex, 1), lib.pv_flex_error(flex, 0)) == (-5, 0)
        assert in_child(lambda: require(lib.pv_flex_set_error(back, 1, 0) == -errno.ECHILD)) == 0
        indexes[68 // 4] = 5000
        for call in (lib.pv_flex_read, lib.pv_flex_peek):
            assert call(back, out, 1) == -errno.EPROTO
        assert lib.pv_flex_write(back, out, 1) == -errno.EPROTO


def require(true: bool) -> None:
    assert true
