# SPDX-License-Identifier: MIT
"""An image that fails: each request has the status of what became of it, and everything else goes on."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import paravirt
from paravirt.backend.c_engine import EngineName
from paravirt.errors import IoError
from paravirt.frontend.vbd import Disk
from paravirt.protocol.blkif import Status
from tests.faults import each_call_fails, failing
from tests.needs import missing

KIB = 1 << 10
SIZE = 1024 * KIB
SECTOR = 512
DEADLINE_S = 20.0

pytestmark = pytest.mark.timeout(180)

Step = tuple[str, int, int]
STEPS: list[Step] = [
    ("write", 0, 4 * KIB),
    ("read", 0, 4 * KIB),
    ("write", 64 * KIB, 300 * KIB),  # indirect, and more pieces than one call takes
    ("flush", 0, 0),
    ("read", 2 * KIB, 400 * KIB),
    ("barrier", 512 * KIB, 12 * KIB),
    ("discard", 128 * KIB, 64 * KIB),
    ("write", 512, 512),
    ("read", 0, 1024 * KIB),
    ("flush", 0, 0),
]


class Model:
    """What a disk has to read as; of some bytes nobody knows, since a request that was to write them has failed."""

    def __init__(self, content: bytes) -> None:
        self._content = np.frombuffer(content, np.uint8).copy()
        self._known = np.ones(len(content), bool)

    def write(self, offset: int, data: bytes, *, failed: bool) -> None:
        place = slice(offset, offset + len(data))
        self._content[place] = np.frombuffer(data, np.uint8)
        self._known[place] = not failed

    def check(self, offset: int, data: bytes) -> None:
        place = slice(offset, offset + len(data))
        wrong = (np.frombuffer(data, np.uint8) != self._content[place]) & self._known[place]
        assert not wrong.any(), f"byte {offset + int(wrong.argmax())} is wrong"


def do(disk: Disk, step: Step, model: Model, seed: int) -> int:
    """One step; its status."""
    what, offset, n = step
    data, status = np.random.default_rng(seed).bytes(n), int(Status.OKAY)
    try:
        match what:
            case "read":
                model.check(offset, disk.pread(n, offset, timeout_s=DEADLINE_S))
            case "write":
                disk.pwrite(data, offset, timeout_s=DEADLINE_S)
            case "barrier":
                disk.pwrite(data, offset, barrier=True, timeout_s=DEADLINE_S)
            case "discard":
                data = bytes(n)
                disk.discard(offset, n, timeout_s=DEADLINE_S)
            case _:
                disk.flush(timeout_s=DEADLINE_S)
    except IoError as error:
        status = error.status
    if what in ("write", "barrier", "discard"):
        model.write(offset, data, failed=status != Status.OKAY)
    return status


@pytest.fixture(scope="module")
def host(vbd_engine: EngineName) -> Iterator[paravirt.Host]:
    with paravirt.Host(engine=vbd_engine) as running:
        yield running


@pytest.fixture
def domain(host: paravirt.Host) -> Iterator[paravirt.Domain]:
    made = host.create_domain("guest")
    yield made
    host.destroy_domain(made)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def disks(host: paravirt.Host, domain: paravirt.Domain, image: Path) -> Iterator[tuple[Disk, Disk]]:
    """One on a file that fails, and another one of the same backend."""
    host.attach_disk(domain, image, driver="file,io=sync")  # calls that can be counted, whatever the image lies on
    host.attach_disk(domain, str(SIZE), driver="memory", device="xvdb")
    with domain.open_disk() as disk, domain.open_disk("xvdb") as other:
        yield disk, other


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("function", ["preadv", "pwritev", "fdatasync"])
def test_whichever_call_fails_one_request_does_and_no_other(
    disks: tuple[Disk, Disk], image: Path, function: str, error: int
) -> None:
    """The K-th call, for every K. What was written before and after is there, also on the other disk."""
    disk, other = disks
    model, others = Model(image.read_bytes()), Model(bytes(SIZE))
    seed = iter(range(10**6))
    outcomes: list[int] = []

    def scenario() -> None:
        failed = 0
        for step in STEPS:
            status = do(disk, step, model, next(seed))
            assert status in (Status.OKAY, Status.ERROR)
            failed += status != Status.OKAY
            if step[0] != "barrier":
                assert do(other, step, others, next(seed)) == Status.OKAY
        outcomes.append(failed)

    calls = each_call_fails(function, scenario, error)
    # Each of the calls failed once, and took one request with it; in the last round there were no more.
    assert outcomes == [1] * calls + [0]
    assert calls >= {"preadv": 3, "pwritev": 4, "fdatasync": 4}[function]
    model.check(0, disk.pread(SIZE, 0))
    others.check(0, other.pread(SIZE, 0))


@pytest.mark.parametrize("error", [errno.EIO, errno.EOPNOTSUPP])
def test_a_discard_that_fails(disks: tuple[Disk, Disk], image: Path, vbd_engine: EngineName, error: int) -> None:
    """With an error, or for ever."""
    if vbd_engine == "python":
        pytest.skip("its discards are not the core's calls")
    disk, _ = disks
    model = Model(image.read_bytes())
    with failing("fallocate", error, times=1) as fault:
        status = do(disk, ("discard", 0, 64 * KIB), model, 1)
        assert fault.happened
    assert status == (Status.ERROR if error == errno.EIO else Status.EOPNOTSUPP)
    for step in STEPS:
        if step[0] != "discard" or error == errno.EIO:
            assert do(disk, step, model, 2) == Status.OKAY
    assert disk.can_discard is (error == errno.EIO)


def test_calls_that_signals_interrupt_are_made_again(disks: tuple[Disk, Disk], image: Path) -> None:
    disk, _ = disks
    model = Model(image.read_bytes())
    for seed, step in enumerate(STEPS):
        for function in ("preadv", "pwritev"):
            with failing(function, errno.EINTR, times=3):
                assert do(disk, step, model, seed) == Status.OKAY


def test_a_file_that_got_shorter_fails_where_it_ends_and_is_whole_again_when_it_is(
    disks: tuple[Disk, Disk], image: Path
) -> None:
    disk, _ = disks
    content = image.read_bytes()
    os.truncate(image, SIZE // 2)
    assert disk.pread(64 * KIB, 0) == content[: 64 * KIB]
    for offset in (SIZE // 2, SIZE // 2 - 512, SIZE - 512):
        with pytest.raises(IoError) as failed:
            disk.pread(1024, min(offset, SIZE - 1024))
        assert failed.value.status == Status.ERROR
    # A write there makes it longer again, as files do.
    disk.pwrite(b"w" * 512, SIZE - 512)
    assert disk.pread(SIZE, 0) == content[: SIZE // 2] + bytes(SIZE // 2 - 512) + b"w" * 512


def test_a_flush_that_failed_was_not_one(disks: tuple[Disk, Disk], image: Path) -> None:
    """What it was for is told that, once; a later one is right about what came after."""
    disk, _ = disks
    disk.pwrite(b"1" * 4096, 0)
    with failing("fdatasync", errno.EIO, times=1), pytest.raises(IoError):
        disk.flush()
    assert disk.can_flush
    disk.pwrite(b"2" * 4096, 0)
    disk.flush()
    assert image.read_bytes()[:4096] == b"2" * 4096


_FULL = """
import pathlib, sys
import paravirt
from paravirt.errors import IoError

