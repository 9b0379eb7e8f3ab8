# SPDX-License-Identifier: MIT
"""A `Disk` with several queues: who goes where, what holds across them, what becomes of them."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import paravirt
from paravirt.backend.service import BackendService
from paravirt.errors import Closed, InvalidRequest, PeerError, TimedOut
from paravirt.frontend.disk_device import default_queues
from paravirt.frontend.vbd import Disk
from paravirt.xenstore import xenbus
from tests.eventually import eventually

from .disk_stage import PAGE, SIZE, Opened, opened

QUEUES = 3
DEADLINE_S = 20.0


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Opened]:
    with opened(tmp_path, max_queues=QUEUES, queues=QUEUES) as made:
        yield made


def on_queue(disk: Disk, i: int) -> None:
    """This thread's requests go there from now on."""
    disk._mine.queue = disk._queues[i]


def halt(stage: Opened, i: int) -> Callable[[], None]:
    """Have the backend serve queue `i` no more; a call that goes on."""
    device = stage.device
    device._engines[i].stop()

    def go_on() -> None:
        device._engines[i] = device._make_engine(device._connections[i])
        device._engines[i].start()

    return go_on


@pytest.mark.parametrize(
    ("wanted", "offered", "agreed"), [(1, 3, 1), (3, 3, 3), (8, 3, 3), (4, 1, 1), (None, 64, None)]
)
def test_as_many_as_both_want(tmp_path: Path, wanted: int | None, offered: int, agreed: int | None) -> None:
    with opened(tmp_path, max_queues=offered, queues=wanted) as stage:
        agreed = default_queues() if agreed is None else agreed
        assert stage.disk.n_queues == agreed == len(stage.disk.statistics().queues)
        store, front = stage.host.store, stage.disk._path.frontend
        said = xenbus.read_key(store, f"{front}/multi-queue-num-queues")
        assert said == (str(agreed) if agreed > 1 else None)
        place = f"{front}/queue-{agreed - 1}/event-channel" if agreed > 1 else f"{front}/event-channel"
        assert xenbus.read_key(store, place)
        for i in range(agreed):
            on_queue(stage.disk, i)
            assert stage.disk.pread(PAGE, i * PAGE) == stage.content[i * PAGE : (i + 1) * PAGE]
        assert [queue.reads for queue in stage.disk.statistics().queues] == [1] * agreed


