# SPDX-License-Identifier: MIT
"""Using the two ends: batches of any kind, waiting, exchange, statistics, closing."""

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from paravirt.errors import Closed, InvalidRequest
from paravirt.ring._core import ffi
from paravirt.ring.event import EventPort, EventWaiter, WaitResult, init_inbox
from paravirt.ring.memory import PAGE_BYTES, Mapping, map_new
from paravirt.ring.shared import BackRing, FrontRing

from .support import DEADLINE_S, REQUEST, RESPONSE, Pair, answers, requests, ring_pair


def as_bytes(batch: Any) -> Any:
    return batch.tobytes()


def as_byte_array(batch: Any) -> Any:
    return np.frombuffer(batch.tobytes(), np.uint8)


@pytest.mark.parametrize(
    "kind", [lambda batch: batch, as_bytes, as_byte_array, lambda batch: memoryview(as_bytes(batch))]
)
def test_batches_of_any_kind(kind: Any) -> None:
    with ring_pair() as pair:
        assert pair.front.push(kind(requests(5, 3))) == 3
        buffer = bytearray(4 * REQUEST.itemsize)
        assert pair.back.take(buffer) == 3
        taken = np.frombuffer(buffer, REQUEST)
        assert np.array_equal(taken[:3], requests(5, 3))
        assert not taken[3]["words"].any()


def test_arrays_are_told_apart_however_many_there_are() -> None:
    """More arrays than are remembered, each used twice, mixed with buffers that are not remembered."""
    with ring_pair() as pair:
        arrays = [requests(i, 1) for i in range(20)]
        for _ in range(2):
            for i, one in enumerate(arrays):
                pair.front.push(one)
                pair.front.push(requests(100 + i, 1).tobytes())
                pair.front.push(one)
                assert pair.back.take_batch()["id"].tolist() == [i, 100 + i, i]
                pair.back.push(answers(requests(0, 3)))
                pair.front.take_batch()


def test_parts_of_a_batch() -> None:
    with ring_pair() as pair:
        batch = requests(0, 40)
        assert pair.front.push(batch, 5) == 5
        assert pair.front.push(batch, 2, start=30) == 2
        assert pair.front.push(batch, start=38) == 2
        assert pair.front.push(batch, 0) == 0
        assert pair.front.push(batch) == 32 - 9
        out = np.zeros(40, REQUEST)
        assert pair.back.take(out, 9) == 9
        assert out["id"][:9].tolist() == [0, 1, 2, 3, 4, 30, 31, 38, 39]
        for count, start in ((41, 0), (1, 40), (-1, 0), (1, -1), (None, 41)):
            with pytest.raises(InvalidRequest, match="not within"):
                pair.front.push(batch, count, start)
        with pytest.raises(InvalidRequest, match="do not fit"):
            pair.back.take(out, 41)


@pytest.mark.parametrize(
    "wrong", [b"x", bytes(113), np.zeros(7, np.uint8), np.zeros(14, np.uint64), np.zeros(112, RESPONSE)]
)
def test_a_batch_of_something_else(wrong: Any) -> None:
    with ring_pair() as pair:
        with pytest.raises(InvalidRequest, match="batch"):
            pair.front.push(wrong)


def test_arrays_that_cannot_be_used() -> None:
    with ring_pair() as pair:
        with pytest.raises(InvalidRequest, match="not a batch"):
            pair.front.push(requests(0, 8)[::2])
        pair.front.push(requests(0, 1))
        with pytest.raises(InvalidRequest, match="not a batch"):
            pair.back.take(bytes(112))
        constant = np.zeros(1, REQUEST)
        constant.flags.writeable = False
        with pytest.raises(InvalidRequest, match="not a batch"):
            pair.back.take(constant)


def test_wait_returns_at_once_when_there_is_work() -> None:
    with ring_pair() as pair:
        assert pair.back.wait(timeout_s=0) is WaitResult.TIMEOUT
        pair.front.push(requests(0, 1))
        assert pair.back.wait() is WaitResult.EVENT
        assert pair.back.wait() is WaitResult.EVENT, "until it is taken"
        pair.back_waiter.kick()
        assert pair.back.wait() is WaitResult.KICKED, "work does not hide a kick"
        assert pair.back.wait() is WaitResult.EVENT


def test_wait_ends_by_time_spinning_or_sleeping() -> None:
    with ring_pair() as pair:
        assert pair.back.wait(timeout_s=0.05) is WaitResult.TIMEOUT
        assert pair.back.statistics().sleeps == 1
        assert pair.back.wait(spin_ns=10**12, timeout_s=0.05) is WaitResult.TIMEOUT
        assert pair.back.statistics().sleeps == 1
        assert pair.back.statistics().spins == 0


