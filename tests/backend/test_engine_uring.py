# SPDX-License-Identifier: MIT
"""Files that the engine in C asks through io_uring: order, errors, ends, and kernels that refuse it."""

import os
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import paravirt
from paravirt.backend.c_engine import CEngine
from paravirt.backend.disks import FileDisk, open_disk
from paravirt.backend.disks.file import may_wait
from paravirt.backend.service import BackendService
from paravirt.errors import InvalidRequest, ResourceLimit
from paravirt.protocol.blkif import Operation, Status
from paravirt.ring._core import lib
from paravirt.ring.vbd_engine import liburing_version

from ..faults import each_call_fails
from ..needs import missing
from .blkif_pair import request, together
from .engine_stage import BASE, DEADLINE_S, PAGES, Stage, make_stage
from .test_engines import discard, open_image, serving

SECTORS = 2048

if not liburing_version():
    missing("the core was built without liburing", module=True)
if lib.pv_try_io_uring() != 0:
    missing("the kernel gives no io_uring", module=True)


def page(stage: Stage, number: int) -> memoryview:
    return stage.data.view[number * 4096 : (number + 1) * 4096]


def write(sector: int, at: int, id_: int, operation: Operation = Operation.WRITE) -> np.ndarray:
    return request(operation, sector, ((BASE + at, 0, 7),), id_)


def test_overlapping_writes_in_flight_keep_their_order(tmp_path: Path) -> None:
    """Of each burst of writes to one place the last one is what stays."""
    chance = random.Random(7)
    with make_stage() as stage, serving(stage, "c", open_image(tmp_path / "disk", "file,io=uring")) as engine:
        assert isinstance(engine, CEngine)
        assert engine.uring
        for burst in range(100):
            for at in range(32):
                page(stage, at)[:] = struct.pack("<HH", burst, at) * 1024
            sectors = [chance.choice([0, 4, 8, 800]) for _ in range(32)]
            assert set(stage.ask(together([write(s, at, at) for at, s in enumerate(sectors)]))["status"]) == {0}
            found = (tmp_path / "disk").read_bytes()
            model = bytearray(SECTORS * 512)
            for at, sector in enumerate(sectors):
                model[sector * 512 : sector * 512 + 4096] = struct.pack("<HH", burst, at) * 1024
            for sector in set(sectors):
                assert found[sector * 512 : sector * 512 + 4096] == model[sector * 512 : sector * 512 + 4096]


def test_what_is_read_after_a_write_that_came_before_is_what_was_written(tmp_path: Path) -> None:
    with make_stage() as stage, serving(stage, "c", open_image(tmp_path / "disk", "file,io=uring")):
        for burst in range(50):
            asked = []
            for i in range(8):
                page(stage, i)[:] = struct.pack("<HH", burst, i) * 1024
                asked += [write(8 * (i % 3), i, 2 * i), write(8 * (i % 3), 16 + i, 2 * i + 1, Operation.READ)]
            assert set(stage.ask(together(asked))["status"]) == {0}
            for i in range(8):
                assert page(stage, 16 + i) == struct.pack("<HH", burst, i) * 1024


def test_a_barrier_is_between_what_came_before_and_after(tmp_path: Path) -> None:
    with make_stage() as stage, serving(stage, "c", open_image(tmp_path / "disk", "file,io=uring")):
        for i in range(30):
            page(stage, i)[:] = bytes([i]) * 4096
        asked = [write(0, 0, 0), write(8, 1, 1), write(0, 2, 2, Operation.WRITE_BARRIER), write(0, 3, 3)]
        asked += [request(Operation.WRITE_BARRIER, segments=(), id=4), write(8, 4, 5), discard(8, 4, 6)]
        assert set(stage.ask(together(asked))["status"]) == {0}
    assert (tmp_path / "disk").read_bytes()[:8192] == bytes([3]) * 4096 + bytes(2048) + bytes([4]) * 2048


