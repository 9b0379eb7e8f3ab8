# SPDX-License-Identifier: MIT
"""Both ends against a model of Xen's ring.h in plain Python, by hypothesis' stateful testing."""

from contextlib import ExitStack
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paravirt.ring.waiting import offer_fence

from .support import REQUEST, RESPONSE, Pair, answers, requests, ring_pair

COUNT = 2**32


class ModelEnd:
    """One direction's producer words in ring.h's terms; all arithmetic modulo 2**32."""

    def __init__(self, start: int) -> None:
        self.prod = start
        self.event = (start + 1) % COUNT
        self.cons = start
        self.queue: list[tuple[int, ...]] = []
        self.unchecked = 0

    def push_quietly(self, count: int) -> None:
        """RING_PUSH_..., whose look at the event index is made up for by the next one."""
        self.prod = (self.prod + count) % COUNT
        self.unchecked += count

    def push_and_check_notify(self, count: int) -> bool:
        """RING_PUSH_..._AND_CHECK_NOTIFY."""
        old, self.prod = (self.prod - self.unchecked) % COUNT, (self.prod + count) % COUNT
        self.unchecked = 0
        return (self.prod - self.event) % COUNT < (self.prod - old) % COUNT

    def final_check(self, ahead: int = 1) -> bool:
        """RING_FINAL_CHECK_FOR_..."""
        if self.queue:
            return True
        self.event = (self.cons + ahead) % COUNT
        return False

    def take(self, most: int) -> list[tuple[int, ...]]:
        taken, self.queue = self.queue[:most], self.queue[most:]
        self.cons = (self.cons + len(taken)) % COUNT
        return taken


def as_tuples(batch: Any) -> list[tuple[int, ...]]:
    return [tuple(np.frombuffer(message.tobytes(), "<u8").tolist()) for message in batch]


class RingMachine(RuleBasedStateMachine):
    """Any order of pushes, takes and final checks of both ends, of any size, any index at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.next_id = 0
        self.unanswered: list[Any] = []

    @initialize(
        start=st.integers(COUNT - 100, COUNT - 1) | st.just(0),
        pages=st.sampled_from([1, 2, 3, 16]),
        fence=st.sampled_from(["full", "process", "host"] if offer_fence("host") else ["full"]),
        half=st.booleans(),
    )
    def begin(self, start: int, pages: int, fence: str, half: bool) -> None:
        self.pair: Pair = self.stack.enter_context(ring_pair(pages, start=start, fence=fence))
        self.half = half
        self.pair.front.set_event_policy("half" if half else "next")
        self.size = self.pair.front.size
        self.out, self.back = ModelEnd(start), ModelEnd(start)
        self.notified = [0, 0]
        self.batches = [0, 0]
        self.quiet = 0

    def teardown(self) -> None:
        self.stack.close()

    def outstanding(self) -> int:
        return (self.out.prod - self.back.cons) % COUNT

    @rule(count=st.integers(0, 70))
    def push_requests(self, count: int) -> None:
        batch = requests(self.next_id, count)
        fitting = min(count, self.size - self.outstanding())
        assert self.pair.front.push(batch) == fitting
        self.next_id += fitting
        if fitting:
            self.out.queue += as_tuples(batch[:fitting])
            self.notified[0] += self.out.push_and_check_notify(fitting)
            self.batches[0] += 1

    @rule(count=st.integers(1, 70))
    def push_requests_quietly(self, count: int) -> None:
        batch = requests(self.next_id, count)
        fitting = min(count, self.size - self.outstanding())
        assert self.pair.front.push_quietly(batch) == fitting
        self.next_id += fitting
        self.out.queue += as_tuples(batch[:fitting])
        if fitting:
            self.out.push_quietly(fitting)
            self.batches[0] += 1
            self.quiet += 1

    @rule()
    def look_for_all(self) -> None:
        if self.out.unchecked:
            self.quiet -= 1
            self.notified[0] += self.out.push_and_check_notify(0)
        self.pair.front.notify()

    @rule(count=st.integers(1, 70))
    def fill_requests_in_place(self, count: int) -> None:
        slots = self.pair.front.reserve(count)
        till_end = self.size - self.out.prod % self.size
        assert len(slots) == min(count, till_end, self.size - self.outstanding())
        batch = requests(self.next_id, len(slots))
        slots[:] = batch
        assert self.pair.front.commit(len(slots)) == len(slots)
        self.next_id += len(slots)
        self.out.queue += as_tuples(batch)
        if len(slots):
            self.notified[0] += self.out.push_and_check_notify(len(slots))
            self.batches[0] += 1

    @rule(most=st.integers(0, 70))
    def take_requests(self, most: int) -> None:
        buffer = np.zeros(most, REQUEST)
        n = self.pair.back.take(buffer)
        assert as_tuples(buffer[:n]) == self.out.take(most)
        self.unanswered += list(answers(buffer[:n]))

    @precondition(lambda self: self.unanswered)
    @rule(count=st.integers(1, 70), data=st.data())
    def push_responses(self, count: int, data: st.DataObject) -> None:
        order = data.draw(st.permutations(range(len(self.unanswered))))[:count]
        batch = np.array([self.unanswered[i] for i in order], RESPONSE)
        self.unanswered = [one for i, one in enumerate(self.unanswered) if i not in order]
        assert self.pair.back.push(batch) == len(batch)
        self.back.queue += as_tuples(batch)
        self.notified[1] += self.back.push_and_check_notify(len(batch))
        self.batches[1] += 1

    @rule(most=st.integers(0, 70))
    def take_responses(self, most: int) -> None:
        batch = self.pair.front.take_batch(most)
        assert as_tuples(batch) == self.back.take(min(most, self.size))

    @rule()
    def front_final_check(self) -> None:
        unanswered = (self.out.prod - self.back.cons) % COUNT
        ahead = unanswered // 2 + 1 if self.half and unanswered > 1 else 1
        assert self.pair.front.final_check() == self.back.final_check(ahead)

    @rule()
    def back_final_check(self) -> None:
        assert self.pair.back.final_check() == self.out.final_check()

    @invariant()
    def words_and_counts_agree(self) -> None:
        front, back = self.pair.front, self.pair.back
        assert self.pair.header() == [self.out.prod, self.out.event, self.back.prod, self.back.event]
        assert front.poll() == bool(self.back.queue)
        assert back.poll() == bool(self.out.queue)
        assert front.outstanding == self.outstanding()
        assert front.free == self.size - self.outstanding()
        assert back.outstanding == len(self.unanswered)
        assert front.unconsumed == len(self.back.queue)
        assert back.unconsumed == len(self.out.queue)
        for end, notified, batches, quiet in zip(
            (front, back), self.notified, self.batches, (self.quiet, 0), strict=True
        ):
            statistics = end.statistics()
            assert statistics.batches == batches
            assert statistics.notifications_sent == notified
            assert statistics.notifications_suppressed == batches - notified - quiet


RingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRing = RingMachine.TestCase
