# SPDX-License-Identifier: MIT
"""Memory of a disk that the backend uses in place: nothing is copied, and nothing is given away too early."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import paravirt
from paravirt.errors import Closed, InvalidRequest, ResourceLimit

from .disk_stage import PAGE, Opened, opened

ROOM = 1 << 20


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Opened]:
    with opened(tmp_path, buffer_bytes=ROOM) as made:
        yield made


def test_every_call_takes_them_without_a_copy(stage: Opened) -> None:
    disk = stage.disk
    buffers = disk.buffers(PAGE, 64)
    assert (len(buffers), buffers.n_bytes, buffers.array.shape) == (64, PAGE, (64, PAGE))
    offsets = np.arange(64)[::-1] * PAGE
    before = stage.content
    assert disk.read_batch(offsets, PAGE, buffers.array) is buffers.array
    assert all(bytes(buffers[i]) == before[at : at + PAGE] for i, at in enumerate(offsets.tolist()))
    buffers.array[:] = np.frombuffer(os.urandom(64 * PAGE), np.uint8).reshape(64, PAGE)
    disk.write_batch(offsets, PAGE, buffers.array)
    disk.pwrite(buffers[0], 2 << 20)
    disk.pwritev([buffers[1], buffers[2][512:1024]], 3 << 20)
    disk.pread_into(buffers[3][1024:2048], 2 << 20)
    assert stage.content[2 << 20 : (2 << 20) + PAGE] == buffers[0]
    assert stage.content[3 << 20 : (3 << 20) + PAGE + 512] == bytes(buffers[1]) + bytes(buffers[2][512:1024])
    assert buffers[3][1024:2048] == buffers[0][:1024]
    counts = disk.statistics()
    assert counts.copied_bytes == 0
    assert counts.direct_bytes == counts.read_bytes + counts.written_bytes == 128 * PAGE + PAGE + PAGE + 512 + 1024
    disk.pread(512, 0)
    assert disk.statistics().copied_bytes == 512


def test_large_ones_are_indirect_from_any_sector(stage: Opened) -> None:
    with stage.disk.buffers(ROOM - PAGE) as buffers:
        for start in (0, 512, 3584, 4096):
            memory = buffers[0][start:]
            stage.disk.pread_into(memory, 512)
            assert memory == stage.content[512 : 512 + len(memory)]
        assert stage.disk.statistics().copied_bytes == 0


def test_what_there_is_room_for(stage: Opened, tmp_path: Path) -> None:
    disk = stage.disk
    for n_bytes, count in ((0, 1), (-512, 1), (100, 1), (512, 0)):
        with pytest.raises(InvalidRequest, match="whole sectors"):
            disk.buffers(n_bytes, count)
    first = disk.buffers(ROOM // 2)
    with pytest.raises(ResourceLimit, match=f"{ROOM // 2} bytes that are left"):
        disk.buffers(ROOM // 2 + 512)
    second = disk.buffers(512, ROOM // 1024)
    with pytest.raises(ResourceLimit, match="the 0 bytes"):
        disk.buffers(512)
    first.free()
    first.free()
    with pytest.raises(Closed, match="freed"):
        first[0]
    assert "freed" in repr(first)
    third = disk.buffers(ROOM // 2)
    assert not third.array.any(), "zeroed"
    with pytest.raises(IndexError):
        second[ROOM // 1024]
    other = tmp_path / "other"
    other.mkdir()
    with opened(other) as without, pytest.raises(ResourceLimit, match="buffer_bytes"):
        without.disk.buffers(512)


def test_one_that_is_freed_while_it_is_read_into(stage: Opened) -> None:
    """A cancelled read goes on at the backend: its memory becomes nothing else until it is answered."""
    disk = stage.disk
    device = stage.device
    disk.pread(512, 0)
    for engine in device._engines:
        engine.stop()
    buffers = disk.buffers(ROOM)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await disk.aio.pread_into(buffers[0], 0)

    asyncio.run(give_up())
    assert buffers.in_flight > 0
    buffers.free()
    with pytest.raises(ResourceLimit):
        disk.buffers(512)
    device._engines = [device._make_engine(connection) for connection in device._connections]
    for engine in device._engines:
        engine.start()
    assert disk.pread(512, 0) == stage.content[:512]
    assert len(disk.buffers(ROOM)) == 1


def test_one_that_the_backend_keeps(stage: Opened) -> None:
    """As any page of an arena that is freed: it comes back when the backend has let go."""
    disk, arena = stage.disk, stage.disk.queue.end.arena
    assert arena is not None
    (connection,) = stage.device._connections
    buffers = disk.buffers(PAGE)
    offset = int(buffers.array.ctypes.data) - arena.memory.address
    gref = arena.base + offset // PAGE
    connection.mapper.map(gref)
    buffers.free()
    assert arena.statistics().held_pages == 1
    connection.mapper.unmap(gref)
    assert arena.statistics().held_pages == 0


def test_nothing_of_it_is_left(stage: Opened) -> None:
    disk, arena = stage.disk, stage.disk.queue.end.arena
    assert arena is not None
    granted = arena.statistics().granted_pages
    for _ in range(20):
        with disk.buffers(8192, 5) as buffers:
            disk.read_batch(np.arange(5) * 8192, 8192, buffers.array)
    assert arena.statistics().granted_pages == granted
    view = disk.buffers(PAGE).array
    disk.close()
    assert not view.any(), "the memory stays as long as somebody looks at it"


def test_with_several_queues(tmp_path: Path) -> None:
    with opened(tmp_path, max_queues=3, queues=3, buffer_bytes=ROOM) as stage:
        buffers = stage.disk.buffers(PAGE, 32)
        for queue in stage.disk._queues:
            stage.disk._mine.queue = queue
            stage.disk.read_batch(np.arange(32) * PAGE, PAGE, buffers.array)
            assert buffers.array.tobytes() == stage.content[: 32 * PAGE]
            buffers.array[:] = 0
        assert [each.direct_bytes for each in stage.disk.statistics().queues] == [32 * PAGE] * 3


@pytest.mark.parametrize("key", ["0", "", "yes"])
def test_an_untrusted_backend_gets_no_memory_in_use(tmp_path: Path, key: str) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(ROOM))
    with paravirt.Host() as host:
        guest = host.create_domain("guest")
        path = host.attach_disk(guest, str(image), trusted=False)
        trusted = f"{path.frontend}/trusted"
        assert host.store.read(trusted) in ("0", b"0")
        host.store.write(trusted, key)
        with guest.open_disk("xvda", buffer_bytes=ROOM) as disk:
            with pytest.raises(InvalidRequest, match="not trusted"):
                disk.buffers(PAGE)
            disk.pwrite(b"x" * PAGE, PAGE)
            assert disk.pread(PAGE, PAGE) == b"x" * PAGE
            counts = disk.statistics()
            assert (counts.direct_bytes, counts.copied_bytes) == (0, 2 * PAGE)
