# SPDX-License-Identifier: MIT
"""Disks of every kind as a guest sees them: through the ring, from the backend that serves them."""

import errno
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import pytest

import paravirt
from paravirt.backend.c_engine import EngineName
from paravirt.backend.disks import DRIVERS, FILTERS, Disk, MemoryDisk, own
from paravirt.backend.disks.base import Transfer, total
from paravirt.backend.disks.filters.base import Filter
from paravirt.backend.disks.spec import Opening
from paravirt.backend.service import BackendService
from paravirt.errors import AlreadyExists, InvalidRequest, IoError, NotFound, TimedOut
from tests.backend.disk_model import data_of
from tests.backend.nbd_servers import nbdkit, running

MIB = 1 << 20


@pytest.fixture(scope="module")
def host(vbd_engine: EngineName) -> Iterator[paravirt.Host]:
    with paravirt.Host(engine=vbd_engine) as running_host:
        yield running_host


@pytest.fixture
def domain(host: paravirt.Host) -> Iterator[paravirt.Domain]:
    made = host.create_domain("guest")
    yield made
    host.destroy_domain(made)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


@pytest.mark.parametrize(
    "driver",
    ["file,direct=1", "file,sector-size=4096", "cow,overlay={directory}/overlay:file", "readahead:stats:delay:file"],
)
def test_a_guest_reads_what_it_wrote(host: paravirt.Host, domain: paravirt.Domain, image: Path, driver: str) -> None:
    image.write_bytes(b"b" * MIB)
    host.attach_disk(domain, str(image), driver=driver.format(directory=image.parent))
    with domain.open_disk() as disk:
        assert disk.size_bytes == MIB
        data = data_of(1, 64 << 10)
        disk.pwrite(data, 8192)
        disk.flush()
        assert disk.pread(len(data) + 8192, 4096) == b"b" * 4096 + data + b"b" * 4096
    host.detach_disk(domain)
    assert image.read_bytes() == (b"b" * MIB if "cow" in driver else b"b" * 8192 + data + b"b" * (MIB - 8192 - 65536))


def test_a_guest_has_a_disk_of_an_nbd_server(host: paravirt.Host, domain: paravirt.Domain, tmp_path: Path) -> None:
    path = tmp_path / "s"
    (tmp_path / "image").write_bytes(bytes(MIB))
    with running(path, *nbdkit(path, "file", str(tmp_path / "image"))) as server:
        host.attach_disk(domain, f"unix:{path}", driver="nbd")
        with domain.open_disk() as disk:
            data = data_of(2, 256 << 10)
            disk.pwrite(data, 4096)
            server.kill()
            server.start()
            assert disk.pread(len(data), 4096) == data
            disk.flush()
        host.detach_disk(domain)
    assert (tmp_path / "image").read_bytes()[4096 : 4096 + len(data)] == data


@pytest.mark.parametrize("call", [1, 2, 3, 7])
def test_a_call_that_fails_is_an_error_of_its_own_request(
    host: paravirt.Host, domain: paravirt.Domain, call: int
) -> None:
    host.attach_disk(domain, "1M", driver=f"error,on=read,call={call}:memory")
    with domain.open_disk() as disk:
        failed = []
        for i in range(1, 9):
            try:
                assert disk.pread(512, i * 512) == bytes(512)
            except IoError:
                failed.append(i)
        assert failed == [call]
        disk.pwrite(b"x" * 512, 0)
        disk.flush()
    host.detach_disk(domain)


