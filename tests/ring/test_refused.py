# SPDX-License-Identifier: MIT
"""What the kernel can refuse events and rings: each call says so and leaves things as they were."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.ring.event import EventPort, EventWaiter, WaitResult, from_half, make_pair
from paravirt.ring.memory import Mapping

from ..faults import Fault, each_call_fails, failing
from ..forked import in_child
from .support import DEADLINE_S, ring_pair
from .test_event import new_inbox

MS = 1_000_000
End = tuple[EventWaiter, EventPort]


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    first, second = make_pair("eventfd")
    one, two = from_half(first), from_half(second)
    with one[0], two[0]:
        yield one, two


@pytest.fixture
def inbox() -> Iterator[Mapping]:
    fd, mapping = new_inbox()
    os.close(fd)
    with mapping:
        yield mapping


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("function", ["epoll_create1", "eventfd", "fcntl", "epoll_ctl"])
def test_a_waiter_that_cannot_be_made_leaves_nothing(function: str) -> None:
    waiter, before = ffi.new("struct pv_waiter *"), descriptors()

    def scenario() -> None:
        result = lib.pv_waiter_init(waiter, ffi.NULL)
        assert result in (0, -errno.EMFILE)
        if result == 0:
            lib.pv_waiter_destroy(waiter)
        assert descriptors() == before

    assert each_call_fails(function, scenario, errno.EMFILE) >= 1


@pytest.mark.parametrize(
    ("function", "call"), [("realloc", 1), ("malloc", 1), ("fcntl", 1), ("fcntl", 2), ("epoll_ctl", 1)]
)
def test_an_inbox_that_cannot_be_added_is_not_known(inbox: Mapping, function: str, call: int) -> None:
    with EventWaiter() as waiter:
        bell = os.eventfd(0)
        core = inbox.pointer("struct pv_inbox *")
        with failing(function, at=call):
            assert lib.pv_waiter_add(waiter.core, core, bell) == -errno.ENOMEM
        assert lib.pv_waiter_remove(waiter.core, core, bell) == -errno.ENOENT
        assert lib.pv_waiter_add(waiter.core, core, -1) == -errno.EBADF
        assert waiter.core.n_doorbells == 0
        assert lib.pv_waiter_add(waiter.core, core, bell) == 0
        assert lib.pv_waiter_remove(waiter.core, core, bell) == 0
        os.close(bell)


def test_a_read_that_a_signal_cut_short_takes_the_kick_all_the_same() -> None:
    with EventWaiter() as waiter:
        waiter.kick()
        with failing("read", errno.EINTR, times=2) as fault:
            assert waiter.wait(timeout_s=0) is WaitResult.KICKED
        assert fault.calls == 3
        assert waiter.wait(timeout_s=0) is WaitResult.TIMEOUT


@pytest.mark.parametrize(("error", "result"), [(errno.EINTR, lib.PV_WAIT_INTERRUPTED), (errno.EBADF, -errno.EBADF)])
def test_a_sleep_that_fails(ends: tuple[End, End], error: int, result: int) -> None:
    _, (waiter, receiver) = ends
    with failing("epoll_wait", error):
        assert lib.pv_wait(waiter.core, receiver.core, 0, -1) == result
        assert lib.pv_wait(waiter.core, ffi.NULL, 0, -1) == result
        drained = lib.pv_waiter_drain(waiter.core)
        assert drained == (lib.PV_WAIT_EVENT if error == errno.EINTR else -errno.EBADF)
    assert receiver.core.rx.asleep == 0, "nobody is rung for a wait that is over"


@pytest.mark.parametrize("function", ["timerfd_create", "epoll_ctl", "timerfd_settime"])
def test_without_a_timer_an_eoi_is_not_delayed(ends: tuple[End, End], function: str) -> None:
    """An event that could not be unmasked later is unmasked at once: none is lost."""
    (_, sender), (waiter, receiver) = ends
    receiver.late_eoi(spurious_threshold=0)
    with failing(function, errno.ENOSPC):
        for _ in range(3):
            sender.notify()
            assert waiter.wait(receiver, timeout_s=0) is WaitResult.EVENT
            assert lib.pv_port_eoi(receiver.core, 1) == -errno.ENOSPC
    sender.notify()
    assert waiter.wait(receiver, timeout_s=0) is WaitResult.EVENT
    assert receiver.eoi(spurious=True) > 0, "with a timer it is delayed again"


def test_the_one_that_holds_the_delayed_eois_is_waited_for(ends: tuple[End, End]) -> None:
    _, (waiter, receiver) = ends
    waiter.core.eoi_lock = 1
    with failing("sched_yield", result=0) as yields:
        thread = started(lambda: lib.pv_waiter_forget_eoi(waiter.core, receiver.core))
        until_called(yields)
        assert thread.is_alive()
        waiter.core.eoi_lock = 0
        thread.join(DEADLINE_S)
    assert waiter.core.eoi_lock == 0


def test_a_sender_waits_for_the_one_before_it(ends: tuple[End, End]) -> None:
    (_, sender), (_, receiver) = ends
    sender.core.busy = 1
    with failing("sched_yield", result=0) as yields:
        thread = started(sender.notify)
        until_called(yields)
        assert not receiver.take_pending()
        sender.core.busy = 0
        thread.join(DEADLINE_S)
    assert receiver.take_pending()


def started(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until_called(fault: Fault) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not fault.happened:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_broken_pipe_rings_nobody_and_leaves_no_signal() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert lib.pv_bell_ring(writer) == -errno.EPIPE
    with failing("sigpending", errno.EFAULT):
        assert lib.pv_bell_ring(writer) == -errno.EPIPE
    with failing("write", errno.EPIPE):
        assert lib.pv_bell_ring(writer) == -errno.EPIPE, "also where the kernel sent no signal"
    assert not signal.sigpending()
    os.close(writer)
    assert lib.pv_bell_ring(-1) == -errno.EBADF
    assert lib.pv_bell_ring(writer) == -errno.EBADF


@pytest.mark.parametrize(
    ("error", "result"),
    [(errno.ENOSYS, -errno.EOPNOTSUPP), (errno.EINVAL, -errno.EOPNOTSUPP), (errno.EPERM, -errno.EPERM)],
)
def test_a_kernel_without_membarrier(error: int, result: int) -> None:
    def child() -> None:
        with failing("syscall", error), ring_pair() as pair:
            # Each process asks once; a forked child is one of its own.
            assert lib.pv_fence_register(lib.PV_FENCE_HOST) == result
            assert lib.pv_ring_set_fence(pair.front.core, lib.PV_FENCE_HOST) == result
            assert lib.pv_ring_set_fence(pair.front.core, lib.PV_FENCE_PROCESS) == 0
            assert pair.front.core.fence == lib.PV_FENCE_FULL

    assert in_child(child) == 0


def test_a_heavy_fence_that_is_refused_lets_nobody_sleep() -> None:
    with ring_pair() as pair:
        if lib.pv_fence_register(lib.PV_FENCE_PROCESS):
            pytest.skip("this kernel has no membarrier(2)")
        pair.back.core.fence = lib.PV_FENCE_PROCESS
        with failing("syscall", errno.EPERM):
            assert lib.pv_ring_final_check(pair.back.core) == -errno.EPERM
            assert lib.pv_ring_wait(pair.back.core, 0, -1) == -errno.EPERM


@pytest.mark.parametrize(("function", "result"), [("open", None), ("read", None), ("read", 0)])
def test_a_load_that_cannot_be_read_keeps_nobody_from_spinning(function: str, result: int | None) -> None:
    """What is not known counts as idle, on a machine with two CPUs or more."""

    def child() -> None:
        time.sleep(lib.PV_SPIN_SLICE_NS / 1e9)  # longer than an answer is believed
        with failing(function, errno.EMFILE, result=result) as fault:
            idle = lib.pv_spin_cpu_is_idle(lib.pv_now_ns())
        assert fault.happened
        assert bool(idle) == (os.sysconf("SC_NPROCESSORS_ONLN") > 1)

    assert in_child(child) == 0


def test_a_page_that_cannot_be_mapped() -> None:
    address = ffi.cast("void *", 0)
    assert lib.pv_map_pages(address, 4096, -1, 0, 0) == -errno.EBADF
    with failing("mmap", errno.ENOMEM):
        assert lib.pv_hv_deliver(0, 0, -1) == -errno.ENOMEM


def test_a_page_that_a_fork_would_copy_is_refused() -> None:
    fd, mapping = new_inbox()
    with mapping, failing("madvise", errno.EINVAL):
        target: Any = mapping.pointer("void *")
        assert lib.pv_map_pages(target, 4096, fd, 0, 1) == -errno.EINVAL
    os.close(fd)