def test_default_is_one_for_every_two_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, queues in ((1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cpus=cpus: set(range(cpus)))
        assert default_queues() == queues


@pytest.mark.parametrize("queues", [0, -1, 257])
def test_numbers_that_cannot_be(tmp_path: Path, queues: int) -> None:
    with pytest.raises(InvalidRequest, match="queues"), opened(tmp_path, queues=queues):
        pass


def test_a_thread_keeps_its_queue(stage: Opened) -> None:
    seen: dict[int, set[int]] = {}

    def work(number: int) -> None:
        seen[number] = set()
        for _ in range(20):
            seen[number].add(id(stage.disk.queue))
            stage.disk.pread(512, 0)

    for number in range(2 * QUEUES):
        thread = threading.Thread(target=work, args=(number,))
        thread.start()
        thread.join(DEADLINE_S)
    assert all(len(queues) == 1 for queues in seen.values())
    assert [queue.reads for queue in stage.disk.statistics().queues] == [40] * QUEUES
    counts = stage.disk.statistics()
    assert (counts.reads, counts.read_bytes) == (120, 120 * 512)


def test_one_queue_does_not_wait_for_another(stage: Opened) -> None:
    go_on = halt(stage, 1)
    on_queue(stage.disk, 1)
    with pytest.raises(TimedOut):
        stage.disk.pread(512, 0, timeout_s=0.05)
    on_queue(stage.disk, 0)
    for _ in range(100):
        assert stage.disk.pread(512, 0) == stage.content[:512]
    assert [queue.in_flight for queue in stage.disk.statistics().queues] == [0, 1, 0]
    go_on()
    on_queue(stage.disk, 1)
    stage.disk.pread(512, 0)
    assert stage.disk.statistics().in_flight == 0


def test_a_barrier_waits_for_all_queues_and_all_wait_for_it(stage: Opened) -> None:
    disk, said = stage.disk, []
    halted = [halt(stage, 1), halt(stage, 0)]

    def call(name: str, queue: int, work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            on_queue(disk, queue)
            work()
            said.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [call("before", 1, lambda: disk.pwrite(b"b" * 512, 0))]
    eventually(lambda: disk._queues[1].transfers.slots.in_flight == 1)
    threads.append(call("barrier", 0, lambda: disk.pwrite(b"B" * 512, 512, barrier=True)))
    eventually(lambda: disk._queues[1]._holders == 1)
    assert disk._queues[0].transfers.slots.in_flight == 0, "it waits for what is before it"
    halted[0]()
    eventually(lambda: disk._queues[0].transfers.slots.in_flight == 1)
    threads += [call("after", queue, lambda: disk.pwrite(b"a" * 512, 1024)) for queue in (1, 2)]
    eventually(lambda: all(disk._queues[queue].transfers.core.waiting == 1 for queue in (1, 2)))
    assert said == ["before"]
    halted[1]()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(said) == ["after", "after", "barrier", "before"]
    assert [queue._holders for queue in disk._queues] == [0] * QUEUES


def test_a_barrier_that_gives_up_lets_the_others_go_on(stage: Opened) -> None:
    go_on = halt(stage, 1)
    on_queue(stage.disk, 1)
    with pytest.raises(TimedOut):
        stage.disk.pread(512, 0, timeout_s=0.05)
    on_queue(stage.disk, 0)
    with pytest.raises(TimedOut):
        stage.disk.pwrite(b"B" * 512, 0, barrier=True, timeout_s=0.05)
    on_queue(stage.disk, 2)
    stage.disk.pwrite(b"c" * 512, 512)
    go_on()
    on_queue(stage.disk, 0)
    stage.disk.pwrite(b"B" * 512, 0, barrier=True)
    assert stage.content[:1024] == b"B" * 512 + b"c" * 512


def test_a_flush_covers_what_other_queues_were_answered(stage: Opened) -> None:
    for i in range(QUEUES):
        on_queue(stage.disk, i)
        stage.disk.pwrite(bytes([i]) * 512, i * 512)
    stage.disk.flush()
    assert stage.content[: QUEUES * 512] == b"".join(bytes([i]) * 512 for i in range(QUEUES))


def test_all_queues_are_made_anew_for_another_backend(stage: Opened) -> None:
    """With what is in flight on each of them, and what waits."""
    disk, host = stage.disk, stage.host
    failures: list[BaseException] = []
    stop = threading.Event()

    def work(number: int) -> None:
        on_queue(disk, number % QUEUES)
        region, version = number * (SIZE // 8), 0
        offsets = np.arange(region, region + 64 * PAGE, PAGE)
        try:
            while not stop.is_set():
                version += 1
                disk.write_batch(offsets, PAGE, np.full((64, PAGE), version % 251, np.uint8), timeout_s=DEADLINE_S)
                assert (disk.read_batch(offsets, PAGE, timeout_s=DEADLINE_S) == version % 251).all()
                assert disk.pread(512, region, timeout_s=DEADLINE_S) == bytes([version % 251]) * 512
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2 * QUEUES)]
    for thread in threads:
        thread.start()
    service = host._backend
    for _ in range(20):
        stop.wait(0.02)
        service.stop()
        service = BackendService(host.hypervisor, host.store, max_queues=QUEUES)
        service.start()
    stop.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not failures
    counts = disk.statistics()
    assert counts.reconnects > 3
    assert counts.reissued == sum(queue.reissued for queue in counts.queues) > 0
    disk.close()
    service.stop()


def test_a_backend_that_takes_fewer_is_left(stage: Opened) -> None:
    stage.disk.pread(512, 0)
    stage.host._backend.stop()
    other = BackendService(stage.host.hypervisor, stage.host.store, max_queues=QUEUES - 1)
    other.start()
    try:
        with pytest.raises(PeerError, match=f"takes {QUEUES - 1} queues, the last one {QUEUES}"):
            stage.disk.pread(512, 0, timeout_s=DEADLINE_S)
    finally:
        stage.disk.close()
        other.stop()


def test_nothing_is_left_of_the_queues(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))

    def counts() -> tuple[int, int, int]:
        with open("/proc/self/maps") as maps:
            shared = sum("paravirt" in line for line in maps)
        return len(os.listdir("/proc/self/fd")), threading.active_count(), shared

    with paravirt.Host(max_queues=4) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, str(image))

        def life() -> None:
            with domain.open_disk(queues=4, buffer_bytes=1 << 16) as disk:
                for i in range(4):
                    on_queue(disk, i)
                    disk.pread(512, 0)
                disk.buffers(512, 3)
            with pytest.raises(Closed):
                disk.pread(512, 0)

        life()
        before = counts()
        for _ in range(10):
            life()
        assert counts() == before
