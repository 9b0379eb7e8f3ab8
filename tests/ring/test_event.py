# SPDX-License-Identifier: MIT
"""Event channels without a hypervisor: bits, masks, doorbells, kicks, changed bindings."""

import os
import random
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.ring._core import ffi
from paravirt.ring.event import (
    SLOTS,
    EventPort,
    EventWaiter,
    NotifyResult,
    WaitResult,
    from_half,
    init_inbox,
    make_bell,
    make_pair,
    ring_bell,
)
from paravirt.ring.memory import PAGE_BYTES, Mapping, create_object
from paravirt.ring.shared import FrontRing

from .support import DEADLINE_S

End = tuple[EventWaiter, EventPort]


@pytest.fixture(params=["eventfd", "pipe"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    first, second = make_pair(request.param)
    one, two = from_half(first), from_half(second)
    with one[0], two[0]:
        yield one, two


def new_inbox() -> tuple[int, Mapping]:
    fd = create_object("memfd", PAGE_BYTES)
    mapping = Mapping(fd, PAGE_BYTES)
    init_inbox(mapping)
    return fd, mapping


def in_thread(wait: Any) -> "tuple[threading.Thread, list[WaitResult]]":
    results: list[WaitResult] = []
    thread = threading.Thread(target=lambda: results.append(wait()), daemon=True)
    thread.start()
    return thread, results


def until_asleep(waiter: EventWaiter, sleeps: int = 1) -> None:
    """Until the waiter's thread has armed and is at the system call."""
    while waiter.statistics().sleeps < sleeps:
        os.sched_yield()


def fill(pipe_fd: int) -> None:
    with suppress(BlockingIOError):
        while True:
            os.write(pipe_fd, bytes(4096))


def test_an_awake_receiver_is_not_rung(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    assert sender.notify() is NotifyResult.SUPPRESSED
    assert receiver.take_pending()
    assert not receiver.take_pending()
    assert waiter.wait(receiver, timeout_s=0) is WaitResult.TIMEOUT
    assert sender.statistics().rang == 0


def test_pending_events_merge(ends: tuple[End, End]) -> None:
    (_, sender), (_, receiver) = ends
    for _ in range(5):
        sender.notify()
    assert receiver.take_pending()
    assert not receiver.take_pending()
    statistics = sender.statistics()
    assert (statistics.sent, statistics.merged, statistics.rang) == (5, 4, 0)
    assert receiver.statistics().received == 1


def test_a_sleeper_is_woken_by_its_doorbell(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    thread, results = in_thread(lambda: waiter.wait(receiver))
    until_asleep(waiter)
    assert sender.notify() is NotifyResult.RANG
    thread.join(DEADLINE_S)
    assert results == [WaitResult.EVENT]
    assert (waiter.statistics().sleeps, waiter.statistics().wakeups) == (1, 1)
    assert not receiver.take_pending(), "the wait took the event"


def test_waiting_without_a_port_takes_nothing(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    sender.notify()
    assert waiter.wait(timeout_s=0) is WaitResult.EVENT
    assert waiter.wait(timeout_s=0) is WaitResult.EVENT
    assert waiter.take_pending() == [receiver]
    assert waiter.wait(timeout_s=0) is WaitResult.TIMEOUT
    assert receiver.statistics().received == 1


def test_spinning_needs_no_doorbell(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    thread, results = in_thread(lambda: waiter.wait(receiver, spin_ns=DEADLINE_S * 10**9))
    assert sender.notify() is NotifyResult.SUPPRESSED
    thread.join(DEADLINE_S)
    assert results == [WaitResult.EVENT]
    assert waiter.statistics().sleeps == 0


def test_masked_events_are_kept_and_wake_nobody(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    receiver.mask()
    thread, results = in_thread(lambda: waiter.wait(receiver))
    until_asleep(waiter)
    assert sender.notify() is NotifyResult.SUPPRESSED
    assert waiter.statistics().wakeups == 0
    assert waiter.take_pending() == []
    assert receiver.unmask(), "unmask tells that an event is pending"
    thread.join(DEADLINE_S)
    assert results == [WaitResult.EVENT], "and wakes the sleeper"


def test_unmask_without_an_event_wakes_nobody(ends: tuple[End, End]) -> None:
    _, (waiter, receiver) = ends
    receiver.mask()
    assert not receiver.unmask()
    assert waiter.wait(receiver, timeout_s=0) is WaitResult.TIMEOUT


def test_set_pending_as_a_bind_does(ends: tuple[End, End]) -> None:
    _, (waiter, receiver) = ends
    thread, results = in_thread(lambda: waiter.wait(receiver))
    until_asleep(waiter)
    receiver.set_pending()
    thread.join(DEADLINE_S)
    assert results == [WaitResult.EVENT]


def test_kick_ends_the_wait_or_the_next_one_once(ends: tuple[End, End]) -> None:
    _, (waiter, receiver) = ends
    waiter.kick()
    waiter.kick()
    assert waiter.wait(receiver) is WaitResult.KICKED
    assert waiter.wait(receiver, timeout_s=0) is WaitResult.TIMEOUT
    thread, results = in_thread(lambda: waiter.wait(receiver))
    until_asleep(waiter)
    waiter.kick()
    thread.join(DEADLINE_S)
    assert results == [WaitResult.KICKED]


def test_a_full_doorbell_is_rung_already() -> None:
    wait_fd, ring_fd = make_bell("pipe")
    try:
        fill(ring_fd)
        assert ring_bell(ring_fd)
    finally:
        os.close(wait_fd)
        os.close(ring_fd)
    eventfd, other = make_bell("eventfd")
    try:
        os.eventfd_write(eventfd, 2**64 - 2)
        assert ring_bell(other)
    finally:
        os.close(eventfd)
        os.close(other)


def test_a_stuffed_doorbell_costs_wakeups_and_nothing_else() -> None:
    """A hostile sender fills its pipe: the receiver goes on, and still finds its event."""
    first, second = make_pair("pipe")
    (sender_waiter, sender), (waiter, receiver) = from_half(first), from_half(second)
    with sender_waiter, waiter:
        fill(sender.core.tx_bell)
        assert waiter.wait(receiver, timeout_s=0.05) is WaitResult.TIMEOUT
        assert waiter.statistics().wakeups >= 2
        sender.notify()
        assert waiter.wait(receiver) is WaitResult.EVENT


def test_a_dead_receiver_is_survived_even_without_pythons_signal_setting() -> None:
    first, second = make_pair("pipe")
    (sender_waiter, sender), (waiter, receiver) = from_half(first), from_half(second)
    former = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        with sender_waiter:
            waiter.fileno()  # the receiver is always rung from now on ...
            core = receiver.core
            os.close(waiter.inboxes[0].bell_fd)  # ... and nobody reads
            core.rx.asleep = 1
            assert sender.notify() is NotifyResult.RANG
            assert not ring_bell(sender.core.tx_bell)
            assert signal.sigpending() == set()
    finally:
        signal.signal(signal.SIGPIPE, former)
        waiter.inboxes[0].bell_fd = os.open("/dev/null", os.O_RDONLY)  # for close
        waiter.close()


def test_the_death_of_the_last_sender_is_told_once() -> None:
    first, second = make_pair("pipe")
    (sender_waiter, _), (waiter, receiver) = from_half(first), from_half(second)
    with waiter:
        thread, results = in_thread(lambda: waiter.wait(receiver))
        until_asleep(waiter)
        sender_waiter.close()
        thread.join(DEADLINE_S)
        assert results == [WaitResult.STALE]
        assert waiter.wait(receiver, timeout_s=0) is WaitResult.TIMEOUT


def test_unbound_is_dropped_silently() -> None:
    with EventWaiter() as waiter, EventPort(waiter, None, 0) as port:
        assert port.notify() is NotifyResult.UNBOUND
        assert port.statistics().dropped == 1
        assert not port.take_pending()
        assert not port.bound


def test_a_changed_binding_is_learnt_before_the_next_send() -> None:
    generation = ffi.new("uint32_t *", 7)
    (old_fd, old), (new_fd, new) = new_inbox(), new_inbox()
    asked = []
    with EventWaiter(generation) as waiter, EventPort(waiter, None, 0) as port:
        port.set_peer(Mapping(old_fd, PAGE_BYTES), 3, -1, 7)
        assert port.notify() is NotifyResult.SUPPRESSED
        generation[0] = 8
        assert port.notify() is NotifyResult.STALE, "nobody can say to what it changed"

        def ask() -> None:
            asked.append(port)
            port.set_peer(Mapping(new_fd, PAGE_BYTES), 4, -1, generation[0])

        port.on_stale = ask
        assert port.notify() is NotifyResult.SUPPRESSED
        assert asked == [port]
        assert port.notify() is NotifyResult.SUPPRESSED
        assert asked == [port]
        pending = [ffi.cast("struct pv_inbox *", page.address).pending[0] for page in (old, new)]
        assert pending == [1 << 3, 1 << 4]
        assert port.statistics().sent == 3
        assert waiter.wait(timeout_s=0) is WaitResult.STALE, "the waiter is told too, once"
        assert waiter.wait(timeout_s=0) is WaitResult.TIMEOUT
    for fd, mapping in ((old_fd, old), (new_fd, new)):
        mapping.close()
        os.close(fd)


def test_a_binding_that_changes_for_ever_keeps_nobody_from_sending() -> None:
    generation = ffi.new("uint32_t *", 0)
    fd, page = new_inbox()
    with EventWaiter(generation) as waiter, EventPort(waiter, None, 0) as port:
        asked = []

        def ask() -> None:
            asked.append(port)
            port.set_peer(Mapping(fd, PAGE_BYTES), 5, -1, generation[0])
            generation[0] += 1  # by the time we have the answer it is old again

        port.on_stale = ask
        generation[0] = 1
        for _ in range(3):
            page.view[128:PAGE_BYTES] = bytes(PAGE_BYTES - 128)
            assert port.notify() is NotifyResult.SUPPRESSED
            assert ffi.cast("struct pv_inbox *", page.address).pending[0] == 1 << 5, "delivered all the same"
        assert len(asked) == 3
    page.close()
    os.close(fd)


def test_foreign_loop_is_told_of_events_kicks_and_what_was_there_before(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    poll = select.poll()
    sender.notify()
    poll.register(waiter.fileno(), select.POLLIN)
    assert poll.poll(0), "pending before it was armed"
    assert waiter.drain_bells() is WaitResult.EVENT
    assert waiter.take_pending() == [receiver]
    assert not poll.poll(0)
    assert sender.notify() is NotifyResult.RANG
    assert poll.poll(0)
    assert waiter.drain_bells() is WaitResult.EVENT
    assert waiter.take_pending() == [receiver]
    waiter.kick()
    assert poll.poll(0)
    assert waiter.drain_bells() is WaitResult.KICKED
    assert not poll.poll(0)
    assert sender.notify() is NotifyResult.RANG, "still armed"


def test_many_ports_share_one_inbox_and_bell() -> None:
    fd, mapping = new_inbox()
    wait_fd, ring_fd = make_bell()
    with EventWaiter() as waiter, EventWaiter() as other:
        inbox = waiter.add_inbox(mapping, wait_fd)
        slots = [0, 63, 64, 1000, SLOTS - 1]
        receivers = [EventPort(waiter, inbox, slot) for slot in slots]
        senders = [EventPort(other, None, 0) for _ in slots]
        for sender, slot in zip(senders, slots, strict=True):
            sender.set_peer(Mapping(fd, PAGE_BYTES), slot, os.dup(ring_fd), 0)
            sender.notify()
        assert waiter.take_pending() == receivers
        senders[2].notify()
        assert not receivers[1].take_pending()
        assert waiter.take_pending() == [receivers[2]]
        with pytest.raises(InvalidRequest, match="taken"):
            EventPort(waiter, inbox, 64)
        with pytest.raises(InvalidRequest, match="not within"):
            EventPort(waiter, inbox, SLOTS)
        with pytest.raises(InvalidRequest, match="open ports"):
            waiter.remove_inbox(inbox)
        for port in receivers:
            port.close()
        waiter.remove_inbox(inbox)
        assert waiter.inboxes == ()
        assert all(sender.notify() is not NotifyResult.RANG for sender in senders), "nobody there any more"
        for sender in senders:
            sender.close()
    os.close(fd)
    os.close(ring_fd)


def test_an_event_from_before_the_port_was_made_is_pending(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    inbox = waiter.inboxes[0]
    receiver.close()
    sender.notify()
    assert waiter.wait(timeout_s=0) is WaitResult.TIMEOUT, "a closed port is masked"
    with EventPort(waiter, inbox, 0) as again:
        assert waiter.wait(again, timeout_s=0) is WaitResult.EVENT


def test_a_page_that_is_no_inbox_is_refused_and_released() -> None:
    before = len(os.listdir("/proc/self/fd"))
    fd = create_object("memfd", PAGE_BYTES)
    wait_fd, ring_fd = make_bell()
    with EventWaiter() as waiter, EventPort(waiter, None, 0) as port:
        with pytest.raises(PeerError, match="magic"):
            waiter.add_inbox(Mapping(fd, PAGE_BYTES), wait_fd)
        with pytest.raises(PeerError, match="magic"):
            port.set_peer(Mapping(fd, PAGE_BYTES), 0, ring_fd, 0)
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_thread_waits(ends: tuple[End, End]) -> None:
    _, (waiter, receiver) = ends
    thread, _ = in_thread(lambda: waiter.wait(receiver))
    until_asleep(waiter)
    with pytest.raises(InvalidRequest, match="another thread waits"):
        waiter.wait(timeout_s=0)
    fd, mapping = new_inbox()
    with pytest.raises(InvalidRequest, match="another thread waits"):
        waiter.add_inbox(mapping, fd)
    with pytest.raises(InvalidRequest, match="waits"):
        waiter.close()
    waiter.kick()
    thread.join(DEADLINE_S)


def test_use_after_close(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    waiter.close()
    waiter.close()
    for call in (waiter.wait, waiter.kick, waiter.take_pending, waiter.fileno, waiter.drain_bells, waiter.statistics):
        with pytest.raises(Closed):
            call()
    for call in (receiver.notify, receiver.take_pending, receiver.mask, receiver.unmask, receiver.statistics):
        with pytest.raises(Closed):
            call()
    assert "closed" in repr(waiter)
    assert "closed" in repr(receiver)
    sender.notify()


@pytest.mark.parametrize("timeout_s", [-1, float("nan")])
def test_a_timeout_that_cannot_be(ends: tuple[End, End], timeout_s: float) -> None:
    with pytest.raises(InvalidRequest, match="timeout"):
        ends[0][0].wait(timeout_s=timeout_s)


def test_a_signal_runs_its_handler_and_the_wait_goes_on(ends: tuple[End, End]) -> None:
    (_, sender), (waiter, receiver) = ends
    ran = []

    def handle(number: int, frame: object) -> None:
        ran.append(number)
        sender.notify()

    former = signal.signal(signal.SIGUSR1, handle)
    main = threading.get_ident()

    def interrupt() -> None:
        until_asleep(waiter)
        signal.pthread_kill(main, signal.SIGUSR1)

    try:
        thread, _ = in_thread(interrupt)
        assert waiter.wait(receiver) is WaitResult.EVENT
        thread.join(DEADLINE_S)
        assert ran == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, former)


def test_a_forked_child_is_refused() -> None:
    script = """
import os
import random
from paravirt.errors import Closed
from paravirt.ring.event import make_pair, from_half
(waiter, port), (other, _) = map(from_half, make_pair())
def refused(call):
    try:
        call()
    except Closed:
        return True
child = os.fork()
if child == 0:
    calls = (port.notify, waiter.wait, waiter.take_pending, waiter.drain_bells)
    good = all(refused(call) for call in calls)
    waiter.close()
    fresh, _ = map(from_half, make_pair())
    fresh[1].notify()
    os._exit(0 if good else 1)
assert os.waitpid(child, 0)[1] == 0
port.notify()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=DEADLINE_S)


def test_no_wake_up_is_lost(ends: tuple[End, End]) -> None:
    """1000 sends at random moments to a receiver that sleeps, spins or works at random: each is seen."""
    (_, sender), (waiter, receiver) = ends
    rounds = 1000
    sent = threading.Semaphore(0)
    answered = threading.Semaphore(0)
    failures: list[WaitResult] = []

    def receive() -> None:
        choose = random.Random(1)
        for _ in range(rounds):
            result = waiter.wait(receiver, spin_ns=choose.choice((0, 0, 1000, 50_000)), timeout_s=DEADLINE_S)
            if result is not WaitResult.EVENT or not sent.acquire(blocking=False):
                failures.append(result)
            answered.release()

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    choose = random.Random(2)
    for _ in range(rounds):
        for _ in range(choose.choice((0, 0, 10, 300))):
            os.sched_yield()
        sent.release()
        sender.notify()
        assert answered.acquire(timeout=DEADLINE_S)
    thread.join(DEADLINE_S)
    assert failures == []
    assert receiver.statistics().received == rounds


@pytest.mark.parametrize("retry", ["wait", "final_check"])
def test_a_peer_that_could_not_be_told_is_told_before_anybody_waits(retry: str) -> None:
    """A signal handler raised between the push and the slow way to notify."""
    generation = ffi.new("uint32_t *", 7)
    message = np.dtype("<u8")
    fd, inbox = new_inbox()
    raised = [Unheard()]

    def ask() -> None:
        if raised:
            raise raised.pop()
        port.set_peer(Mapping(fd, PAGE_BYTES), 4, -1, generation[0])

    with (
        EventWaiter(generation) as waiter,
        EventPort(waiter, None, 0) as port,
        FrontRing.create(memoryview(bytearray(PAGE_BYTES)), message, message, port=port) as front,
    ):
        port.set_peer(Mapping(fd, PAGE_BYTES), 3, -1, 7)
        port.on_stale = ask
        generation[0] = 8
        with pytest.raises(Unheard):
            front.push(np.array([5], message))
        pending = ffi.cast("struct pv_inbox *", inbox.address).pending
        assert pending[0] == 0
        if retry == "wait":
            front.wait(timeout_s=0)
        else:
            front.final_check()
        assert pending[0] == 1 << 4
        pending[0] = 0
        front.final_check()
        assert pending[0] == 0, "once"
        assert front.outstanding == 1
    inbox.close()
    os.close(fd)


class Unheard(Exception):
    pass
