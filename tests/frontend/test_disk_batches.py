# SPDX-License-Identifier: MIT
"""Vectors, batches and merging of a `Disk`, against a real backend and its image."""

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from paravirt.errors import InvalidRequest, IoError, ParavirtError, TimedOut

from .disk_stage import PAGE, SIZE, Opened, opened


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Opened]:
    with opened(tmp_path) as made:
        yield made


def test_scatter_and_gather(stage: Opened) -> None:
    disk, before = stage.disk, stage.content
    into = [bytearray(512), memoryview(bytearray(8192)), np.zeros((3, 1024), np.uint8), np.zeros(128, np.float64)]
    assert disk.preadv(into, 4096) == 512 + 8192 + 3072 + 1024
    assert b"".join(bytes(buffer) for buffer in into) == before[4096 : 4096 + 12800]
    out = [os.urandom(1536), bytearray(os.urandom(512)), np.arange(2048, dtype=np.uint16)]
    assert disk.pwritev(out, 512) == 1536 + 512 + 4096
    assert stage.content == before[:512] + b"".join(bytes(part) for part in out) + before[512 + 6144 :]
    assert disk.statistics().merged == 3 + 2, "each call was one request"
    one = bytearray(1024)
    assert disk.pread_into(one, 2048) == 1024
    assert one == stage.content[2048:3072]


def test_memory_that_cannot_be_used(stage: Opened) -> None:
    disk = stage.disk
    with pytest.raises(InvalidRequest, match="writable"):
        disk.pread_into(bytes(512), 0)
    with pytest.raises(InvalidRequest, match="contiguous"):
        disk.pread_into(np.zeros((64, 64), np.uint8)[:, ::2], 0)
    with pytest.raises(InvalidRequest, match="contiguous"):
        disk.pwrite("text", 0)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="whole sectors"):
        disk.preadv([bytearray(500), bytearray(12)], 0)
    with pytest.raises(InvalidRequest, match="not inside"):
        disk.preadv([], 0)
    with pytest.raises(InvalidRequest, match="not inside"):
        disk.preadv([bytearray(512), bytearray(0)], 0)
    with pytest.raises(InvalidRequest, match="not inside"):
        disk.pwritev([bytes(512), bytes(1024)], SIZE - 1024)
    assert disk.statistics().in_flight == 0


def test_batches_of_arrays(stage: Opened) -> None:
    disk, before, chance = stage.disk, stage.content, np.random.default_rng(3)
    offsets = chance.permutation(SIZE // PAGE)[:700] * PAGE
    rows = disk.read_batch(offsets, PAGE)
    assert rows.shape == (700, PAGE)
    assert all(bytes(row) == before[at : at + PAGE] for row, at in zip(rows, offsets.tolist(), strict=True))
    flat = bytearray(700 * 512)
    assert disk.read_batch(offsets.astype(np.uint32), 512, flat) is flat
    assert flat == b"".join(before[at : at + 512] for at in offsets.tolist())
    data = chance.integers(0, 256, (700, PAGE), np.uint8)
    assert disk.write_batch(offsets, PAGE, data) == 700 * PAGE
    after = stage.content
    assert all(after[at : at + PAGE] == bytes(row) for row, at in zip(data, offsets.tolist(), strict=True))
    assert disk.read_many(offsets.tolist(), PAGE) == [bytes(row) for row in data]
    counts = disk.statistics()
    assert (counts.in_flight, counts.waiting, counts.copied_bytes) == (0, 0, 3 * 700 * PAGE + 700 * 512)
    assert counts.direct_bytes == 0


def test_batches_that_are_wrong_do_nothing(stage: Opened) -> None:
    disk, before = stage.disk, stage.content
    data = np.zeros((2, 512), np.uint8)
    for offsets, complaint in (
        ([0, SIZE], f"512 bytes at {SIZE} are not inside"),
        ([0, -512], "-512 are not inside"),
        ([0, 1 << 70], "are not inside"),
        ([0, 100], "whole sectors"),
        (np.array([0.0, 512.0]), "whole numbers"),
        (np.zeros((1, 2), np.int64), "one dimension"),
        ([0, 512, 1024], "3 times 512 bytes are not the 1024 bytes"),
    ):
        with pytest.raises(InvalidRequest, match=complaint):
            disk.write_batch(offsets, 512, data)
    with pytest.raises(InvalidRequest, match="not inside"):
        disk.read_batch([0], 0)
    with pytest.raises(InvalidRequest, match="not inside"):
        disk.read_batch([0], -512)
    assert disk.write_batch([], 512, b"") == 0
    assert disk.read_batch(np.zeros(0, np.int64), 512).shape == (0, 512)
    assert disk.read_many([], 512) == []
    assert disk.write_many([]) == 0
    assert stage.content == before
    assert disk.statistics().ring.requests == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("merge", "requests"), [(True, 8), (False, 1024)])
