# SPDX-License-Identifier: MIT
"""A load on a disk: what it asks for, what it counts, what it finds wrong. Never how fast it is."""

import itertools
import random
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import paravirt
from paravirt.backend.service import BackendService
from paravirt.errors import Closed, InvalidRequest, PeerError, ReadOnly, TimedOut
from paravirt.frontend.load import run_load
from paravirt.frontend.vbd import Disk
from paravirt.protocol.blkif import RESPONSE, Operation, Status
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkload import MOST_DEPTH, RWS, Histogram, Load, LoadJob, LoadResult, Rw

from .blkfront_stage import N_SLOTS, Stage, make_stage

SIZE = 4 << 20


@pytest.fixture(scope="module")
def host():
    with paravirt.Host() as running:
        yield running


@pytest.fixture
def domain(host: paravirt.Host):
    made = host.create_domain(f"guest-{random.randrange(1 << 40):x}")
    yield made
    if made in host.domains:
        host.destroy_domain(made)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(7).randbytes(SIZE))
    return path


@pytest.fixture
def disk(host: paravirt.Host, domain: paravirt.Domain, image: Path):
    host.attach_disk(domain, str(image))
    with domain.open_disk("xvda") as opened:
        yield opened


@pytest.fixture
def stage():
    with make_stage() as made:
        yield made


# -- times


def test_each_time_is_kept_to_three_percent() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        ns = chance.randrange(1 << chance.randrange(1, 42))
        one = Histogram()
        one.add(ns)
        ((least, n),) = one.latency().buckets
        assert n == 1
        assert least <= ns <= least * 1.04
        assert set(one.latency().percentiles_ns.values()) == {ns}


def test_buckets_lie_side_by_side() -> None:
    edges = [lib.pv_histogram_bucket_ns(i) for i in range(lib.PV_HISTOGRAM_BUCKETS + 1)]
    assert edges[0] == 0
    assert edges[-1] == 1 << 42
    assert all(before < after for before, after in itertools.pairwise(edges))
    for i, (edge, after) in enumerate(itertools.pairwise(edges)):
        for ns in (edge, after - 1):
            one = Histogram()
            one.add(ns)
            assert one.core.buckets[i] == 1


def test_percentiles() -> None:
    times = Histogram()
    for ns in range(1, 10_001):
        times.add(ns * 10)
    latency = times.latency()
    assert (latency.n, latency.least_ns, latency.most_ns, latency.mean_ns) == (10_000, 10, 100_000, 50_005)
    for share, ns in latency.percentiles_ns.items():
        assert ns == pytest.approx(share * 1000, rel=0.03)


def test_times_out_of_range_count_at_the_ends() -> None:
    times = Histogram()
    times.add(-5)
    times.add((1 << 63) - 1)
    latency = times.latency()
    assert [n for _, n in latency.buckets] == [1, 1]
    assert (latency.least_ns, latency.most_ns) == (0, (1 << 63) - 1)


def test_nothing_measured() -> None:
    latency = Histogram().latency()
    assert (latency.n, latency.mean_ns, latency.buckets) == (0, 0.0, ())
    assert set(latency.percentiles_ns.values()) == {0}


def test_merging() -> None:
    a, b, empty = Histogram(), Histogram(), Histogram()
    a.add(500)
    b.add(7)
    b.add(90_000)
    a.merge(b)
    a.merge(empty)
    latency = a.latency()
    assert (latency.n, latency.least_ns, latency.most_ns) == (3, 7, 90_000)
    empty.merge(a)
    assert empty.latency() == latency


# -- what it asks for, against a backend that the test plays


def start(stage: Stage, job: LoadJob, generations: "np.ndarray | None" = None) -> Load:
    return Load(stage.slots, job, spin_ns=0, wait_spin_ns=0, generations=generations, slice_ns=0)


def answer(stage: Stage, requests: np.ndarray, **forged: int) -> None:
    answers = np.zeros(len(requests), RESPONSE)
    indirect = requests["operation"] == Operation.INDIRECT  # then the next byte says what is done
    answers["id"], answers["status"] = requests["id"], Status.OKAY
    answers["operation"] = np.where(indirect, requests["nr_segments"], requests["operation"])
    for name, value in forged.items():
        answers[name][-1] = value
    stage.back.push(answers)


