# SPDX-License-Identifier: MIT
"""Copy on write: the base is never written, the overlay outlives its process, and what it cannot keep it says."""

import errno
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings

from paravirt.backend.disks import Disk, block_device, open_disk
from paravirt.backend.disks.filters import overlay
from paravirt.errors import AlreadyExists, InvalidRequest, NotFound
from tests.backend import disk_model
from tests.backend.disk_model import Step, data_of, raises, read, write

N_BLOCKS = 9
SIZE = N_BLOCKS * 4096 - 1024  # the last block is short
BASE = data_of(42, SIZE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cow")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(BASE)
    return path


def cow(base: Path, *, read_only: bool = False, name: str = "overlay", block: str = "4k") -> Disk:
    driver = f"cow,overlay={base.parent / name},block={block}:file"
    return open_disk(driver, str(base), read_only=read_only)


@pytest.mark.parametrize("holes", [True, False], ids=["holes", "no holes"])
@settings(max_examples=25, deadline=None)
@given(todo=disk_model.steps(SIZE // 512, "write", "read", "zeroes", "flush", "reopen"))
def test_it_is_what_was_written_over_the_base(place: Path, holes: bool, todo: list[Step]) -> None:
    base = place / "base.img"
    base.write_bytes(BASE)
    (place / "overlay").unlink(missing_ok=True)

    def reopen() -> Disk:
        with pytest.MonkeyPatch.context() as patch:
            if not holes:
                patch.setattr(block_device, "can_punch_holes", lambda fd, size: False)
            return cow(base)

    disk = reopen()
    assert disk.can_discard <= holes
    disk_model.follow(disk, todo, bytearray(BASE), reopen).close()
    assert base.read_bytes() == BASE


def test_many_pieces_in_one_write(base: Path) -> None:
    disk = cow(base)
    data = memoryview(data_of(1, SIZE))
    disk.pwritev([data[i : i + 16] for i in range(512, 30208, 16)], 512)
    assert read(disk, 29696, at=512) == data[512:30208]
    assert read(disk, 512, at=0) == BASE[:512]
    disk.close()


def test_whole_blocks_are_discarded_and_others_kept(base: Path) -> None:
    disk = cow(base)
    if not disk.can_discard:
        pytest.skip("this file system has no holes")
    assert disk.discard_granularity_bytes == 4096
    write(disk, b"x" * 4096, at=4096)
    disk.discard(512, 2 * 4096)
    disk.discard(SIZE - 512, 512)
    assert read(disk, SIZE, at=0) == BASE[:4096] + bytes(4096) + BASE[8192:]
    disk.discard(8 * 4096, SIZE - 8 * 4096)  # the last, short one is whole
    assert read(disk, 3072, at=8 * 4096) == bytes(3072)
    assert raises(disk.discard, 0, 4096, True) == errno.EOPNOTSUPP
    disk.close()


def test_many_overlays_of_one_base(base: Path) -> None:
    disks = [cow(base, name=f"overlay{i}") for i in range(3)]
    for i, disk in enumerate(disks):
        write(disk, bytes([i]) * 512, at=0)
    assert [read(disk, 512, at=0)[0] for disk in disks] == [0, 1, 2]
    with pytest.raises(AlreadyExists, match="overlay0 is already in use"):
        cow(base, name="overlay0")
    with pytest.raises(AlreadyExists, match="already in use"):
        open_disk("file", str(base), read_only=False)
    for disk in disks:
        disk.close()


def test_read_only_makes_and_changes_nothing(base: Path) -> None:
    with pytest.raises(NotFound, match=r"overlay .* does not exist"):
        cow(base, read_only=True)
    assert list(base.parent.iterdir()) == [base]
    disk = cow(base)
    write(disk, b"y" * 512, at=512)
    disk.close()
    first, second = cow(base, read_only=True), cow(base, read_only=True)
    before = (base.parent / "overlay").read_bytes()
    assert read(second, 1024, at=0) == BASE[:512] + b"y" * 512
    assert raises(first.pwritev, [memoryview(b"z" * 512)], 0) == errno.EROFS
    assert raises(first.write_zeroes, 0, 8192) == errno.EROFS
    first.flush()
    assert not first.can_discard
    for disk in (first, second):
        disk.close()
    assert (base.parent / "overlay").read_bytes() == before


def test_the_size_stays(base: Path) -> None:
    disk = cow(base)
    os.truncate(base, SIZE + 4096)
    assert disk.current_size() == SIZE
    disk.close()


WRITER = """
import os, sys
from paravirt.backend.disks import open_disk
disk = open_disk(sys.argv[1], sys.argv[2], read_only=False)
for i in range(9 * 8 - 2):
    disk.pwritev([memoryview(bytes([i + 1]) * 512)], i * 512)
    os.write(1, bytes([i + 1]))
sys.stdin.read()
"""


@pytest.mark.parametrize("after", [1, 17, 70])
def test_what_was_answered_outlives_the_process(base: Path, after: int) -> None:
    """Killed with no flush, in the middle of a block or not: what was answered is there, the rest is the base's."""
    command = [sys.executable, "-c", WRITER, f"cow,overlay={base.parent}/overlay,block=4k:file", str(base)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        answered = 0
        while answered < after:
            answered += len(os.read(process.stdout.fileno(), 1))
        process.send_signal(signal.SIGKILL)
        answered += len(process.stdout.read())
    disk = cow(base)
    for i in range(SIZE // 512):
        found = read(disk, 512, at=i * 512)
        if i < answered:
            assert found == bytes([i + 1]) * 512
        else:
            # The one write that was under way may be done.
            assert found == BASE[i * 512 :][:512] or (i == answered and found == bytes([i + 1]) * 512)
    disk.close()


@pytest.fixture
def reboot(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """The machine stops and starts again: as far as an overlay can tell."""
    boots = iter(range(10, 100))

    def another() -> None:
        boot = f"{next(boots):036}".encode()
        monkeypatch.setattr(overlay, "boot_id", lambda: boot)

    another()
    return another


def test_after_a_stop_of_the_machine_what_was_flushed_counts(
    base: Path, reboot: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    disk = cow(base)
    write(disk, b"a" * 4096, at=0)
    disk.flush()
    write(disk, b"b" * 4096, at=4096)
    disk.close()
    # The blocks that were not flushed may be lost, and the map that speaks of them may not: here it is so.
    file = base.parent / "overlay"
    content = bytearray(file.read_bytes())
    content[4096 + 2 * 4096 + 4096 :][:4096] = bytes(4096)
    file.write_bytes(content)
    reboot()
    for read_only in (True, False, False):  # to read only it changes nothing, to write it is made so
        disk = cow(base, read_only=read_only)
        assert read(disk, SIZE, at=0) == b"a" * 4096 + BASE[4096:]
        disk.close()
    assert caplog.text.count("the machine has stopped") == 2
    disk = cow(base)
    write(disk, b"c" * 512, at=4096)  # a part of the lost block: the rest is from the base
    disk.flush()
    disk.close()
    reboot()
    disk = cow(base)
    assert read(disk, SIZE, at=0) == b"a" * 4096 + b"c" * 512 + BASE[4608:]
    disk.close()


def test_a_machine_that_does_not_tell_its_boots_is_always_another(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "boot_id", lambda: overlay.NO_BOOT)
    disk = cow(base)
    write(disk, b"a" * 512, at=0)
    disk.flush()
    write(disk, b"b" * 512, at=4096)
    disk.close()
    disk = cow(base)
    assert read(disk, SIZE, at=0) == b"a" * 512 + BASE[512:]
    disk.close()


def test_this_machine_has_a_boot() -> None:
    assert len(overlay.boot_id()) == 36


def damage(path: Path, where: int, data: bytes, *, add_up: bool = False) -> None:
    content = bytearray(path.read_bytes())
    content[where : where + len(data)] = data
    if add_up:
        content[68:72] = struct.pack("<I", zlib.crc32(content[:68]))
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("where", "data", "add_up", "wrong"),
    [
        (0, b"QFI\xfb", False, "is not an overlay"),
        (40, b"x", False, "is damaged: its header does not add up"),
        (70, b"xx", False, "is damaged: its header does not add up"),
        (16, b"\2", True, "is of version 2, not 1"),
        (20, bytes(4), True, "is damaged: it has blocks of 0 bytes"),
        (20, b"\xff\xff\xff\xff", True, "is damaged: it has blocks of 4294967295 bytes"),
        (24, bytes(8), True, "is for a disk of 0 bytes, not for this one"),
    ],
)
def test_damage_is_named(base: Path, where: int, data: bytes, add_up: bool, wrong: str) -> None:
    cow(base).close()
    damage(base.parent / "overlay", where, data, add_up=add_up)
    for read_only in (True, False):
        with pytest.raises(InvalidRequest, match=wrong):
            cow(base, read_only=read_only)


@pytest.mark.parametrize("size", [0, 10, 71, 72, 4096, 12288, SIZE])
def test_an_overlay_that_is_cut_is_refused(base: Path, size: int) -> None:
    cow(base).close()
    os.truncate(base.parent / "overlay", size)
    with pytest.raises(InvalidRequest, match=r"is damaged|is not an overlay"):
        cow(base)


def test_the_base_must_have_the_size_it_had(base: Path) -> None:
    cow(base).close()
    os.truncate(base, SIZE - 512)
    with pytest.raises(InvalidRequest, match=f"is for a disk of {SIZE} bytes, not for this one of {SIZE - 512}"):
        cow(base)


def test_an_overlay_keeps_its_blocks(base: Path) -> None:
    disk = cow(base, block="8k")
    write(disk, b"x" * 512, at=512)
    disk.close()
    disk = cow(base, block="64k")
    assert disk.discard_granularity_bytes == 8192
    assert read(disk, 1024, at=0) == BASE[:512] + b"x" * 512
    disk.close()


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("overlay=/none/x", "overlay '/none/x' cannot be made: No such file"),
        ("overlay=/", "overlay|is a directory"),
        ("overlay=%00", "cannot be made"),
        ("overlay=", "needs an option overlay"),
        ("overlay=x,block=12k", "block of 12288 bytes is not a power of two"),
        ("overlay=x,block=32M", "block of 33554432 bytes is not a power of two"),
    ],
)
def test_overlays_that_cannot_be(base: Path, monkeypatch: pytest.MonkeyPatch, option: str, wrong: str) -> None:
    monkeypatch.chdir(base.parent)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InvalidRequest, match=wrong):
        open_disk(f"cow,{option}:file", str(base), read_only=False)
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(base.parent.iterdir()) == [base]


def test_a_write_that_fails_changes_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = cow(base)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        assert raises(disk.pwritev, [memoryview(b"x" * 512)], 0) == errno.ENOSPC
    assert read(disk, SIZE, at=0) == BASE
    disk.close()


def test_nothing_leaks(base: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        disk = cow(base)
        disk.close()
        disk.close()
    assert len(os.listdir("/proc/self/fd")) == before
