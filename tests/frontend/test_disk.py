# SPDX-License-Identifier: MIT
"""`Disk` against a real backend, everything in one process."""

import contextlib
import os
import random
import signal
import threading
from pathlib import Path

import pytest

import paravirt
from paravirt.errors import AlreadyExists, Closed, InvalidRequest, IoError, NotFound, PeerGone, ReadOnly, ResourceLimit
from paravirt.frontend.vbd import Disk
from paravirt.host import vbd
from paravirt.ring.waiting import Wait
from tests.eventually import eventually

SIZE = 4 << 20
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def host(vbd_engine):
    with paravirt.Host(engine=vbd_engine) as running:
        yield running


@pytest.fixture
def domain(host: paravirt.Host):
    made = host.create_domain(f"guest-{random.randrange(1 << 40):x}")
    yield made
    if made in host.domains:
        host.destroy_domain(made)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(7).randbytes(SIZE))
    return path


@pytest.fixture
def disk(host: paravirt.Host, domain: paravirt.Domain, image: Path):
    host.attach_disk(domain, str(image))
    with domain.open_disk("xvda") as opened:
        yield opened


def test_geometry(disk: Disk) -> None:
    assert (disk.size_bytes, disk.sector_size, disk.read_only) == (SIZE, 512, False)


def test_reads_what_the_file_has(disk: Disk, image: Path) -> None:
    content = image.read_bytes()
    assert disk.pread(512, 0) == content[:512]
    assert disk.pread(4096, 4096) == content[4096:8192]
    assert disk.pread(45056, SIZE - 45056) == content[-45056:]
    assert disk.pread(SIZE, 0) == content


@pytest.mark.parametrize("n_bytes", [512, 1024, 4096, 4608, 45056, 45568, 1 << 20])
def test_writes_reach_the_file(disk: Disk, image: Path, n_bytes: int) -> None:
    data = os.urandom(n_bytes)
    assert disk.pwrite(data, 1536) == n_bytes
    disk.flush()
    assert image.read_bytes()[1536 : 1536 + n_bytes] == data
    assert disk.pread(n_bytes, 1536) == data


