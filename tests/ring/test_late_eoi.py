# SPDX-License-Identifier: MIT
"""Late EOI: a port is masked from delivery to `eoi`, and events without work cost more and more.

Rows of the interface's storm handling (Linux events_base.c), each with its test:

| rule | test |
|---|---|
| masked from delivery until eoi | test_a_port_is_masked_until_its_event_is_ended |
| reasons to mask are a set | test_a_port_is_unmasked_when_no_reason_is_left |
| delay 1 << (count - 1 - threshold) jiffies, at most 1 s | test_spurious_events_cost_what_the_formula_says |
| threshold of a device | test_a_threshold_of_its_own |
| an event with work resets | test_an_event_with_work_forgives |
| 256 events and 2 jiffies: every further EOI 10 jiffies late | test_a_storm_over_many_ports_is_deferred |
| never handled twice at once | test_an_event_is_handled_once_at_a_time |
| a delayed EOI wakes the sleeper, a foreign loop too | test_a_delayed_eoi_... |
| a closed port, a closed waiter | test_closing_forgets_a_delayed_eoi |
| both sides of a ring | test_a_ring_ends_its_events_itself |
"""

import select
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from paravirt.errors import Closed, InvalidRequest
from paravirt.ring._core import lib
from paravirt.ring.event import EventPort, EventWaiter, NotifyResult, WaitResult, from_half, make_pair

from .support import DEADLINE_S, REQUEST, requests, ring_pair
from .test_event import until_asleep

JIFFY_S = lib.PV_JIFFY_NS / 1e9
End = tuple[EventWaiter, EventPort]


