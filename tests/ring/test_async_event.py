# SPDX-License-Identifier: MIT
"""Event channels in an asyncio program."""

import asyncio
import os
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from paravirt.errors import Closed, InvalidRequest
from paravirt.ring.async_event import AsyncEvents
from paravirt.ring.event import EventPort, EventWaiter, WaitResult, from_half, make_bell, make_pair
from paravirt.ring.memory import PAGE_BYTES, Mapping

from .support import DEADLINE_S
from .test_event import new_inbox

End = tuple[EventWaiter, EventPort]


@pytest.fixture(params=["eventfd", "pipe"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    first, second = make_pair(request.param)
    one, two = from_half(first), from_half(second)
    with one[0], two[0]:
        yield one, two


def run(story: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await story

    asyncio.run(limited())


async def until_waiting(task: "asyncio.Task[Any]") -> None:
    """Until the task had its turn."""
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()


def test_two_tasks_play_ping_pong(ends: tuple[End, End]) -> None:
    (one, here), (two, there) = ends

    async def story() -> None:
        with AsyncEvents(one) as events_here, AsyncEvents(two) as events_there:

            async def answer() -> None:
                for _ in range(100):
                    assert await events_there.wait(there) is WaitResult.EVENT
                    there.notify()

            task = asyncio.create_task(answer())
            for _ in range(100):
                here.notify()
                assert await events_here.wait(here) is WaitResult.EVENT
            await task

    run(story())
    assert here.statistics().received == there.statistics().received == 100


def many(waiter: EventWaiter, n: int) -> tuple[list[EventPort], list[EventPort]]:
    """`n` ports of the waiter, and their senders, which belong to it as well."""
    fd, mapping = new_inbox()
    wait_fd, ring_fd = make_bell()
    inbox = waiter.add_inbox(mapping, wait_fd)
    receivers = [EventPort(waiter, inbox, slot) for slot in range(n)]
    senders = [EventPort(waiter, None, 0) for _ in range(n)]
    for slot, sender in enumerate(senders):
        sender.set_peer(Mapping(fd, PAGE_BYTES), slot, os.dup(ring_fd), 0)
    os.close(fd)
    os.close(ring_fd)
    return receivers, senders


def test_any_gives_what_nobody_waits_for_by_name() -> None:
    with EventWaiter() as waiter:
        receivers, senders = many(waiter, 10)
        receivers[7].priority = 0

        async def story() -> None:
            with AsyncEvents(waiter) as events:
                named = asyncio.create_task(events.wait(receivers[3]))
                others = asyncio.create_task(events.any())
                await until_waiting(others)
                with pytest.raises(InvalidRequest):
                    await events.any()
                with pytest.raises(InvalidRequest):
                    await events.wait(receivers[3])
                for sender in senders:
                    sender.notify()
                assert await named is WaitResult.EVENT
                assert await others == [receivers[7], *(receivers[n] for n in (0, 1, 2, 4, 5, 6, 8, 9))]
                senders[1].notify()
                assert await events.any() == [receivers[1]]
                senders[2].notify()
                senders[2].notify()
                assert await events.wait(receivers[2]) is WaitResult.EVENT

        run(story())
        for sender in senders:
            sender.close()


def test_kick_and_stale_are_told_to_all(ends: tuple[End, End]) -> None:
    (sender_waiter, _), (waiter, receiver) = ends

    async def story() -> None:
        with AsyncEvents(waiter) as events:
            for result, happens in ((WaitResult.KICKED, waiter.kick), (WaitResult.STALE, sender_waiter.close)):
                if (
                    result is WaitResult.STALE
                    and os.readlink(f"/proc/self/fd/{waiter.inboxes[0].bell_fd}")[:4] != "pipe"
                ):
                    continue
                named, others = asyncio.create_task(events.wait(receiver)), asyncio.create_task(events.any())
                await until_waiting(others)
                happens()
                assert await named is result
                assert await others == []

    run(story())


def test_no_event_is_lost_by_a_cancelled_wait(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends

    async def story() -> None:
        with AsyncEvents(waiter) as events:
            for early in (True, False):
                task = asyncio.create_task(events.wait(receiver))
                await until_waiting(task)
                if not early:
                    sender.notify()
                    events._ready()  # the loop has taken the event for the task, which has not run yet
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                if early:
                    sender.notify()
                assert await events.wait(receiver) is WaitResult.EVENT

    run(story())


def test_the_end(ends: tuple[End, End]) -> None:
    _, (waiter, receiver) = ends

    async def story() -> None:
        events = AsyncEvents(waiter)
        task, other = asyncio.create_task(events.wait(receiver)), asyncio.create_task(events.any())
        await until_waiting(task)
        assert "1 tasks wait" in repr(events)
        events.close()
        events.close()
        for each in (task, other):
            with pytest.raises(asyncio.CancelledError):
                await each
        for call in (events.wait(receiver), events.any()):
            with pytest.raises(Closed):
                await call
        assert "closed" in repr(events)
        with AsyncEvents(waiter):
            pass

    run(story())


def test_a_late_eoi_of_a_task(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi()

    async def story() -> None:
        with AsyncEvents(waiter) as events:
            for n in range(4):
                sender.notify()
                assert await events.wait(receiver) is WaitResult.EVENT
                assert (receiver.eoi(spurious=True) > 0) is (n > 0)

    run(story())
