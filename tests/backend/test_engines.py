# SPDX-License-Identifier: MIT
"""Both engines are told the same, honest and hostile, and answer the same from the same disk."""

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from paravirt.backend import c_engine
from paravirt.backend.c_engine import CEngine, EngineName, engine_factory
from paravirt.backend.disks import Disk, FileDisk, MemoryDisk, NullDisk, open_disk
from paravirt.backend.disks.base import core_kind
from paravirt.backend.engine import PythonEngine
from paravirt.errors import InvalidRequest, PeerError, ResourceLimit
from paravirt.protocol.blkif import (
    DISCARD_REQUEST,
    INDIRECT_REQUEST,
    REQUEST,
    SEGMENT,
    X86_32_REQUEST,
    Operation,
    Status,
)
from paravirt.ring.waiting import Wait

from ..faults import each_call_fails, failing
from .blkif_pair import request, together
from .engine_stage import BASE, DEADLINE_S, PAGES, Stage, make_stage

SECTORS = 2048
ENGINES: tuple[EngineName, ...] = ("c", "python")
ROUNDS = int(os.environ.get("VBD_ENGINE_ROUNDS", "12"))


def open_image(path: Path, driver: str = "file", content: bytes = bytes(SECTORS * 512)) -> Disk:
    path.write_bytes(content)
    return open_disk(driver, str(path), read_only=False)