@pytest.fixture(params=["eventfd", "pipe"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    first, second = make_pair(request.param)
    one, two = from_half(first), from_half(second)
    with one[0], two[0]:
        yield one, two


def storm(sender: EventPort, waiter: EventWaiter, receiver: EventPort) -> float:
    """One event without work; by how much its EOI is delayed."""
    sender.notify()
    assert waiter.wait(receiver, timeout_s=DEADLINE_S) is WaitResult.EVENT
    return receiver.eoi(spurious=True)


def test_a_port_is_masked_until_its_event_is_ended(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi()
    waiter.fileno()  # senders ring whenever they may
    assert sender.notify() is NotifyResult.RANG
    assert waiter.wait(receiver, timeout_s=0) is WaitResult.EVENT
    for _ in range(3):
        assert sender.notify() is NotifyResult.SUPPRESSED
        assert waiter.wait(receiver, timeout_s=0) is WaitResult.TIMEOUT
        assert waiter.take_pending() == []
        assert not receiver.take_pending()
    assert receiver.eoi() == 0
    assert waiter.take_pending() == [receiver], "what came meanwhile was kept"
    assert sender.notify() is NotifyResult.SUPPRESSED, "taking all masks as well"
    receiver.eoi()
    assert receiver.take_pending()
    assert receiver.statistics().received == 3


def test_an_event_is_handled_once_at_a_time(ends: tuple[End, End]) -> None:
    (_, sender), (_, receiver) = ends
    with pytest.raises(InvalidRequest, match="no event"):
        receiver.eoi()
    receiver.late_eoi()
    taken: list[bool] = []
    inside = threading.Semaphore(1)

    def take() -> None:
        while len(taken) < 500:
            if receiver.take_pending():
                taken.append(inside.acquire(blocking=False))
                inside.release()
                receiver.eoi()
            sender.notify()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert all(taken)
    receiver.take_pending()
    receiver.eoi()
    with pytest.raises(InvalidRequest, match="no event"):
        receiver.eoi()


def test_a_port_is_unmasked_when_no_reason_is_left(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi()
    sender.notify()
    assert receiver.take_pending()
    sender.notify()
    receiver.mask()
    assert receiver.eoi() == 0
    assert waiter.take_pending() == [], "masked by ourselves"
    assert receiver.unmask()
    assert waiter.take_pending() == [receiver]
    receiver.mask()
    sender.notify()
    assert not receiver.unmask(), "the event before is not ended"
    assert waiter.take_pending() == []
    receiver.eoi()
    assert waiter.take_pending() == [receiver]


def test_spurious_events_cost_what_the_formula_says(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi()
    delays = [storm(sender, waiter, receiver) for _ in range(5)]
    assert delays == [0, *(JIFFY_S * 2**n for n in range(4))]
    statistics = receiver.statistics()
    assert (statistics.spurious, statistics.eoi_delayed_ns) == (5, round(sum(delays) * 1e9))
    receiver.core.spurious_row = 9
    assert storm(sender, waiter, receiver) == 1.0, "256 jiffies are more than a second"
    assert receiver.core.spurious_row == 10
    assert sender.notify() is NotifyResult.SUPPRESSED, "masked: a storm wakes nobody"


def test_the_row_ends_where_it_makes_no_difference(ends: tuple[End, End]) -> None:
    (_, sender), (_, receiver) = ends
    receiver.late_eoi(spurious_threshold=2**32 - 1)
    for _ in range(20):
        sender.notify()
        assert receiver.take_pending()
        assert receiver.eoi(spurious=True) == 0
    assert receiver.core.spurious_row == 10


def test_a_threshold_of_its_own(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi(spurious_threshold=3)
    assert [storm(sender, waiter, receiver) for _ in range(5)] == [0, 0, 0, JIFFY_S, JIFFY_S * 2]
    with pytest.raises(InvalidRequest):
        receiver.late_eoi(spurious_threshold=-1)


def test_an_event_with_work_forgives(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi()
    assert [storm(sender, waiter, receiver) for _ in range(3)] == [0, JIFFY_S, JIFFY_S * 2]
    sender.notify()
    assert waiter.wait(receiver, timeout_s=DEADLINE_S) is WaitResult.EVENT
    assert receiver.eoi() == 0
    assert storm(sender, waiter, receiver) == 0


def test_a_delayed_eoi_wakes_the_sleeper(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi()
    while storm(sender, waiter, receiver) == 0:
        pass
    sender.notify()
    assert waiter.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
    assert waiter.take_pending() == [receiver]
    assert waiter.core.eoi_due_ns == 0


def test_a_delayed_eoi_makes_a_foreign_loop_look(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi()
    poll = select.poll()
    poll.register(waiter.fileno(), select.POLLIN)
    taken = []
    sender.notify()
    while len(taken) < 4:
        assert poll.poll(DEADLINE_S * 1000)
        waiter.drain_bells()
        for port in waiter.take_pending():
            taken.append(port.eoi(spurious=True))
            sender.notify()
    assert taken == [0, JIFFY_S, JIFFY_S * 2, JIFFY_S * 4]


def test_a_storm_over_many_ports_is_deferred(ends: tuple[End, End]) -> None:
    """No port alone is over its threshold; all of them together keep the waiter from sleep."""
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi(spurious_threshold=100)

    def spurious_event() -> float:
        sender.notify()
        assert waiter.wait(receiver, timeout_s=DEADLINE_S) is WaitResult.EVENT
        return receiver.eoi(spurious=True)

    assert spurious_event() == 0
    waiter.core.storm_since_ns -= 3 * lib.PV_JIFFY_NS  # as if it had lasted so long
    delays = [spurious_event() for _ in range(lib.PV_STORM_EVENTS)]
    assert delays[: lib.PV_STORM_EVENTS - 2] == [0] * (lib.PV_STORM_EVENTS - 2)
    assert delays[-2] == JIFFY_S * lib.PV_STORM_DELAY_JIFFIES
    assert delays[-1] == 0, "to wait for the delayed one was sleep, which ends a storm"


def test_work_is_no_storm(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi()
    for _ in range(2 * lib.PV_STORM_EVENTS):
        sender.notify()
        assert waiter.wait(receiver, timeout_s=0) is WaitResult.EVENT
        waiter.core.storm_since_ns -= 3 * lib.PV_JIFFY_NS
        assert receiver.eoi() == 0


def test_closing_forgets_a_delayed_eoi(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    inbox = waiter.inboxes[0]
    receiver.late_eoi()
    while storm(sender, waiter, receiver) == 0:
        pass
    sender.notify()
    receiver.close()
    with pytest.raises(Closed):
        receiver.eoi()
    assert not any(delayed.first for delayed in waiter.core.delayed)
    with EventPort(waiter, inbox, 0) as again:
        assert not again.take_pending(), "what was pending went with the port"
        sender.notify()
        assert waiter.wait(again, timeout_s=0) is WaitResult.EVENT


def test_a_waiter_is_closed_with_delayed_eois() -> None:
    first, second = make_pair()
    (other, sender), (waiter, receiver) = from_half(first), from_half(second)
    with other:
        with waiter:
            receiver.late_eoi()
            while storm(sender, waiter, receiver) == 0:
                pass
            thread = threading.Thread(target=lambda: waiter.wait(receiver))
            thread.start()
            until_asleep(waiter)
            waiter.kick()
            thread.join(DEADLINE_S)


def test_a_ring_ends_its_events_itself() -> None:
    """A peer that only sends events is masked longer and longer; requests forgive it."""
    with ring_pair() as pair:
        pair.back_port.late_eoi()
        for _ in range(4):
            pair.front_port.notify()
            assert pair.back.wait(timeout_s=0.01) in (WaitResult.TIMEOUT, WaitResult.EVENT)
        assert pair.back_port.statistics().spurious >= 2
        assert pair.back_port.core.spurious_row >= 2
        out = np.zeros(1, REQUEST)
        pair.front.push(requests(0, 1))
        assert pair.back.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
        assert pair.back.take(out) == 1
        while pair.back_port.core.spurious_row > 0:
            assert pair.back.wait(timeout_s=0.01) is WaitResult.TIMEOUT, "until the event of that request is looked at"
