# SPDX-License-Identifier: MIT
"""The disks a backend serves: data, sizes, locks, and what is said of images that cannot be served."""

import os
from pathlib import Path

import pytest

from paravirt.backend.disks import DRIVERS, Disk, open_disk
from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, PermissionRefused

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.fixture(params=["file", "memory"])
def disk(request: pytest.FixtureRequest, image: Path):
    spec = str(image) if request.param == "file" else "1M"
    opened = open_disk(request.param, spec, read_only=False)
    yield opened
    opened.close()


def read(disk: Disk, *lengths: int, at: int) -> list[bytes]:
    buffers = [bytearray(length) for length in lengths]
    disk.preadv([memoryview(buffer) for buffer in buffers], at)
    return [bytes(buffer) for buffer in buffers]


def test_what_is_written_is_read_in_pieces(disk: Disk) -> None:
    assert disk.size_bytes == SIZE
    data = os.urandom(4096)
    disk.pwritev([memoryview(data)[:512], memoryview(data)[512:]], 8192)
    disk.flush()
    assert b"".join(read(disk, 1024, 3072, at=8192)) == data
    assert read(disk, 512, at=8192 - 512) == [bytes(512)]


def test_close_is_harmless_when_repeated(disk: Disk) -> None:
    disk.close()
    disk.close()


def test_null_reads_zeroes_and_keeps_nothing() -> None:
    disk = open_disk("null,read-zeroes=1", "1G", read_only=False)
    disk.pwritev([memoryview(b"x" * 512)], 0)
    assert read(disk, 512, 4096, at=0) == [bytes(512), bytes(4096)]


def test_null_leaves_buffers_alone() -> None:
    disk = open_disk("null", "1G", read_only=False)
    page = bytearray(b"p" * 512)
    disk.preadv([memoryview(page)], 0)
    assert page == b"p" * 512


def test_writes_reach_the_file(image: Path) -> None:
    disk = open_disk("file", str(image), read_only=False)
    disk.pwritev([memoryview(b"y" * 512)], 512)
    disk.close()
    assert image.read_bytes()[512:1024] == b"y" * 512


def test_an_image_that_shrank_is_an_error_and_not_short_data(image: Path) -> None:
    disk = open_disk("file", str(image), read_only=False)
    os.truncate(image, SIZE // 2)
    with pytest.raises(OSError, match="shorter"):
        read(disk, 4096, at=SIZE - 4096)
    disk.close()


def test_one_writer_at_a_time(image: Path) -> None:
    first = open_disk("file", str(image), read_only=False)
    for read_only in (False, True):
        with pytest.raises(AlreadyExists, match="already in use"):
            open_disk("file", str(image), read_only=read_only)
    first.close()
    open_disk("file", str(image), read_only=False).close()


def test_many_readers_no_writer(image: Path) -> None:
    readers = [open_disk("file", str(image), read_only=True) for _ in range(3)]
    with pytest.raises(AlreadyExists, match="already in use"):
        open_disk("file", str(image), read_only=False)
    for reader in readers:
        reader.close()


def test_missing_image(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        open_disk("file", str(tmp_path / "none.img"), read_only=False)


@pytest.mark.parametrize("read_only", [True, False])
def test_directory_instead_of_an_image(tmp_path: Path, read_only: bool) -> None:
    with pytest.raises(InvalidRequest, match="is a directory"):
        open_disk("file", str(tmp_path), read_only=read_only)


@pytest.mark.parametrize("size", [0, 511, 513, SIZE + 1])
def test_size_must_be_whole_sectors(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(size))
    with pytest.raises(InvalidRequest, match=f"has {size} bytes"):
        open_disk("file", str(path), read_only=False)


def test_fifo_instead_of_an_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidRequest, match="neither a file nor a block device"):
        open_disk("file", str(tmp_path / "fifo"), read_only=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_no_rights(image: Path) -> None:
    image.chmod(0o400)
    with pytest.raises(PermissionRefused, match="no rights to read and write"):
        open_disk("file", str(image), read_only=False)
    open_disk("file", str(image), read_only=True).close()


def test_path_with_a_nul() -> None:
    with pytest.raises(InvalidRequest, match="cannot be opened"):
        open_disk("file", "/image\0", read_only=True)


@pytest.mark.parametrize("driver", ["memory", "null"])
@pytest.mark.parametrize("spec", ["", "0", "-1", "513", "1X", "12345678901234567", "1.5M"])
def test_sizes_that_are_none(driver: str, spec: str) -> None:
    with pytest.raises(InvalidRequest, match="multiple of 512"):
        open_disk(driver, spec, read_only=False)


def test_unknown_driver() -> None:
    with pytest.raises(InvalidRequest, match="unknown disk driver 'tape'"):
        open_disk("tape", "x", read_only=False)
    assert {"file", "memory", "null"} <= set(DRIVERS)


def test_nothing_leaks(image: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(50):
        open_disk("file", str(image), read_only=False).close()
        with pytest.raises(InvalidRequest):
            open_disk("file", str(image.parent), read_only=True)
    assert count() == before
