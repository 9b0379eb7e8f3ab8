# SPDX-License-Identifier: MIT
"""Barriers, discards, large requests, sizes and kinds of disks: `Disk` against a real backend."""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import paravirt
from paravirt.backend import disks
from paravirt.backend.c_engine import EngineName
from paravirt.backend.device import BackendDevice
from paravirt.backend.disks import MemoryDisk
from paravirt.errors import InvalidRequest, IoError, NotFound, ReadOnly
from paravirt.host import vbd
from paravirt.protocol.blkif import MAX_REQUEST_BYTES, Status
from paravirt.xenstore import xenbus
from tests.eventually import eventually

SIZE = 4 << 20
DEADLINE_S = 20.0


@pytest.fixture(scope="module")
def running(vbd_engine: EngineName) -> Iterator[paravirt.Host]:
    with paravirt.Host(engine=vbd_engine) as made:
        yield made


@pytest.fixture
def guest(running: paravirt.Host) -> Iterator[paravirt.Domain]:
    made = running.create_domain(f"guest-{random.randrange(1 << 40):x}")
    yield made
    running.destroy_domain(made)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(7).randbytes(SIZE))
    return path


class PythonDisk(MemoryDisk):
    """Served call by call, as one without memory or a file is; `calls` are what was asked of it."""

    calls: list[str] = []
    missing: set[str] = set()

    def __init__(self) -> None:
        super().__init__(str(SIZE), False)
        self._bytes, self.memory = self.memory, None
        self.can_discard = True
        PythonDisk.calls, PythonDisk.missing = [], set()

    def _did(self, what: str) -> None:
        self.calls.append(what)
        if what in self.missing:
            raise OSError(errno.EOPNOTSUPP, f"no {what}")

    def preadv(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._did("read")
        assert self._bytes is not None
        for buffer in buffers:
            buffer[:] = self._bytes[offset : offset + len(buffer)]
            offset += len(buffer)

    def pwritev(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._did("write")
        assert self._bytes is not None
        for buffer in buffers:
            self._bytes[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        self._did("flush")

    def discard(self, offset: int, length: int, secure: bool = False) -> None:
        self._did("discard")

    def close(self) -> None:
        if self._bytes is not None:
            self._bytes.release()
            self._bytes = None
        super().close()


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch, running: paravirt.Host, guest: paravirt.Domain) -> Iterator[Any]:
    monkeypatch.setitem(disks.DRIVERS, "odd", lambda opening: PythonDisk())
    running.attach_disk(guest, "", driver="odd")
    with guest.open_disk() as disk:
        yield disk


def settled(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(DEADLINE_S / 0.005)):
        if condition():
            return
        waiting.wait(0.005)
    raise AssertionError("it does not become true")


@pytest.mark.parametrize("n_bytes", [512, MAX_REQUEST_BYTES, MAX_REQUEST_BYTES + 512, 1 << 20])
def test_barriers_reach_the_file(running: paravirt.Host, guest: paravirt.Domain, image: Path, n_bytes: int) -> None:
    running.attach_disk(guest, str(image))
    data = os.urandom(n_bytes)
    with guest.open_disk() as disk:
        assert disk.can_barrier
        assert disk.pwrite(data, 1536, barrier=True) == n_bytes
        assert image.read_bytes()[1536 : 1536 + n_bytes] == data


def test_a_barrier_flushes_before_and_after(odd: Any) -> None:
    odd.pwrite(bytes(512), 0, barrier=True)
    assert PythonDisk.calls == ["flush", "write", "flush"]


def test_what_the_disk_has_not_is_offered_no_longer(running: paravirt.Host, guest: paravirt.Domain, odd: Any) -> None:
    backend = odd._path.backend
    PythonDisk.missing = {"flush", "discard"}
    with pytest.raises(IoError, match="EOPNOTSUPP") as caught:
        odd.flush()
    assert caught.value.status == Status.EOPNOTSUPP
    settled(lambda: xenbus.read_key(running.store, f"{backend}/feature-flush-cache") == "0")
    settled(lambda: xenbus.read_key(running.store, f"{backend}/feature-barrier") == "0")
    settled(lambda: not odd.can_barrier)
    assert not odd.can_flush
    odd.flush()  # what is answered is as durable as it gets
    with pytest.raises(InvalidRequest, match="no barriers"):
        odd.pwrite(bytes(512), 0, barrier=True)
    with pytest.raises(IoError, match="EOPNOTSUPP"):
        odd.discard(0, 4096)
    assert not odd.can_discard
    with pytest.raises(InvalidRequest, match="no discard"):
        odd.discard(0, 4096)
    settled(lambda: xenbus.read_key(running.store, f"{backend}/feature-discard") == "0")
    odd.pwrite(b"x" * 512, 0)
    assert odd.pread(512, 0) == b"x" * 512
    assert PythonDisk.calls.count("flush") == 1


def test_discards(running: paravirt.Host, guest: paravirt.Domain, image: Path) -> None:
    running.attach_disk(guest, str(image))
    with guest.open_disk() as disk:
        if not disk.can_discard:
            pytest.skip("the file system of the temporary directory has no holes")
        before = image.stat().st_blocks
        kept = disk.pread(4096, 1 << 20)
        disk.write_many([(0, b"w" * 4096)])
        disk.discard(0, 1 << 20)
        assert image.stat().st_blocks < before
        assert disk.pread(1 << 20, 0) == bytes(1 << 20)
        assert disk.pread(4096, 1 << 20) == kept
        with pytest.raises(InvalidRequest, match="no secure discard"):
            disk.discard(0, 4096, secure=True)
        with pytest.raises(InvalidRequest, match="not inside"):
            disk.discard(0, SIZE + 512)
        with pytest.raises(InvalidRequest, match="whole sectors"):
            disk.discard(100, 512)
        assert disk.statistics().discards == 1


def test_discards_among_other_requests_of_a_batch(running: paravirt.Host, guest: paravirt.Domain) -> None:
    running.attach_disk(guest, "1M", driver="memory")
    with guest.open_disk() as disk:
        threads = [threading.Thread(target=disk.discard, args=(i << 16, 4096)) for i in range(8)]
        disk.write_many([(i << 12, bytes([i]) * 4096) for i in range(256)])
        for thread in threads:
            thread.start()
        found = [disk.pread(4096, i << 12) for i in range(256)]
        for thread in threads:
            thread.join()
        assert all(found[i] == bytes([i]) * 4096 for i in range(256) if i % 16)
        assert disk.read_many([i << 16 for i in range(8)], 4096) == [bytes(4096)] * 8


def test_discard_can_be_switched_off(running: paravirt.Host, guest: paravirt.Domain) -> None:
    running.attach_disk(guest, "1M", driver="memory", discard=False)
    with guest.open_disk() as disk:
        assert not disk.can_discard


def test_a_read_only_disk_offers_nothing_that_writes(
    running: paravirt.Host, guest: paravirt.Domain, image: Path
) -> None:
    running.attach_disk(guest, str(image), mode="r")
    with guest.open_disk() as disk:
        assert (disk.can_barrier, disk.can_discard, disk.can_flush) == (False, False, True)
        with pytest.raises(ReadOnly):
            disk.discard(0, 4096)


@pytest.mark.parametrize("order", [0, 2, 4])
@pytest.mark.parametrize("driver", ["file", "memory"])
def test_large_requests(running: paravirt.Host, guest: paravirt.Domain, image: Path, order: int, driver: str) -> None:
    running.attach_disk(guest, str(image) if driver == "file" else str(SIZE), driver=driver)
    with guest.open_disk(ring_page_order=order) as disk:
        assert disk.max_request_bytes == (87 if order == 0 else 256) * 4096
        data = os.urandom(SIZE - 512)
        disk.pwrite(data, 512)
        assert disk.pread(SIZE - 512, 512) == data
        done = disk.statistics()
        assert done.writes == -(-len(data) // disk.max_request_bytes)
        assert done.written_bytes == done.read_bytes == len(data)
        assert done.in_flight == done.held_slots == 0


def test_large_requests_of_a_disk_in_python(odd: Any) -> None:
    data = os.urandom(SIZE)
    odd.pwrite(data, 0)
    assert odd.pread(SIZE, 0) == data
    assert PythonDisk.calls == ["write"] * 4 + ["read"] * 4


def test_small_ones_only(running: paravirt.Host, guest: paravirt.Domain) -> None:
    running.attach_disk(guest, "1M", driver="memory")
    with guest.open_disk(max_segments=11) as disk:
        assert disk.max_request_bytes == MAX_REQUEST_BYTES
        disk.pwrite(b"s" * 100 * 4096, 0)
        assert disk.statistics().writes == 10
    with pytest.raises(InvalidRequest, match="max_segments is 10"):
        guest.open_disk(max_segments=10)


def test_large_and_small_requests_of_many_threads(running: paravirt.Host, guest: paravirt.Domain) -> None:
    running.attach_disk(guest, str(8 << 20), driver="memory")
    failures: list[BaseException] = []
    with guest.open_disk(ring_page_order=1) as disk:

        def work(number: int) -> None:
            chance = random.Random(number)
            base = number << 21
            try:
                for _ in range(12):
                    n_bytes = chance.choice((512, 4096, 45056, 200 * 1024, 1 << 20))
                    data = chance.randbytes(n_bytes)
                    offset = base + chance.randrange((2 << 20) - n_bytes + 1) // 512 * 512
                    disk.pwrite(data, offset)
                    assert disk.pread(n_bytes, offset) == data
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        done = disk.statistics()
        assert (done.in_flight, done.held_slots) == (0, 0)


def test_sectors_of_4096(running: paravirt.Host, guest: paravirt.Domain, image: Path) -> None:
    running.attach_disk(guest, str(image), driver="file,sector-size=4096")
    keys = xenbus.read_keys(
        running.store,
        f"/local/domain/0/backend/vbd/{guest.domid}/51712",
        ("sectors", "sector-size", "physical-sector-size"),
    )
    assert keys == {"sectors": str(SIZE // 512), "sector-size": "4096", "physical-sector-size": "4096"}
    with guest.open_disk() as disk:
        assert (disk.size_bytes, disk.sector_size, disk.physical_sector_size) == (SIZE, 4096, 4096)
        assert disk.pread(8192, 4096) == image.read_bytes()[4096:12288]
        disk.pwrite(b"4" * 4096, 8192, barrier=True)
        disk.discard(0, 4096)
        for n_bytes, offset in ((512, 0), (4096, 512)):
            with pytest.raises(InvalidRequest, match="whole sectors of 4096"):
                disk.pread(n_bytes, offset)


def test_kinds(running: paravirt.Host, guest: paravirt.Domain, image: Path) -> None:
    path = running.attach_disk(guest, str(image), device_type="cdrom", removable=True, mode="r")
    assert xenbus.read_key(running.store, f"{path.backend}/info") == "7"
    with guest.open_disk() as disk:
        assert (disk.cdrom, disk.removable, disk.read_only) == (True, True, True)
    running.detach_disk(guest)
    running.attach_disk(guest, str(image))
    with guest.open_disk() as disk:
        assert (disk.cdrom, disk.removable, disk.read_only) == (False, False, False)
    with pytest.raises(InvalidRequest, match="'tape'"):
        running.attach_disk(guest, str(image), device="xvdb", device_type="tape")  # type: ignore[arg-type]


def test_another_disk_in_its_place_before_the_backend_looks(
    running: paravirt.Host, guest: paravirt.Domain, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However busy the backend is: what is attached last is what is served."""
    path = running.attach_disk(guest, str(image), device_type="cdrom", removable=True, mode="r")
    with guest.open_disk() as disk:
        assert disk.cdrom
    eventually(lambda: xenbus.read_key(running.store, f"{path.backend}/state") in ("2", "6"))
    looks, evaluate = threading.Event(), BackendDevice.evaluate

    def late(device: BackendDevice[object]) -> None:
        looks.wait(DEADLINE_S)
        evaluate(device)

    monkeypatch.setattr(BackendDevice, "evaluate", late)
    vbd.detach(running.store, guest.domid, "xvda", timeout_s=0.01)
    busy = threading.Timer(0.5, looks.set)
    busy.start()
    running.attach_disk(guest, "1M", driver="memory")
    busy.join()
    with guest.open_disk() as disk:
        assert (disk.cdrom, disk.removable, disk.read_only, disk.size_bytes) == (False, False, False, 1 << 20)


def test_a_disk_grows_and_shrinks_while_it_is_used(running: paravirt.Host, guest: paravirt.Domain, image: Path) -> None:
    heard: list[int] = []
    running.attach_disk(guest, str(image))
    with guest.open_disk(on_resize=heard.append) as disk:
        with pytest.raises(InvalidRequest, match="not inside"):
            disk.pread(512, SIZE)
        os.truncate(image, 2 * SIZE)
        running.resize_disk(guest)
        settled(lambda: heard == [2 * SIZE])
        assert disk.size_bytes == 2 * SIZE
        disk.pwrite(b"n" * 4096, 2 * SIZE - 4096)
        assert disk.pread(4096, 2 * SIZE - 4096) == b"n" * 4096
        os.truncate(image, SIZE // 2)
        running.resize_disk(guest)
        settled(lambda: heard == [2 * SIZE, SIZE // 2])
        with pytest.raises(InvalidRequest, match="not inside"):
            disk.pread(512, SIZE // 2)
        running.resize_disk(guest)  # nothing has changed: nobody hears
        assert disk.pread(512, 0)
    assert heard == [2 * SIZE, SIZE // 2]
    with pytest.raises(NotFound, match="no disk xvdb"):
        running.resize_disk(guest, "xvdb")


def test_a_callback_that_fails_does_no_harm(running: paravirt.Host, guest: paravirt.Domain, image: Path) -> None:
    running.attach_disk(guest, str(image))

    def fail(n_bytes: int) -> None:
        raise RuntimeError("the callback")

    with guest.open_disk(on_resize=fail) as disk:
        os.truncate(image, SIZE + 4096)
        running.resize_disk(guest)
        settled(lambda: disk.size_bytes == SIZE + 4096)
        assert disk.pread(4096, SIZE) == bytes(4096)
