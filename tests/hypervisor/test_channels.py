# SPDX-License-Identifier: MIT
"""Event channels over sockets, with both kinds of doorbell."""

import asyncio
import os
import threading

import pytest

from paravirt.errors import (
    HypervisorError,
    InvalidRequest,
    NotFound,
)
from paravirt.hypervisor.client import (
    ChannelStatus,
    PortState,
)
from paravirt.hypervisor.rules import DOMID_SELF
from paravirt.ring.async_event import AsyncEvents
from paravirt.ring.event import NotifyResult, WaitResult

from .conftest import World

DEADLINE_S = 30


def test_events_go_both_ways_and_the_first_one_is_there_at_once(world: World) -> None:
    guest = world.guest()
    guest_waiter, dom0_waiter = guest.waiter(), world.dom0.waiter()
    theirs = guest.alloc_unbound(guest_waiter, 0)
    assert theirs.status() == ChannelStatus(PortState.UNBOUND, 0, 0)
    assert theirs.notify() is NotifyResult.UNBOUND
    ours = world.dom0.bind_interdomain(dom0_waiter, 1, theirs.port)
    assert ours.remote == (1, theirs.port)
    assert ours.take_pending()
    assert guest_waiter.wait(theirs, timeout_s=DEADLINE_S) is WaitResult.STALE, "the binding rang"
    assert theirs.status() == ChannelStatus(PortState.INTERDOMAIN, 0, ours.port)
    for _ in range(100):
        assert ours.notify() in (NotifyResult.SUPPRESSED, NotifyResult.RANG)
        assert guest_waiter.wait(theirs, timeout_s=DEADLINE_S) is WaitResult.EVENT
        theirs.notify()
        assert dom0_waiter.wait(ours, timeout_s=DEADLINE_S) is WaitResult.EVENT
    assert ours.statistics().sent == 100
    assert theirs.statistics().received == 100


def test_a_sleeping_end_is_woken(world: World) -> None:
    guest = world.guest()
    guest_waiter, dom0_waiter = guest.waiter(), world.dom0.waiter()
    theirs = guest.alloc_unbound(guest_waiter, 0)
    ours = world.dom0.bind_interdomain(dom0_waiter, 1, theirs.port)
    answers: list[WaitResult] = []

    def echo() -> None:
        for _ in range(200):
            while (result := guest_waiter.wait(theirs, timeout_s=DEADLINE_S)) is WaitResult.STALE:
                pass
            answers.append(result)
            theirs.notify()

    thread = threading.Thread(target=echo)
    thread.start()
    ours.take_pending()
    for _ in range(200):
        ours.notify()
        assert dom0_waiter.wait(ours, timeout_s=DEADLINE_S) is WaitResult.EVENT
    thread.join()
    assert answers == [WaitResult.EVENT] * 200


def test_a_notify_after_a_rebind_reaches_the_new_peer(world: World) -> None:
    """The sender does not know yet: its first notify is stale, asks, and goes to the right inbox."""
    guest = world.guest()
    theirs = guest.alloc_unbound(guest.waiter(), 0)
    first_waiter = world.dom0.waiter()
    first = world.dom0.bind_interdomain(first_waiter, 1, theirs.port)
    assert theirs.notify() is not NotifyResult.UNBOUND
    assert first_waiter.wait(first, timeout_s=DEADLINE_S) is WaitResult.EVENT
    first.close()
    assert theirs.notify() is NotifyResult.UNBOUND
    other_process = world.connect(0)
    second_waiter = other_process.waiter()
    second = other_process.bind_interdomain(second_waiter, 1, theirs.port)
    second.take_pending()
    assert theirs.notify() is not NotifyResult.UNBOUND
    assert second_waiter.wait(second, timeout_s=DEADLINE_S) is WaitResult.EVENT