def test_a_full_disk_is_an_error(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach_disk(domain, "1M", driver="error,on=write,errno=ENOSPC,range=4096-8192:memory")
    with domain.open_disk() as disk:
        disk.pwrite(b"x" * 4096, 0)
        with pytest.raises(IoError):
            disk.pwrite(b"x" * 4096, 4096)
        assert disk.pread(8192, 0) == b"x" * 4096 + bytes(4096)
    host.detach_disk(domain)


@pytest.mark.parametrize(
    ("driver", "spec", "wrong"),
    [
        ("delay,read=1", "null:1M", "option read of delay: is '1'"),
        ("rate", "null:1M", "rate: has neither"),
        ("nbd", "unix:/none", "no NBD server answers"),
        ("file,direct=2", "/none", "option direct of file"),
        ("file,", "/none", "not of the form OPTION=VALUE"),
        ("delay", "\ud800", "is not UTF-8"),
    ],
)
def test_what_is_wrong_is_what_attach_says(
    host: paravirt.Host, domain: paravirt.Domain, driver: str, spec: str, wrong: str
) -> None:
    with pytest.raises(InvalidRequest, match=wrong):
        host.attach_disk(domain, spec, driver=driver)


def test_an_overlay_is_found_from_where_the_user_is(
    host: paravirt.Host, domain: paravirt.Domain, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image.parent)
    host.attach_disk(domain, "disk.img", driver="stats,file=a%2Cb.json:cow,overlay=changes:file")
    with domain.open_disk() as disk:
        disk.pwrite(b"x" * 512, 0)
    host.detach_disk(domain)
    deadline = time.monotonic() + 30
    while sorted(os.listdir()) != ["a,b.json", "changes", "disk.img"]:
        assert time.monotonic() < deadline  # the backend may still be closing it
        time.sleep(0.001)


def test_what_a_stop_interrupts_is_done_by_the_next_backend(tmp_path: Path) -> None:
    """A guest writes while the server is away, and the backend is replaced meanwhile: it sees a pause."""
    path = tmp_path / "s"
    (tmp_path / "image").write_bytes(bytes(MIB))
    serving = nbdkit(path, "file", str(tmp_path / "image"))
    with running(path, *serving) as server, paravirt.Host() as host, ExitStack() as services:
        domain = host.create_domain("guest")
        host.attach_disk(domain, f"unix:{path}", driver="nbd,patience=3600s")
        with domain.open_disk() as disk, ThreadPoolExecutor(1) as pool:
            server.kill()
            written = pool.submit(disk.pwrite, b"x" * 4096, 8192)
            while not disk.statistics().in_flight:
                time.sleep(0.001)
            time.sleep(0.05)  # it is the server that is waited for
            host._backend.stop()
            server.start()
            services.enter_context(BackendService(host.hypervisor, host.store))
            written.result(30)
            assert disk.pread(4096, 8192) == b"x" * 4096
    assert (tmp_path / "image").read_bytes()[8192:12288] == b"x" * 4096


def test_a_disk_that_waits_holds_nobody_up(host: paravirt.Host, domain: paravirt.Domain, tmp_path: Path) -> None:
    """A guest goes while its disk waits for a server that does not come back; other disks go on."""
    path = tmp_path / "s"
    with running(path, *nbdkit(path, "memory", "1M")) as server:
        host.attach_disk(domain, f"unix:{path}", driver="nbd,patience=3600s")
        disk = domain.open_disk()
        server.kill()
        with pytest.raises(TimedOut):
            disk.pread(512, 0, timeout_s=0.1)
        disk.close()
    host.detach_disk(domain)
    host.attach_disk(domain, "1M", driver="memory", device="xvdb")
    with domain.open_disk("xvdb") as other:
        assert other.pread(512, 0) == bytes(512)


class Together(Filter):
    """Notes what comes together; what begins with the sector `bad` fails."""

    many_in_flight = True
    reads: ClassVar[list[list[int]]] = []  # first sectors
    writes: ClassVar[list[list[int]]] = []  # all sectors
    bad = 100 * 512

    @classmethod
    def open(cls, opening: Opening) -> Disk:
        return cls(opening.below(opening.read_only))

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        if offset == self.bad:
            raise OSError(errno.EIO, "bad")
        super().preadv(buffers, offset)

    def preadv_many(self, transfers: Sequence[Transfer]) -> list[int]:
        self.reads.append([offset // 512 for _, offset in transfers])
        return super().preadv_many(transfers)

    def pwritev_many(self, transfers: Sequence[Transfer]) -> list[int]:
        places = [(offset // 512, total(buffers) // 512) for buffers, offset in transfers]
        self.writes.append([sector for first, n in places for sector in range(first, first + n)])
        return super().pwritev_many(transfers)


@pytest.fixture
def together(host: paravirt.Host, domain: paravirt.Domain) -> Iterator[paravirt.Disk]:
    own.register("together", Together)
    try:
        host.attach_disk(domain, "1M", driver="together:delay,all=1ms:memory")  # so that more comes meanwhile
        with domain.open_disk(merge=False) as disk:
            yield disk
        host.detach_disk(domain)
    finally:
        own.unregister("together")
        Together.reads.clear()
        Together.writes.clear()


def test_what_comes_together_goes_together_unless_writes_overlap(together: paravirt.Disk) -> None:
    chance = random.Random(1)
    for _ in range(5):
        places = [(chance.randrange(64), chance.randrange(1, 8)) for _ in range(16)]
        together.write_many([(first * 512, bytes(n * 512)) for first, n in places])
    data = data_of(3, 96 * 512)
    together.write_many([(offset, data[offset : offset + 512]) for offset in range(0, len(data), 512)])
    assert b"".join(together.read_many(list(range(0, len(data), 512)), 512)) == data
    assert max(map(len, Together.reads)) > 4
    assert max(map(len, Together.writes)) > 4
    assert all(len(set(sectors)) == len(sectors) for sectors in Together.writes)


def test_one_that_fails_fails_alone(together: paravirt.Disk) -> None:
    with pytest.raises(IoError):
        together.read_many([sector * 512 for sector in range(90, 110)], 512)
    assert any(100 in group and len(group) > 1 for group in Together.reads)
    assert together.pread(512, 99 * 512) == bytes(512)
    counters = together.statistics()
    assert counters.in_flight == 0


class Backwards(Filter):
    """Not exactly useful."""

    @classmethod
    def open(cls, opening: Opening) -> Disk:
        return cls(opening.below(opening.read_only))


def test_disks_of_ones_own() -> None:
    own.register("mine", MemoryDisk)
    own.load("backwards=tests.backend.test_disk_served:Backwards")
    try:
        assert "mine" in DRIVERS
        assert "backwards" in FILTERS
        with pytest.raises(AlreadyExists, match="a disk driver mine already"):
            own.register("mine", MemoryDisk)
        with pytest.raises(AlreadyExists, match="a disk driver cow already"):
            own.register("cow", MemoryDisk)
    finally:
        for name in ("mine", "backwards"):
            own.unregister(name)
    assert "mine" not in DRIVERS
    assert "backwards" not in FILTERS


@pytest.mark.parametrize(
    ("text", "kind", "wrong"),
    [
        ("mine", InvalidRequest, "not of the form name=module:Class"),
        ("mine=module", InvalidRequest, "not of the form module:Class"),
        ("mine=:Class", InvalidRequest, "not of the form module:Class"),
        ("mine=no_such_module:X", NotFound, "there is no driver no_such_module:X"),
        ("mine=os:X", NotFound, "there is no driver os:X"),
        ("mine=os:sep", InvalidRequest, "os:sep is no disk"),
        ("Mi,ne=tests.backend.test_disk_served:Backwards", InvalidRequest, "'Mi,ne' is not the name of a disk driver"),
    ],
)
def test_classes_that_are_none(text: str, kind: type[Exception], wrong: str) -> None:
    with pytest.raises(kind, match=wrong):
        own.load(text)
