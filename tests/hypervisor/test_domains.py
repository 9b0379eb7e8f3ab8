# SPDX-License-Identifier: MIT
"""Domains over sockets: made, listed, ended; quotas; the way of their processes to xenstored."""

import os
import select
import signal
import socket
import subprocess

import pytest

from paravirt.errors import (
    AlreadyExists,
    HypervisorError,
    HypervisorGone,
    InvalidRequest,
    NotFound,
    PermissionRefused,
)
from paravirt.hypervisor.client import (
    VIRQ_DOM_EXC,
    DomainState,
    ShutdownReason,
)
from paravirt.hypervisor.messages import Op, new_message
from paravirt.ring._core import lib
from paravirt.ring.event import WaitResult

from .conftest import World

DEADLINE_S = 30


def test_domains_are_made_listed_and_destroyed(world: World) -> None:
    dom0 = world.dom0
    first = dom0.create_domain("first", isolated=world.isolated, max_pages=10, uid=1234)
    assert (first.domid, first.name, first.isolated, first.uid, first.max_pages) == (
        1, "first", world.isolated, 1234, 10,
    )  # fmt: skip
    assert first.state is DomainState.RUNNING
    with pytest.raises(AlreadyExists, match="first"):
        dom0.create_domain("first")
    with pytest.raises(HypervisorError, match="no name for a domain"):
        dom0.create_domain("a/b")
    with pytest.raises(InvalidRequest):
        dom0.create_domain("x" * 64)
    second = dom0.create_domain("second")
    assert [info.name for info in dom0.list_domains()] == ["Domain-0", "first", "second"]
    dom0.destroy_domain(first.domid)
    assert [info.domid for info in dom0.list_domains(dying=True)] == [0, second.domid]
    with pytest.raises(NotFound):
        dom0.destroy_domain(first.domid)
    with pytest.raises(NotFound):
        dom0.domain_socket(first.domid)


