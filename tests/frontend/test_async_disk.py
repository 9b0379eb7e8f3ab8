# SPDX-License-Identifier: MIT
"""A `Disk` in an event loop: many at once, cancelled at any moment, beside threads, closed while somebody waits."""

import asyncio
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from paravirt.errors import Closed, InvalidRequest, IoError, PeerGone
from paravirt.frontend.async_disk import AsyncDisk

from .disk_stage import PAGE, SIZE, Opened, opened

DEADLINE_S = 30.0


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Opened]:
    with opened(tmp_path) as made:
        yield made


def test_each_call(stage: Opened) -> None:
    async def main() -> None:
        aio, before = stage.disk.aio, stage.content
        assert await aio.pread(PAGE, PAGE) == before[PAGE : 2 * PAGE]
        assert await aio.pread(SIZE, 0) == before
        into = [bytearray(512), np.zeros(1024, np.uint8)]
        assert await aio.preadv(into, 512) == 1536
        assert b"".join(map(bytes, into)) == before[512:2048]
        assert await aio.pread_into(into[0], 0) == 512
        assert into[0] == before[:512]
        assert await aio.pwrite(b"w" * 512, 0) == 512
        assert await aio.pwritev([b"v" * 512, b"u" * 1024], 512) == 1536
        assert await aio.write_many([(8192, b"m" * 512), (16384, b"n" * 512)]) == 1024
        assert await aio.write_batch(np.array([32768, 40960]), 512, b"b" * 1024) == 1024
        await aio.flush()
        await aio.discard(1 << 20, PAGE)
        assert await aio.read_many([0, 8192, 16384], 512) == [b"w" * 512, b"m" * 512, b"n" * 512]
        rows = await aio.read_batch(np.array([32768, 40960, 512]), 512)
        assert [bytes(row) for row in rows] == [b"b" * 512, b"b" * 512, b"v" * 512]
        assert await aio.read_many([], 512) == []
        assert await aio.write_many([]) == 0

    asyncio.run(main())
    assert stage.content[:2048] == b"w" * 512 + b"v" * 512 + b"u" * 1024
    assert stage.disk.statistics().flushes == 1