image = pathlib.Path("/mnt/disk.img")
with open(image, "wb") as file:
    file.truncate(4 << 20)
with paravirt.Host(engine=sys.argv[1]) as host:
    domain = host.create_domain("guest")
    host.attach_disk(domain, image)
    host.attach_disk(domain, "1M", driver="memory", device="xvdb")
    with domain.open_disk() as disk, domain.open_disk("xvdb") as other:
        written, refused = [], []
        for at in range(0, 4 << 20, 64 << 10):
            try:
                disk.pwrite(at.to_bytes(8, "little") * 8192, at)
                written.append(at)
            except IoError as error:
                assert error.status == -1
                refused.append(at)
            other.pwrite(b"o" * 4096, at % (1 << 20))
        assert written and refused, (len(written), len(refused))
        disk.flush()
        for at in written:
            assert disk.pread(64 << 10, at) == at.to_bytes(8, "little") * 8192
        disk.discard(written[0], 128 << 10)
        disk.pwrite(b"x" * (64 << 10), refused[-1])
        assert disk.pread(64 << 10, refused[-1]) == b"x" * (64 << 10)
        assert disk.pread(64 << 10, written[0]) == bytes(64 << 10)
print("done")
"""


def test_a_full_file_system_refuses_what_it_has_no_room_for(vbd_engine: EngineName) -> None:
    """An image with holes on a tmpfs of 2 MiB; what was written is there, and room that is given back is used."""
    inside = f'mount -t tmpfs -o size=2M none /mnt && exec {sys.executable} -c "$0" {vbd_engine}'
    shell = ["unshare", "-Urm", "sh", "-c", inside, _FULL]
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        missing("no mount namespace of one's own can be had here")
    done = subprocess.run(shell, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "done", done.stderr