def play(stage: Stage, load: Load, rounds: int = 10_000) -> np.ndarray:
    """Run it to its end; all its requests in order."""
    seen: list[np.ndarray] = []
    for _ in range(rounds):
        if load.run(stage.front):
            return np.concatenate(seen)
        requests = stage.back.take_batch()
        seen.append(requests.copy())
        answer(stage, requests)
    raise AssertionError("it does not end")


def test_one_block_after_the_other(stage: Stage) -> None:
    job = LoadJob(rw="read", depth=3, start=1024, n_bytes=5 * 4096 + 512, requests=12)
    seen = play(stage, start(stage, job))
    assert list(seen["sector"]) == [2 + 8 * (i % 5) for i in range(12)]
    assert set(seen["operation"]) == {Operation.READ}
    assert set(seen["nr_segments"]) == {1}


def test_places_are_random_and_all_are_used(stage: Stage) -> None:
    job = LoadJob(depth=8, n_bytes=64 * 4096, requests=6400)
    seen = Counter(int(sector) for sector in play(stage, start(stage, job))["sector"])
    assert set(seen) == {8 * i for i in range(64)}
    assert max(seen.values()) < 200
    again = play(stage, start(stage, LoadJob(depth=8, n_bytes=64 * 4096, requests=6400, seed=2)))
    assert Counter(int(sector) for sector in again["sector"]) != seen


@pytest.mark.parametrize(("percent", "reads"), [(0, 0), (100, 1000), (70, 700), (0.5, 5)])
def test_a_mix(stage: Stage, percent: float, reads: int) -> None:
    job = LoadJob(rw="randrw", read_percent=percent, depth=8, requests=1000, n_bytes=1 << 20)
    load = start(stage, job)
    seen = play(stage, load)
    share = int((seen["operation"] == Operation.READ).sum())
    assert abs(share - reads) <= (60 if 0 < percent < 100 else 0)
    result = load.result()
    assert (result.reads, result.writes, result.errors) == (share, 1000 - share, 0)
    assert (result.read_latency.n, result.write_latency.n, result.latency.n) == (share, 1000 - share, 1000)


@pytest.mark.parametrize(("depth", "refill"), [(1, 1), (8, 1), (8, 8), (8, 3), (32, 16), (64, 64)])
def test_how_many_are_in_flight(stage: Stage, depth: int, refill: int) -> None:
    """Never more than the depth (or than the ring has room for); refilled as soon as so many can be sent at once."""
    load = start(stage, LoadJob(depth=depth, refill=refill, requests=200, n_bytes=1 << 20))
    most = min(depth, N_SLOTS)
    waiting, held = 0, stage.back.take_batch()
    sizes = []
    while not load.run(stage.front):
        requests = stage.back.take_batch()
        waiting += len(requests)
        sizes.append(len(requests))
        assert waiting <= most
        held = np.concatenate([held, requests])
        done = (len(held) + 1) // 2 if refill == 1 else len(held)
        answer(stage, held[:done])
        held, waiting = held[done:], waiting - done
    assert sizes[0] == most
    assert sum(sizes) == 200


def test_refill_waits_for_room(stage: Stage) -> None:
    load = start(stage, LoadJob(depth=8, refill=3, requests=100, n_bytes=1 << 20))
    assert not load.run(stage.front)
    first = stage.back.take_batch().copy()
    assert len(first) == 8
    for i in (0, 1):
        answer(stage, first[i : i + 1])
        assert not load.run(stage.front)
        assert len(stage.back.take_batch()) == 0
    answer(stage, first[2:3])
    assert not load.run(stage.front)
    assert len(stage.back.take_batch()) == 3


def test_large_requests_are_indirect(stage: Stage) -> None:
    job = LoadJob(depth=4, block_bytes=128 << 10, n_bytes=1 << 20, requests=9)
    seen = play(stage, start(stage, job))
    assert len(seen) == 9
    assert set(seen["operation"]) == {Operation.INDIRECT}


def test_it_ends_by_the_clock(stage: Stage) -> None:
    load = start(stage, LoadJob(seconds=0.05, n_bytes=1 << 20))
    seen = play(stage, load)
    result = load.result()
    assert result.reads == len(seen) > 0
    assert result.seconds >= 0.05
    assert result.iops == pytest.approx(result.reads / result.seconds)
    assert result.cpu_s > 0
    assert stage.slots.in_flight == 0


