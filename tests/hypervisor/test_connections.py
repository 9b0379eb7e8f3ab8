# SPDX-License-Identifier: MIT
"""How processes reach the broker, and what is left when either side goes."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from paravirt.errors import (
    AlreadyExists,
    Closed,
    HypervisorGone,
    InvalidRequest,
    NotFound,
)
from paravirt.hypervisor.client import (
    Hypervisor,
)
from paravirt.hypervisor.server import BrokerServer
from paravirt.ring.event import WaitResult

from .conftest import World

DEADLINE_S = 30


def test_listening_sockets_of_a_run_directory(tmp_path: Path) -> None:
    with BrokerServer(tmp_path) as broker:
        with pytest.raises(AlreadyExists):
            BrokerServer(tmp_path)
        with Hypervisor.connect(tmp_path / "hypervisor.sock") as dom0:
            dom0.create_domain("guest")
            home = tmp_path / "domains" / "1"
            path = home / "hypervisor.sock"
            assert path.stat().st_mode & 0o777 == 0o600
            with Hypervisor.connect(path) as guest:
                assert guest.domid == 1
            dom0.destroy_domain(1)
            assert not home.exists()
            with pytest.raises(NotFound):
                Hypervisor.connect(path)
        broker.stop()
    assert not (tmp_path / "hypervisor.sock").exists()


def test_stale_sockets_are_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    path = tmp_path / "hypervisor.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(path))
    with BrokerServer(tmp_path), Hypervisor.connect(path) as dom0:
        assert dom0.domid == 0
    path.write_text("mine")
    with pytest.raises(AlreadyExists):
        BrokerServer(tmp_path)
    assert path.read_text() == "mine"
    with pytest.raises(InvalidRequest, match="107 bytes"):
        BrokerServer(tmp_path / ("x" * 100))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a socket to another user")
def test_a_domains_socket_belongs_to_its_uid(tmp_path: Path) -> None:
    with BrokerServer(tmp_path), Hypervisor.connect(tmp_path / "hypervisor.sock") as dom0:
        dom0.create_domain("guest", uid=4242)
        assert (tmp_path / "domains/1/hypervisor.sock").stat().st_uid == 4242


def test_connections_by_environment(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world.guest()
    monkeypatch.setenv("PARAVIRT_FD", str(world.dom0.domain_socket(1)))
    with Hypervisor.from_environment() as guest:
        assert guest.domid == 1
    with pytest.raises(NotFound):
        Hypervisor.from_environment()
    monkeypatch.setenv("PARAVIRT_SOCKET", str(tmp_path / "none"))
    with pytest.raises(NotFound, match="no hypervisor runs"):
        Hypervisor.from_environment()
    with open(os.devnull) as other, pytest.raises(InvalidRequest):
        Hypervisor.from_fd(other.fileno())


def test_everything_closes_after_the_broker_is_gone(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    theirs = guest.alloc_unbound(waiter, 0)
    dom0_waiter = world.dom0.waiter()
    ours = world.dom0.bind_interdomain(dom0_waiter, 1, theirs.port)
    ours.take_pending()
    theirs.status()
    arena = guest.create_arena(0, 4)
    gref = arena.grant(arena.allocate(1).gref)
    foreign = world.dom0.foreign_arena(1, gref)
    pages = foreign.map_pages([gref])
    pages.set_unmap_notify(port=ours.port)
    world.broker.stop()
    for call in (guest.info, guest.waiter, lambda: guest.create_arena(0, 1), lambda: guest.alloc_unbound(waiter, 0)):
        with pytest.raises(HypervisorGone):
            call()
    with pytest.raises(Closed):
        world.broker.connect(0)
    # What is there goes on.
    theirs.notify()
    assert dom0_waiter.wait(ours, timeout_s=DEADLINE_S) is WaitResult.EVENT
    foreign.mapper.map(gref)
    foreign.mapper.unmap(gref)
    for each in (pages, foreign, arena, ours, theirs, waiter, dom0_waiter, guest, world.dom0):
        each.close()
        each.close()


def test_use_after_close_and_in_a_forked_child(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 2)
    run = arena.allocate(1)
    waiter = guest.waiter()
    channel = guest.alloc_unbound(waiter, 0)
    child = os.fork()
    if child == 0:
        os._exit(_count_closed(guest, lambda: run.view, channel.notify, waiter.wait, lambda: arena.grant(run.gref)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    guest.close()
    guest.close()
    assert _count_closed(guest, lambda: run.view, channel.notify, waiter.wait, lambda: arena.allocate(1)) == 5
    assert "closed" in repr(guest)


def _count_closed(guest: Hypervisor, *calls: Callable[[], object]) -> int:
    n = 0
    for call in (guest.info, *calls):
        try:
            call()
        except Closed:
            n += 1
    return n


def test_calls_from_many_threads(world: World) -> None:
    guest = world.guest()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with guest.waiter() as waiter:
                for _ in range(50):
                    channel = guest.alloc_unbound(waiter, 0)
                    with guest.create_arena(0, 2) as arena:
                        arena.grant(arena.allocate(2).gref)
                    channel.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    info = world.dom0.list_domains()[1]
    assert (info.ports, info.arenas, info.pages) == (0, 0, 0)


def test_broker_refuses_nonsense_settings() -> None:
    with pytest.raises(InvalidRequest, match="provider"):
        BrokerServer(provider="paper")  # type: ignore[arg-type]
    idle = BrokerServer()
    with pytest.raises(Closed):
        idle.connect(0)
    idle.stop()
    idle.stop()
    assert "closed" in repr(idle)
