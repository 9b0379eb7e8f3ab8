# SPDX-License-Identifier: MIT
"""Files and memory as disks, beyond reading and writing: discards, zeroes, sectors of 4096, O_DIRECT, growth."""

import errno
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from paravirt.backend.disks import Disk, FileDisk, MemoryDisk, NullDisk, block_device, open_disk
from paravirt.backend.disks.base import skip, take
from paravirt.backend.disks.filters.readahead import ReadaheadFilter
from paravirt.backend.disks.filters.stats import StatsFilter
from paravirt.errors import InvalidRequest
from tests.backend import disk_model
from tests.backend.disk_model import Step, data_of, read, write

SIZE = 256 << 10
EVERYTHING = ("write", "read", "discard", "zeroes", "flush")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture
def file(image: Path) -> Iterator[FileDisk]:
    os.truncate(image, 0)
    os.truncate(image, SIZE)
    disk = FileDisk(str(image), False)
    yield disk
    disk.close()


@settings(max_examples=40, deadline=None)
@given(disk_model.steps(SIZE // 512, *EVERYTHING, "reopen", longest=100))
def test_a_file_is_what_was_written(image: Path, todo: list[Step]) -> None:
    image.write_bytes(bytes(SIZE))
    disk_model.follow(FileDisk(str(image), False), todo, bytearray(SIZE), lambda: FileDisk(str(image), False)).close()


@settings(max_examples=20, deadline=None)
@given(disk_model.steps(SIZE // 512, *EVERYTHING, "reopen", longest=100))
def test_a_file_past_the_page_cache_is_what_was_written(image: Path, todo: list[Step]) -> None:
    image.write_bytes(bytes(SIZE))

    def reopen() -> Disk:
        return open_disk("file,direct=1,sector-size=512", str(image), read_only=False)

    try:
        disk = reopen()
    except InvalidRequest as error:
        pytest.skip(f"this file system: {error}")
    assert disk.direct
    disk_model.follow(disk, todo, bytearray(SIZE), reopen).close()


@settings(max_examples=40, deadline=None)
@given(disk_model.steps(SIZE // 512, *EVERYTHING, longest=100))
def test_memory_is_what_was_written(todo: list[Step]) -> None:
    disk_model.follow(MemoryDisk("256k", False), todo, bytearray(SIZE)).close()


@settings(max_examples=30, deadline=None)
@given(disk_model.steps(SIZE // 4096, *EVERYTHING))
def test_sectors_of_4096(todo: list[Step]) -> None:
    disk = open_disk("memory,sector-size=4096", "256k", read_only=False)
    assert disk.sector_size == 4096
    disk_model.follow(disk, todo, bytearray(SIZE)).close()


def test_a_file_with_sectors_of_4096(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(8192))
    disk = open_disk("file,sector-size=4096", str(tmp_path / "disk.img"), read_only=False)
    assert (disk.sector_size, disk.physical_sector_size, disk.size_bytes) == (4096, 4096, 8192)
    disk.close()
    os.truncate(tmp_path / "disk.img", 8192 + 512)
    with pytest.raises(InvalidRequest, match="has 8704 bytes, not a positive multiple of 4096"):
        open_disk("file,sector-size=4096", str(tmp_path / "disk.img"), read_only=False)


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_discard_gives_the_space_of_a_file_back(file: FileDisk, image: Path) -> None:
    if not file.can_discard:
        pytest.skip("this file system has no holes")
    write(file, data_of(1, SIZE), at=0)
    file.flush()
    before = allocated(image)
    file.discard(0, SIZE // 2)
    assert allocated(image) <= before - SIZE // 2 + file.discard_granularity_bytes
    assert read(file, SIZE, at=0) == bytes(SIZE // 2) + data_of(1, SIZE)[SIZE // 2 :]
    assert image.stat().st_size == SIZE


def test_a_discard_gives_memory_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    disk = MemoryDisk("64M", False)
    disk.write_zeroes(0, 512)
    for offset in range(0, 64 << 20, 1 << 20):
        write(disk, b"x" * (1 << 20), at=offset)
    full = resident()
    disk.discard(0, 64 << 20)
    assert resident() <= full - (48 << 20)
    disk.close()


@pytest.mark.parametrize("driver", ["file", "memory"])
def test_secure_discard_is_not_promised(driver: str, image: Path) -> None:
    disk = open_disk(driver, str(image) if driver == "file" else "1M", read_only=False)
    assert not disk.can_discard_secure
    assert disk_model.raises(disk.discard, 0, 512, True) == errno.EOPNOTSUPP
    disk.close()


def test_secure_discard_of_a_file_is_refused(image: Path) -> None:
    with pytest.raises(InvalidRequest, match="is a file, which has no secure discard"):
        open_disk("file,secure-discard=1", str(image), read_only=False)


def test_a_disk_to_read_only_offers_no_discard(image: Path) -> None:
    disk = FileDisk(str(image), True)
    assert not disk.can_discard
    disk.close()


def test_zeroes_without_help_of_the_file_system(file: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(block_device, "fallocate", refuse)
    write(file, data_of(1, SIZE), at=0)
    file.write_zeroes(512, SIZE - 1024)
    assert read(file, SIZE, at=0) == data_of(1, SIZE)[:512] + bytes(SIZE - 1024) + data_of(1, SIZE)[-512:]
    assert not block_device.can_punch_holes(0, 0)


def test_a_file_that_grows_and_shrinks(file: FileDisk, image: Path) -> None:
    assert file.current_size() == SIZE
    os.truncate(image, 2 * SIZE + 100)
    assert file.size_bytes == SIZE
    assert file.current_size() == file.size_bytes == 2 * SIZE
    write(file, b"z" * 512, at=2 * SIZE - 512)
    os.truncate(image, SIZE // 2)
    assert file.current_size() == SIZE // 2
    with pytest.raises(OSError, match="shorter"):
        read(file, 4096, at=SIZE - 4096)


def test_the_size_is_asked_for_while_others_read_and_write(file: FileDisk, image: Path) -> None:
    disk = StatsFilter(ReadaheadFilter(file, 8192))
    sizes: set[int] = set()
    stopping = threading.Event()

    def look() -> None:
        while not stopping.is_set():
            sizes.add(disk.current_size())
            disk.interrupt()  # nothing waits here: it means nothing

    thread = threading.Thread(target=look)
    thread.start()
    for i in range(300):
        offset = i % 16 * 4096
        write(disk, bytes([i % 256]) * 4096, at=offset)
        assert read(disk, 4096, at=offset) == bytes([i % 256]) * 4096
        if i % 100 == 50:
            os.truncate(image, SIZE + i * 4096)
    stopping.set()
    thread.join()
    assert disk.current_size() == SIZE + 250 * 4096
    assert sizes <= {SIZE, *(SIZE + i * 4096 for i in (50, 150, 250))}


def test_a_cdrom_is_removable_and_not_written(image: Path) -> None:
    disk = open_disk("file,cdrom=1", str(image), read_only=False)
    assert (disk.cdrom, disk.removable, disk.read_only) == (True, True, True)
    disk.close()
    disk = open_disk("file,removable=1", str(image), read_only=False)
    assert (disk.cdrom, disk.removable, disk.read_only) == (False, True, False)
    disk.close()


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_direct_of_what_is_no_image(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    (os.mkdir if kind == "directory" else os.mkfifo)(path)
    with pytest.raises(InvalidRequest, match=r"is a directory|neither a file|cannot be opened"):
        open_disk("file,direct=1", str(path), read_only=True)


def test_a_file_that_may_grow_no_further(tmp_path: Path) -> None:
    """A limit of the process stands for a full file system: a sparse image finds no room."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    os.truncate(image, 1 << 20)
    disk = FileDisk(str(image), False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        write(disk, b"x" * 4096, at=4096)
        with pytest.raises(OSError, match="too large") as caught:
            write(disk, b"x" * 8192, at=8192)
        assert caught.value.errno == errno.EFBIG
        with pytest.raises(OSError, match="too large"):
            write(disk, b"x" * 4096, at=6144)  # half of it fits
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert read(disk, 4096, at=4096)[:2048] == b"x" * 2048
    disk.close()


@pytest.mark.parametrize("opened", [lambda: MemoryDisk("1M", False), lambda: NullDisk("1M", False)])
def test_long_buffers(opened: Callable[[], Disk]) -> None:
    disk = opened()
    assert read(disk, 300 << 10, 512, at=0) == bytes((300 << 10) + 512)
    disk.close()


def test_nothing_goes_to_a_closed_disk(file: FileDisk) -> None:
    memory = MemoryDisk("1M", False)
    for disk in (file, memory):
        disk.close()
        for call in (disk.discard, disk.write_zeroes):
            assert disk_model.raises(call, 0, 4096) == errno.EBADF
        assert disk_model.raises(disk.preadv, [memoryview(bytearray(512))], 0) == errno.EBADF
        assert disk_model.raises(disk.pwritev, [memoryview(bytes(512))], 0) == errno.EBADF
    assert disk_model.raises(file.flush) == errno.EBADF


def test_pieces_of_buffers() -> None:
    buffers = [memoryview(b"abc"), memoryview(b""), memoryview(b"defgh")]
    assert [bytes(piece) for piece in skip(buffers, 4)] == [b"efgh"]
    assert [bytes(piece) for piece in take(buffers, 1, 4)] == [b"bc", b"de"]
    assert take(buffers, 1, 0) == []
