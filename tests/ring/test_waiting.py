# SPDX-License-Identifier: MIT
"""How long a wait looks before it sleeps, and at which message it wants to be woken."""

import threading
from typing import Any

import numpy as np
import pytest

from paravirt.errors import InvalidRequest
from paravirt.ring._core import ffi, lib
from paravirt.ring.event import WaitResult, from_half, make_pair
from paravirt.ring.shared import FrontRing
from paravirt.ring.waiting import LEARNT, SpinBudget, Wait

from .support import NEAR_WRAP, REQUEST, RESPONSE, Pair, answers, requests, ring_pair

MOST_NS = 50_000
MS = 1_000_000


class Spin:
    """The learning, with gaps given instead of measured."""

    def __init__(self, most_ns: int = MOST_NS, budget: Any = ffi.NULL) -> None:
        self.core = ffi.new("struct pv_spin *")
        lib.pv_spin_init(self.core, most_ns, budget)
        self.now_ns = 0

    def wait(self, gap_ns: int, *, idle: bool = True) -> int:
        """A wait for which the message comes after `gap_ns`: how long it spun."""
        allowed = lib.pv_spin_begin(self.core, self.now_ns, idle)
        spun = min(allowed, gap_ns)
        if allowed:
            lib.pv_spin_end(self.core, spun, gap_ns <= allowed)
        if gap_ns > allowed:
            lib.pv_spin_slept(self.core, gap_ns)
        self.now_ns += gap_ns
        return spun


def test_short_gaps_are_spun_through() -> None:
    spin = Spin()
    assert [spin.wait(800) for _ in range(200)] == [800] * 200
    nearly = range(lib.PV_SPIN_WORTH_NS, lib.PV_SPIN_WORTH_NS + 8)
    assert spin.core.next_ns in nearly, "a message that does not come soon is not waited for long"
    assert spin.wait(30_000) in nearly


def test_long_gaps_are_not_spun_for() -> None:
    """After a few in vain it only tries now and then: less than one part in a hundred of its time."""
    spin = Spin()
    spun = [spin.wait(MS) for _ in range(3000)]
    assert sum(spun) < 0.01 * spin.now_ns
    assert spun[-300:].count(0) >= 298
    assert max(spun) <= MOST_NS


def test_it_notices_that_gaps_became_short() -> None:
    spin = Spin()
    for _ in range(2000):
        spin.wait(MS)
    spun = [spin.wait(2000) for _ in range(600)]
    assert spun[-1] == 2000
    assert spun.index(2000) <= 257


def test_it_learns_a_gap_that_is_longer_than_it_looked() -> None:
    spin = Spin()
    for _ in range(200):
        spin.wait(1500)
    spun = [spin.wait(40_000) for _ in range(20)]
    assert spun[-1] == 40_000


@pytest.mark.parametrize("most_ns", [0, -1])
def test_never(most_ns: int) -> None:
    spin = Spin(most_ns)
    assert [spin.wait(10) for _ in range(50)] == [0] * 50


def test_no_idle_cpu_no_spin() -> None:
    spin = Spin()
    assert [spin.wait(1000, idle=False) for _ in range(5)] == [0] * 5
    assert spin.core.gated == 5
    assert spin.wait(1000) == 1000


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25])
@pytest.mark.parametrize("rhythm_ns", [6_000, 20_000, 49_000])
def test_no_rhythm_burns_more_than_the_budget(share: float, rhythm_ns: int) -> None:
    """A peer that answers within every spin, as late as it can. Two rings of it share one budget."""
    budget = SpinBudget(share)
    budget.core.filled_at_ns = 0
    rings = [Spin(budget=budget.core) for _ in range(2)]
    spun = now_ns = 0
    while now_ns < 10_000 * MS:
        for spin in rings:
            spin.now_ns = now_ns
            took = spin.wait(rhythm_ns)
            spun += max(0, took - lib.PV_SPIN_FREE_NS)
            now_ns += rhythm_ns
    assert spun <= share * now_ns + lib.PV_SPIN_SAVED_NS + MS
    if share:
        assert spun > 0.5 * min(share, (rhythm_ns - 5000) / rhythm_ns) * now_ns, "and it may use what it has"
        assert budget.refused > 0 or share > (rhythm_ns - 5000) / rhythm_ns
    else:
        assert budget.refused > 0


def test_what_a_budget_saves_up_is_bounded() -> None:
    budget = SpinBudget(1.0)
    assert lib.pv_spin_budget_open(budget.core, budget.core.filled_at_ns + 3600 * 1000 * MS)
    assert budget.left_ns == lib.PV_SPIN_SAVED_NS
    lib.pv_spin_budget_spend(budget.core, 3 * lib.PV_SPIN_SAVED_NS)
    assert not lib.pv_spin_budget_open(budget.core, budget.core.filled_at_ns)
    assert "-40.0 ms left" in repr(budget)
    with pytest.raises(InvalidRequest, match="share"):
        SpinBudget(1.5)


