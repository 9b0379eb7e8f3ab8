# SPDX-License-Identifier: MIT
"""A real frontend and what its backend does around the ends of a connection."""

import asyncio
import logging
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import paravirt
from paravirt.backend import disks
from paravirt.backend.c_engine import EngineName
from paravirt.backend.engine import EngineStatistics, PythonEngine
from paravirt.backend.service import BackendService
from paravirt.errors import AlreadyExists, InvalidRequest, IoError, PeerError
from paravirt.host import vbd
from paravirt.protocol import blkif
from paravirt.xenstore import xenbus

DEADLINE_S = 20.0


@pytest.fixture
def host(vbd_engine: EngineName) -> Iterator[paravirt.Host]:
    with paravirt.Host(engine=vbd_engine) as running:
        yield running


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def another_backend(host: paravirt.Host) -> BackendService:
    return BackendService(host.hypervisor, host.store)


def test_backends_that_come_and_go_at_any_moment(host: paravirt.Host, image: Path) -> None:
    """Threads with requests in flight, and backends that live for some milliseconds: nobody sees more than a delay."""
    domain = host.create_domain("guest")
    host.attach_disk(domain, str(image))
    disk, done, wrong = domain.open_disk(), threading.Event(), []

    def work(k: int) -> None:
        try:
            version = 0
            while not done.is_set():
                version += 1
                data = (k << 32 | version).to_bytes(8, "little") * 512
                if k == 3:  # with pages of other slots, and segments in one of them
                    disk.pwrite(data * 75, 1 << 19, timeout_s=DEADLINE_S)
                    if disk.pread(75 * 4096, 1 << 19, timeout_s=DEADLINE_S) != data * 75:
                        raise AssertionError("wrong data of a large request")
                    continue
                disk.write_many([((k * 8 + i) * 4096, data) for i in range(8)], timeout_s=DEADLINE_S)
                if disk.read_many([(k * 8 + i) * 4096 for i in range(8)], 4096, timeout_s=DEADLINE_S) != [data] * 8:
                    raise AssertionError("wrong data")
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    chance, service = random.Random(3), host._backend
    for _ in range(60):
        done.wait(chance.random() * 0.03)
        service.stop()
        service = another_backend(host)
        service.start()
    done.set()
    for worker in workers:
        worker.join(DEADLINE_S)
    disk.close()
    service.stop()
    assert wrong == []


@pytest.mark.parametrize("segments", [0, 100, 4096])
def test_a_backend_that_takes_smaller_requests_than_the_last_one(
    host: paravirt.Host, image: Path, segments: int
) -> None:
    """What is in flight may be larger than it takes, so the disk is closed; a larger one changes nothing."""
    domain = host.create_domain("guest")
    host.attach_disk(domain, str(image))
    with domain.open_disk() as disk:
        disk.pwrite(b"1" * (256 * 4096), 0)
        assert disk.statistics().writes == 1
        host._backend.stop()
        with BackendService(host.hypervisor, host.store, max_indirect_segments=segments):
            if segments < 256:
                with pytest.raises(PeerError, match="a new backend takes requests of"):
                    disk.pread(512, 0, timeout_s=DEADLINE_S)
            else:
                assert disk.pread(256 * 4096, 0, timeout_s=DEADLINE_S) == b"1" * (256 * 4096)
            disk.close()
        with pytest.raises(InvalidRequest, match="max_indirect_segments is 4097"):
            BackendService(host.hypervisor, host.store, max_indirect_segments=4097)


@pytest.mark.parametrize("reported", [False, True], ids=["soon", "after it was reported"])
def test_an_image_that_the_last_backend_still_writes_to(host: paravirt.Host, image: Path, reported: bool) -> None:
    """The kernel keeps the lock of a killed process until its last write is done."""
    domain = host.create_domain("guest")
    path = host.attach_disk(domain, str(image))
    with domain.open_disk() as disk:
        host._backend.stop()
        last = disks.FileDisk(str(image), False)
        queue = host.store.watch_queue()
        queue.add(path.backend)
        with another_backend(host) as service:
            status = "error" if reported else "connected"
            if not reported:
                threading.Event().wait(0.1)  # some looks at the lock
            while xenbus.read_key(host.store, f"{path.backend}/hotplug-status") != status:
                assert queue.get(timeout_s=DEADLINE_S)
            with pytest.raises(AlreadyExists):
                disks.FileDisk(str(image), False)
            last.close()
            assert disk.pread(512, 0, timeout_s=DEADLINE_S) == bytes(512)
            assert service.statistics()[path].reads == 1
            disk.close()
    vbd.detach(host.store, domain.domid, "xvda", timeout_s=0.1)


def test_statistics_while_the_device_is_torn_down(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, closed = threading.Event(), threading.Event()

    class SlowToTell(PythonEngine):
        def statistics(self) -> EngineStatistics:
            asked.set()
            assert closed.wait(DEADLINE_S)
            return super().statistics()

    with paravirt.Host(engine=SlowToTell) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "1M", driver="memory")
        disk = domain.open_disk()
        found: list[object] = []
        asker = threading.Thread(target=lambda: found.append(host.backend_statistics()))
        asker.start()
        assert asked.wait(DEADLINE_S)
        disk.close()
        closed.set()
        asker.join(DEADLINE_S)
        assert found == [{}]


def test_a_failing_disk_does_not_fill_the_log(
    host: paravirt.Host, image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    domain = host.create_domain("guest")
    host.attach_disk(domain, str(image))
    with domain.open_disk() as disk:
        image.write_bytes(b"")
        for _ in range(20):
            with pytest.raises(IoError):
                disk.pread(512, 0, timeout_s=DEADLINE_S)
    complaints = [record for record in caplog.records if "requests failed" in record.message]
    assert [record.levelno for record in complaints if record.levelno >= logging.WARNING] == [logging.WARNING]


class LateEngine(PythonEngine):
    """Answers before it lets go of the pages."""

    let_go = threading.Event()

    def _answer(self, n: int) -> None:
        batch = self._batch
        batch.prepare(n)
        asked = np.frombuffer(bytes(batch.requests[: n * blkif.REQUEST.itemsize]), blkif.REQUEST)
        answers = np.zeros(n, blkif.RESPONSE)
        answers["id"], answers["operation"] = asked["id"], asked["operation"]
        self._ring.push(answers)
        LateEngine.let_go.wait(DEADLINE_S)
        batch.finish(n)


def test_pages_that_the_backend_lets_go_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """All slots may be out of use for a while; afterwards the disk is as before."""
    monkeypatch.setattr("paravirt.backend.engine.MAX_BATCH", 32)
    LateEngine.let_go.clear()
    with paravirt.Host(engine=LateEngine) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "1M", driver="memory")
        with domain.open_disk(ring_page_order=0) as disk:
            disk.read_many([0] * 32, 512, timeout_s=DEADLINE_S)
            assert disk.statistics().held_slots == 32
            with pytest.raises(PeerError, match="keeps the pages of 32"):
                disk.pread(512, 0, timeout_s=DEADLINE_S)
            with pytest.raises(PeerError, match="keeps the pages of 32"):
                asyncio.run(asyncio.wait_for(disk.aio.pread(512, 0), DEADLINE_S))
            LateEngine.let_go.set()
            host._backend.stop()  # when its engine has finished
            with another_backend(host):
                assert disk.pread(512, 0, timeout_s=DEADLINE_S) == bytes(512)
                assert disk.statistics().held_slots == 0
                disk.close()