def test_a_ring_without_a_port_spins() -> None:
    memory = bytearray(4096)
    with FrontRing.create(memory, REQUEST, RESPONSE) as front, BackRing.attach(memory, REQUEST, RESPONSE) as back:
        assert back.wait(timeout_s=0.05) is WaitResult.TIMEOUT
        thread = threading.Thread(target=lambda: front.push(requests(0, 1)))
        thread.start()
        assert back.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
        thread.join()
        assert back.take(np.zeros(1, REQUEST), spin_ns=1000) == 1
        assert back.take(np.zeros(1, REQUEST), spin_ns=1000) == 0


def serve(pair: Pair, count: int, **wait: Any) -> threading.Thread:
    """A thread that answers `count` requests."""

    def run() -> None:
        done = 0
        while done < count:
            batch = pair.back.take_batch()
            if len(batch):
                pair.back.push(answers(batch))
                done += len(batch)
            else:
                pair.back.wait(**wait)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("spin_ns", [0, 20_000])
def test_exchange(spin_ns: int) -> None:
    with ring_pair(start=2**32 - 20) as pair:
        thread = serve(pair, 50, spin_ns=spin_ns)
        for i in range(50):
            request = requests(i, 1)
            response = pair.front.exchange(request if i % 2 else request[0], spin_ns=spin_ns)
            assert response == answers(request)
        thread.join(DEADLINE_S)


def test_exchange_that_cannot_be() -> None:
    with ring_pair() as pair:
        assert pair.front.exchange(requests(0, 1), timeout_s=0.05) is None
        with pytest.raises(InvalidRequest, match="outstanding"):
            pair.front.exchange(requests(1, 1))


def test_every_counter_is_what_was_counted() -> None:
    """A dialogue in one thread, so that each decision is known."""
    with ring_pair() as pair:
        front, back = pair.front, pair.back
        front.push(requests(0, 4))  # the first batch always notifies: req_event is 1
        assert back.wait() is WaitResult.EVENT  # one event, with work
        front.push(requests(4, 6))  # the back end did not ask
        assert len(back.take_batch()) == 10
        assert back.wait(timeout_s=0.05) is WaitResult.TIMEOUT  # asks, sleeps once
        front.push(requests(10, 1))  # asked
        assert len(back.take_batch()) == 1  # taken before the event is: not spurious, it was news
        assert back.wait(timeout_s=0.05) is WaitResult.TIMEOUT  # event 2, sleeps once
        pair.front_port.notify()  # an event for nothing
        assert back.wait(timeout_s=0.05) is WaitResult.TIMEOUT  # event 3, spurious, sleeps once
        back.push(answers(requests(0, 11)))  # notifies: rsp_event is 1
        assert front.wait() is WaitResult.EVENT
        assert len(front.take_batch()) == 11

        one, two = front.statistics(), back.statistics()
        assert (one.requests, one.responses, one.batches) == (11, 11, 3)
        assert (one.notifications_sent, one.notifications_suppressed) == (2, 1)
        assert (one.events, one.notifications_spurious, one.waits, one.spins, one.sleeps) == (1, 0, 0, 0, 0)
        assert one.max_outstanding == 11
        assert (two.requests, two.responses, two.batches) == (11, 11, 1)
        assert (two.notifications_sent, two.notifications_suppressed) == (1, 0)
        assert (two.events, two.notifications_spurious, two.waits, two.spins, two.sleeps) == (3, 1, 3, 0, 3)
        assert two.max_outstanding == 11
        assert pair.front_port.statistics().sent == 3
        assert pair.back_waiter.statistics().sleeps == 3


def test_the_spin_counter() -> None:
    with ring_pair() as pair:
        thread = threading.Thread(target=lambda: [pair.front.push(requests(0, 1)), pair.front.wait()])
        thread.start()
        assert pair.back.wait(spin_ns=DEADLINE_S * 10**9) is WaitResult.EVENT
        statistics = pair.back.statistics()
        assert statistics.spins == statistics.waits <= 1
        assert statistics.sleeps == 0
        pair.back.push(answers(pair.back.take_batch()))
        thread.join(DEADLINE_S)


def test_pushing_and_taking_from_two_threads() -> None:
    total = 20_000
    with ring_pair(pages=2, start=2**32 - 5000) as pair:
        server = serve(pair, total)
        room = threading.Semaphore(0)

        def push() -> None:
            sent = 0
            while sent < total:
                sent += (n := pair.front.push(requests(sent, min(64, total - sent))))
                if n == 0:
                    assert room.acquire(timeout=DEADLINE_S)

        pusher = threading.Thread(target=push, daemon=True)
        pusher.start()
        got = 0
        while got < total:
            batch = pair.front.take_batch()
            if len(batch) == 0:
                assert pair.front.wait(timeout_s=DEADLINE_S) is WaitResult.EVENT
                continue
            assert np.array_equal(batch, answers(requests(got, len(batch))))
            got += len(batch)
            room.release()
        pusher.join(DEADLINE_S)
        server.join(DEADLINE_S)
        assert pair.front.outstanding == 0