def test_what_a_domain_holds_is_counted(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    guest.create_arena(0, 16)
    channels = [guest.alloc_unbound(waiter, 0) for _ in range(3)]
    info = world.dom0.list_domains()[1]
    assert (info.pages, info.arenas, info.ports, info.maps, info.connections) == (16, 1, 3, 0, 1)
    channels[0].close()
    waiter.close()
    assert world.dom0.list_domains()[1].ports == 0
    before = world.dom0.info()
    assert before.used_bytes > 16 * 4096
    assert (before.domains, before.connections, before.has_store) == (2, 2, False)
    guest.close()
    world.dom0.destroy_domain(1)
    assert world.dom0.info().used_bytes == 4096, "what is left is Dom0's bindings page"


def test_guests_may_not_do_what_is_dom0s(world: World) -> None:
    guest = world.guest()
    pidfd = os.pidfd_open(os.getpid())
    for call in (
        lambda: guest.create_domain("mine"),
        lambda: guest.destroy_domain(1),
        guest.list_domains,
        lambda: guest.domain_socket(0),
        lambda: guest.set_init(1, pidfd),
        lambda: guest.add_process(1, pidfd),
        guest.register_store,
    ):
        with pytest.raises(PermissionRefused):
            call()
    os.close(pidfd)
    with pytest.raises(HypervisorError) as info:
        guest.bind_virq(guest.waiter())
    assert info.value.name == "EBUSY"
    assert guest.domid == 1
    assert guest.isolated is world.isolated


def test_shutdown_and_death_raise_dom_exc(world: World) -> None:
    waiter = world.dom0.waiter()
    virq = world.dom0.bind_virq(waiter)
    with pytest.raises(AlreadyExists):
        world.dom0.bind_virq(waiter, VIRQ_DOM_EXC)
    guest = world.guest()
    guest.shutdown(ShutdownReason.CRASH)
    assert waiter.wait(virq, timeout_s=DEADLINE_S) is WaitResult.EVENT
    info = world.dom0.list_domains()[1]
    assert (info.state, info.shutdown_reason) == (DomainState.SHUTDOWN, ShutdownReason.CRASH)
    world.dom0.destroy_domain(1)
    assert waiter.wait(virq, timeout_s=DEADLINE_S) is WaitResult.EVENT
    with pytest.raises(HypervisorGone):
        guest.info()


def test_an_init_process_takes_its_domain_along(world: World) -> None:
    waiter = world.dom0.waiter()
    virq = world.dom0.bind_virq(waiter)
    guest = world.guest()
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    pidfd = os.pidfd_open(child)
    world.dom0.set_init(1, pidfd)
    with pytest.raises(AlreadyExists):
        world.dom0.set_init(1, pidfd)
    with pytest.raises(HypervisorError):
        world.dom0.set_init(0, pidfd)
    with pytest.raises(NotFound):
        world.dom0.set_init(9, pidfd)
    os.kill(child, 9)
    assert waiter.wait(virq, timeout_s=DEADLINE_S) is WaitResult.EVENT
    assert len(world.dom0.list_domains(dying=True)) == 1
    with pytest.raises(HypervisorGone):
        guest.info()
    os.waitpid(child, 0)
    os.close(pidfd)


def test_an_end_that_is_noticed_twice_in_one_round_is_one_end(world: World) -> None:
    """The request to destroy and the death of the domain's processes reach the broker at the same moment."""
    for n in range(20):
        guest = world.guest(f"guest-{n}")
        children = [subprocess.Popen(["sleep", "1000"]) for _ in range(2)]
        pidfds = [os.pidfd_open(child.pid) for child in children]
        world.dom0.set_init(guest.domid, pidfds[0])
        world.dom0.add_process(guest.domid, pidfds[1])

        def all_at_once(pidfds: list[int] = pidfds, domid: int = guest.domid, order: int = n % 2) -> int:
            """Runs in the broker's thread, which so hears of everything only afterwards."""
            request = new_message(Op.DOMAIN_DESTROY, 2**31)
            request.domain.domid = domid
            steps = [lambda: lib.pv_hv_send(world.dom0.link._socket.fileno(), request, -1)]  # type: ignore[union-attr]
            steps.insert(order, lambda: [signal.pidfd_send_signal(fd, signal.SIGKILL) for fd in pidfds])
            for step in steps:
                step()
            for fd in pidfds:
                select.select([fd], [], [])
            return 0

        world.broker._in_loop(all_at_once)
        world.dom0.link._seq = 2**31
        assert [info.domid for info in world.dom0.list_domains()] == [0]
        for child, fd in zip(children, pidfds, strict=True):
            child.wait()
            os.close(fd)


def test_destroying_a_domain_kills_its_init_process(world: World) -> None:
    world.guest()
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    pidfd = os.pidfd_open(child)
    world.dom0.set_init(1, pidfd)
    os.close(pidfd)
    world.dom0.destroy_domain(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_only_a_pidfd_is_an_init_process(world: World) -> None:
    world.guest()
    with open(os.devnull) as other, pytest.raises(HypervisorError, match="no pidfd"):
        world.dom0.set_init(1, other.fileno())


def test_processes_reach_xenstored_with_their_label(world: World) -> None:
    guest = world.guest()
    with pytest.raises(NotFound, match="no xenstored"):
        guest.store_connection()
    with world.dom0.register_store() as store:
        with pytest.raises(AlreadyExists):
            world.dom0.register_store()
        with guest.store_connection() as client, world.dom0.store_connection() as own:
            domid, served = store.next()
            own_domid, own_served = store.next()
            assert (domid, own_domid) == (1, 0)
            client.send(b"hello")
            assert served.recv(10) == b"hello"
            served.close()
            own_served.close()
            assert own.recv(1) == b""
        world.dom0.destroy_domain(1)
        assert len(world.dom0.list_domains(dying=True)) == 2, "xenstored has not forgotten it yet"
        store.released(1)
        world.dom0.info()
        while len(world.dom0.list_domains(dying=True)) != 1:
            pass
    with pytest.raises(NotFound):
        world.dom0.store_connection()


def test_a_xenstored_that_takes_nothing_is_busy_not_a_hang(world: World) -> None:
    clients: list[socket.socket] = []
    with world.dom0.register_store() as store:
        with pytest.raises(HypervisorError) as info:
            clients.extend(world.dom0.store_connection() for _ in range(10000))
        assert info.value.name == "EAGAIN"
        store.next()[1].close()
    for client in clients:
        client.close()
