# SPDX-License-Identifier: MIT
"""A peer that lies: its indexes, in each direction, and rings that stand in the wrong state."""

import numpy as np
import pytest

from paravirt.errors import InvalidRequest, PeerError
from paravirt.ring.event import WaitResult
from paravirt.ring.shared import BackRing, FrontRing

from .support import NEAR_WRAP, REQUEST, RESPONSE, Pair, answers, requests, ring_pair

REQ_PROD, RSP_PROD = 0, 2


def dead(pair: Pair, end: FrontRing | BackRing) -> None:
    """From now on every call says so, whatever the shared words are later."""
    batch = requests(0, 1) if end is pair.front else answers(requests(0, 1))
    pair.set_header(REQ_PROD, NEAR_WRAP)
    pair.set_header(RSP_PROD, NEAR_WRAP)
    for call in (lambda: end.push(batch), end.take_batch, end.wait, end.poll, end.final_check):
        with pytest.raises(PeerError, match="dead"):
            call()
    assert "dead" in repr(end)


@pytest.mark.parametrize("too_far", [33, 34, 1000, 2**31, 2**32 - 1])
def test_request_producer_out_of_range(too_far: int) -> None:
    with ring_pair(start=NEAR_WRAP) as pair:
        pair.set_header(REQ_PROD, NEAR_WRAP + too_far)
        with pytest.raises(PeerError, match="producer index"):
            pair.back.take_batch()
        dead(pair, pair.back)


@pytest.mark.parametrize("far", [1, 31, 32])
def test_request_producer_just_in_range(far: int) -> None:
    with ring_pair(start=NEAR_WRAP) as pair:
        pair.set_header(REQ_PROD, NEAR_WRAP + far)
        assert len(pair.back.take_batch()) == far


def test_unanswered_requests_bound_the_producer() -> None:
    """RING_REQUEST_PROD_OVERFLOW counts from the responses: 20 taken and unanswered leave room for 12."""
    with ring_pair() as pair:
        pair.front.push(requests(0, 20))
        assert len(pair.back.take_batch()) == 20
        pair.set_header(REQ_PROD, 32)
        assert pair.back.poll()
        pair.set_header(REQ_PROD, 33)
        with pytest.raises(PeerError):
            pair.back.take_batch()


@pytest.mark.parametrize("taken", [0, 3, 5])
def test_request_producer_that_goes_back(taken: int) -> None:
    with ring_pair() as pair:
        pair.front.push(requests(0, 5))
        pair.back.take_batch(taken)
        assert pair.back.poll() == (taken < 5)
        pair.set_header(REQ_PROD, 2)
        with pytest.raises(PeerError):
            pair.back.take_batch(20)
        dead(pair, pair.back)


@pytest.mark.parametrize("too_far", [1, 2, 33, 2**31, 2**32 - 1])
def test_response_producer_without_requests(too_far: int) -> None:
    with ring_pair(start=NEAR_WRAP) as pair:
        pair.set_header(RSP_PROD, NEAR_WRAP + too_far)
        with pytest.raises(PeerError, match="producer index"):
            pair.front.take_batch()
        dead(pair, pair.front)


def test_responses_may_not_pass_the_requests() -> None:
    """Within the size of the ring, and still more than was asked: 4 requests, 5 responses."""
    with ring_pair(start=NEAR_WRAP) as pair:
        pair.front.push(requests(0, 4))
        pair.set_header(RSP_PROD, NEAR_WRAP + 4)
        assert len(pair.front.take_batch(3)) == 3
        pair.set_header(RSP_PROD, NEAR_WRAP + 5)
        with pytest.raises(PeerError):
            pair.front.take_batch()
        dead(pair, pair.front)


def test_only_the_ring_dies() -> None:
    with ring_pair() as pair, ring_pair() as other:
        pair.set_header(REQ_PROD, 99)
        with pytest.raises(PeerError):
            pair.back.take_batch()
        other.front.push(requests(0, 1))
        assert len(other.back.take_batch()) == 1
        again = FrontRing.create(pair.mapping, REQUEST, RESPONSE)
        again.push(requests(7, 1))
        with pytest.raises(PeerError):
            pair.back.poll()
        again.close()


def test_own_words_are_never_read_back() -> None:
    """A peer that overwrites our own producer and event words disturbs only itself."""
    with ring_pair() as pair:
        pair.front.push(requests(0, 3))
        pair.set_header(REQ_PROD, 1_000_000)
        pair.set_header(3, 77)
        pair.front.push(requests(3, 3))
        assert pair.header()[0] == 6
        assert pair.back.take_batch()["id"].tolist() == [0, 1, 2, 3, 4, 5]


def test_more_responses_than_requests_is_the_callers_fault() -> None:
    with ring_pair() as pair:
        pair.front.push(requests(0, 2))
        batch = answers(pair.back.take_batch())
        with pytest.raises(InvalidRequest, match="more responses"):
            pair.back.push(np.concatenate([batch, batch]))
        assert pair.back.push(batch) == 2, "the ring is still good"