def test_batches(disk: Disk, image: Path) -> None:
    chance = random.Random(3)
    places = chance.sample(range(SIZE // 4096), 500)
    writes = [(place * 4096, os.urandom(4096)) for place in places]
    assert disk.write_many(writes) == 500 * 4096
    assert disk.read_many([offset for offset, _ in writes], 4096) == [data for _, data in writes]
    content = image.read_bytes()
    assert all(content[offset : offset + 4096] == data for offset, data in writes)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_may_be_written(disk: Disk, kind: type) -> None:
    disk.pwrite(kind(b"z" * 512), 0)
    assert disk.pread(512, 0) == b"z" * 512


@pytest.mark.parametrize(
    ("n_bytes", "offset", "complaint"),
    [
        (512, SIZE, "not inside"),
        (1024, SIZE - 512, "not inside"),
        (512, -512, "not inside"),
        (0, 0, "not inside"),
        (-512, 0, "not inside"),
        (512, 1 << 70, "not inside"),
        (100, 0, "whole sectors"),
        (512, 100, "whole sectors"),
    ],
)
def test_bad_ranges(disk: Disk, n_bytes: int, offset: int, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        disk.pread(n_bytes, offset)
    with pytest.raises(InvalidRequest, match=complaint):
        disk.read_many([0, offset], n_bytes)
    if n_bytes >= 0:
        with pytest.raises(InvalidRequest, match=complaint):
            disk.pwrite(bytes(n_bytes), offset)


def test_read_only_disk(host: paravirt.Host, domain: paravirt.Domain, image: Path) -> None:
    before = image.read_bytes()
    host.attach_disk(domain, str(image), mode="r")
    with domain.open_disk() as disk:
        assert disk.read_only
        assert disk.pread(512, 0) == before[:512]
        with pytest.raises(ReadOnly, match="read-only"):
            disk.pwrite(bytes(512), 0)
        with pytest.raises(ReadOnly, match="read-only"):
            disk.write_many([(0, bytes(512))])
    assert image.read_bytes() == before


@pytest.mark.parametrize("order", range(5))
def test_every_ring_size(host: paravirt.Host, domain: paravirt.Domain, image: Path, order: int) -> None:
    host.attach_disk(domain, str(image))
    with domain.open_disk(ring_page_order=order) as disk:
        assert disk.read_many(range(0, SIZE, 4096), 4096) == [disk.pread(4096, at) for at in range(0, SIZE, 4096)]
        ring = disk.statistics().ring
        assert ring is not None


@pytest.mark.parametrize("spin_ns", [0, 1_000_000])
def test_sleeping_and_spinning(host: paravirt.Host, domain: paravirt.Domain, spin_ns: int) -> None:
    host.attach_disk(domain, "1M", driver="memory")
    with domain.open_disk(spin_ns=spin_ns) as disk:
        for i in range(200):
            disk.pwrite(i.to_bytes(4, "little") * 128, i * 512)
        assert [disk.pread(512, i * 512)[:4] for i in range(200)] == [i.to_bytes(4, "little") for i in range(200)]


@pytest.mark.parametrize("wait", ["adaptive", "spin", "sleep"])
def test_each_way_of_waiting(wait: Wait) -> None:
    with paravirt.Host(wait=wait) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "1M", driver="memory")
        with domain.open_disk(wait=wait) as disk:
            for i in range(100):
                disk.pwrite(bytes([i]) * 512, i * 512)
            assert disk.read_many(range(0, 51200, 512), 512) == [bytes([i]) * 512 for i in range(100)]
            (device,) = host._backend._devices.values()
            ours, theirs = disk.statistics().ring, device.statistics().ring  # type: ignore[union-attr]
            assert ours is not None
            if wait == "adaptive":
                assert ours.spun_ns > 0 or ours.spins_gated > 0
            elif wait == "spin":
                assert ours.sleeps == theirs.sleeps == 0
            else:
                assert ours.spun_ns == theirs.spun_ns == 0
                assert theirs.sleeps > 0
        with pytest.raises(InvalidRequest):
            domain.open_disk(wait="never")  # type: ignore[arg-type]


def test_two_disks_of_one_domain(host: paravirt.Host, domain: paravirt.Domain, image: Path) -> None:
    host.attach_disk(domain, str(image), device="xvda")
    host.attach_disk(domain, "1M", device="xvdb", driver="memory")
    assert domain.disks() == ["xvda", "xvdb"]
    with domain.open_disk("xvda") as first, domain.open_disk("xvdb") as second:
        second.pwrite(first.pread(4096, 8192), 0)
        assert second.pread(4096, 0) == image.read_bytes()[8192:12288]


def test_null_disk(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach_disk(domain, "1G", driver="null,read-zeroes=1")
    with domain.open_disk() as disk:
        assert disk.size_bytes == 1 << 30
        disk.pwrite(b"x" * 4096, 0)
        assert disk.pread(4096, 0) == bytes(4096)


def test_many_threads(disk: Disk) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        base = number * (SIZE // 8)
        try:
            for _ in range(60):
                offset = base + chance.randrange(SIZE // 8 // 4096 - 2) * 4096
                data = chance.randbytes(8192)
                disk.pwrite(data, offset)
                assert disk.pread(8192, offset) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_statistics_count_what_was_done(host: paravirt.Host, domain: paravirt.Domain) -> None:
    path = host.attach_disk(domain, "1M", driver="memory")
    with domain.open_disk() as disk:
        for _ in range(3):
            disk.pread(4096, 0)
        disk.read_many([0, 4096], 512)
        for _ in range(4):
            disk.pwrite(bytes(1024), 0)
        disk.flush()
        mine, theirs = disk.statistics(), host.backend_statistics()[path]
        assert (mine.reads, mine.writes, mine.flushes, mine.errors) == (5, 4, 1, 0)
        assert (mine.read_bytes, mine.written_bytes) == (3 * 4096 + 2 * 512, 4 * 1024)
        assert (mine.in_flight, mine.held_slots, mine.reconnects, mine.reissued) == (0, 0, 0, 0)
        assert (theirs.reads, theirs.writes, theirs.flushes, theirs.refused, theirs.errors) == (5, 4, 1, 0, 0)
        assert (theirs.read_bytes, theirs.written_bytes) == (3 * 4096 + 2 * 512, 4 * 1024)
        assert mine.ring is not None
        assert mine.ring.requests == theirs.ring.requests == 10
        assert mine.ring.responses == theirs.ring.responses == 10
        assert mine.ring.batches == theirs.batches == 9, "read_many is one"


def test_disk_errors_reach_the_caller_and_the_disk_goes_on(
    host: paravirt.Host, domain: paravirt.Domain, image: Path
) -> None:
    host.attach_disk(domain, str(image))
    with domain.open_disk() as disk:
        os.truncate(image, SIZE // 2)
        with pytest.raises(IoError, match="READ of 4096 bytes") as caught:
            disk.pread(4096, SIZE - 4096)
        assert caught.value.status == -1
        assert disk.pread(4096, 0) == image.read_bytes()[:4096]
        assert disk.statistics().errors == 1


def test_use_after_close(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach_disk(domain, "1M", driver="memory")
    disk = domain.open_disk()
    disk.close()
    disk.close()
    calls = (lambda: disk.pread(512, 0), lambda: disk.pwrite(bytes(512), 0), disk.flush, lambda: disk.size_bytes)
    for call in calls:
        with pytest.raises(Closed):
            call()
    assert "closed" in repr(disk)


def test_a_closed_disk_opens_again(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach_disk(domain, "1M", driver="memory")
    for i in range(5):
        with domain.open_disk() as disk:
            disk.pwrite(bytes([i]) * 512, i * 512)
    with domain.open_disk() as disk:
        assert disk.pread(5 * 512, 0) == b"".join(bytes([i]) * 512 for i in range(5))


def test_out_of_memory_budget(host: paravirt.Host) -> None:
    """A domain that may not share enough pages cannot open its disk; with a smaller ring it can."""
    domain = host.create_domain("poor", max_pages=400)
    host.attach_disk(domain, "1M", driver="memory")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ResourceLimit, match="pages"):
        domain.open_disk(ring_page_order=2)
    assert len(os.listdir("/proc/self/fd")) <= before
    with domain.open_disk(ring_page_order=0) as disk:
        assert disk.pread(512, 0) == bytes(512)
    host.destroy_domain(domain)


def test_a_disk_is_open_once(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach_disk(domain, "1M", driver="memory")
    with domain.open_disk() as disk:
        with pytest.raises(AlreadyExists, match="is open already"):
            domain.open_disk()
        disk.pread(512, 0)
    domain.open_disk().close()


def test_what_a_dead_process_left_open_can_be_opened(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach_disk(domain, "1M", driver="memory")
    disk = domain.open_disk()
    disk.pwrite(b"k" * 512, 0)
    channel = disk.queue.end.channel
    assert channel is not None
    keys = {name: domain.store.read(f"{disk._path.frontend}/{name}") for name in ("state", "event-channel")}
    disk.close()
    for name, value in keys.items():
        domain.store.write(f"{disk._path.frontend}/{name}", value)
    with domain.open_disk() as again:
        assert again.pread(512, 0) == b"k" * 512


def test_detach_while_open(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach_disk(domain, "1M", driver="memory")
    disk = domain.open_disk()
    host.detach_disk(domain)
    with pytest.raises(PeerGone, match="closed"):
        disk.pread(512, 0)
    disk.close()
    assert vbd.list_vbds(host.store, domain.domid) == []


def test_no_such_disk(host: paravirt.Host, domain: paravirt.Domain) -> None:
    with pytest.raises(NotFound, match="no disk xvdz"):
        domain.open_disk("xvdz")
    with pytest.raises(NotFound, match="no disk xvdz"):
        host.detach_disk(domain, "xvdz")


def test_bad_images_are_named_and_leave_nothing(
    host: paravirt.Host, domain: paravirt.Domain, tmp_path: Path, image: Path
) -> None:
    odd = tmp_path / "odd.img"
    odd.write_bytes(bytes(1000))
    for spec, complaint in (
        (tmp_path / "none.img", "does not exist"),
        (tmp_path, "is a directory"),
        (odd, "not a positive multiple of 512"),
    ):
        with pytest.raises(InvalidRequest, match=complaint):
            host.attach_disk(domain, str(spec))
    with pytest.raises(InvalidRequest, match="unknown disk driver"):
        host.attach_disk(domain, "x", driver="tape")
    with pytest.raises(InvalidRequest, match="device name"):
        host.attach_disk(domain, str(image), device="sda")
    with pytest.raises(InvalidRequest, match="mode 'rw' is not r or w"):
        host.attach_disk(domain, str(image), mode="rw")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="is not UTF-8"):
        host.attach_disk(domain, str(tmp_path / "\udcff.img"))
    assert vbd.list_vbds(host.store, domain.domid) == []
    assert domain.disks() == []


def test_an_image_with_a_name_in_any_language(host: paravirt.Host, domain: paravirt.Domain, tmp_path: Path) -> None:
    image = tmp_path / "Übung 木.img"
    image.write_bytes(b"x" * 512)
    host.attach_disk(domain, image)
    with domain.open_disk("xvda") as disk:
        assert disk.pread(512, 0) == b"x" * 512
    assert [found.spec for found in vbd.list_vbds(host.store, domain.domid)] == [str(image)]


def test_domains_that_cannot_be_made_or_destroyed(host: paravirt.Host) -> None:
    for max_pages in (0, -1):
        with pytest.raises(InvalidRequest, match="max_pages"):
            host.create_domain("small", max_pages=max_pages)
    domain = host.create_domain("once")
    host.destroy_domain(domain)
    with pytest.raises(NotFound, match="destroyed already"):
        host.destroy_domain(domain)


def test_an_image_in_use_and_a_name_in_use(host: paravirt.Host, domain: paravirt.Domain, image: Path) -> None:
    host.attach_disk(domain, str(image))
    with pytest.raises(InvalidRequest, match="already in use"):
        host.attach_disk(domain, str(image), device="xvdb")
    with pytest.raises(AlreadyExists, match="has a disk xvda already"):
        host.attach_disk(domain, "1M", driver="memory")
    with pytest.raises(AlreadyExists):
        host.create_domain(domain.name)


def test_destroying_a_domain_tears_its_devices_down(host: paravirt.Host, image: Path) -> None:
    domain = host.create_domain("short-lived")
    host.attach_disk(domain, str(image))
    disk = domain.open_disk()
    disk.pread(512, 0)
    host.destroy_domain(domain)
    with pytest.raises(Closed):
        disk.pread(512, 0)
    again = host.create_domain("short-lived")
    host.attach_disk(again, str(image))  # the lock on the image is free again
    host.destroy_domain(again)


def test_nothing_leaks(image: Path) -> None:
    def counts() -> tuple[int, int, int]:
        with open("/proc/self/maps") as maps:
            shared = sum("paravirt" in line for line in maps)
        return len(os.listdir("/proc/self/fd")), threading.active_count(), shared

    def life() -> None:
        with paravirt.Host() as host:
            domain = host.create_domain("guest")
            host.attach_disk(domain, str(image))
            for _ in range(3):
                with domain.open_disk() as disk:
                    disk.pread(4096, 0)
            host.detach_disk(domain)
            host.destroy_domain(domain)

    life()
    before = counts()
    for _ in range(5):
        life()
    # The broker may not have closed its ends of the first one when they were counted.
    eventually(lambda: all(now <= then for now, then in zip(counts(), before, strict=True)), "nothing leaks")
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("paravirt")]


def test_signal_handlers_that_raise(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """A caller that is interrupted at any moment loses its own request and nothing else."""

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    host.attach_disk(domain, "1M", driver="memory")
    chance, before = random.Random(5), signal.signal(signal.SIGALRM, interrupt)
    try:
        with domain.open_disk() as disk:
            for _ in range(2000):
                with contextlib.suppress(Interrupted):
                    signal.setitimer(signal.ITIMER_REAL, chance.random() * 0.002 + 0.0001)
                    while True:
                        disk.read_many([0] * 4, 512, timeout_s=DEADLINE_S)
            disk.read_many([0] * 500, 512, timeout_s=DEADLINE_S)
            assert disk.statistics().in_flight == 0
    finally:
        signal.signal(signal.SIGALRM, before)