def test_a_push_learns_a_changed_binding() -> None:
    """The messages are published first; then the notification takes the slow way, once."""
    generation = ffi.new("uint32_t *", 1)
    memory = bytearray(4096)
    fd, inbox = map_new("memfd", PAGE_BYTES)
    init_inbox(inbox)
    asked = []
    with EventWaiter(generation) as waiter, EventPort(waiter, None, 0) as port:

        def ask() -> None:
            asked.append(port.statistics().sent)
            port.set_peer(Mapping(fd, PAGE_BYTES), 9, -1, generation[0])

        port.on_stale = ask
        with FrontRing.create(memory, REQUEST, RESPONSE, port=port) as front:
            generation[0] = 2
            assert front.push(requests(0, 3)) == 3
            assert front.push(requests(3, 3)) == 3
            assert front.statistics().notifications_sent == 1
    assert asked == [0]
    assert inbox.view[192 : 192 + 8] == (1 << 9).to_bytes(8, "little"), "pending[0] of the new inbox"
    inbox.close()
    os.close(fd)


def test_use_after_close() -> None:
    with ring_pair() as pair:
        for end, batch in ((pair.front, requests(0, 1)), (pair.back, answers(requests(0, 1)))):
            end.push(requests(0, 1)) if end is pair.front else end.take_batch()
            assert not end.closed
            end.close()
            end.close()
            assert end.closed
            calls = (
                lambda e=end, b=batch: e.push(b),
                end.take_batch,
                end.wait,
                end.poll,
                end.final_check,
                end.statistics,
            )
            for call in calls:
                with pytest.raises(Closed, match="closed"):
                    call()
            with pytest.raises(Closed):
                _ = end.outstanding
            assert "closed" in repr(end)


def test_a_ring_outlives_its_event_channel() -> None:
    """In whatever order things are closed: nothing is sent any more, and a wait says why it cannot be."""
    with ring_pair() as pair:
        pair.back_waiter.close()
        pair.front_port.close()
        assert pair.front.push(requests(0, 1)) == 1
        assert len(pair.back.take_batch()) == 1
        assert pair.back.push(answers(requests(0, 1))) == 1
        for end in (pair.front, pair.back):
            with pytest.raises(Closed, match="event channel"):
                end.wait()


def test_memory_is_free_after_close() -> None:
    memory = bytearray(4096)
    front = FrontRing.create(memory, REQUEST, RESPONSE)
    with pytest.raises(BufferError):
        memory.append(0)
    front.push(requests(0, 1))
    front.close()
    memory.append(0)


def test_a_forked_child_is_refused() -> None:
    script = """
import os
import signal
from paravirt.errors import Closed
from tests.ring.support import ring_pair, requests, answers
def refused(call):
    try:
        call()
    except Closed as error:
        return "parent" in str(error)
with ring_pair() as pair:
    pair.front.push(requests(0, 1))
    child = os.fork()
    if child == 0:
        front, back = pair.front, pair.back
        calls = [lambda: front.push(requests(0, 1)), lambda: back.push(answers(requests(0, 1)))]
        for end in (front, back):
            calls += [end.take_batch, end.wait, end.poll, end.final_check, end.statistics, lambda e=end: e.outstanding]
        good = all([refused(call) for call in calls])
        with ring_pair() as fresh:
            fresh.front.push(requests(0, 1))
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(pair.back.take_batch()) == 1
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=DEADLINE_S, cwd=root)


@pytest.mark.parametrize("port", [True, False])
def test_a_signal_is_handled_in_a_long_spin(port: bool) -> None:
    class Enough(Exception):
        pass

    def handle(number: int, frame: object) -> None:
        raise Enough

    with ring_pair() as pair, BackRing.attach(pair.mapping, REQUEST, RESPONSE) as without_port:
        former = signal.signal(signal.SIGALRM, handle)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with pytest.raises(Enough):
                (pair.back if port else without_port).wait(spin_ns=DEADLINE_S * 10**9)
        finally:
            signal.signal(signal.SIGALRM, former)


def test_a_long_spin_ends_in_sleep() -> None:
    with ring_pair() as pair:
        results: list[WaitResult] = []
        thread = threading.Thread(target=lambda: results.append(pair.back.wait(spin_ns=60_000_000)), daemon=True)
        thread.start()
        while not pair.back_waiter.statistics().sleeps:
            os.sched_yield()
        pair.back_waiter.kick()
        thread.join(DEADLINE_S)
        assert results == [WaitResult.KICKED]
        statistics = pair.back.statistics()
        assert (statistics.waits, statistics.spins, statistics.sleeps) == (1, 0, 1)
