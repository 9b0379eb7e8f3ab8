# SPDX-License-Identifier: MIT
"""Single messages over a ring: none lost, none sent twice, in order, whatever is full or empty."""

import threading
from collections.abc import Callable

import numpy as np
import pytest

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.ring.buffered import BufferedMessages

from .support import DEADLINE_S, NEAR_WRAP, REQUEST, RESPONSE, Pair, answers, requests, ring_pair


def request(number: int) -> bytes:
    return requests(number, 1).tobytes()


def response(number: int) -> bytes:
    return answers(requests(number, 1)).tobytes()


def number_of(message: bytes | None) -> int:
    assert message is not None
    return int.from_bytes(message[:8], "little")


def serve(pair: Pair, most: int) -> Callable[[], None]:
    """Answers so many requests in a thread; what is returned waits for its end."""

    def run() -> None:
        messages = BufferedMessages(pair.back, batch=7)
        for i, each in enumerate(messages, 1):
            messages.put(answers(np.frombuffer(each, REQUEST)).tobytes())
            if i == most:
                messages.flush()
                return

    thread = threading.Thread(target=run)
    thread.start()

    def join() -> None:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()

    return join


def test_nothing_is_sent_before_a_batch_is_full_or_flushed() -> None:
    with ring_pair() as pair:
        messages = BufferedMessages(pair.front, batch=4)
        for number in range(3):
            messages.put(request(number))
        assert not pair.back.poll()
        messages.put(bytearray(request(3)))
        assert pair.back.take_batch()["id"].tolist() == [0, 1, 2, 3]
        messages.put(memoryview(request(4)))
        assert messages.flush()
        assert pair.back.take_batch().tobytes() == request(4)
        assert messages.flush()
        assert not pair.back.poll()


@pytest.mark.parametrize("batch", [1, 3, 1000])
@pytest.mark.parametrize("start", [0, NEAR_WRAP])
def test_every_request_is_answered(batch: int, start: int) -> None:
    count = 2000
    with ring_pair(start=start) as pair:
        join = serve(pair, count)
        messages = BufferedMessages(pair.front, batch=batch)
        for number in range(count):  # far more than fit: responses that come meanwhile are kept
            messages.put(request(number))
        assert [messages.get(DEADLINE_S) for _ in range(count)] == [response(number) for number in range(count)]
        assert messages.get_nowait() is None
        join()


def test_waiting_sends_what_was_collected() -> None:
    with ring_pair() as pair:
        join = serve(pair, 1)
        messages = BufferedMessages(pair.front)
        messages.put(request(5))
        assert messages.get(DEADLINE_S) == response(5)
        join()


def test_iterating_and_getting_are_one_stream() -> None:
    with ring_pair() as pair:
        pair.front.push(requests(0, 6))
        messages = BufferedMessages(pair.back)
        stream = iter(messages)
        assert [number_of(next(stream)), number_of(messages.get()), number_of(next(stream))] == [0, 1, 2]
        assert [number_of(messages.get_nowait()) for _ in range(3)] == [3, 4, 5]
        assert messages.get(0) is None
        assert messages.get(0.01) is None


def test_one_way() -> None:
    count = 1000
    with ring_pair() as pair:
        received: list[bytes] = []

        def receive() -> None:
            for message in BufferedMessages(pair.back, one_way=True):
                received.append(message)
                if len(received) == count:
                    return

        thread = threading.Thread(target=receive)
        thread.start()
        messages = BufferedMessages(pair.front, one_way=True)
        for number in range(count):
            messages.put(request(number))
        messages.flush()
        thread.join(DEADLINE_S)
        assert received == [request(number) for number in range(count)]
        assert pair.back.outstanding == 0
        with pytest.raises(InvalidRequest, match="nothing to get"):
            messages.get()


def test_a_kick_ends_iterating_and_a_wait_for_room_which_loses_nothing() -> None:
    with ring_pair() as pair:
        pair.back_waiter.kick()
        assert list(BufferedMessages(pair.back)) == []
        messages = BufferedMessages(pair.front, batch=1)
        for number in range(pair.front.size):
            messages.put(request(number))
        pair.front_waiter.kick()
        messages.put(request(99))
        assert pair.back.take_batch()["id"].tolist() == list(range(pair.front.size))
        pair.back.push(np.zeros(1, RESPONSE))
        assert messages.flush()
        assert pair.back.take_batch().tobytes() == request(99)


def test_what_is_refused() -> None:
    with ring_pair() as pair:
        with pytest.raises(InvalidRequest, match="1 or more"):
            BufferedMessages(pair.front, batch=0)
        front, back = BufferedMessages(pair.front), BufferedMessages(pair.back)
        for message in (b"", bytes(REQUEST.itemsize - 1), bytes(REQUEST.itemsize + 1)):
            with pytest.raises(InvalidRequest, match=f"{REQUEST.itemsize} bytes, not {len(message)}"):
                front.put(message)
        back.put(bytes(RESPONSE.itemsize))
        with pytest.raises(InvalidRequest, match="more responses than requests"):
            back.flush()
        assert "1 collected" in repr(back)
        pair.front.close()
        with pytest.raises(Closed):
            front.get(0)


def test_a_peer_that_lies() -> None:
    with ring_pair() as pair:
        pair.mapping.view[0:4] = (1000).to_bytes(4, "little")
        with pytest.raises(PeerError):
            BufferedMessages(pair.back).get(0)