@pytest.mark.parametrize("outstanding", [1, 5, 32])
def test_attaching_with_requests_outstanding_is_refused(outstanding: int) -> None:
    with ring_pair(start=NEAR_WRAP) as pair:
        pair.front.push(requests(0, outstanding))
        with pytest.raises(PeerError, match="not idle"):
            BackRing.attach(pair.mapping, REQUEST, RESPONSE)
        with pytest.raises(PeerError, match="not idle"):
            FrontRing.attach(pair.mapping, REQUEST, RESPONSE)


def test_the_crash_that_attaching_would_not_survive() -> None:
    """A back end took three requests, answered the last one first, and died: a successor at rsp_prod would find two
    requests, one of them overwritten by the response. It is refused; a new ring and re-issue is the way."""
    with ring_pair() as pair:
        pair.front.push(requests(0, 3))
        taken = pair.back.take_batch()
        pair.back.push(answers(taken[2:]))
        pair.back.close()
        assert pair.header()[RSP_PROD] == 1
        with pytest.raises(PeerError, match="new one"):
            BackRing.attach(pair.mapping, REQUEST, RESPONSE)
        assert pair.front.take_batch()["id"].tolist() == [2]

        with FrontRing.create(pair.mapping, REQUEST, RESPONSE) as front:
            with BackRing.attach(pair.mapping, REQUEST, RESPONSE) as back:
                front.push(requests(0, 2))
                assert back.take_batch()["id"].tolist() == [0, 1]


def test_an_idle_ring_can_be_joined_at_its_index() -> None:
    with ring_pair(start=NEAR_WRAP) as pair:
        for _ in range(3):
            pair.front.push(requests(0, 20))
            pair.back.push(answers(pair.back.take_batch()))
            pair.front.take_batch()
        with FrontRing.attach(pair.mapping, REQUEST, RESPONSE) as front:
            with BackRing.attach(pair.mapping, REQUEST, RESPONSE) as back:
                front.push(requests(9, 1))
                assert back.take_batch()["id"].tolist() == [9]
                back.push(answers(requests(9, 1)))
                assert front.take_batch() == answers(requests(9, 1))


def test_joining_at_an_index_that_is_remembered() -> None:
    with ring_pair(start=NEAR_WRAP) as pair:
        pair.front.push(requests(0, 30))
        pair.back.push(answers(pair.back.take_batch()))
        pair.front.take_batch()
        for wrong in (NEAR_WRAP, NEAR_WRAP + 29, NEAR_WRAP + 31, 0):
            with pytest.raises(PeerError, match=f"not idle at index {wrong}"):
                BackRing.attach(pair.mapping, REQUEST, RESPONSE, index=wrong)
        with BackRing.attach(pair.mapping, REQUEST, RESPONSE, index=NEAR_WRAP + 30) as back:
            pair.front.push(requests(30, 1))
            assert back.take_batch()["id"].tolist() == [30]
            with pytest.raises(PeerError, match="not idle"):
                FrontRing.attach(pair.mapping, REQUEST, RESPONSE, index=NEAR_WRAP + 30)


def test_what_stands_in_the_slots_before_they_are_committed_is_the_callers() -> None:
    """A peer that moves our words, or writes into free slots, does not change which slots are given and sent."""
    with ring_pair(start=NEAR_WRAP) as pair:
        slots = pair.front.reserve(4)
        pair.set_header(REQ_PROD, 12345)
        slots[:] = requests(0, 4)
        pair.front.commit(4)
        assert pair.header()[REQ_PROD] == NEAR_WRAP + 4
        assert pair.back.take_batch()["id"].tolist() == [0, 1, 2, 3]
        del slots


@pytest.mark.parametrize("where", [0, 1, 2**31, 2**32 - 1])
def test_a_peer_that_lies_about_its_cpu_costs_a_spin(where: int) -> None:
    with ring_pair(fence="process", wait="adaptive") as pair:
        for offset in (56, 60):
            pair.mapping.view[offset : offset + 4] = where.to_bytes(4, "little")
        assert pair.back.wait(timeout_s=0.001) is WaitResult.TIMEOUT
        pair.front.push(requests(0, 1))
        assert pair.back.wait(timeout_s=10) is WaitResult.EVENT
        assert len(pair.back.take_batch()) == 1


@pytest.mark.parametrize("event", [0, 1, NEAR_WRAP - 1, 2**31, 2**32 - 1])
def test_any_event_index_costs_one_notification_at_most(event: int) -> None:
    with ring_pair(start=NEAR_WRAP) as pair:
        pair.set_header(1, event)
        for i in range(32):
            pair.front.push_quietly(requests(i, 1))
        pair.front.notify()
        assert pair.front_port.statistics().sent == ((event - NEAR_WRAP - 1) % 2**32 < 32)
