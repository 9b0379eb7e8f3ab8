# SPDX-License-Identifier: MIT
"""Block devices and full file systems, where this machine lets a test have them."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings

from paravirt.backend.disks import FileDisk, open_disk
from paravirt.errors import InvalidRequest
from tests.backend import disk_model
from tests.backend.disk_model import Step, data_of, raises, read, write

SIZE = 1 << 20

Attach = Callable[..., str]


@pytest.fixture(scope="module")
def attach(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attach]:
    """Makes a loop device on a new file; gives its path."""
    losetup = shutil.which("losetup")
    if os.geteuid() != 0 or losetup is None:
        pytest.skip("loop devices are for root")

    def make(*options: str) -> str:
        image = tmp_path_factory.mktemp("loop") / "image"
        image.write_bytes(bytes(SIZE))
        done = subprocess.run(
            [losetup, *options, "--find", "--show", image], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"this machine has no loop devices to spare: {done.stderr}")
        device = done.stdout.strip()
        stack.callback(subprocess.run, [losetup, "--detach", device], check=True)
        return device

    with ExitStack() as stack:
        yield make


@pytest.fixture(scope="module")
def device(attach: Attach) -> str:
    return attach()


@settings(max_examples=15, deadline=None)
@given(todo=disk_model.steps(SIZE // 512, "write", "read", "discard", "zeroes", "flush", "reopen", longest=100))
def test_a_device_is_what_was_written(device: str, todo: list[Step]) -> None:
    disk = FileDisk(device, False)
    disk.write_zeroes(0, SIZE)
    disk_model.follow(disk, todo, bytearray(SIZE), lambda: FileDisk(device, False)).close()


def test_what_a_device_says_of_itself(device: str) -> None:
    disk = FileDisk(device, False)
    queue = Path("/sys/block", Path(device).name, "queue")
    assert (disk.size_bytes, disk.sector_size) == (SIZE, int((queue / "logical_block_size").read_text()))
    assert disk.physical_sector_size == int((queue / "physical_block_size").read_text())
    assert disk.discard_granularity_bytes == int((queue / "discard_granularity").read_text())
    assert disk.can_discard == (int((queue / "discard_max_bytes").read_text()) > 0)
    assert not disk.can_discard_secure
    disk.close()


def test_secure_discard_is_asked_of_the_device(device: str) -> None:
    disk = open_disk("file,secure-discard=1", device, read_only=False)
    assert disk.can_discard_secure == disk.can_discard
    assert raises(disk.discard, 0, 4096, True) == errno.EOPNOTSUPP  # a loop device has none
    disk.close()


@pytest.mark.parametrize("direct", ["0", "1"])
def test_a_device_with_sectors_of_4096(attach: Attach, direct: str) -> None:
    device = attach("--sector-size", "4096")
    disk = open_disk(f"file,direct={direct}", device, read_only=False)
    assert (disk.sector_size, disk.physical_sector_size) == (4096, 4096)
    write(disk, data_of(1, 8192), at=4096)
    assert read(disk, 512, 7680, at=4096) == data_of(1, 8192)  # in whatever pieces a guest has its pages
    disk.close()
    with pytest.raises(InvalidRequest, match="has sectors of 4096 bytes, not of 512"):
        open_disk("file,sector-size=512", device, read_only=False)


FULL = """
import errno, os, sys
from paravirt.backend.disks import open_disk
os.chdir(sys.argv[1])
with open("disk.img", "wb") as image:
    image.truncate(8 << 20)
file = open_disk("file", "disk.img", read_only=False)
cow = open_disk("cow,overlay=overlay:memory", "8M", read_only=False)
data = memoryview(b"x" * (64 << 10))
done = {}
for name, disk in (("file", file), ("cow", cow)):
    offset = 0
    try:
        while offset < disk.size_bytes:
            disk.pwritev([data], offset)
            offset += len(data)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    assert offset < disk.size_bytes
    done[name] = offset
    if name == "file":
        disk.discard(0, 1 << 20)
for name, disk in (("file", file), ("cow", cow)):
    page = bytearray(len(data))
    for offset in range(1 << 20 if name == "file" else 0, done[name], len(data)):
        disk.preadv([memoryview(page)], offset)
        assert page == data, (name, offset)
    disk.flush()
    disk.close()
try:
    open_disk("cow,overlay=another:null", "1T", read_only=False)
except Exception as error:
    print(type(error).__name__, error, sorted(os.listdir()))
"""


def test_a_full_file_system(tmp_path: Path) -> None:
    """What was answered is there, what was not is ENOSPC, and an overlay that has no room is not half there."""
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    script = 'mount -t tmpfs -o size=4m none "$1" || exit 77; exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        [*unshare, "sh", "-c", script, "sh", tmp_path, sys.executable, FULL],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or done.stderr.startswith("unshare"):
        pytest.skip(f"nobody may mount here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ResourceLimit overlay another cannot be made: No space left")
    assert "another" not in done.stdout.partition("[")[2]