def test_a_ring_spends_the_budget_of_its_peer() -> None:
    budget = SpinBudget(0.5)
    with ring_pair(wait="adaptive", budget=budget) as pair:
        pair.back.core.spin.most_ns = pair.back.core.spin.next_ns = MOST_NS
        before = budget.left_ns
        lib.pv_spin_end(ffi.addressof(pair.back.core, "spin"), 7000, False)
        assert budget.left_ns == before - 7000
    with ring_pair(wait="adaptive", budget=SpinBudget(0)) as pair:
        pair.back.take_batch(1, spin_ns=LEARNT)
        assert pair.back.statistics().spun_ns == 0


@pytest.mark.parametrize("wait", ["adaptive", "sleep"])
def test_each_way_of_waiting_finds_and_sleeps(wait: Wait) -> None:
    with ring_pair(wait=wait) as pair:
        for i in range(20):
            assert pair.back.wait(timeout_s=0.001) is WaitResult.TIMEOUT
            pair.front.push(requests(i, 1))
            assert pair.back.wait(timeout_s=10) is WaitResult.EVENT
            assert pair.back.take_batch()["id"].tolist() == [i]
            pair.back.push(answers(requests(i, 1)))
            assert len(pair.front.take_batch()) == 1
        statistics = pair.back.statistics()
        assert statistics.sleeps > 0
        if wait == "sleep":
            assert statistics.spun_ns == 0


def test_spinning_never_sleeps() -> None:
    with ring_pair(wait="spin") as pair:
        assert pair.back.wait(timeout_s=0.12) is WaitResult.TIMEOUT
        pair.front.push(requests(0, 1))
        assert pair.back.wait() is WaitResult.EVENT
        assert pair.back.statistics().sleeps == 0


def test_waits_for_an_event_learn_too() -> None:
    first, second = make_pair()
    (sending, sender), (waiter, receiver) = from_half(first), from_half(second)
    with sending, waiter:
        spin = waiter.core.spin
        assert waiter.wait(receiver, spin_ns=LEARNT, timeout_s=0.001) is WaitResult.TIMEOUT
        assert spin.spun_ns > 0 or spin.gated > 0
        for _ in range(20):
            sender.notify()
            assert waiter.wait(receiver, spin_ns=LEARNT, timeout_s=10) is WaitResult.EVENT
        for most_ns, budget in (0, None), (MOST_NS, SpinBudget(0)):
            waiter.set_spin(most_ns, budget)
            threading.Timer(0.01, sender.notify).start()
            sleeps = waiter.statistics().sleeps
            assert waiter.wait(receiver, spin_ns=LEARNT, timeout_s=10) is WaitResult.EVENT
            assert waiter.core.spin.spun_ns == 0
            assert waiter.statistics().sleeps > sleeps
        assert budget is not None
        assert budget.refused > 0 or waiter.core.spin.gated > 0
        with pytest.raises(InvalidRequest):
            waiter.set_spin(-1)


def test_what_is_no_way_of_waiting() -> None:
    for wrong in ({"wait": "doze"}, {"wait": "adaptive", "max_spin_ns": -1}):
        with pytest.raises(InvalidRequest):
            FrontRing.create(bytearray(4096), np.dtype("<u8"), np.dtype("<u8"), **wrong)  # type: ignore[arg-type]


def test_the_machine_is_asked_for_an_idle_cpu() -> None:
    assert lib.pv_spin_cpu_is_idle(1 << 62) in (0, 1)


# -- at which response to wake


def outstanding(pair: Pair, count: int) -> int:
    """So many requests on the way; the front end found nothing and asked: at which response it wants to be woken."""
    pair.front.push(requests(0, count))
    assert not pair.front.final_check()
    asked = (pair.header()[3] - pair.front.core.cons) % 2**32
    sent = pair.back.statistics().notifications_sent
    batch = answers(pair.back.take_batch())
    for i in range(count):
        pair.back.push(batch[i : i + 1])
        woken = pair.back.statistics().notifications_sent - sent
        assert woken == (i + 1 >= asked)
    return asked


@pytest.mark.parametrize(("count", "next_", "half"), [(1, 1, 1), (2, 1, 2), (3, 1, 2), (8, 1, 5), (31, 1, 16)])
def test_policies(count: int, next_: int, half: int) -> None:
    with ring_pair(start=NEAR_WRAP) as pair:
        assert outstanding(pair, count) == next_
    with ring_pair(start=2**32 - 3) as pair:
        pair.front.set_event_policy("half")
        assert outstanding(pair, count) == half


def test_half_with_nothing_outstanding_wakes_at_once() -> None:
    """Of nothing there is no half: an event index further ahead would be one for which nobody rings."""
    with ring_pair() as pair:
        pair.front.set_event_policy("half")
        assert not pair.front.final_check()
        assert pair.header()[3] == 1


