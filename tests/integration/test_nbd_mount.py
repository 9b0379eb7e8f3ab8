# SPDX-License-Identifier: MIT
"""`paravirt vbd mount`: a file system is made on the file, filled and checked; ends in good order and otherwise."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.host.running import DEADLINE_S, RunningHost, read_line

from .exported import Killer, attached_image, client, descendants, need
from .file_system import check, fill, mounted

MIB = 1 << 20
SIZE = 32 * MIB

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def host() -> Iterator[RunningHost]:
    need("nbdfuse", "fusermount3", "mkfs.ext4", "e2fsck", "debugfs")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        needs.missing("/dev/fuse cannot be opened")
    with RunningHost() as running:
        running.ask("domain", "create", "guest")
        yield running


@pytest.fixture
def image(host: RunningHost) -> Iterator[Path]:
    with attached_image(host, bytes(SIZE)) as path:
        yield path


def test_a_file_system_is_made_filled_and_checked(host: RunningHost, image: Path, tmp_path: Path) -> None:
    with mounted(host) as (process, file):
        assert file.stat().st_size == SIZE
        client("mkfs.ext4", "-q", "-F", str(file))
        fill(file, tmp_path, range(1, 30))
        check(file, tmp_path, range(1, 30))
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert not file.exists()
    check(image, tmp_path, range(1, 30))


def test_the_same_while_backends_are_killed(host: RunningHost, image: Path, tmp_path: Path) -> None:
    with mounted(host) as (process, file):
        with Killer(host) as killer:
            client("mkfs.ext4", "-q", "-F", str(file))
            names = range(1, 1)
            while killer.killed < 3 or not len(names):
                names = range(names.stop, names.stop + 5)
                fill(file, tmp_path, names)
        names = range(1, names.stop)
        check(file, tmp_path, names)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
    check(image, tmp_path, names)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system of a kernel")
def test_a_kernel_mounts_it(host: RunningHost, image: Path, tmp_path: Path) -> None:
    with mounted(host) as (_, file):
        client("mkfs.ext4", "-q", "-F", str(file))
        place = tmp_path / "mount"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-o", "loop", str(file), str(place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            needs.missing(f"no loop device here: {done.stderr.strip()}")
        try:
            (place / "file").write_bytes(b"x" * MIB)
        finally:
            client("umount", str(place))
        client("e2fsck", "-f", "-n", str(file))
    assert client("debugfs", "-R", "cat file", str(image)) == "x" * MIB


def test_nbdkit_is_killed(host: RunningHost, image: Path) -> None:
    """There is nothing to read any more: it is unmounted, and the command says so."""
    with mounted(host) as (process, file):
        for pid in descendants(process.pid):
            if Path(f"/proc/{pid}/comm").read_text().startswith("nbdkit"):
                os.kill(pid, signal.SIGKILL)
        assert process.wait(DEADLINE_S) == 2
        assert not os.path.ismount(file)
        assert not file.exists()


def test_a_file_that_is_there(host: RunningHost, image: Path, tmp_path: Path) -> None:
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.write_bytes(b"x")
    for place in (full, tmp_path):
        done = host.attempt("vbd", "mount", "xvda", str(place), "--domain", "guest")
        assert f"{place} exists and is no empty file" in done.stderr
        assert done.returncode == 2
    assert full.read_bytes() == b"x"
    empty.touch()
    with host.beside("vbd", "mount", "xvda", str(empty), "--domain", "guest", "--read-only") as process:
        assert read_line(process.stdout) == f"xvda is {empty}"
        assert empty.stat().st_size == SIZE
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert empty.stat().st_size == 0


def test_a_disk_that_is_not_there(host: RunningHost, tmp_path: Path) -> None:
    done = host.attempt("vbd", "mount", "xvdq", str(tmp_path / "file"), "--domain", "guest")
    assert done.returncode == 2
    assert "has no disk xvdq" in done.stderr
    assert not (tmp_path / "file").exists()
