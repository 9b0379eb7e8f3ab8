# SPDX-License-Identifier: MIT
"""A `Vif` in an event loop: many tasks, cancelled at any moment, beside threads, over reconnects, to its end."""

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import pytest

import paravirt
from paravirt.errors import Closed, InvalidRequest, PeerError, PeerGone
from paravirt.frontend.vif import Vif
from paravirt.frontend.vif_queue import VifQueueEnd, Way
from paravirt.ring.netif import Burst

from .frames import frame

DEADLINE_S = 30.0
N = 2000


@dataclass
class Pair:
    """Two domains on one bridge that know each other."""

    host: paravirt.Host
    one: Vif
    other: Vif

    def numbered(self, first: int, n: int) -> list[bytes]:
        return [frame(self.other.mac, self.one.mac, i.to_bytes(4)) for i in range(first, first + n)]


@pytest.fixture(params=[True, False], ids=["split channels", "one channel"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with paravirt.Host() as host:
        vifs = []
        for name in ("one", "other"):
            domain = host.create_domain(name)
            path = host.attach_vif(domain)
            host.store.write(f"{path.backend}/feature-split-event-channels", str(int(request.param)))
            vifs.append(domain.open_vif())
        with host.bridge() as bridge:
            bridge.set_hold(DEADLINE_S)  # so that nobody is too slow
        for vif in vifs:
            vif.announce()
        for vif in vifs:
            while vif.receive(timeout_s=0.05):
                pass
        yield Pair(host, *vifs)


def number_of(packet: bytes) -> int:
    return int.from_bytes(packet[14:18])


async def numbers(vif: Vif, n: int, max_packets: int = 64) -> list[int]:
    found: list[int] = []
    while len(found) < n:
        found += map(number_of, await vif.aio.receive(min(max_packets, n - len(found))))
    return found


def run(main: "asyncio._CoroutineLike[None]") -> None:
    async def in_time() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await main

    asyncio.run(in_time())


def test_what_is_sent_is_received_in_order(pair: Pair) -> None:
    """More than the rings hold, both ways at once."""

    async def main() -> None:
        back = [frame(pair.one.mac, pair.other.mac, i.to_bytes(4)) for i in range(N)]
        found = await asyncio.gather(
            numbers(pair.other, N),
            numbers(pair.one, N),
            pair.one.aio.send(pair.numbered(0, N)),
            pair.other.aio.send(back),
        )
        assert found[0] == found[1] == list(range(N))
        assert found[2:] == [N, N]

    run(main())
    run(main())  # in a loop of its own


def test_bursts_end_when_the_device_is_closed(pair: Pair) -> None:
    async def main() -> None:
        found: list[int] = []

        async def take() -> None:
            async for burst in pair.other.aio.bursts(16):
                assert len(burst) <= 16
                found.extend(map(number_of, burst))

        taking = asyncio.create_task(take())
        await pair.one.aio.send(pair.numbered(0, N))
        while len(found) < N:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(pair.other.close)
        await taking
        assert found == list(range(N))

    run(main())


def test_tasks_take_turns(pair: Pair) -> None:
    """Frames of one call are together, and each frame comes to one task."""

    async def main() -> None:
        parts = [pair.numbered(first, 100) for first in range(0, N, 100)]
        receiving = [asyncio.create_task(numbers(pair.other, N // 4, 10)) for _ in range(4)]
        assert await asyncio.gather(*map(pair.one.aio.send, parts)) == [100] * len(parts)
        found = await asyncio.gather(*receiving)
        assert sorted(chain.from_iterable(found)) == list(range(N))
        assert all(sorted(part) == part for part in found), "of each, in order"

    run(main())


def test_a_cancelled_receive_loses_nothing(pair: Pair) -> None:
    async def main() -> None:
        found: list[int] = []
        chance = random.Random(1)

        async def take() -> None:
            burst = Burst(4)
            await pair.other.aio.receive_burst(burst, 4)
            found.extend(map(number_of, burst))

        async def send() -> None:
            for first in range(0, N, 8):
                await pair.one.aio.send(pair.numbered(first, 8))
                await asyncio.sleep(chance.random() * 0.001)

        sending, cancelled = asyncio.create_task(send()), 0
        while len(found) < N:
            taking = asyncio.create_task(take())
            await asyncio.sleep(chance.choice((0, 0, 0.0005)))
            taking.cancel()
            try:
                await taking
            except asyncio.CancelledError:
                cancelled += 1
        await sending
        assert found == list(range(N))
        assert cancelled

    run(main())


def test_it_waits_for_the_next_backend(pair: Pair) -> None:
    async def main() -> None:
        receiving = asyncio.create_task(numbers(pair.other, 1))
        await asyncio.sleep(0.05)
        for vif in (pair.one, pair.other):
            await asyncio.to_thread(vif.suspend)
        sending = asyncio.create_task(pair.one.aio.send(pair.numbered(7, 1)))
        await asyncio.sleep(0.05)
        assert not receiving.done()
        assert not sending.done()
        for vif in (pair.other, pair.one):
            await asyncio.to_thread(vif.resume)
        assert await sending == 1
        assert await receiving == [7]

    run(main())


def test_the_end_of_the_device_ends_what_waits(pair: Pair) -> None:
    async def main() -> None:
        receiving = asyncio.create_task(pair.one.aio.receive())
        other = asyncio.create_task(pair.other.aio.receive())
        await asyncio.sleep(0.05)
        await asyncio.to_thread(pair.one.close)
        await asyncio.to_thread(pair.host.detach_vif, pair.host.domains[1])
        with pytest.raises(Closed):
            await receiving
        with pytest.raises(PeerGone):
            await other
        with pytest.raises(Closed):
            await pair.one.aio.send(pair.numbered(0, 1))

    run(main())


def test_a_thread_may_receive_meanwhile(pair: Pair) -> None:
    """Each frame comes to one of both, whichever hears the doorbell."""
    in_thread: list[int] = []
    stop = threading.Event()

    def take() -> None:
        while not stop.is_set():
            in_thread.extend(map(number_of, pair.other.receive(4, timeout_s=0.01)))

    async def main() -> None:
        found: list[int] = []

        async def receive() -> None:
            async for burst in pair.other.aio.bursts(4):
                found.extend(map(number_of, burst))

        receiving = asyncio.create_task(receive())
        thread = threading.Thread(target=take)
        thread.start()
        try:
            for first in range(0, N, 20):
                await pair.one.aio.send(pair.numbered(first, 20))
                await asyncio.sleep(0.001)
            while len(found) + len(in_thread) < N:
                await asyncio.sleep(0.01)
        finally:
            stop.set()
            await asyncio.to_thread(thread.join)
            receiving.cancel()
        assert sorted(found + in_thread) == list(range(N))
        assert in_thread

    run(main())


def test_what_a_thread_leaves_behind_comes_to_the_loop(pair: Pair) -> None:
    """Also when the event that told of all of it was the thread's."""

    async def main() -> None:
        in_thread: list[int] = []
        found: list[int] = []

        async def receive() -> None:
            while len(found) + len(in_thread) < 5:
                found.extend(map(number_of, await pair.other.aio.receive()))

        receiving = asyncio.create_task(receive())
        await asyncio.sleep(0.02)
        taking = threading.Thread(
            target=lambda: in_thread.extend(map(number_of, pair.other.receive(2, timeout_s=DEADLINE_S)))
        )
        taking.start()
        pair.one.send(pair.numbered(0, 5))
        taking.join()  # the loop stands still: it hears of nothing meanwhile
        await receiving
        assert in_thread + found == list(range(5))
        assert in_thread

    for _ in range(20):
        run(main())


def test_it_sends_while_a_thread_receives_on_the_same_queue(pair: Pair) -> None:
    """The thread hears of the room for more, where both rings have one channel."""
    waiting = threading.Thread(target=lambda: pair.one.receive(timeout_s=DEADLINE_S))

    async def main() -> None:
        waiting.start()
        await asyncio.sleep(0.05)
        sent, found = await asyncio.gather(pair.one.aio.send(pair.numbered(0, N)), numbers(pair.other, N))
        assert (sent, found) == (N, list(range(N)))

    run(main())
    pair.other.send([frame(pair.one.mac, pair.other.mac)])
    waiting.join()


def test_one_loop_at_a_time(pair: Pair) -> None:
    heard = threading.Event()
    complaint: list[BaseException] = []

    def elsewhere() -> None:
        try:
            asyncio.run(asyncio.wait_for(pair.one.aio.receive(), DEADLINE_S))
        except BaseException as error:
            complaint.append(error)
        heard.set()

    async def main() -> None:
        waiting = asyncio.create_task(pair.one.aio.receive())
        await asyncio.sleep(0.05)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        await asyncio.to_thread(heard.wait, DEADLINE_S)
        thread.join()
        assert not waiting.done()
        waiting.cancel()

    run(main())
    assert [str(error) for error in complaint] == ["another event loop waits for this device"]
    assert isinstance(complaint[0], InvalidRequest)


def test_nobody_is_woken_for_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[str] = []
    take_event = VifQueueEnd.take_event

    def counted(end: VifQueueEnd, doorbell: Way) -> object:
        woken.append(doorbell)
        return take_event(end, doorbell)

    monkeypatch.setattr(VifQueueEnd, "take_event", counted)

    async def main() -> None:
        receiving = asyncio.create_task(numbers(pair.other, 1))
        await asyncio.sleep(0.1)
        woken.clear()
        await asyncio.sleep(0.3)
        assert not woken
        await pair.one.aio.send(pair.numbered(3, 1))
        assert await receiving == [3]
        assert len(woken) < 10

    run(main())


async def send_for_ever(pair: Pair) -> None:
    while True:
        await pair.one.aio.send(pair.numbered(0, 1))


def test_a_backend_that_breaks_the_protocol_is_left(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(end: VifQueueEnd, burst: Burst, max_packets: int) -> int:
        raise PeerError("an answer to nothing")

    async def main() -> None:
        monkeypatch.setattr(VifQueueEnd, "try_receive", broken)
        with pytest.raises(PeerError, match="an answer to nothing"):
            await pair.one.aio.receive()
        with pytest.raises(PeerError, match="an answer to nothing"):
            await send_for_ever(pair)

    run(main())


def test_there_is_no_such_queue(pair: Pair) -> None:
    async def main() -> None:
        with pytest.raises(InvalidRequest, match="there is no queue 1"):
            await pair.one.aio.send(pair.numbered(0, 1), queue=1)
        with pytest.raises(InvalidRequest, match="there is no queue 7"):
            await pair.one.aio.receive(queue=7)
        assert await pair.one.aio.send([]) == 0

    run(main())
