# SPDX-License-Identifier: MIT
"""Domains that are suspended and resumed: new rings and ports, what was in flight again, and callers that only wait."""

import threading
from collections.abc import Iterator

import pytest

import paravirt
from paravirt.backend.service import BackendService
from paravirt.errors import Closed, PeerError, TimedOut
from paravirt.frontend.vbd import Disk
from paravirt.host import vbd
from paravirt.protocol.xenbus import XenbusState
from paravirt.xenstore import xenbus
from tests.echo_device import ADD, EchoBack, EchoFront

DEADLINE_S = 20.0


@pytest.fixture
def disk(host: paravirt.Host, domain: paravirt.Domain) -> Iterator[Disk]:
    host.attach_disk(domain, "1M", driver="memory")
    with domain.open_disk() as opened:
        yield opened


def state_of(disk: Disk) -> XenbusState:
    return xenbus.read_state(disk._store, disk._path.frontend)


def test_a_disk_goes_on_over_a_new_ring(disk: Disk) -> None:
    disk.pwrite(b"x" * 4096, 8192)
    disk.suspend()
    disk.suspend()
    assert state_of(disk) is XenbusState.CONNECTED
    assert disk.statistics().ring is None
    with pytest.raises(TimedOut):
        disk.pread(4096, 8192, timeout_s=0.05)
    disk.resume()
    disk.resume()
    assert state_of(disk) is XenbusState.CONNECTED
    assert disk.pread(4096, 8192) == b"x" * 4096
    counted = disk.statistics()
    assert counted.ring is not None
    assert counted.ring.requests == 1  # the one whose caller waited no longer was never sent
    assert (counted.reconnects, counted.in_flight, counted.held_slots) == (1, 0, 0)


def test_what_is_in_flight_is_sent_again(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """It was under way in the backend when the domain was suspended; it is answered to the one who asked, once."""
    host.attach_disk(domain, "1M", driver="delay,read=200ms:memory")
    with domain.open_disk() as disk:
        disk.pwrite(b"y" * 4096, 0)
        found: list[bytes] = []
        caller = threading.Thread(target=lambda: found.append(disk.pread(4096, 0, timeout_s=DEADLINE_S)))
        caller.start()
        while not disk.statistics().in_flight:
            threading.Event().wait(0.001)
        disk.suspend()
        assert disk.statistics().in_flight == 1
        disk.resume()
        caller.join(DEADLINE_S)
        assert found == [b"y" * 4096]
        counted = disk.statistics()
        assert (counted.reissued, counted.reads, counted.in_flight) == (1, 1, 0)


def test_callers_in_threads_see_only_a_pause(disk: Disk) -> None:
    done, wrong = threading.Event(), list[object]()

    def work(k: int) -> None:
        version = 0
        try:
            while not done.is_set():
                version += 1
                data = (k << 32 | version).to_bytes(8, "little") * 512
                disk.write_many([((k * 8 + i) * 4096, data) for i in range(8)], timeout_s=DEADLINE_S)
                found = disk.read_many([(k * 8 + i) * 4096 for i in range(8)], 4096, timeout_s=DEADLINE_S)
                if found != [data] * 8:
                    wrong.append("wrong data")
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for _ in range(40):
        done.wait(0.003)
        disk.suspend()
        done.wait(0.001)
        disk.resume(timeout_s=DEADLINE_S)
    done.set()
    for worker in workers:
        worker.join(DEADLINE_S)
    assert wrong == []
    assert disk.statistics().reconnects == 40


def test_all_devices_of_a_domain(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach(domain, EchoBack)
    for device in "xvda", "xvdb":
        host.attach_disk(domain, "1M", driver="memory", device=device)
    with domain.open_disk("xvda") as first, domain.open_disk("xvdb") as second, domain.open(EchoFront) as echo:
        first.pwrite(b"1" * 512, 0)
        second.pwrite(b"2" * 512, 0)
        domain.suspend()
        for disk in first, second:
            with pytest.raises(TimedOut):
                disk.pread(512, 0, timeout_s=0.02)
        waiting = echo.send(operation=ADD, value=5)
        domain.resume()
        assert first.pread(512, 0) == b"1" * 512
        assert second.pread(512, 0) == b"2" * 512
        assert waiting.result(DEADLINE_S).value == 6


def test_a_backend_that_is_another_one_by_then(host: paravirt.Host, domain: paravirt.Domain, tmp_path: object) -> None:
    image = f"{tmp_path}/image"
    with open(image, "wb") as made:
        made.truncate(1 << 20)
    host.attach_disk(domain, image)
    with domain.open_disk() as disk:
        disk.pwrite(b"x" * 512, 0)
        disk.suspend()
        host._backend.stop()
        with BackendService(host.hypervisor, host.store):
            disk.resume(timeout_s=DEADLINE_S)
            assert disk.pread(512, 0) == b"x" * 512
            disk.close()


def test_no_backend_by_then(host: paravirt.Host, domain: paravirt.Domain, disk: Disk) -> None:
    """The resume does not wait for ever, and ends when there is a backend."""
    disk.suspend()
    host._backend.stop()
    with pytest.raises(TimedOut, match=r"did not connect again in [0-9.]+ s: the backend is in state CONN"):
        disk.resume(timeout_s=0.1)
    with BackendService(host.hypervisor, host.store):
        assert disk.pread(512, 0, timeout_s=DEADLINE_S) == bytes(512)
        disk.close()


def test_a_device_taken_away_meanwhile(host: paravirt.Host, domain: paravirt.Domain, disk: Disk) -> None:
    """By force, as nobody answers while it is suspended."""
    disk.suspend()
    vbd.detach(host.store, domain.domid, "xvda", timeout_s=0.1)
    with pytest.raises(Closed, match="is closed"):
        disk.resume()
    with pytest.raises(paravirt.errors.ParavirtError):
        disk.pread(512, 0)
    assert domain.disks() == []


def test_a_device_that_is_being_taken_away(host: paravirt.Host, domain: paravirt.Domain, disk: Disk) -> None:
    """The resumed frontend answers: nothing has to be done by force."""
    disk.suspend()
    taker = threading.Thread(target=host.detach_disk, args=(domain,))
    taker.start()
    while xenbus.read_key(host.store, f"{disk._path.backend}/online") == "1":
        threading.Event().wait(0.001)
    with pytest.raises(Closed):
        disk.resume(timeout_s=DEADLINE_S)
    taker.join(5.0)
    assert not taker.is_alive()
    assert domain.disks() == []


def test_a_backend_of_another_domain(domain: paravirt.Domain, disk: Disk) -> None:
    disk.suspend()
    domain.store.write(f"{disk._path.frontend}/backend", "/local/domain/7/backend/vbd/1/51712")
    with pytest.raises(PeerError, match="has another backend than before"):
        disk.resume()


def test_closing_while_suspended(host: paravirt.Host, domain: paravirt.Domain, disk: Disk) -> None:
    disk.suspend()
    disk.close()
    for call in disk.suspend, disk.resume:
        with pytest.raises(Closed):
            call()
    with domain.open_disk() as again:
        assert again.pread(512, 0) == bytes(512)
