# SPDX-License-Identifier: MIT
"""Disks whose frontends leave pages granted and whose backends leave them mapped; and ends of which only one does."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import paravirt
from paravirt.backend.c_engine import EngineName
from paravirt.backend.service import BackendService
from paravirt.frontend.vbd import Disk
from paravirt.hypervisor.client import Arena
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring._core import lib
from paravirt.xenstore import xenbus

DEADLINE_S = 20.0
SIZE = 1 << 20
Opener = Callable[..., tuple[paravirt.Host, DevicePath, Disk]]


@pytest.fixture
def opener(tmp_path: Path, vbd_engine: EngineName) -> Iterator[Opener]:
    """`opener(backend, frontend)`: a host, a disk's path, and the disk, open; whether each end has them."""
    hosts: list[paravirt.Host] = []

    def opened(backend: bool, frontend: bool = True) -> tuple[paravirt.Host, DevicePath, Disk]:
        hosts.append(host := paravirt.Host(engine=vbd_engine, persistent=backend))
        domain = host.create_domain("guest")
        image = tmp_path / f"{len(hosts)}.img"
        image.write_bytes(bytes(SIZE))
        path = host.attach_disk(domain, image)
        disk = domain.open_disk(persistent=frontend)
        assert isinstance(disk, Disk)
        return host, path, disk

    yield opened
    for host in hosts:
        host.close()


def kept(host: paravirt.Host) -> int:
    """Pages that backends keep mapped."""
    return sum(device.persistent_grants for device in host._backend.statistics().values())


def arena_of(disk: Disk) -> Arena:
    arena = disk._queues[0].end.arena
    assert arena is not None
    return arena


def in_use(disk: Disk) -> int:
    """Grants of a frontend that its entries say are mapped, but those of the ring."""
    arena = arena_of(disk)
    granter = arena.granter.core
    return sum(lib.pv_grant_in_use(granter, gref) != 0 for gref in range(arena.base, arena.base + arena.n_pages))


def exercise(disk: Disk, seed: int = 1, turns: int = 60) -> None:
    """Random reads and writes of every length beside a model."""
    chance = np.random.default_rng(seed)
    model = bytearray(disk.pread(SIZE, 0))
    for _ in range(turns):
        first = int(chance.integers(0, SIZE // 512 - 1))
        n = min(int(chance.choice([1, 3, 8, 88, 200, 1000])), SIZE // 512 - first)
        place = slice(first * 512, (first + n) * 512)
        if chance.integers(2):
            model[place] = data = chance.bytes(n * 512)
            disk.pwrite(data, first * 512)
        else:
            assert disk.pread(n * 512, first * 512) == model[place]
    assert disk.pread(SIZE, 0) == model


@pytest.mark.parametrize("backend", [False, True])
@pytest.mark.parametrize("frontend", [False, True])
def test_both_ends_have_to_say_it(opener: Opener, backend: bool, frontend: bool) -> None:
    host, path, disk = opener(backend, frontend)
    agreed = backend and frontend
    assert xenbus.read_key(host.store, f"{path.backend}/feature-persistent") == str(int(backend))
    assert xenbus.read_key(host.store, f"{path.frontend}/feature-persistent") == str(int(agreed))
    exercise(disk)
    assert (kept(host) > 0) is agreed
    ring_pages = disk.n_queues << disk._queues[0].end.order
    assert in_use(disk) == ring_pages + kept(host)


def test_from_backends_that_keep_pages_to_such_that_do_not_and_back(opener: Opener, vbd_engine: EngineName) -> None:
    """With requests in flight all the time."""
    host, _, disk = opener(True)
    service, wrong, done = host._backend, [], threading.Event()

    def work() -> None:
        try:
            for seed in range(1000):
                if done.is_set():
                    return
                exercise(disk, seed, turns=8)
        except Exception as error:
            wrong.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    for turn in range(12):
        done.wait(0.05)
        service.stop()
        service = BackendService(host.hypervisor, host.store, persistent=turn % 3 == 1)
        service.start()
    done.set()
    worker.join(DEADLINE_S)
    assert wrong == []
    disk.pread(512, 0)
    disk.close()
    service.stop()


def test_more_pages_than_a_backend_keeps(vbd_engine: EngineName) -> None:
    """A ring of 16 pages has 5632 of its own; a backend keeps 1056."""
    size = 4 << 20
    with paravirt.Host(engine=vbd_engine, persistent=True) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, str(size), driver="memory")
        with domain.open_disk(ring_page_order=4) as disk:
            model = os.urandom(size)
            writes = [(at, model[at : at + 45056]) for at in range(0, size - 45056, 45056)]
            rest = size - 45056 * len(writes)
            disk.write_many([*writes, (size - rest, model[size - rest :])])
            for _ in range(3):
                threads = [
                    threading.Thread(target=disk.read_many, args=([at for at, _ in writes], 45056)) for _ in "abcd"
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert kept(host) <= lib.PV_BLKIF_PERSISTENT_GRANTS
            assert disk.pread(size, 0) == model
