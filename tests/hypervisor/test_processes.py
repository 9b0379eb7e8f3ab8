# SPDX-License-Identifier: MIT
"""Real processes: a broker of its own, guests, and kill -9 of each of them."""

import os
import resource
from pathlib import Path

import pytest

from paravirt.errors import AlreadyExists, HypervisorError, HypervisorGone, NotFound, ResourceLimit
from paravirt.hypervisor.client import DomainState, Hypervisor, PortState
from paravirt.hypervisor.server import BrokerServer
from paravirt.ring.event import WaitResult

from .actor import Actor
from .conftest import World

DEADLINE_S = 30


def wait_for_event(waiter, channel) -> None:  # type: ignore[no-untyped-def]
    result = waiter.wait(channel, timeout_s=DEADLINE_S)
    while result is WaitResult.STALE:
        result = waiter.wait(channel, timeout_s=DEADLINE_S)
    assert result is WaitResult.EVENT


@pytest.mark.parametrize("isolated", [False, True], ids=["shared", "isolated"])
def test_three_processes_share_a_page_and_a_channel(tmp_path: Path, isolated: bool) -> None:
    with Actor("broker", tmp_path), Hypervisor.connect(tmp_path / "hypervisor.sock") as dom0:
        dom0.create_domain("guest", isolated=isolated)
        with Actor("guest", tmp_path / "domains/1/hypervisor.sock") as guest:
            domid, gref, port = map(int, guest.words)
            waiter = dom0.waiter()
            channel = dom0.bind_interdomain(waiter, domid, port)
            channel.take_pending()
            with dom0.foreign_arena(domid, gref) as arena, arena.map_pages([gref]) as pages:
                view = pages.view
                for value in range(1, 201):
                    view[0] = value
                    channel.notify()
                    wait_for_event(waiter, channel)
                    assert view[1] == value
                view[0] = 255
                channel.notify()
            assert guest.close() == 0
        assert dom0.list_domains()[1].connections == 0
        assert dom0.list_domains()[1].state is DomainState.RUNNING, "the end of a socket is no end of a domain"


def test_kill_of_a_mapper_clears_its_pins_and_tells_the_granter(world: World) -> None:
    guest = world.guest()
    waiter = guest.waiter()
    channel = guest.alloc_unbound(waiter, 0)
    arena = guest.create_arena(0, 8)
    run = arena.allocate(8)
    grefs = [arena.grant(run.gref + page) for page in range(8)]
    run.view[3 * 4096] = 1
    fd = world.broker.connect(0)
    with Actor("mapper", fd, 1, channel.port, *grefs[3:6], pass_fds=[fd]) as mapper:
        os.close(fd)
        assert channel.status().remote_port == int(mapper.words[0])
        assert [arena.revoke(gref) for gref in grefs] == [True] * 3 + [False] * 3 + [True] * 2
        assert world.dom0.list_domains()[0].maps == 1
        mapper.kill()
        wait_for_event(waiter, channel)
        assert run.view[3 * 4096] == 0
        assert all(arena.revoke(gref) for gref in grefs[3:6])
        assert channel.status().state is PortState.UNBOUND
        arena.free(run)
        assert arena.statistics().free_pages == 8
    dom0 = world.dom0.list_domains()[0]
    assert (dom0.maps, dom0.ports, dom0.connections) == (0, 0, 1)


def test_kill_of_one_mapper_keeps_the_pins_of_another(world: World) -> None:
    guest = world.guest()
    channels = [guest.alloc_unbound(guest.waiter(), 0) for _ in range(2)]
    arena = guest.create_arena(0, 4)
    run = arena.allocate(4)
    grefs = [arena.grant(run.gref + page) for page in range(4)]
    fds = [world.broker.connect(0) for _ in range(2)]
    with (
        Actor("mapper", fds[0], 1, channels[0].port, *grefs[:3], pass_fds=fds[:1]) as first,
        Actor("mapper", fds[1], 1, channels[1].port, *grefs[2:], pass_fds=fds[1:]),
    ):
        for fd in fds:
            os.close(fd)
        first.kill()
        wait_for_event(channels[0].waiter, channels[0])
        assert [arena.revoke(gref) for gref in grefs] == [True, True, False, False]


def test_kill_of_a_guest_frees_what_it_had(tmp_path: Path) -> None:
    with BrokerServer(tmp_path), Hypervisor.connect(tmp_path / "hypervisor.sock") as dom0:
        waiter = dom0.waiter()
        virq = dom0.bind_virq(waiter)
        before = dom0.info()
        dom0.create_domain("guest")
        with Actor("init") as init, Actor("crowd", tmp_path / "domains/1/hypervisor.sock", 50) as crowd:
            pidfd = os.pidfd_open(init.process.pid)
            dom0.set_init(1, pidfd)
            os.close(pidfd)
            info = dom0.list_domains()[1]
            assert (info.ports, info.arenas, info.pages) == (50, 50, 100)
            init.kill()
            wait_for_event(waiter, virq)
            assert len(dom0.list_domains(dying=True)) == 1
            assert crowd.process.poll() is None, "it lives, but its connection is closed"
        after = dom0.info()
        assert after.used_bytes == before.used_bytes
        assert after.connections == 1
        assert not (tmp_path / "domains/1").exists()


