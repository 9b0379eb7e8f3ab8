# SPDX-License-Identifier: MIT
"""A thousand of everything, made and ended: descriptors, threads and mappings are counted exactly."""

import gc
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from paravirt.errors import HypervisorError, ParavirtError
from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.server import BrokerServer
from tests.eventually import eventually, steady

from .conftest import World, settle

ROUNDS = 1000


class Held(NamedTuple):
    """What this process holds."""

    descriptors: int
    threads: int
    shared_mappings: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        maps = Path("/proc/self/maps").read_text().splitlines()
        ours = sum("memfd:paravirt" in line or "/dev/shm/paravirt" in line for line in maps)
        return cls(len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), ours)


def test_domains(world: World) -> None:
    world.dom0.destroy_domain(world.dom0.create_domain("warm").domid)
    used, before = world.dom0.info().used_bytes, Held.now()
    for n in range(ROUNDS):
        world.dom0.destroy_domain(world.dom0.create_domain(f"guest-{n % 7}", isolated=world.isolated).domid)
    assert Held.now() == before
    assert world.dom0.info().used_bytes == used
    assert len(world.dom0.list_domains(dying=True)) == 1


def test_ports(world: World) -> None:
    guest = world.guest()
    guest_waiter, dom0_waiter = guest.waiter(), world.dom0.waiter()
    used, before = world.dom0.info().used_bytes, Held.now()
    for _ in range(ROUNDS):
        theirs = guest.alloc_unbound(guest_waiter, 0)
        ours = world.dom0.bind_interdomain(dom0_waiter, 1, theirs.port)
        theirs.notify()
        ours.close()
        theirs.close()
    assert Held.now() == before
    assert world.dom0.info().used_bytes == used


def test_arenas(world: World) -> None:
    guest = world.guest()
    used, before = world.dom0.info().used_bytes, Held.now()
    for _ in range(ROUNDS):
        with guest.create_arena(0, 4) as arena:
            run = arena.allocate(3)
            grefs = [arena.grant(run.gref + page) for page in (2, 0)]
            with world.dom0.foreign_arena(1, grefs[0]) as foreign, foreign.map_pages(grefs) as pages:
                pages.view[0] = 1
    assert Held.now() == before
    assert world.dom0.info().used_bytes == used


def test_waiters(world: World) -> None:
    guest = world.guest()
    used, before = world.dom0.info().used_bytes, Held.now()
    for _ in range(ROUNDS):
        with guest.waiter() as waiter:
            guest.alloc_unbound(waiter, 0)
    assert Held.now() == before
    assert world.dom0.info().used_bytes == used


def test_connections_that_close_nothing_themselves(world: World) -> None:
    world.guest()
    world.connect(1).close()
    settle(world)
    used, before = world.dom0.info().used_bytes, Held.now()
    for _ in range(ROUNDS // 5):
        connection = Hypervisor.from_fd(world.broker.connect(1))
        waiter = connection.waiter()
        connection.alloc_unbound(waiter, 0)
        connection.create_arena(0, 2).allocate(1)
        connection.reserved_page(1)
        connection.close()
    settle(world)
    world.dom0.destroy_domain(1)
    after = Held.now()
    # The guest's own connection is one socket less at the broker's end.
    assert after.threads == before.threads
    assert after.descriptors <= before.descriptors
    assert after.shared_mappings <= before.shared_mappings
    assert world.dom0.info().used_bytes < used


@pytest.mark.parametrize("what", ["port", "arena", "map", "domain", "store"])
def test_refused_calls(world: World, what: str) -> None:
    """What is refused leaves nothing behind, on neither side."""
    guest = world.guest()
    waiter = guest.waiter()
    calls: dict[str, Callable[[], object]] = {
        "port": lambda: guest.bind_interdomain(waiter, 0, 77),
        "arena": lambda: guest.create_arena(0, 2**31),
        "map": lambda: guest.foreign_arena(0, 1),
        "domain": lambda: world.dom0.create_domain("guest"),
        "store": guest.store_connection,
    }
    used, before = world.dom0.info().used_bytes, Held.now()
    for _ in range(ROUNDS // 10):
        with pytest.raises(ParavirtError):
            calls[what]()
    assert Held.now() == before
    assert world.dom0.info().used_bytes == used


def test_whole_brokers(tmp_path: Path) -> None:
    def once() -> None:
        with BrokerServer(tmp_path) as broker, Hypervisor.connect(tmp_path / "hypervisor.sock") as dom0:
            domid = dom0.create_domain("guest").domid
            guest = Hypervisor.from_fd(broker.connect(domid))
            dom0.bind_interdomain(dom0.waiter(), domid, guest.alloc_unbound(guest.waiter(), 0).port)
            arena = guest.create_arena(0, 2)
            dom0.foreign_arena(domid, arena.base)
            dom0.register_store()
            guest.store_connection().close()
            with subprocess.Popen(["sleep", "1000"]) as init:
                pidfd = os.pidfd_open(init.pid)
                dom0.set_init(domid, pidfd)
                os.close(pidfd)
                guest.close()
                dom0.destroy_domain(domid)  # which kills its init

    once()
    before = steady(Held.now)
    for _ in range(20):
        once()
    eventually(lambda: Held.now() == before, "as much is held as before")
    assert list(tmp_path.glob("domains/*")) == []


def test_out_of_descriptors_is_a_clean_refusal(world: World) -> None:
    """The broker (and we, in the same process) have no descriptor left: each call fails cleanly and nothing is lost."""
    guest = world.guest()
    waiter = guest.waiter()
    before = Held.now()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    try:
        for spare in range(8):
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + spare, hard))
            for call in (
                lambda: guest.create_arena(0, 1).close(),
                lambda: guest.alloc_unbound(waiter, 0).close(),
                lambda: guest.waiter().close(),
                lambda: world.dom0.domain_socket(1),
            ):
                try:
                    call()
                except (ParavirtError, OSError):
                    pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with guest.create_arena(0, 1), guest.alloc_unbound(waiter, 0):
        pass
    assert Held.now().shared_mappings == before.shared_mappings


def test_a_refusal_names_its_code(world: World) -> None:
    guest = world.guest()
    with pytest.raises(HypervisorError) as info:
        guest.bind_interdomain(guest.waiter(), 0, 1)
    assert (info.value.code, info.value.name) == (22, "EINVAL")