# -- what is checked


def test_the_pattern_tells_place_generation_and_seed() -> None:
    block = np.zeros(4096, np.uint8)
    mismatch = ffi.new("struct pv_pattern_mismatch *")
    at = ffi.cast("uint8_t *", ffi.from_buffer(block))
    lib.pv_pattern_fill(at, 4096, 8192, 5, 9)

    def check(offset: int = 8192, generation: int = 5, seed: int = 9) -> int:
        return int(lib.pv_pattern_check(at, 4096, offset, generation, seed, mismatch))

    assert check() == 0
    assert check(seed=10) == 8
    assert check(generation=4) == 8
    assert (mismatch.generation, mismatch.found_generation) == (4, 5)
    assert check(offset=4096) == 8
    assert (mismatch.offset, mismatch.found_offset) == (4096, 8192)
    chance = random.Random(2)
    for _ in range(300):
        place = chance.randrange(4096)
        before = int(block[place])
        block[place] ^= 1 << chance.randrange(8)
        assert check() == 1
        assert mismatch.offset == 8192 + place // 512 * 512
        block[place] = before
    assert check() == 0


class Model:
    """A backend that is a piece of memory."""

    def __init__(self, stage: Stage, n_bytes: int) -> None:
        self.stage, self.memory = stage, bytearray(n_bytes)
        self.forge = 0
        """So many reads from now, one is answered with a wrong bit."""

    def serve(self, requests: np.ndarray) -> None:
        for request in requests:
            at = int(request["sector"]) * 512
            is_read = request["operation"] == Operation.READ
            gref = int(request["seg"][0]["gref"])
            page = self.stage.mapper.map(gref, read_only=not is_read)
            view = self.stage.data.view[page : page + 4096]
            if is_read:
                view[:] = self.memory[at : at + 4096]
                self.forge -= 1
                if self.forge == 0:
                    view[700] ^= 4
            else:
                self.memory[at : at + 4096] = view
            self.stage.mapper.unmap(gref, read_only=not is_read)

    def run(self, load: Load, **forged: int) -> LoadResult:
        while not load.run(self.stage.front):
            requests = self.stage.back.take_batch()
            self.serve(requests)
            answer(self.stage, requests, **forged)
        return load.result()


BLOCKS = 40


def verifying(rw: Rw, requests: int, depth: int = 16) -> LoadJob:
    return LoadJob(rw=rw, depth=depth, n_bytes=BLOCKS * 4096, requests=requests, verify=True)


def test_what_was_written_is_read_back(stage: Stage) -> None:
    model = Model(stage, BLOCKS * 4096)
    generations = np.zeros(BLOCKS, np.uint32)
    filled = model.run(start(stage, verifying("write", BLOCKS), generations))
    assert (filled.writes, filled.verified, filled.unknown) == (BLOCKS, 0, 0)
    assert list(generations) == [1] * BLOCKS
    mixed = model.run(start(stage, verifying("randrw", 2000), generations))
    assert (mixed.verified, mixed.unknown, mixed.wrong, mixed.first_wrong) == (mixed.reads, 0, 0, "")
    assert int(generations.sum()) == BLOCKS + mixed.writes
    read = model.run(start(stage, verifying("read", BLOCKS), generations))
    assert read.verified == BLOCKS


def test_blocks_nobody_wrote_are_not_checked(stage: Stage) -> None:
    read = Model(stage, BLOCKS * 4096).run(start(stage, verifying("randread", 100)))
    assert (read.verified, read.unknown, read.wrong) == (0, 100, 0)


def test_a_wrong_bit_is_found(stage: Stage) -> None:
    model = Model(stage, BLOCKS * 4096)
    generations = np.zeros(BLOCKS, np.uint32)
    model.run(start(stage, verifying("write", BLOCKS), generations))
    model.forge = 7
    read = model.run(start(stage, verifying("read", BLOCKS), generations))
    assert (read.verified, read.wrong) == (BLOCKS - 1, 1)
    assert read.first_wrong == f"byte {6 * 4096 + 512}: generation 1 of byte {6 * 4096 + 512} instead of generation 1"


