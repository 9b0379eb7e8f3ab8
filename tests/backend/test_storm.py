# SPDX-License-Identifier: MIT
"""Peers of a block device that send events without work: they wake the other side less and less, and I/O goes on."""

from collections.abc import Callable, Iterator

import pytest

import paravirt
from paravirt.backend.c_engine import EngineName
from paravirt.frontend.vbd import Disk
from paravirt.ring.event import EventPort

STORM = 20_000
DEADLINE_S = 20.0


@pytest.fixture
def host(vbd_engine: EngineName) -> Iterator[paravirt.Host]:
    with paravirt.Host(engine=vbd_engine) as running:
        yield running


@pytest.fixture
def disk(host: paravirt.Host) -> Iterator[Disk]:
    domain = host.create_domain("guest")
    host.attach_disk(domain, "1M", driver="memory")
    with domain.open_disk() as opened:
        yield opened


def ends(host: paravirt.Host, disk: Disk) -> tuple[EventPort, EventPort]:
    """Event channels of the frontend and of the backend."""
    (device,) = host._backend._devices.values()
    (connection,) = device._connections  # type: ignore[attr-defined]
    assert disk.queue.end.channel is not None
    port: EventPort = connection.port
    return disk.queue.end.channel, port


@pytest.mark.parametrize("pick", [lambda ports: ports, lambda ports: ports[::-1]], ids=["frontend", "backend"])
def test_a_storm_of_one_side_wakes_the_other_a_few_times(
    host: paravirt.Host, disk: Disk, pick: Callable[[tuple[EventPort, EventPort]], tuple[EventPort, EventPort]]
) -> None:
    sender, receiver = pick(ends(host, disk))
    disk.pread(4096, 0, timeout_s=DEADLINE_S)
    before = receiver.statistics().received
    for _ in range(STORM):
        sender.notify()
    assert receiver.statistics().received - before < 50
    disk.pwrite(b"x" * 4096, 4096, timeout_s=DEADLINE_S)
    assert disk.pread(4096, 4096, timeout_s=DEADLINE_S) == b"x" * 4096


def test_honest_ends_are_never_late(host: paravirt.Host, disk: Disk) -> None:
    for n in range(500):
        disk.pread(4096, n % 64 * 4096, timeout_s=DEADLINE_S)
        disk.read_many([0, 8192, 4096], 4096, timeout_s=DEADLINE_S)
    for port in ends(host, disk):
        assert port.statistics().eoi_delayed_ns == 0
