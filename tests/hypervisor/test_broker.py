# SPDX-License-Identifier: MIT
"""The broker and its client, end to end over sockets: every operation, both memory providers, both doorbells."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from paravirt.errors import (
    AlreadyExists,
    Closed,
    HypervisorError,
    HypervisorGone,
    InvalidRequest,
    NotFound,
    PermissionRefused,
    ResourceLimit,
)
from paravirt.hypervisor.client import (
    VIRQ_DOM_EXC,
    XENSTORE_GREF,
    ChannelStatus,
    DomainState,
    Hypervisor,
    PortState,
    ShutdownReason,
)
from paravirt.hypervisor.rules import DOMID_SELF, Limits
from paravirt.hypervisor.server import BrokerServer
from paravirt.ring.event import NotifyResult, WaitResult
from paravirt.ring.grant import CopyOp, GrantFailed, GrantStatus

from .conftest import World

MakeWorld = Callable[..., World]
DEADLINE_S = 30


# Domains


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


# Event channels


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


# Arenas


def test_pages_are_shared_granted_and_taken_back(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 32)
    assert arena.provider == world.provider
    run = arena.allocate(3)
    grefs = [arena.grant(run.gref + page) for page in (2, 0, 1)]
    foreign = world.dom0.foreign_arena(1, grefs[0])
    assert world.dom0.foreign_arena(1, grefs[1]) is foreign
    foreign.close()
    pages = foreign.map_pages(grefs)
    for page in range(3):
        run.view[page * 4096] = page + 1
    assert [pages.view[at * 4096] for at in range(3)] == [3, 1, 2]
    pages.view[5] = 99
    assert run.view[2 * 4096 + 5] == 99
    in_order = foreign.map_pages([run.gref, run.gref + 1], read_only=True)
    assert in_order.mapping is foreign.data
    assert in_order.view.readonly
    assert not arena.revoke(run.gref)
    in_order.close()
    pages.close()
    with pytest.raises(Closed):
        _ = pages.view
    assert all(arena.revoke(gref) for gref in grefs)
    foreign.close()
    assert world.dom0.list_domains()[0].maps == 0


def test_a_bad_reference_pins_nothing(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 8)
    run = arena.allocate(2)
    arena.grant(run.gref)
    with world.dom0.foreign_arena(1, arena.base) as foreign:
        with pytest.raises(GrantFailed) as info:
            foreign.map_pages([run.gref, run.gref + 1])
        assert info.value.status is GrantStatus.GENERAL_ERROR
        with pytest.raises(InvalidRequest):
            foreign.map_pages([])
        assert foreign.mapper.statistics().pinned_pages == 0
        assert arena.revoke(run.gref)


def test_memory_made_for_somebody_else_cannot_be_mapped(world: World) -> None:
    guest, other = world.guest("a"), world.guest("b")
    arena = guest.create_arena(0, 8)
    for gref in (arena.base, arena.base + 7):
        with pytest.raises(PermissionRefused):
            other.foreign_arena(guest.domid, gref)
    with pytest.raises(HypervisorError):
        other.foreign_arena(guest.domid, arena.base + 8)
    with pytest.raises(HypervisorError):
        other.foreign_arena(guest.domid, XENSTORE_GREF)
    with pytest.raises(NotFound):
        other.foreign_arena(77, 8)


def test_a_read_only_arena_is_read_only_for_the_peer(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 4, read_only=True)
    run = arena.allocate(1)
    run.view[0] = 42
    arena.grant(run.gref)
    with world.dom0.foreign_arena(1, run.gref) as foreign:
        assert foreign.read_only
        with pytest.raises(GrantFailed):
            foreign.map_pages([run.gref])
        with foreign.map_pages([run.gref], read_only=True) as pages:
            assert pages.view[0] == 42
            assert pages.view.readonly
            with pytest.raises(PermissionRefused):
                pages.set_unmap_notify(clear_byte=0)
        assert foreign.mapper.copy_to([CopyOp(run.gref, 0, 1)], b"x") == [GrantStatus.GENERAL_ERROR]


def test_reserved_pages_are_granted_to_dom0_from_the_start(world: World) -> None:
    guest = world.guest()
    foreign = world.dom0.foreign_arena(1, XENSTORE_GREF)
    page = guest.reserved_page(XENSTORE_GREF)
    assert guest.reserved_page(XENSTORE_GREF) is page
    page.memory.view[7] = 1
    with foreign.map_pages([XENSTORE_GREF]) as pages:
        assert pages.view[7] == 1
    foreign.close()
    with pytest.raises(HypervisorError):
        guest.reserved_page(8)
    page.close()
    assert guest.reserved_page(XENSTORE_GREF).memory.view[7] == 1, "it lives as long as its domain"


def test_a_page_with_a_pin_is_not_used_again_before_it_is_gone(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 4)
    run = arena.allocate(4)
    grefs = [arena.grant(run.gref + page) for page in range(4)]
    foreign = world.dom0.foreign_arena(1, arena.base)
    pages = foreign.map_pages([grefs[1]])
    run.view[:] = b"\xff" * run.n_bytes
    arena.free(run)
    assert (arena.statistics().free_pages, arena.statistics().held_pages) == (3, 1)
    with pytest.raises(ResourceLimit):
        arena.allocate(4)
    with pytest.raises(InvalidRequest):
        arena.free(run)
    small = arena.allocate(2)
    assert small.gref == arena.base + 2
    assert not any(small.view), "zeroed"
    arena.free(small)
    pages.view[0] = 9
    pages.close()
    whole = arena.allocate(4)
    assert not any(whole.view)
    assert arena.statistics().granted_pages == 0
    foreign.close()


def test_unmap_notifications_tell_the_granter(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    theirs = guest.alloc_unbound(waiter, 0)
    backend = world.connect(0)
    ours = backend.bind_interdomain(backend.waiter(), 1, theirs.port)
    theirs.status()
    arena = guest.create_arena(0, 4)
    run = arena.allocate(4)
    grefs = [arena.grant(run.gref + page) for page in (3, 1)]
    run.view[3 * 4096 + 100] = run.view[1 * 4096 + 1] = 1
    foreign = backend.foreign_arena(1, arena.base)
    first, second = foreign.map_pages(grefs), foreign.map_pages(grefs)
    with pytest.raises(InvalidRequest):
        first.set_unmap_notify()
    with pytest.raises(InvalidRequest):
        first.set_unmap_notify(clear_byte=8192)
    with pytest.raises(HypervisorError):
        first.set_unmap_notify(port=ours.port + 1)
    first.set_unmap_notify(port=ours.port, clear_byte=100)
    second.set_unmap_notify(port=ours.port, clear_byte=4097)
    while waiter.wait(theirs, timeout_s=0) is not WaitResult.TIMEOUT:
        pass
    first.close()
    assert waiter.wait(theirs, timeout_s=DEADLINE_S) is WaitResult.EVENT
    assert (run.view[3 * 4096 + 100], run.view[1 * 4096 + 1]) == (0, 1)
    backend.link.close()  # what the kernel does when the process dies
    result = waiter.wait(theirs, timeout_s=DEADLINE_S)
    while result is WaitResult.STALE:
        result = waiter.wait(theirs, timeout_s=DEADLINE_S)
    assert result is WaitResult.EVENT
    assert run.view[1 * 4096 + 1] == 0
    assert arena.revoke(grefs[0]), "the pins of the dead process are gone"


def test_an_arena_outlives_its_owner_while_it_is_mapped(world: World) -> None:
    guest = world.guest()
    arena = guest.create_arena(0, 4)
    gref = arena.grant(arena.allocate(1).gref)
    foreign = world.dom0.foreign_arena(1, gref)
    world.dom0.destroy_domain(1)
    foreign.data.view[0] = 5
    assert [info.state for info in world.dom0.list_domains(dying=True)] == [DomainState.RUNNING, DomainState.DYING]
    assert world.dom0.create_domain("next").domid == 2
    foreign.close()
    assert [info.domid for info in world.dom0.list_domains(dying=True)] == [0, 2]


def test_quotas_and_the_budget_say_what_is_exhausted(make_world: MakeWorld) -> None:
    world = make_world(budget_bytes=100 * 4096, limits=Limits(max_pages=60, max_ports=2, max_connections=2))
    guest = world.guest()
    with pytest.raises(ResourceLimit, match="60 pages"):
        guest.create_arena(0, 61)
    guest.create_arena(0, 60)
    with pytest.raises(ResourceLimit, match="memory budget"):
        world.dom0.create_arena(1, 60)
    assert world.dom0.list_domains()[0].pages == 0
    waiter = guest.waiter()
    for _ in range(2):
        guest.alloc_unbound(waiter, 0)
    with pytest.raises(ResourceLimit, match="2 event channels"):
        guest.alloc_unbound(waiter, 0)
    world.connect(1)
    with pytest.raises(HypervisorError, match="2 connections"):
        world.connect(1)


# xenstored's link


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


# Connections


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
