# SPDX-License-Identifier: MIT
"""A guest that uses a disk in every way there is until its standard input ends, and says how far it is.

`disk_worker.py QUEUES`. Each sector group (block) holds its own number and a version, many times over. Each writer has
blocks of its own and reads back exactly the last version; readers of everybody's blocks see no version older than the
one that was acknowledged when they asked, and none that was not written yet.
"""

import asyncio
import random
import struct
import sys
import threading
from collections.abc import Callable

import numpy as np

import paravirt
from paravirt.frontend.vbd import Disk

BLOCK = 4096
EACH = 128  # blocks of a writer
RECORD = struct.Struct("<QQ")

issued: dict[int, int] = {}
acknowledged: dict[int, int] = {}


def content(place: int, version: int) -> bytes:
    return RECORD.pack(place, version) * (BLOCK // RECORD.size)


def next_version(place: int) -> bytes:
    """Of a block that is about to be written."""
    issued[place] = version = issued.get(place, 0) + 1
    return content(place, version)


def check(right: bool, what: str) -> None:
    if not right:
        raise AssertionError(what)


def batches(disk: Disk, chance: random.Random, first: int, stop: threading.Event, *, direct: bool) -> None:
    """Arrays of offsets, in memory that is copied or not."""
    buffers = disk.buffers(BLOCK, 32) if direct else None
    array = np.zeros((32, BLOCK), np.uint8) if buffers is None else buffers.array
    while not stop.is_set():
        start = chance.randrange(EACH - 32)
        places = list(range(first + start, first + start + 32)) if chance.randrange(2) else []
        places = places or [first + place for place in chance.sample(range(EACH), 32)]
        offsets = np.array(places) * BLOCK
        array[:] = np.frombuffer(b"".join(map(next_version, places)), np.uint8).reshape(32, BLOCK)
        disk.write_batch(offsets, BLOCK, array)
        acknowledged.update((place, issued[place]) for place in places)
        array[:] = 0
        disk.read_batch(offsets[::-1].copy(), BLOCK, array)
        for row, place in zip(array, places[::-1], strict=True):
            check(bytes(row) == content(place, issued[place]), f"block {place} of a batch")


async def tasks(disk: Disk, chance: random.Random, first: int, stop: threading.Event) -> None:
    """Tasks that write one block several times in a turn, in order, and are cancelled now and then."""
    aio = disk.aio
    while not stop.is_set():
        places = [first + place for place in chance.sample(range(EACH // 2), 16)]
        writes = [aio.pwrite(next_version(place), place * BLOCK) for _ in range(3) for place in places]
        await asyncio.gather(*writes)
        acknowledged.update((place, issued[place]) for place in places)
        gone = bytearray(BLOCK)
        task = asyncio.create_task(aio.pread_into(gone, places[0] * BLOCK))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gone[:] = bytes(BLOCK)
        for place, data in zip(
            places, await asyncio.gather(*(aio.pread(BLOCK, place * BLOCK) for place in places)), strict=True
        ):
            check(data == content(place, issued[place]), f"block {place} of a task")
        check(not any(gone), "memory of a cancelled call was written")
        extra = first + EACH // 2 + chance.randrange(EACH // 2 - 16)
        vector = [next_version(place) for place in range(extra, extra + 16)]
        await aio.pwritev(vector, extra * BLOCK)
        acknowledged.update((place, issued[place]) for place in range(extra, extra + 16))


def readers(disk: Disk, chance: random.Random, stop: threading.Event) -> None:
    while not stop.is_set():
        if not acknowledged:
            continue
        place = chance.choice(list(acknowledged))
        least = acknowledged[place]
        data = disk.pread(BLOCK, place * BLOCK)
        most = issued[place]
        for number, version in RECORD.iter_unpack(data):
            check(number == place, f"block {place} is block {number}")
            check(least <= version <= most, f"block {place}: {version} is not from {least} to {most}")


def main() -> None:
    stop, failures = threading.Event(), []

    def listen() -> None:
        sys.stdin.read()
        stop.set()

    def guarded(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failures.append(repr(error))
                stop.set()

        return run

    threading.Thread(target=listen, daemon=True).start()
    queues, chance = int(sys.argv[1]), [random.Random(seed) for seed in range(5)]
    with (
        paravirt.Domain.from_environment() as domain,
        domain.open_disk("xvda", queues=queues, buffer_bytes=1 << 20) as disk,
    ):
        assert disk.n_queues == queues
        works: list[Callable[[], object]] = [
            lambda: batches(disk, chance[0], 0, stop, direct=False),
            lambda: batches(disk, chance[1], EACH, stop, direct=True),
            lambda: asyncio.run(tasks(disk, chance[2], 2 * EACH, stop)),
            lambda: readers(disk, chance[3], stop),
        ]
        threads = [threading.Thread(target=guarded(work)) for work in works]
        for thread in threads:
            thread.start()
        print("ready", flush=True)
        rounds = 0
        while not stop.wait(0.1):
            sums = sum(issued.values())
            if sums >= 2000 * (rounds + 1):
                rounds = sums // 2000
                print(rounds, flush=True)
        for thread in threads:
            thread.join()
        disk.flush()
        for place, version in issued.items():
            if disk.pread(BLOCK, place * BLOCK) != content(place, version):
                failures.append(f"block {place} at the end")
        counts = disk.statistics()
        if failures or counts.in_flight or counts.waiting:
            print("wrong data", flush=True)
            sys.exit(f"{failures}, {counts}")
        print("done", rounds, counts.reconnects, counts.reissued, flush=True)


if __name__ == "__main__":
    main()