def test_kill_of_the_broker_leaves_running_channels_and_ends_calls(tmp_path: Path) -> None:
    """Memory and bells are held by the ends: data and events go on, calls say that the hypervisor is gone."""
    with Actor("broker", tmp_path) as broker, Hypervisor.connect(tmp_path / "hypervisor.sock") as dom0:
        dom0.create_domain("guest", isolated=True)
        with Actor("guest", tmp_path / "domains/1/hypervisor.sock") as guest:
            domid, gref, port = map(int, guest.words)
            waiter = dom0.waiter()
            channel = dom0.bind_interdomain(waiter, domid, port)
            channel.take_pending()
            arena = dom0.foreign_arena(domid, gref)
            pages = arena.map_pages([gref])
            for value in range(1, 101):
                if value == 50:
                    broker.kill()
                pages.view[0] = value
                channel.notify()
                wait_for_event(waiter, channel)
                assert pages.view[1] == value
            for call in (dom0.info, dom0.waiter, lambda: dom0.create_domain("x"), dom0.store_connection):
                with pytest.raises(HypervisorGone):
                    call()
            with pytest.raises(NotFound):
                Hypervisor.connect(tmp_path / "hypervisor.sock")
            pages.view[0] = 255
            channel.notify()
            assert guest.close() == 0
        for each in (pages, arena, channel, waiter, dom0):
            each.close()
    with Actor("broker", tmp_path), Hypervisor.connect(tmp_path / "hypervisor.sock") as dom0:
        assert len(dom0.list_domains()) == 1, "a new broker starts at the stale socket"


def test_a_broker_out_of_descriptors_refuses_and_recovers(tmp_path: Path) -> None:
    """Whatever step of an operation gets no descriptor: a clean refusal, and nothing of it stays."""
    with Actor("broker", tmp_path) as broker, Hypervisor.connect(tmp_path / "hypervisor.sock") as dom0:
        pid = broker.process.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        dom0.create_domain("guest", isolated=True)
        guest = Hypervisor.from_fd(dom0.domain_socket(1))
        arena = guest.create_arena(0, 2)
        waiters = {hypervisor: hypervisor.waiter() for hypervisor in (dom0, guest)}
        pidfd = os.pidfd_open(pid)

        def everything() -> int:
            """Each operation that takes descriptors of the broker, undone at once; how many were refused."""
            refusals = 0
            for call in (
                lambda: dom0.destroy_domain(dom0.create_domain("other").domid),
                lambda: guest.create_arena(0, 1).close(),
                lambda: dom0.foreign_arena(1, arena.base).close(),
                lambda: guest.alloc_unbound(waiters[guest], 0).close(),
                lambda: dom0.bind_ipi(waiters[dom0]).close(),
                lambda: os.close(dom0.domain_socket(1)),
                lambda: dom0.set_init(0, pidfd),
                lambda: Hypervisor.connect(tmp_path / "domains/1/hypervisor.sock").close(),
                lambda: dom0.register_store().close(),
            ):
                try:
                    call()
                except ResourceLimit:
                    refusals += 1
                except (HypervisorError, HypervisorGone, AlreadyExists):
                    pass
                settle()
            return refusals

        def settle() -> None:
            while dom0.info().connections > 2:
                pass

        everything()
        used = dom0.info().used_bytes
        held = os.listdir(f"/proc/{pid}/fd")
        refusals = 0
        for spare in range(10):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(held) + spare, hard))
            refusals += everything()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert refusals > 10
        assert everything() == 0
        info = dom0.info()
        assert (info.used_bytes, info.domains, info.connections) == (used, 2, 2)
        assert len(os.listdir(f"/proc/{pid}/fd")) == len(held)
        os.close(pidfd)
        guest.close()


def test_a_registered_xenstored_that_is_killed_makes_room_for_the_next(world: World) -> None:
    store = world.connect(0)
    store.register_store()
    store.link.close()
    for registration in list(store._registrations):
        registration.close()
    while world.dom0.info().has_store:
        pass
    world.dom0.register_store().close()


def test_nothing_is_left_in_dev_shm(tmp_path: Path) -> None:
    with Actor("broker", tmp_path) as broker, Hypervisor.connect(tmp_path / "hypervisor.sock") as dom0:
        dom0.create_domain("guest", isolated=False)
        with Actor("crowd", tmp_path / "domains/1/hypervisor.sock", 3) as crowd:
            crowd.kill()
        broker.kill()
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("paravirt-")]