def test_neighbours_are_merged_unless_told_not_to(tmp_path: Path, merge: bool, requests: int) -> None:
    """Up to what the backend takes in one request: 1 MiB, here bounded by a quarter of the slots to 1 MiB less."""
    with opened(tmp_path, merge=merge) as stage:
        rows = stage.disk.read_batch(np.arange(0, SIZE, PAGE), PAGE)
        assert rows.tobytes() == stage.content
        counts = stage.disk.statistics()
        assert counts.ring is not None
        if merge:
            assert counts.ring.requests <= requests
            assert counts.merged >= 1024 - requests
        else:
            assert (counts.ring.requests, counts.merged) == (requests, 0)


def test_overlapping_writes_of_one_batch_keep_their_order(stage: Opened) -> None:
    chance, model = random.Random(5), bytearray(stage.content)
    for _ in range(30):
        writes = []
        for _ in range(200):
            at, data = chance.randrange(64) * 512, chance.randbytes(chance.choice([512, 1024, 8192]))
            model[at : at + len(data)] = data
            writes.append((at, data))
        stage.disk.write_many(writes)
    assert stage.content == model


def test_an_error_in_a_batch_names_the_request(stage: Opened) -> None:
    os.truncate(stage.image, SIZE // 2)
    with pytest.raises(IoError, match=f"READ of 4096 bytes at {SIZE - PAGE} failed"):
        stage.disk.read_many([0, SIZE - PAGE, PAGE], PAGE)
    # The backend may have seen meanwhile that the image is shorter, and have said so.
    with pytest.raises(ParavirtError, match=f"READ of 512 bytes at {SIZE - 512} failed|are not inside disk xvda"):
        stage.disk.pread(512, SIZE - 512)
    assert stage.disk.read_many([0, 8192], PAGE) == [stage.content[:PAGE], stage.content[8192 : 8192 + PAGE]]


def test_barriers_of_any_length(tmp_path: Path) -> None:
    with opened(tmp_path) as stage:
        assert stage.disk.can_barrier
        before = stage.content
        for n_bytes in (512, 40 << 10, (40 << 10) + 512, 44 << 10, 3 << 20):
            data = os.urandom(n_bytes)
            assert stage.disk.pwrite(data, 1024, barrier=True) == n_bytes
            assert stage.content[:1024] + data == before[:1024] + stage.content[1024 : 1024 + n_bytes]
        parts = [os.urandom(512), os.urandom(100 * 512)]
        assert stage.disk.pwritev(parts, 0, barrier=True) == 101 * 512
        assert stage.content[: 101 * 512] == b"".join(parts)


def test_threads_with_batches(stage: Opened) -> None:
    """Each in a region of its own, with everything a disk can do."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        chance, size = random.Random(number), SIZE // 8
        base, model = number * (SIZE // 8), bytearray(stage.content[number * size : (number + 1) * size])
        try:
            for _ in range(40):
                offsets = np.array(chance.sample(range(0, size - 8192, 512), 20))
                data = chance.randbytes(20 * 512)
                stage.disk.write_batch(offsets + base, 512, data)
                for i, at in enumerate(offsets.tolist()):
                    model[at : at + 512] = data[i * 512 : (i + 1) * 512]
                stage.disk.pwrite(data[:512], base)
                model[:512] = data[:512]
                rows = stage.disk.read_batch(offsets + base, 8192)
                assert all(bytes(row) == model[at : at + 8192] for row, at in zip(rows, offsets.tolist(), strict=True))
                assert stage.disk.pread(4096, base) == model[:4096]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


def test_memory_is_not_written_after_a_timeout(tmp_path: Path) -> None:
    """The backend stands still; what it answers later goes nowhere, and the disk goes on."""
    with opened(tmp_path, wait="sleep") as stage:
        device = stage.device
        stage.disk.pread(512, 0)
        for engine in device._engines:
            engine.stop()
        into = np.zeros((500, PAGE), np.uint8)
        with pytest.raises(TimedOut):
            stage.disk.read_batch(np.arange(0, 500 * PAGE, PAGE), PAGE, into, timeout_s=0.05)
        with pytest.raises(TimedOut):
            stage.disk.pread(512, 0, timeout_s=0.05)
        counts = stage.disk.statistics()
        assert counts.in_flight > 0
        assert counts.waiting == 0
        connections = device._connections
        device._engines = [device._make_engine(connection) for connection in connections]
        for engine in device._engines:
            engine.start()
        assert stage.disk.pread(512, 512) == stage.content[512:1024]
        assert not into.any()
        assert stage.disk.statistics().in_flight == 0