def test_a_lost_write_is_found(stage: Stage) -> None:
    model = Model(stage, BLOCKS * 4096)
    generations = np.zeros(BLOCKS, np.uint32)
    model.run(start(stage, verifying("write", BLOCKS), generations))
    before = bytes(model.memory)
    model.run(start(stage, verifying("write", 1, depth=1), generations))
    model.memory[:] = before
    read = model.run(start(stage, verifying("read", BLOCKS), generations))
    assert read.wrong == 8
    assert read.first_wrong == "byte 0: generation 1 of byte 0 instead of generation 2"


def test_a_block_is_in_flight_once(stage: Stage) -> None:
    load = start(stage, verifying("randrw", 3000, depth=32))
    model = Model(stage, BLOCKS * 4096)
    flying: Counter[int] = Counter()
    held: list[np.ndarray] = []
    chance = random.Random(5)
    while not load.run(stage.front):
        requests = stage.back.take_batch().copy()
        model.serve(requests)
        held += [requests[i : i + 1] for i in range(len(requests))]
        flying.update(int(sector) for sector in requests["sector"])
        assert max(flying.values()) == 1
        chance.shuffle(held)
        for one in held[: len(held) // 2 + 1]:
            answer(stage, one)
            del flying[int(one["sector"][0])]
        held = held[len(held) // 2 + 1 :]
    assert load.result().wrong == 0


def test_a_write_that_failed_is_not_relied_on(stage: Stage) -> None:
    model = Model(stage, BLOCKS * 4096)
    generations = np.zeros(BLOCKS, np.uint32)
    failed = model.run(start(stage, verifying("write", 1, depth=1), generations), status=Status.ERROR)
    assert (failed.writes, failed.errors, list(generations)) == (0, 1, [0] * BLOCKS)
    read = model.run(start(stage, verifying("read", 1, depth=1), generations))
    assert read.unknown == 1


def test_what_was_in_flight_when_it_gave_up_is_not_relied_on(stage: Stage) -> None:
    generations = np.zeros(BLOCKS, np.uint32)
    load = start(stage, verifying("write", 4, depth=4), generations)
    assert not load.run(stage.front)
    assert np.flatnonzero(generations).tolist() == [0, 1, 2, 3]
    start(stage, verifying("read", 4, depth=4), generations)
    assert not generations.any()


def test_generations_wrap(stage: Stage) -> None:
    model = Model(stage, BLOCKS * 4096)
    generations = np.full(BLOCKS, 0x7FFFFFFF, np.uint32)
    model.run(start(stage, verifying("write", BLOCKS), generations))
    assert list(generations) == [1] * BLOCKS
    assert model.run(start(stage, verifying("read", BLOCKS), generations)).verified == BLOCKS


# -- backends that do not do as they should


def test_errors_are_counted(stage: Stage) -> None:
    load = start(stage, LoadJob(depth=1, requests=5, n_bytes=1 << 20))
    while not load.run(stage.front):
        answer(stage, stage.back.take_batch(), status=Status.ERROR)
    result = load.result()
    assert (result.reads, result.errors, result.latency.n) == (0, 5, 5)


@pytest.mark.parametrize(
    ("forged", "complaint"),
    [
        ({"id": N_SLOTS}, "not in flight"),
        ({"id": 1 << 63}, "not in flight"),
        ({"operation": 1}, "not what was asked"),
        ({"status": 1}, "with status 1"),
    ],
)
def test_answers_that_match_no_request(stage: Stage, forged: dict[str, int], complaint: str) -> None:
    load = start(stage, LoadJob(depth=4, requests=100, n_bytes=1 << 20))
    assert not load.run(stage.front)
    answer(stage, stage.back.take_batch(), **forged)
    with pytest.raises(PeerError, match=complaint):
        load.run(stage.front)
    assert load.result().reads == 3


def test_an_index_out_of_range(stage: Stage) -> None:
    load = start(stage, LoadJob(depth=4, requests=100, n_bytes=1 << 20))
    assert not load.run(stage.front)
    stage.rings[-1].view[8:12] = (1000).to_bytes(4, "little")
    with pytest.raises(PeerError, match="out of range"):
        load.run(stage.front)


def test_no_answer(stage: Stage) -> None:
    load = start(stage, LoadJob(depth=4, requests=100, n_bytes=1 << 20, timeout_s=0.05))
    assert not load.run(stage.front)
    time.sleep(0.06)
    with pytest.raises(TimedOut):
        load.run(stage.front)
    assert stage.slots.in_flight == 4


def test_a_backend_that_keeps_all_pages(stage: Stage) -> None:
    load = start(stage, LoadJob(depth=N_SLOTS, requests=100, n_bytes=1 << 20))
    assert not load.run(stage.front)
    requests = stage.back.take_batch().copy()
    for request in requests:
        stage.mapper.map(int(request["seg"][0]["gref"]))
    answer(stage, requests)
    with pytest.raises(PeerError, match="keeps the pages"):
        load.run(stage.front)
    for request in requests:
        stage.mapper.unmap(int(request["seg"][0]["gref"]))
    assert len(play(stage, load)) == 100 - N_SLOTS


def test_a_new_ring_in_the_middle(stage: Stage) -> None:
    model = Model(stage, BLOCKS * 4096)
    generations = np.zeros(BLOCKS, np.uint32)
    load = start(stage, verifying("randrw", 500), generations)
    for _ in range(10):
        assert not load.run(stage.front)
        requests = stage.back.take_batch()
        model.serve(requests[: len(requests) // 2])
        stage.front.close()
        stage.back.close()
        stage.new_ring()
        stage.slots.reissue(stage.front)
        requests = stage.back.take_batch()
        model.serve(requests)
        answer(stage, requests)
    result = model.run(load)
    assert (result.reads + result.writes, result.wrong, result.errors) == (500, 0, 0)


# -- jobs that cannot be


@pytest.mark.parametrize(
    "job",
    [
        {"rw": "trim"},
        {"block_bytes": 0},
        {"block_bytes": 1000},
        {"block_bytes": -512},
        {"start": 100},
        {"depth": 0},
        {"depth": MOST_DEPTH + 1},
        {"refill": 0},
        {"refill": 33},
        {"n_bytes": 4095},
        {"requests": 0},
        {"requests": -1},
        {"seconds": -1.0},
        {"read_percent": 101.0},
        {"seed": 0},
        {"timeout_s": 0.0},
        {"verify": True, "n_bytes": 31 * 4096},
    ],
)
def test_bad_jobs(job: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        LoadJob(**{"requests": 1, **job})  # type: ignore[arg-type]


def test_jobs_the_ring_has_no_room_for(stage: Stage) -> None:
    with pytest.raises(InvalidRequest, match="no room"):
        start(stage, LoadJob(block_bytes=4 << 20, n_bytes=4 << 20, depth=1, requests=1))
    with pytest.raises(InvalidRequest, match="generations"):
        start(stage, verifying("read", 1), np.zeros(BLOCKS - 1, np.uint32))
    with pytest.raises(InvalidRequest, match="generations"):
        start(stage, verifying("read", 1), np.zeros(BLOCKS, np.uint64))


@pytest.mark.parametrize(
    "field", ["depth", "refill", "seed", "n_blocks", "block_bytes", "start", "read_per_mille", "length_ns"]
)
def test_the_core_refuses_what_it_cannot_run(stage: Stage, field: str) -> None:
    load = start(stage, verifying("randrw", 1))
    core = load.core
    assert lib.pv_blkload_begin(core, stage.slots.core) == 0
    wrong = {"start": 100, "read_per_mille": 1001, "length_ns": -1}.get(field, 0)
    setattr(core, field, wrong)
    assert lib.pv_blkload_begin(core, stage.slots.core) == -22


# -- on a disk


@pytest.mark.parametrize("rw", RWS)
def test_on_a_disk(disk: Disk, rw: Rw) -> None:
    result = run_load(disk, LoadJob(rw=rw, requests=3000, n_bytes=SIZE))
    assert result.reads + result.writes == 3000
    assert result.errors == 0
    counted = disk.statistics()
    assert (counted.reads, counted.writes, counted.in_flight) == (result.reads, result.writes, 0)


@pytest.mark.parametrize("n_bytes", [512, 4096, 45056, 128 << 10])
def test_verified_on_a_disk(disk: Disk, image: Path, n_bytes: int) -> None:
    blocks = SIZE // n_bytes
    generations = np.zeros(blocks, np.uint32)

    def job(rw: Rw, requests: int) -> LoadJob:
        return LoadJob(rw=rw, block_bytes=n_bytes, n_bytes=SIZE, depth=8, requests=requests, verify=True, seed=77)

    assert run_load(disk, job("write", blocks), generations=generations).writes == blocks
    mixed = run_load(disk, job("randrw", 300), generations=generations)
    assert (mixed.verified, mixed.wrong) == (mixed.reads, 0)
    disk.flush()
    with image.open("r+b") as file:
        file.seek(n_bytes + 9)
        file.write(b"\xff\x00")
    read = run_load(disk, job("read", blocks), generations=generations)
    assert (read.verified, read.wrong) == (blocks - 1, 1)


def test_a_region(disk: Disk, image: Path) -> None:
    before = image.read_bytes()
    run_load(disk, LoadJob(rw="randwrite", start=1 << 20, n_bytes=1 << 20, requests=2000))
    disk.flush()
    after = image.read_bytes()
    assert after[: 1 << 20] == before[: 1 << 20]
    assert after[2 << 20 :] == before[2 << 20 :]
    assert after[1 << 20 : 2 << 20] != before[1 << 20 : 2 << 20]


@pytest.mark.parametrize(
    ("job", "complaint"),
    [
        ({"n_bytes": SIZE + 4096}, "not on a disk"),
        ({"start": 4096, "n_bytes": SIZE}, "not on a disk"),
        ({"block_bytes": 4 << 20, "n_bytes": SIZE}, "bytes a request"),
    ],
)
def test_what_a_disk_has_not(disk: Disk, job: dict[str, int], complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        run_load(disk, LoadJob(requests=1, **job))  # type: ignore[arg-type]


def test_a_read_only_disk(host: paravirt.Host, domain: paravirt.Domain, image: Path) -> None:
    host.attach_disk(domain, str(image), mode="r")
    with domain.open_disk() as disk:
        assert run_load(disk, LoadJob(requests=10, n_bytes=SIZE)).reads == 10
        with pytest.raises(ReadOnly):
            run_load(disk, LoadJob(rw="randrw", requests=10, n_bytes=SIZE))


def test_others_wait_for_the_load(disk: Disk, image: Path) -> None:
    """Other callers have their turn after it, and none of theirs is lost."""
    content, read = image.read_bytes(), []
    begun = threading.Event()

    def others() -> None:
        begun.set()
        read.extend(disk.read_many(range(0, SIZE, 4096), 4096))
        read.append(disk.pread(4096, 0))

    thread = threading.Thread(target=others)
    thread.start()
    begun.wait(20)
    results = [run_load(disk, LoadJob(requests=2000, n_bytes=SIZE)) for _ in range(3)]
    thread.join(20)
    assert [result.reads for result in results] == [2000] * 3
    assert b"".join(read) == content + content[:4096]


def test_two_loads_at_once(disk: Disk) -> None:
    done: list[LoadResult] = []
    threads = [
        threading.Thread(target=lambda: done.append(run_load(disk, LoadJob(requests=3000, n_bytes=SIZE))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [result.reads for result in done] == [3000] * 3


def test_backends_that_come_and_go(image: Path) -> None:
    """The load sees a pause each time; nothing it wrote is lost, nothing it reads is of another time."""
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, str(image))
        results: list[LoadResult] = []
        job = LoadJob(rw="randrw", seconds=1.5, n_bytes=1 << 20, depth=24, verify=True)
        with domain.open_disk() as disk:
            thread = threading.Thread(target=lambda: results.append(run_load(disk, job)))
            thread.start()
            service, chance = host._backend, random.Random(3)
            for _ in range(10):
                time.sleep(chance.random() * 0.05)
                service.stop()
                service = BackendService(host.hypervisor, host.store)
                service.start()
            thread.join(20)
            assert disk.statistics().reconnects > 0
        service.stop()
        assert len(results) == 1
        assert (results[0].wrong, results[0].errors) == (0, 0)
        assert results[0].verified > 0


def test_closing_ends_it(host: paravirt.Host, domain: paravirt.Domain, image: Path) -> None:
    host.attach_disk(domain, str(image))
    disk = domain.open_disk()
    ended: list[BaseException] = []

    def load() -> None:
        try:
            run_load(disk, LoadJob(seconds=60, n_bytes=SIZE))
        except Closed as error:
            ended.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    while not disk.statistics().reads:
        pass
    disk.close()
    thread.join(20)
    assert len(ended) == 1