def settled(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def serving(stage: Stage, name: EngineName, disk: Disk, **options: object) -> Iterator[CEngine | PythonEngine]:
    engine = stage.engine(name, disk, **options)  # type: ignore[arg-type]
    engine.start()
    try:
        yield engine  # type: ignore[misc]
    finally:
        engine.stop()
        disk.close()


# -- the same stream through both


def random_stream(seed: int, n: int, *, hostile: bool) -> np.ndarray:
    """Requests of every kind; each of 32 in a row has pages of its own."""
    chance = np.random.default_rng(seed)
    made = []
    for id_ in range(n):
        pages = BASE + (id_ % 32) * 7 + np.arange(7)
        segments = []
        for _ in range(chance.integers(1, 7)):
            first = int(chance.integers(0, 8))
            segments.append((int(pages[chance.integers(0, 6)]), first, int(chance.integers(first, 8))))
        sector = int(chance.integers(0, SECTORS - 48))
        kind = chance.integers(0, 100)
        if kind < 75:
            one = request((Operation.READ, Operation.WRITE)[kind % 2], sector, segments, id_)
        elif kind < 80:
            one = request(Operation.FLUSH_DISKCACHE, id=id_)
        elif kind < 85:
            one = request(Operation.WRITE_BARRIER, sector, segments[: chance.integers(0, 3)], id_)
        elif kind < 92:
            one = discard(sector, int(chance.integers(1, 200)), id_)
        else:
            one = indirect(int(pages[6]), segments, kind % 2, sector, id_)
        made.append(spoilt(one, chance) if hostile and chance.random() < 0.4 else one)
    return together(made)


def discard(sector: int, n: int, id_: int) -> np.ndarray:
    made = np.zeros(1, DISCARD_REQUEST)
    made["operation"], made["id"], made["sector"], made["nr_sectors"] = Operation.DISCARD, id_, sector, n
    return np.frombuffer(made.tobytes(), REQUEST)


def indirect(page: int, segments: list[tuple[int, int, int]], operation: int, sector: int, id_: int) -> np.ndarray:
    """Its segments have to be written into `page` before it is sent: `place_segments`."""
    made = np.zeros(1, INDIRECT_REQUEST)
    made["operation"], made["indirect_op"], made["id"], made["sector"] = Operation.INDIRECT, operation, id_, sector
    made["nr_segments"], made["indirect_grefs"][0, 0] = len(segments), page
    return np.frombuffer(made.tobytes(), REQUEST)


def spoilt(one: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """Some bytes of it are others; its id stays, and no other request's page is meant."""
    raw = bytearray(one.tobytes())
    for _ in range(chance.integers(1, 4)):
        place = int(chance.choice([*range(4), *range(16, 24), *(k for k in range(24, 112) if k % 4)]))
        raw[place] = int(chance.choice([0, 1, 7, 8, 128, 255, chance.integers(0, 256)]))
    return np.frombuffer(bytes(raw), REQUEST)


def place_segments(stage: Stage, seed: int) -> None:
    """What is in the guest's pages before: bytes that are told apart, and lists of segments in every seventh."""
    chance = np.random.default_rng(seed)
    stage.data.view[:] = chance.bytes(PAGES * 4096)
    for slot in range(32):
        listed = np.zeros(512, SEGMENT)
        listed["gref"] = BASE + slot * 7 + chance.integers(0, 6, 512)
        listed["first_sect"] = chance.integers(0, 4, 512)
        listed["last_sect"] = chance.integers(4, 8, 512)
        page = slot * 7 + 6
        stage.data.view[page * 4096 : (page + 1) * 4096] = listed.tobytes()


def outcome(
    name: EngineName, make_disk: Callable[[], Disk], seed: int, *, hostile: bool, x86_32: bool = False
) -> tuple[bytes, bytes, bytes, object]:
    """Answers, the disk and the guest's memory afterwards, and what was counted."""
    stream = random_stream(seed, 300, hostile=hostile)
    if x86_32:
        raw = b"".join(one.tobytes()[:4] + one.tobytes()[8:] for one in stream)
        stream = np.frombuffer(raw, X86_32_REQUEST)
    disk = make_disk()
    with make_stage(x86_32=x86_32) as stage:
        place_segments(stage, seed)
        with serving(stage, name, disk) as engine:
            answers = np.concatenate([stage.ask(stream[k : k + 32]) for k in range(0, len(stream), 32)])
            left = bytearray(disk.size_bytes)
            disk.preadv([memoryview(left)], 0)
            counted = engine.statistics()
        guest = bytes(stage.data.view)
        assert stage.failures == []
    counters = [getattr(counted, field) for field in counted.__slots__ if field not in ("batches", "ring")]
    return answers.tobytes(), bytes(left), guest, counters


@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("kind", ["memory", "file,io=sync", "file,io=uring", "null,read-zeroes=1"])
def test_both_answer_the_same(tmp_path: Path, kind: str, seed: int) -> None:
    def make() -> Disk:
        if not kind.startswith("file"):
            return open_disk(kind, "1M", read_only=False)
        return open_image(tmp_path / "disk", kind, np.random.default_rng(seed).bytes(SECTORS * 512))

    hostile, x86_32 = seed % 2 == 1, seed % 4 == 2
    found = [outcome(name, make, seed, hostile=hostile, x86_32=x86_32) for name in ENGINES]
    for one, other in zip(*found, strict=True):
        assert one == other


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wait", ["adaptive", "spin", "sleep"])
def test_each_way_of_waiting(engine: EngineName, wait: Wait) -> None:
    with make_stage(wait=wait) as stage, serving(stage, engine, MemoryDisk("1M", False), wait=wait):
        for sector in range(50):
            assert stage.ask(request(sector=sector))["status"][0] == Status.OKAY


# -- life


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_ends_a_wait_and_is_harmless_when_repeated(engine: EngineName) -> None:
    with make_stage() as stage:
        served = stage.engine(engine, MemoryDisk("1M", False))
        served.start()
        settled(lambda: stage.connection.waiter.statistics().sleeps)
        served.stop()
        served.stop()
        assert served.statistics().reads == 0
        assert stage.failures == []


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_never_started_can_be_stopped(engine: EngineName) -> None:
    with make_stage() as stage:
        stage.engine(engine, MemoryDisk("1M", False)).stop()


def test_engines_leave_neither_threads_nor_memory_in_use() -> None:
    """No more than before: a thread of another test may have been about to end then."""

    def held() -> tuple[int, int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    before = held()
    for _ in range(20):
        with make_stage() as stage, serving(stage, "c", MemoryDisk("1M", False)):
            stage.ask(request())
    after = held()
    assert all(now <= then for now, then in zip(after, before, strict=True)), f"{after}, before {before}"


def test_statistics_can_be_asked_for_at_any_time() -> None:
    with make_stage() as stage:
        disk = MemoryDisk("1M", False)
        with serving(stage, "c", disk) as engine:
            stage.ask(together([request(id=1), request(Operation.WRITE, id=2), request(sector=SECTORS, id=3)]))
            counted = engine.statistics()
            assert (counted.reads, counted.writes, counted.refused) == (1, 1, 1)
            assert (counted.read_bytes, counted.written_bytes) == (4096, 4096)
        assert engine.statistics().reads == 1


def test_a_forked_child_cannot_use_an_engine() -> None:
    with make_stage() as stage, serving(stage, "c", MemoryDisk("1M", False)) as engine:
        child = os.fork()
        if child == 0:
            try:
                engine.stop()  # returns, and nothing is waited for
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert stage.ask(request())["status"][0] == Status.OKAY


# -- what an engine tells


@pytest.mark.parametrize("engine", ENGINES)
def test_a_peer_that_breaks_the_ring(engine: EngineName) -> None:
    with make_stage() as stage, serving(stage, engine, MemoryDisk("1M", False)):
        stage.ring_memory.view[0:4] = (12345).to_bytes(4, "little")
        stage.port.notify()
        assert stage.told.wait(DEADLINE_S)
        (failure,) = stage.failures
        assert isinstance(failure, PeerError)
        assert "producer index is out of range" in str(failure)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_operation_that_the_disk_turns_out_not_to_have(engine: EngineName, tmp_path: Path) -> None:
    with make_stage() as stage, serving(stage, engine, open_image(tmp_path / "disk", "file,io=sync")) as served:
        with failing("fdatasync", errno.EINVAL):
            assert stage.ask(request(Operation.FLUSH_DISKCACHE))["status"][0] == Status.EOPNOTSUPP
            assert stage.told.wait(DEADLINE_S)
        assert stage.unsupported == [Operation.FLUSH_DISKCACHE]
        settled(lambda: stage.ask(request(Operation.FLUSH_DISKCACHE))["status"][0] == Status.EOPNOTSUPP)
        assert served.statistics().refused > 0, "it is offered no longer, so the disk is not asked"


def test_a_file_system_without_holes_has_no_discard(tmp_path: Path) -> None:
    with make_stage() as stage, serving(stage, "c", open_image(tmp_path / "disk", "file,io=sync")):
        with failing("fallocate", errno.EOPNOTSUPP):
            assert stage.ask(discard(0, 8, 1))["status"][0] == Status.EOPNOTSUPP
        assert stage.told.wait(DEADLINE_S)
        assert stage.unsupported == [Operation.DISCARD]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_log_has_each_error_of_a_disk_once(
    engine: EngineName, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with make_stage() as stage, serving(stage, engine, open_image(tmp_path / "disk", "file,io=sync")):
        for error in (errno.EIO, errno.ENOSPC, errno.EIO, errno.ENOSPC):
            with failing("preadv", error):
                assert stage.ask(request())["status"][0] == Status.ERROR
            settled(lambda error=error: os.strerror(error) in caplog.text)
        assert stage.ask(request())["status"][0] == Status.OKAY
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"requests failed: {os.strerror(error)}" for error in (errno.EIO, errno.ENOSPC)
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_that_has_grown_or_shrunk(engine: EngineName) -> None:
    with make_stage() as stage, serving(stage, engine, MemoryDisk("1M", False), sectors=8) as served:
        assert stage.ask(request(sector=8))["status"][0] == Status.ERROR
        served.resize(16)
        assert stage.ask(request(sector=8))["status"][0] == Status.OKAY
        served.resize(15)
        assert stage.ask(request(sector=8))["status"][0] == Status.ERROR
        served.resize(1 << 40)
        assert stage.ask(request(sector=SECTORS))["status"][0] == Status.ERROR, "there is no more memory than that"


@pytest.mark.parametrize("engine", ENGINES)
def test_refused_requests_are_answered_a_batch_a_millisecond(engine: EngineName) -> None:
    """Time that only passes: no upper limit is asserted."""
    with make_stage() as stage, serving(stage, engine, MemoryDisk("1M", False)):
        began = time.monotonic()
        for _ in range(20):
            assert stage.ask(request(99))["status"][0] == Status.EOPNOTSUPP
        assert time.monotonic() - began > 0.018


# -- which engine


def test_which_disks_are_served_in_c(tmp_path: Path) -> None:
    class Own(MemoryDisk):
        """With a method of its own."""

        def flush(self) -> None:
            pass

    class Named(MemoryDisk):
        """With nothing of its own."""

    image = tmp_path / "disk"
    image.write_bytes(bytes(4096))
    kinds = {
        "memory": MemoryDisk("1M", False),
        "file": FileDisk(str(image), True),
        "null": NullDisk("1M", False),
        "zero": NullDisk("1M", False, read_zeroes=True),
    }
    assert {core_kind(disk) for disk in kinds.values()} == set(kinds)
    assert core_kind(Named("1M", False)) == "memory"
    with make_stage() as stage:
        for disk in (Own("1M", False), open_disk("delay", "memory:1M", read_only=False)):
            assert core_kind(disk) is None
            auto = stage.engine("auto", disk)
            assert isinstance(auto, PythonEngine)
            auto.stop()
            with pytest.raises(InvalidRequest, match="no disk that the engine in C can serve"):
                stage.engine("c", disk)
        for name, kind in (("auto", CEngine), ("c", CEngine), ("python", PythonEngine)):
            engine = stage.engine(name, kinds["memory"])  # type: ignore[arg-type]
            assert isinstance(engine, kind)
            engine.stop()
    with pytest.raises(InvalidRequest, match="an engine is one of auto, c, python"):
        engine_factory("fast")  # type: ignore[arg-type]


def test_an_engine_without_memory_or_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever allocation fails: an error, and what was there before."""
    disk = MemoryDisk("1M", False)
    with make_stage() as stage:

        def scenario() -> None:
            try:
                stage.engine("c", disk).stop()
            except ResourceLimit:
                return

        assert each_call_fails("calloc", scenario) > 4
        with failing("pthread_create", errno.EAGAIN, result=errno.EAGAIN):
            engine = stage.engine("c", disk)
            with pytest.raises(ResourceLimit, match="no thread for an engine"):
                engine.start()
            engine.stop()
    assert c_engine._Office._open is None