@pytest.mark.parametrize(
    ("per_window", "threshold", "delay_us"),
    [(100, 60_000, 1000), (1200, 60_000, 100), (1200, 60_000, 0), (100_000, 60_000, 1000), (601, 60_000, 20)],
)
def test_coalescing_by_rate(per_window: int, threshold: int, delay_us: float) -> None:
    """1200 in 10 ms are 120,000 a second, twice the threshold: a delay of 2 x 100 us, in which 24 come. Never more than
    are outstanding."""
    with ring_pair(start=NEAR_WRAP) as pair:
        core = pair.front.core
        pair.front.set_event_policy("rate", threshold_per_s=threshold, delay_us=delay_us)
        start_ns = core.window_start_ns = lib.pv_now_ns() - 10 * MS
        core.consumed += per_window
        asked = outstanding(pair, 30)
        rate = per_window * 1e9 / (core.window_start_ns - start_ns)
        come = rate * delay_us * 1e-6 * rate / threshold if rate > threshold else 1
        assert asked == pytest.approx(min(30, max(1, int(come))), abs=1e-9)


def test_a_back_end_wakes_at_the_next_request() -> None:
    """It cannot know that more will come."""
    with ring_pair() as pair:
        for policy in (1, 2):
            assert lib.pv_ring_set_event_policy(pair.back.core, policy, 1000, 1000) < 0
        for wrong in ({"threshold_per_s": 0}, {"delay_us": -1.0}):
            with pytest.raises(InvalidRequest):
                pair.front.set_event_policy("rate", **wrong)  # type: ignore[arg-type]


# -- batches in place, and pushes that look later


def test_filling_in_place() -> None:
    with ring_pair(start=2**32 - 5) as pair:
        size, index = pair.front.size, (2**32 - 5) % pair.front.size
        slots = pair.front.reserve(100)
        assert len(slots) == size - index == 5, "up to the end of the ring"
        slots[:] = requests(0, 5)
        assert pair.front.free == size, "nothing is sent yet"
        assert pair.front.commit(5) == 5
        slots = pair.front.reserve(3)
        slots[:] = requests(5, 3)
        assert pair.front.commit(2) == 2
        assert np.array_equal(pair.back.take_batch(), requests(0, 7))
        out = pair.back.reserve(7)
        assert out.strides == (pair.front.entry_bytes,)
        out[:] = answers(requests(0, 7))[: len(out)]
        pair.back.commit(len(out))
        assert np.array_equal(pair.front.take_batch(), answers(requests(0, len(out))))
        with pytest.raises(InvalidRequest, match="reserved"):
            pair.front.commit(size + 1)
        pair.front.push(requests(0, pair.front.free))
        assert pair.front.full
        assert len(pair.front.reserve(1)) == 0
        del slots, out


@pytest.mark.parametrize("closing", ["notify", "push"])
def test_what_was_pushed_quietly_is_looked_at_later(closing: str) -> None:
    with ring_pair(start=NEAR_WRAP) as pair:
        assert not pair.back.final_check()
        for i in range(3):
            assert pair.front.push_quietly(requests(i, 1)) == 1
        assert pair.front_port.statistics().sent == 0
        if closing == "push":
            pair.front.push(requests(3, 1))
        else:
            pair.front.notify()
            pair.front.notify()
        assert pair.front_port.statistics().sent == 1, "the event index was passed by the first of them"
        assert pair.back.unconsumed == (4 if closing == "push" else 3)


# -- one request at a time


def test_exchange_in_one_call() -> None:
    with ring_pair(start=2**32 - 2) as pair:
        stop = threading.Event()

        def serve() -> None:
            batch = np.zeros(4, REQUEST)
            while not stop.is_set():
                if n := pair.back.take(batch, spin_ns=MS):
                    pair.back.push(answers(batch[:n]))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            request, out = requests(5, 1), np.zeros(1, RESPONSE)
            for i in range(200):
                request[:] = requests(i, 1)
                assert pair.front.exchange(request, out, spin_ns=MS if i % 2 else 0, timeout_s=30) is out
                assert np.array_equal(out, answers(requests(i, 1)))
            response = pair.front.exchange(requests(7, 1)[0], timeout_s=30)
            assert response is not None
            assert np.array_equal(response, answers(requests(7, 1)))
        finally:
            stop.set()
            thread.join()


def test_exchange_that_is_not_answered() -> None:
    with ring_pair() as pair:
        assert pair.front.exchange(requests(0, 1), spin_ns=LEARNT, timeout_s=0.01) is None
        assert pair.front.outstanding == 1
        with pytest.raises(InvalidRequest, match="outstanding"):
            pair.front.exchange(requests(1, 1))
        pair.back.push(answers(pair.back.take_batch()))
        assert len(pair.front.take_batch()) == 1
        for empty in (requests(0, 0), requests(0, 1)):
            with pytest.raises(InvalidRequest, match="needs"):
                pair.front.exchange(empty, np.zeros(0, RESPONSE))
        assert lib.pv_ring_exchange(pair.back.core, ffi.NULL, ffi.NULL, 0) < 0
