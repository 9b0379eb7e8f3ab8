# SPDX-License-Identifier: MIT
"""Peers that ring without an event: heard some times, then later and later; nobody else waits for that."""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from paravirt.ring._core import lib
from paravirt.ring.event import EventPort, EventWaiter, Half, WaitResult, from_half, make_pair
from paravirt.ring.memory import PAGE_BYTES, Mapping

from .support import DEADLINE_S

FREE_RINGS = lib.PV_BELL_THRESHOLD + 2  # with one port: one for it, and the first after it was made
FEW = 100  # wake-ups in a second; without a bound it is every write


class Ends:
    """A waiter with one port, whoever sends to it, and the doorbell that this one holds."""

    def __init__(self, kind: str) -> None:
        first, second = make_pair(kind)  # type: ignore[arg-type]
        self.bell = os.dup(first.tx_bell_fd)
        self.sending_waiter, self.sender = from_half(first)
        self.waiter, self.receiver = from_half(second)

    @property
    def doorbell(self):  # type: ignore[no-untyped-def]
        return self.waiter.core.doorbells[0]

    def ring(self) -> None:
        """Without an event."""
        assert lib.pv_bell_ring(self.bell) == 0

    @contextmanager
    def storm(self) -> Iterator[None]:
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                self.ring()

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(DEADLINE_S)

    def another_peer(self) -> tuple[EventPort, EventPort]:
        """(sending, receiving): one more domain that may send to the waiter."""
        first, second = make_pair()
        sender = from_half(first)[1]
        return sender, add(self.waiter, second)


def add(waiter: EventWaiter, half: Half) -> EventPort:
    inbox = waiter.add_inbox(Mapping(half.rx_memory_fd, PAGE_BYTES), half.rx_bell_fd)
    for fd in (half.rx_memory_fd, half.tx_memory_fd, half.tx_bell_fd):
        os.close(fd)
    return EventPort(waiter, inbox, 0)