@pytest.mark.parametrize("segments", [1, 12, 1500, 4096])
def test_requests_of_many_pieces(tmp_path: Path, segments: int) -> None:
    """More than one call to the kernel takes, and none of them side by side."""
    content = os.urandom(SECTORS * 512)
    disk = open_image(tmp_path / "disk", "file,io=uring", content)
    with make_stage() as stage, serving(stage, "c", disk, max_indirect_segments=4096):
        n_pages = -(-segments // 512)
        listed = np.zeros(4096, "<u8")
        places = [(k % 64, k // 64 % 8) for k in range(segments)]
        for k, (at, sector) in enumerate(places):
            listed[k] = BASE + at * 2 | sector << 32 | sector << 40
        first = PAGES - 16 - 8
        stage.data.view[first * 4096 : (first + 8) * 4096] = listed.tobytes()
        asked = bytearray(112)
        struct.pack_into("<BBH4xQQ", asked, 0, Operation.INDIRECT, Operation.READ, segments, 9, 5)
        struct.pack_into("<8I", asked, 28, *[BASE + first + k if k < n_pages else 0 for k in range(8)])
        n_bytes = segments * 512
        answer = stage.ask(np.frombuffer(bytes(asked), request().dtype))
        if 5 * 512 + n_bytes > len(content):
            assert answer["status"][0] == Status.ERROR
            return
        assert answer["status"][0] == Status.OKAY
        last = {place: k for k, place in enumerate(places)}
        for (at, sector), k in last.items():
            got = page(stage, at * 2)[sector * 512 : (sector + 1) * 512]
            assert got == content[(5 + k) * 512 : (6 + k) * 512]


def test_an_image_that_is_shorter_than_it_was(tmp_path: Path) -> None:
    with make_stage() as stage, serving(stage, "c", open_image(tmp_path / "disk", "file,io=uring")):
        os.truncate(tmp_path / "disk", 4096 + 512)
        answers = stage.ask(together([write(8 * i, i, i, Operation.READ) for i in range(4)]))
        assert answers["status"].tolist() == [Status.OKAY, Status.ERROR, Status.ERROR, Status.ERROR]


def test_a_file_that_may_not_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error of the kernel's is an error of its request alone, and said once."""
    (tmp_path / "disk").write_bytes(b"r" * SECTORS * 512)
    disk = open_disk("file,io=uring", str(tmp_path / "disk"), read_only=True)
    with make_stage() as stage, serving(stage, "c", disk, read_only=False):
        for _ in range(3):
            answers = stage.ask(together([write(0, 0, 0), write(8, 1, 1, Operation.READ), discard(0, 8, 2)]))
            assert answers["status"].tolist()[:2] == [Status.ERROR, Status.OKAY]
        assert page(stage, 1) == b"r" * 4096
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == ["requests failed: Bad file descriptor"]


def test_a_file_past_the_page_cache_has_the_guests_pages_registered(tmp_path: Path) -> None:
    content = os.urandom(SECTORS * 512)
    (tmp_path / "disk").write_bytes(content)
    try:
        disk = open_disk("file,io=uring,direct=1", str(tmp_path / "disk"), read_only=False)
    except InvalidRequest as error:
        pytest.skip(str(error))
    with make_stage() as stage, serving(stage, "c", disk):
        asked = [write(8 * i, i, i, Operation.READ) for i in range(16)]
        asked += [request(Operation.READ, 800, ((BASE + 20, 0, 7), (BASE + 22, 0, 7)), 16)]
        assert set(stage.ask(together(asked))["status"]) == {0}
        assert b"".join(bytes(page(stage, i)) for i in range(16)) == content[: 16 * 4096]
        assert bytes(page(stage, 20)) + bytes(page(stage, 22)) == content[800 * 512 : 800 * 512 + 8192]
        page(stage, 3)[:] = b"w" * 4096
        assert set(stage.ask(together([write(1600, 3, 1), request(Operation.FLUSH_DISKCACHE, id=2)]))["status"]) == {0}
    assert (tmp_path / "disk").read_bytes()[1600 * 512 : 1608 * 512] == b"w" * 4096


def test_how_a_file_is_asked(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(SECTORS * 512))
    found = {}
    for io in ("auto", "uring", "sync"):
        disk = open_disk(f"file,io={io}", str(image), read_only=True)
        assert isinstance(disk, FileDisk)
        found[io] = disk.uring
        assert disk.fd is not None
        assert found["auto"] == may_wait(disk.fd, 512)
        disk.close()
    assert found["uring"]
    assert not found["sync"]
    with pytest.raises(InvalidRequest, match="option io of file: is 'fast', not auto or uring or sync"):
        open_disk("file,io=fast", str(image), read_only=True)


def test_files_in_memory_are_not_asked_through_io_uring() -> None:
    fd = os.memfd_create("disk")
    try:
        os.truncate(fd, 8192)
        assert not may_wait(fd, 512)
    finally:
        os.close(fd)


def test_engines_that_come_and_go_with_requests_in_flight(tmp_path: Path) -> None:
    """What one has not answered is sent again to the next: nobody sees more than a delay."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, str(image), driver="file,io=uring")
        disk, done, wrong = domain.open_disk(), threading.Event(), []

        def work(k: int) -> None:
            try:
                version = 0
                while not done.is_set():
                    version += 1
                    data = (k << 32 | version).to_bytes(8, "little") * 512
                    disk.write_many([((k * 8 + i) * 4096, data) for i in range(8)], timeout_s=DEADLINE_S)
                    if disk.read_many([(k * 8 + i) * 4096 for i in range(8)], 4096, timeout_s=DEADLINE_S) != [data] * 8:
                        raise AssertionError("wrong data")
            except Exception as error:
                wrong.append(error)

        workers = [threading.Thread(target=work, args=(k,)) for k in range(3)]
        for worker in workers:
            worker.start()
        chance, service = random.Random(3), host._backend
        for _ in range(20):
            done.wait(chance.random() * 0.03)
            service.stop()
            service = BackendService(host.hypervisor, host.store)
            service.start()
        done.set()
        for worker in workers:
            worker.join(DEADLINE_S)
        disk.close()
        service.stop()
        assert wrong == []


def test_memory_that_is_refused(tmp_path: Path) -> None:
    """For an engine: it cannot be made, or asks by blocking calls. For a request: it is answered, or comes later."""
    with make_stage() as stage:

        def scenario() -> None:
            disk = open_image(tmp_path / "disk", "file,io=uring")
            try:
                with serving(stage, "c", disk):
                    answers = stage.ask(together([write(8 * i, i, i, Operation.READ) for i in range(4)]))
                    assert set(answers["status"].tolist()) <= {Status.OKAY, Status.ERROR}
            except ResourceLimit:
                disk.close()

        for function in ("calloc", "realloc"):
            assert each_call_fails(function, scenario) > 0


REFUSED = """
import ctypes, struct, sys
class Program(ctypes.Structure):
    _fields_ = [("n", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (6, 0, 0, 0x00050000 | 1), (6, 0, 0, 0x7FFF0000)]
raw = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
program = Program(len(code), ctypes.addressof(raw))
if libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit(77)
import logging, paravirt
logging.basicConfig(level=logging.WARNING)
with paravirt.Host() as host:
    for name in ("first", "second"):
        domain = host.create_domain(name)
        host.attach_disk(domain, f"{sys.argv[1]}/{name}", driver="file,io=uring")
        with domain.open_disk() as disk:
            disk.pwrite(b"w" * 4096, 4096)
            disk.flush()
            assert disk.pread(8192, 0) == bytes(4096) + b"w" * 4096
print("served")
"""


@pytest.mark.skipif(sys.byteorder != "little" or os.uname().machine != "x86_64", reason="numbers of x86_64's calls")
def test_a_kernel_that_refuses_io_uring(tmp_path: Path) -> None:
    """By a filter, as containers have one: blocking calls serve, and one line of the log says so."""
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode == 77:
        pytest.skip("no filters here")
    assert done.stdout == "served\n", done.stderr
    assert done.stderr.count("no io_uring (Operation not permitted)") == 1