def test_thousands_at_once(stage: Opened) -> None:
    """Far more than the ring takes, each a task, in the order they were asked for."""

    async def main() -> None:
        aio, chance = stage.disk.aio, random.Random(1)
        model = bytearray(stage.content)
        writes = []
        for _ in range(3000):
            at, data = chance.randrange(SIZE // 512) * 512, chance.randbytes(512)
            model[at : at + 512] = data
            writes.append(aio.pwrite(data, at))
        await asyncio.gather(*writes)
        assert stage.content == model
        places = [chance.randrange(SIZE // PAGE) * PAGE for _ in range(5000)]
        assert await asyncio.gather(*(aio.pread(PAGE, at) for at in places)) == [
            bytes(model[at : at + PAGE]) for at in places
        ]

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    counts = stage.disk.statistics()
    assert (counts.in_flight, counts.waiting) == (0, 0)
    assert counts.ring is not None
    assert counts.ring.batches < counts.ring.requests / 8, "what is asked in one turn goes out together"


def test_calls_of_one_turn_are_merged(stage: Opened) -> None:
    async def main() -> list[bytes]:
        return await asyncio.gather(*(stage.disk.aio.pread(512, at) for at in range(0, 64 * 512, 512)))

    assert b"".join(asyncio.run(main())) == stage.content[: 64 * 512]
    counts = stage.disk.statistics()
    assert (counts.merged, counts.reads) == (63, 1)


def test_errors(stage: Opened) -> None:
    (domain,) = stage.host.domains
    stage.host.attach_disk(domain, f"memory:{SIZE}", driver=f"error,range={SIZE // 2}-{SIZE}", device="xvdb")

    async def main(aio: AsyncDisk) -> None:
        with pytest.raises(InvalidRequest, match="not inside"):
            await aio.pread(512, SIZE)
        with pytest.raises(InvalidRequest, match="whole sectors"):
            await aio.pwrite(b"x", 0)
        good, bad = await asyncio.gather(aio.pread(512, 0), aio.pread(512, SIZE - 512), return_exceptions=True)
        assert good == bytes(512)
        assert isinstance(bad, IoError)
        assert f"READ of 512 bytes at {SIZE - 512}" in str(bad)

    with domain.open_disk("xvdb") as disk:
        asyncio.run(main(disk.aio))


def test_cancelled_at_any_moment(stage: Opened) -> None:
    """Memory that was handed back is not written, and the others get what they asked for."""
    disk, before = stage.disk, stage.content

    async def main() -> None:
        chance = random.Random(11)
        aio = disk.aio
        for round_number in range(60):
            buffers = [bytearray(PAGE) for _ in range(200)]
            places = [chance.randrange(SIZE // PAGE) * PAGE for _ in buffers]
            tasks = [
                asyncio.create_task(aio.pread_into(buffer, at)) for buffer, at in zip(buffers, places, strict=True)
            ]
            for _ in range(round_number % 4):
                await asyncio.sleep(0)
            gone = chance.sample(range(200), 100)
            for i in gone:
                tasks[i].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            copies = [bytes(buffer) for buffer in buffers]
            for i, result in enumerate(results):
                if isinstance(result, int):
                    assert copies[i] == before[places[i] : places[i] + PAGE]
                else:
                    assert isinstance(result, asyncio.CancelledError)
            await aio.flush()
            assert copies == [bytes(buffer) for buffer in buffers], "written after it was given back"

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    counts = disk.statistics()
    assert (counts.in_flight, counts.waiting) == (0, 0)
    assert not disk.queue._alive
    assert not disk.queue._futures


def test_beside_threads(stage: Opened) -> None:
    failures: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        chance = random.Random(1)
        try:
            while not stop.is_set():
                at = chance.randrange(SIZE // PAGE // 2) * PAGE
                data = chance.randbytes(PAGE)
                stage.disk.pwrite(data, at)
                assert stage.disk.pread(PAGE, at) == data
        except BaseException as error:
            failures.append(error)

    async def main() -> None:
        async def one(number: int) -> None:
            chance = random.Random(number)
            for _ in range(40):
                at = SIZE // 2 + number * 65536 + chance.randrange(16) * PAGE
                data = chance.randbytes(PAGE)
                await stage.disk.aio.pwrite(data, at)
                assert await stage.disk.aio.pread(PAGE, at) == data

        await asyncio.gather(*(one(number) for number in range(16)))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    finally:
        stop.set()
        thread.join(DEADLINE_S)
    assert not failures


def test_one_loop_after_the_other(stage: Opened) -> None:
    async def main() -> bytes:
        return await stage.disk.aio.pread(512, 512)

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        assert asyncio.run(main()) == stage.content[512:1024]
        assert stage.disk.pread(512, 0) == stage.content[:512]
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_two_loops_at_once_are_refused(stage: Opened) -> None:
    for engine in stage.device._engines:
        engine.stop()
    waits = threading.Event()

    async def first() -> None:
        task = asyncio.create_task(stage.disk.aio.pread(512, 0))
        await asyncio.sleep(0)
        waits.set()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(task, 1)

    thread = threading.Thread(target=lambda: asyncio.run(first()))
    thread.start()
    assert waits.wait(DEADLINE_S)

    async def second() -> None:
        with pytest.raises(InvalidRequest, match="another event loop"):
            await stage.disk.aio.pread(512, 0)

    asyncio.run(second())
    thread.join(DEADLINE_S)


@pytest.mark.parametrize("end", ["close", "detach"])
def test_the_end_while_calls_wait(stage: Opened, end: str) -> None:
    for engine in stage.device._engines:
        engine.stop()

    async def main() -> list[BaseException | bytes]:
        tasks = [asyncio.create_task(stage.disk.aio.pread(512, 0)) for _ in range(400)]
        await asyncio.sleep(0.01)
        loop = asyncio.get_running_loop()
        if end == "close":
            await loop.run_in_executor(None, stage.disk.close)
        else:
            await loop.run_in_executor(None, stage.host.detach_disk, stage.host.domains[0])
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    assert {type(result) for result in results} == {Closed if end == "close" else PeerGone}
    with pytest.raises((Closed, PeerGone)):
        asyncio.run(stage.disk.aio.pread(512, 0))


def test_closed_from_its_own_loop(stage: Opened) -> None:
    async def main() -> None:
        assert await stage.disk.aio.pread(512, 0) == stage.content[:512]
        task = asyncio.create_task(stage.disk.aio.pread(512, 0))
        await asyncio.sleep(0)
        stage.disk.close()
        result = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(result[0], Closed | bytes)

    asyncio.run(main())