def test_a_peers_death_is_heard_and_its_port_can_be_bound_again(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    theirs = guest.alloc_unbound(waiter, 0)
    backend = world.connect(0)
    backend.bind_interdomain(backend.waiter(), 1, theirs.port)
    assert waiter.wait(theirs, timeout_s=DEADLINE_S) is WaitResult.STALE
    backend.close()
    assert waiter.wait(theirs, timeout_s=DEADLINE_S) is WaitResult.STALE
    assert theirs.status() == ChannelStatus(PortState.UNBOUND, 0, 0)
    again = world.dom0.bind_interdomain(world.dom0.waiter(), 1, theirs.port)
    assert again.take_pending()


def test_ports_not_meant_for_the_caller_cannot_be_bound(world: World) -> None:
    guest, other = world.guest("a"), world.guest("b")
    port = guest.alloc_unbound(guest.waiter(), 0).port
    waiter = other.waiter()
    with pytest.raises(HypervisorError) as info:
        other.bind_interdomain(waiter, guest.domid, port)
    assert info.value.name == "EINVAL"
    with pytest.raises(NotFound):
        other.bind_interdomain(waiter, 77, port)
    with pytest.raises(NotFound):
        other.alloc_unbound(waiter, 77)


def test_ipi_and_loopback(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    ipi = guest.bind_ipi(waiter)
    ipi.notify()
    assert waiter.wait(ipi, timeout_s=DEADLINE_S) is WaitResult.EVENT
    end = guest.alloc_unbound(waiter, DOMID_SELF)
    other = guest.bind_interdomain(waiter, DOMID_SELF, end.port)
    other.take_pending()
    end.notify()
    assert other.take_pending()
    other.notify()
    assert waiter.take_pending() == [end]


def test_many_channels_share_one_inbox_and_two_descriptors(world: World) -> None:
    guest = world.guest()
    guest_waiter, dom0_waiter = guest.waiter(), world.dom0.waiter()
    theirs = [guest.alloc_unbound(guest_waiter, 0)]
    ours = [world.dom0.bind_interdomain(dom0_waiter, 1, theirs[0].port)]
    theirs[0].status()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        theirs.append(guest.alloc_unbound(guest_waiter, 0))
        ours.append(world.dom0.bind_interdomain(dom0_waiter, 1, theirs[-1].port))
        theirs[-1].status()
    assert len(os.listdir("/proc/self/fd")) == before
    for channel in ours:
        channel.take_pending()
        channel.notify()
    taken = guest_waiter.take_pending()
    assert set(taken) == set(theirs)
    assert len(guest_waiter.inboxes) == 1
    for channel in theirs:
        channel.close()
    assert guest_waiter.inboxes == ()


def test_a_channel_closed_while_its_waiter_waits_keeps_the_inbox_for_later(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    channel = guest.alloc_unbound(waiter, 0)
    results: list[WaitResult] = []
    thread = threading.Thread(target=lambda: results.append(waiter.wait(timeout_s=DEADLINE_S)))
    thread.start()
    while not waiter.core.waiting:
        pass
    with pytest.raises(InvalidRequest):
        guest.alloc_unbound(waiter, 0)
    with pytest.raises(InvalidRequest):
        waiter.close()
    channel.close()
    waiter.kick()
    thread.join()
    assert results in ([WaitResult.KICKED], [WaitResult.STALE]), "a pipe without writers ends the wait as well"
    guest.alloc_unbound(waiter, 0)
    assert len(waiter.inboxes) == 1
    assert world.dom0.list_domains()[1].ports == 1


def test_channels_in_an_asyncio_program(world: World) -> None:
    """The binding is told as a changed one; then events go both ways."""
    guest = world.guest()
    guest_waiter, dom0_waiter = guest.waiter(), world.dom0.waiter()
    theirs = guest.alloc_unbound(guest_waiter, 0)

    async def story() -> None:
        with AsyncEvents(guest_waiter) as here, AsyncEvents(dom0_waiter) as there:
            waiting = asyncio.create_task(here.wait(theirs))
            await asyncio.sleep(0)
            ours = world.dom0.bind_interdomain(dom0_waiter, guest.domid, theirs.port)
            assert await waiting is WaitResult.STALE
            assert await there.any() == [ours]
            for _ in range(20):
                ours.notify()
                while await here.wait(theirs) is WaitResult.STALE:
                    pass
                theirs.notify()
                assert await there.wait(ours) is WaitResult.EVENT

    async def limited() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await story()

    asyncio.run(limited())