@pytest.fixture(params=["eventfd", "pipe"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    made = Ends(request.param)
    try:
        yield made
    finally:
        made.sending_waiter.close()
        made.waiter.close()
        os.close(made.bell)


def wait_until_unheard(ends: Ends) -> None:
    """In a storm: until its doorbell is no longer heard at once, which may last on a machine that has much to do."""
    deadline = time.monotonic() + DEADLINE_S
    while not ends.doorbell.unheard_until_ns:
        assert time.monotonic() < deadline
        ends.waiter.wait(ends.receiver, timeout_s=0.2)


def ring_for_nothing(ends: Ends, times: int) -> None:
    for _ in range(times):
        ends.ring()
        ends.waiter.drain_bells()


@pytest.mark.parametrize("one_port", [True, False])
def test_a_storm_wakes_a_sleeper_a_few_times(ends: Ends, one_port: bool) -> None:
    with ends.storm():
        assert ends.waiter.wait(ends.receiver if one_port else None, timeout_s=1) is WaitResult.TIMEOUT
    statistics = ends.waiter.statistics()
    assert 0 < statistics.sleeps < FEW
    assert statistics.unheard > 0


def test_a_storm_makes_a_foreign_loop_look_a_few_times(ends: Ends) -> None:
    poll, looks = select.poll(), 0
    poll.register(ends.waiter.fileno(), select.POLLIN)
    with ends.storm():
        while poll.poll(200) and looks < 10 * FEW:
            ends.waiter.drain_bells()
            assert ends.waiter.take_pending() == []
            looks += 1
    assert looks < FEW


def test_events_of_others_come_at_once(ends: Ends) -> None:
    sender, receiver = ends.another_peer()
    with sender.waiter, ends.storm():
        assert ends.waiter.wait(receiver, timeout_s=0.2) is WaitResult.TIMEOUT
        assert ends.waiter.statistics().unheard > 0
        before = ends.waiter.statistics().wakeups
        for _ in range(300):
            threading.Timer(0.0005, sender.notify).start()
            assert ends.waiter.wait(receiver, timeout_s=DEADLINE_S) is WaitResult.EVENT
    assert ends.waiter.statistics().wakeups - before < 300 + FEW


def test_what_the_storm_drowns_comes_later(ends: Ends) -> None:
    with ends.storm():
        wait_until_unheard(ends)
        ends.sender.notify()
        assert ends.waiter.wait(ends.receiver, timeout_s=DEADLINE_S) is WaitResult.EVENT


def test_later_and_later_up_to_a_second(ends: Ends) -> None:
    ring_for_nothing(ends, FREE_RINGS)
    assert ends.waiter.statistics().unheard == 0
    delays = []
    for _ in range(11):
        before_ns = lib.pv_now_ns()
        ends.ring()
        lib.pv_waiter_heard(ends.waiter.core, ends.waiter.inboxes[0].bell_fd)
        after_ns = lib.pv_now_ns()
        delays.append((before_ns, ends.doorbell.unheard_until_ns, after_ns))
    expected = [2**n for n in range(8)] + [250] * 3
    for (before_ns, until_ns, after_ns), jiffies in zip(delays, expected, strict=True):
        assert before_ns + jiffies * lib.PV_JIFFY_NS <= until_ns <= after_ns + jiffies * lib.PV_JIFFY_NS
    assert ends.waiter.statistics().unheard == len(delays)


def take(ends: Ends) -> None:
    ends.sender.notify()
    assert ends.receiver.take_pending()


def take_all(ends: Ends) -> None:
    ends.sender.notify()
    assert ends.waiter.take_pending() == [ends.receiver]


def take_late(ends: Ends) -> None:
    ends.receiver.late_eoi()
    take(ends)


def make_port(ends: Ends) -> None:
    EventPort(ends.waiter, ends.waiter.inboxes[0], 7)  # one more free ring


@pytest.mark.parametrize("forgive", [take, take_all, take_late, make_port])
def test_an_event_that_is_taken_forgives(ends: Ends, forgive: Callable[[Ends], None]) -> None:
    ring_for_nothing(ends, FREE_RINGS)
    assert ends.doorbell.idle_row == FREE_RINGS - 1
    forgive(ends)
    ring_for_nothing(ends, FREE_RINGS)
    assert ends.waiter.statistics().unheard == 0
    assert ends.doorbell.idle_row == FREE_RINGS - 1
    ring_for_nothing(ends, 2)
    assert ends.waiter.statistics().unheard == 1


def test_an_event_that_nobody_takes_forgives_nothing(ends: Ends) -> None:
    """One who waits for another port: the sender must not have a free ring for each look."""
    ends.sender.notify()
    with ends.storm():
        other = EventPort(ends.waiter, ends.waiter.inboxes[0], 9)
        assert ends.waiter.wait(other, timeout_s=0.5) is WaitResult.TIMEOUT
    assert ends.waiter.statistics().sleeps < FEW


def test_ports_that_nobody_waits_for_do_not_make_a_storm(ends: Ends) -> None:
    """Each of many ports rings once while somebody waits for another one."""
    inbox, slots = ends.waiter.inboxes[0], range(1, 200)
    ports = [EventPort(ends.waiter, inbox, slot) for slot in slots]
    assert ends.doorbell.n_ports == 200
    ring_for_nothing(ends, 1)  # forgets that they are new
    for _ in slots:
        ring_for_nothing(ends, 1)
    assert ends.waiter.statistics().unheard == 0
    for port in ports:
        port.close()
    assert ends.doorbell.n_ports == 1
    ring_for_nothing(ends, 1)
    assert ends.waiter.statistics().unheard == 1


def test_a_binding_that_changed_is_no_ring_for_nothing(ends: Ends) -> None:
    for n in range(4 * FREE_RINGS):
        ends.waiter.core.fixed_generation = n + 1
        ends.ring()
        assert ends.waiter.drain_bells() is WaitResult.STALE
    assert ends.waiter.statistics().unheard == 0


def test_the_end_of_the_sender_is_told_while_it_is_not_heard() -> None:
    first, second = make_pair("pipe")
    bell = os.dup(first.tx_bell_fd)
    first.close()
    waiter, port = from_half(second)
    with waiter:
        for _ in range(FREE_RINGS + 6):
            lib.pv_bell_ring(bell)
            waiter.drain_bells()
        assert waiter.core.doorbells[0].unheard_until_ns > 0
        os.close(bell)
        assert waiter.wait(port, timeout_s=DEADLINE_S) is WaitResult.STALE


def test_each_is_heard_again_when_its_own_time_is_over(ends: Ends) -> None:
    sender, receiver = ends.another_peer()
    core, inbox = ends.waiter.core, ends.waiter.inboxes[1]
    with sender.waiter:
        ring_for_nothing(ends, FREE_RINGS + 1)
        assert core.hear_at_ns == ends.doorbell.unheard_until_ns > 0
        far = core.hear_at_ns = ends.doorbell.unheard_until_ns = lib.pv_now_ns() + 10**15
        while not core.doorbells[1].unheard_until_ns:
            lib.pv_waiter_heard(core, inbox.bell_fd)
        assert core.hear_at_ns == core.doorbells[1].unheard_until_ns < far
        while core.doorbells[1].unheard_until_ns:
            assert ends.waiter.wait(receiver, timeout_s=0.01) is WaitResult.TIMEOUT
        assert core.hear_at_ns == ends.doorbell.unheard_until_ns == far


def test_a_doorbell_that_is_removed_while_it_is_not_heard(ends: Ends) -> None:
    ring_for_nothing(ends, FREE_RINGS + 6)
    assert ends.waiter.core.hear_at_ns > 0
    ends.receiver.close()
    ends.waiter.remove_inbox(ends.waiter.inboxes[0])
    assert ends.waiter.wait(timeout_s=0.2) is WaitResult.TIMEOUT
    assert ends.waiter.core.hear_at_ns == 0
