# SPDX-License-Identifier: MIT
"""What `paravirt bench vbd` is made of: peers move the right blocks, values are judged; never how fast anything is."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from paravirt.errors import InvalidRequest, ParavirtError
from paravirt.testing.bench.judge import Spread
from paravirt.testing.bench.programs import NotHere, Programs
from paravirt.testing.bench.rounds import Round
from paravirt.testing.bench.vbd.case import BlockCase, BlockSample, merge, percentile_ns, sample_of
from paravirt.testing.bench.vbd.own import OwnSide, own_side, process_cpu_s
from paravirt.testing.bench.vbd.peers import TABLE, PeerSide, open_peers
from paravirt.testing.bench.vbd.plot import check_plot, write_plot
from paravirt.testing.bench.vbd.results import BlockResult, compare_with, from_json, to_json
from paravirt.testing.bench.vbd.target import Target, file_in_memory, target_of

from .needs import missing

SIZE = 1 << 20
CPUS = sorted(os.sched_getaffinity(0))[:2]

needs_two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="two CPUs are needed")


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with Programs() as made:
        yield made


def cpus() -> tuple[int, int]:
    return CPUS[0], CPUS[-1]


# -- peers


def side_of(name: str, target: Target, programs: Programs) -> Iterator[PeerSide]:
    with open_peers([name], target, SIZE, cpus(), programs) as (sides, why):
        if not sides:
            missing(why[name])
        yield sides[0]


@needs_two_cpus
@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("name", list(TABLE))
def test_each_peer_reads_what_it_wrote(name: str, kind: str, programs: Programs, tmp_path: Path) -> None:
    """Each program writes a pattern to all of the disk and compares every byte it reads, beside a server or not."""
    image = tmp_path / "disk, with a comma.img"
    image.write_bytes(bytes(SIZE))
    target = target_of(f"memory:{SIZE}" if kind == "memory" else f"file:{image}")
    if name == "model" and kind == "file":
        with open_peers([name], target, SIZE, cpus(), programs) as (sides, why):
            assert (sides, why) == ([], {"model": f"the model has nothing like file:{image}"})
        return
    for side in side_of(name, target, programs):
        for case in (
            BlockCase("randread", 4096, 1, SIZE),
            BlockCase("randrw", 4096, 32, SIZE, read_percent=70),
            BlockCase("rw", 65536, 4, SIZE),
            BlockCase("randrw", 512, 8, SIZE, wait="sleep"),
        ):
            sample = side.measure(case, 0.02, verify=True)
            assert sample.iops > 0
            assert sum(n for _, n in sample.buckets) > 0
            assert sample.cpu_us is not None
            assert sample.cpu_us > 0
            assert sample.p50_ns <= sample.p90_ns <= sample.p99_ns <= sample.p999_ns
            assert sample.mb_per_s == pytest.approx(sample.iops * case.block_bytes / 1e6)
    if kind == "file":
        assert image.read_bytes() != bytes(SIZE)


@needs_two_cpus
@pytest.mark.parametrize("name", ["psync", "io_uring", "nbdkit", "qemu-storage-daemon"])
def test_a_peer_that_reads_something_else_is_found_out(name: str, programs: Programs, tmp_path: Path) -> None:
    """Somebody else writes to the file meanwhile: the program says so, and where."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    for side in side_of(name, target_of(f"file:{image}"), programs):
        words = [str(side._program), *BlockCase("randread", 4096, 4, SIZE).arguments(side.target, cpus(), 20)]
        with subprocess.Popen([*words, "verify"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
            deadline = time.monotonic() + 20
            with image.open("r+b") as file:
                while program.poll() is None and time.monotonic() < deadline:
                    for place in range(0, SIZE, 4096):
                        file.seek(place + 700)
                        file.write(b"\xee")
                    file.flush()
                    time.sleep(0.02)
            assert program.wait(20) == 4
            assert program.stderr is not None
            assert "is not as it was written" in program.stderr.read()


@needs_two_cpus
@pytest.mark.parametrize("name", list(TABLE))
def test_what_a_peer_has_of_a_null_disk(name: str, programs: Programs) -> None:
    with open_peers([name], target_of(f"null:{SIZE}"), SIZE, cpus(), programs) as (sides, why):
        if name in ("psync", "io_uring"):
            assert why == {name: f"{name} has nothing like null:{SIZE}"}
        elif not sides:
            missing(why[name])
        else:
            assert sides[0].measure(BlockCase("randread", 4096, 8, SIZE), 0.02).iops > 0


@needs_two_cpus
def test_more_in_flight_than_a_peer_holds(programs: Programs) -> None:
    for side in side_of("model", target_of(f"memory:{SIZE}"), programs):
        with pytest.raises(NotHere, match="do not fit"):
            side.measure(BlockCase("randread", 512, 500, SIZE), 0.02)
        with pytest.raises(NotHere, match="one queue"):
            side.measure(BlockCase("randread", 512, 1, SIZE, queues=2), 0.02)


@needs_two_cpus
@pytest.mark.parametrize("name", ["nbdkit", "qemu-storage-daemon"])
def test_servers_end_with_who_started_them(name: str) -> None:
    """Also when that one is killed."""
    code = (
        "import os, sys\n"
        "from paravirt.testing.bench.programs import Programs\n"
        "from paravirt.testing.bench.vbd.peers import open_peers\n"
        "from paravirt.testing.bench.vbd.target import target_of\n"
        f"with Programs() as p, open_peers([{name!r}], target_of('null:1M'), 1 << 20, {cpus()}, p) as (sides, why):\n"
        "    print(*[pid for side in sides for pid in side.pids()] or ['none', why], flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as who:
        assert who.stdout is not None
        said = who.stdout.readline().split(maxsplit=1)
        if said[0] == "none":
            missing(said[1])
        pidfd = os.pidfd_open(int(said[0]))
        who.kill()
        who.wait()
        ended = [pidfd]
        try:
            import select

            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            assert poller.poll(20_000), "the server still runs"
        finally:
            for fd in ended:
                os.close(fd)


def test_a_server_that_does_not_start_says_why(programs: Programs, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(SIZE))
    target = target_of(f"file:{image}")
    image.unlink()
    with open_peers(["nbdkit"], target, SIZE, cpus(), programs) as (sides, why):
        assert sides == []
        assert "nbdkit" in why["nbdkit"]


def test_what_is_not_installed_is_named(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with open_peers(["nbdkit", "qemu-storage-daemon"], target_of("null:1M"), SIZE, cpus(), programs) as (sides, why):
        assert sides == []
        assert all("apt-get install" in text or "no compiler" in text for text in why.values())


# -- targets


def test_targets(tmp_path: Path) -> None:
    image = tmp_path / "a:b,c.img"
    image.write_bytes(bytes(4096))
    assert target_of("null:1M") == Target("null:1M", "null", 1 << 20)
    assert target_of("memory:64k") == Target("memory:64k", "memory", 1 << 16)
    assert target_of(f"file:{image}") == Target(f"file:{image}", "file", 4096, image)
    assert target_of(f"file,sector-size=4096:{image}").path == image
    assert target_of("delay,read=1ms:memory:1M").kind == "other"


@pytest.mark.parametrize("spec", ["memory", "memory:", "memory:100", "null:x", "file:/nowhere/at/all"])
def test_bad_targets(spec: str) -> None:
    with pytest.raises(InvalidRequest):
        target_of(spec)


def test_files_in_memory_go_away() -> None:
    with file_in_memory(3 << 20) as path:
        content = path.read_bytes()
        assert len(content) == 3 << 20
        assert len(set(content[:4096])) > 200
    assert not path.exists()


def test_no_room_for_a_file_in_memory() -> None:
    with pytest.raises(NotHere, match="no room"), file_in_memory(1 << 50):
        pass


# -- cases and samples


@pytest.mark.parametrize(
    "wrong",
    [
        {"rw": "trim"},
        {"depth": 0},
        {"depth": 5000},
        {"queues": 0},
        {"queues": 17},
        {"block_bytes": 100},
        {"block_bytes": 0},
        {"n_bytes": 512},
        {"n_bytes": 8192, "queues": 3},
        {"read_percent": -1.0},
        {"wait": "never"},
    ],
)
def test_bad_cases(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        BlockCase(**wrong)  # type: ignore[arg-type]


def test_queues_have_parts_of_the_region() -> None:
    case = BlockCase(n_bytes=1_000_000, queues=3)
    jobs = [case.job(1.0, queue=queue) for queue in range(3)]
    assert [job.start for job in jobs] == [0, 331776, 663552]
    assert {job.n_bytes for job in jobs} == {331776}
    assert jobs[-1].start + jobs[-1].n_bytes <= 1_000_000
    assert len({job.seed for job in jobs}) == 3


def test_the_command_line_of_a_peer() -> None:
    case = BlockCase("rw", 512, 3, 1 << 20, read_percent=12.5, wait="sleep")
    assert case.arguments("/disk", (2, 3), 0.5) == [
        "/disk", "seq", "125", "512", "3", "1048576", "0.5", "2", "3", "sleep",
    ]  # fmt: skip
    assert BlockCase("randread").arguments("x", (0, 1), 1.0)[1:3] == ["rand", "1000"]
    assert BlockCase("randwrite").arguments("x", (0, 1), 1.0)[2] == "0"


def test_percentiles_of_buckets() -> None:
    buckets = [(10, 50), (1000, 40), (64_000, 9), (1_000_000, 1)]
    assert percentile_ns(buckets, 0.5) == 10
    assert percentile_ns(buckets, 0.51) == pytest.approx(1000, rel=0.02)
    assert percentile_ns(buckets, 0.99) == pytest.approx(64_000, rel=0.02)
    assert percentile_ns(buckets, 1.0) == pytest.approx(1_000_000, rel=0.02)
    assert percentile_ns([], 0.5) == 0


TOLD = {
    "seconds": 2.0, "reads": 150, "writes": 50, "front_cpu_s": 0.001, "back_cpu_s": None, "sum_ns": 200_000,
    "buckets": [[1000, 200]],
}  # fmt: skip


def test_samples() -> None:
    sample = sample_of(TOLD, 512, 0.003, 20, 10)
    assert (sample.iops, sample.mb_per_s, sample.mean_ns) == (100, 0.0512, 1000)
    assert (sample.front_cpu_us, sample.back_cpu_us, sample.cpu_us) == pytest.approx((5.0, 15.0, 20.0))
    assert (sample.notified, sample.sleeps) == (0.1, 0.05)
    assert sample_of({**TOLD, "back_cpu_s": 0.002}, 512, None).back_cpu_us == pytest.approx(10.0)
    assert sample_of(TOLD, 512, None).cpu_us is None
    assert sample_of({**TOLD, "reads": 0, "writes": 0, "seconds": 0.0}, 512, None).iops == 0
    assert merge([sample, replace(sample, buckets=((500, 1), (1000, 2)))]) == ((500, 1), (1000, 202))


def test_a_process_clock() -> None:
    before = process_cpu_s(os.getpid())
    sum(range(300_000))
    assert before < process_cpu_s(os.getpid()) <= time.process_time()
    with subprocess.Popen(["true"]) as process:
        pid = process.pid
    with pytest.raises(OSError, match="Invalid"):
        process_cpu_s(pid)


# -- results


def result(side: str = "paravirt", iops: float = 1e6, *, tag: float = 100.0, load: float = 0.0) -> BlockResult:
    chance = random.Random(side)
    sample = sample_of(TOLD, 4096, 0.001, 1, 1)
    rounds = [Round(tag, replace(sample, iops=iops * (1 + chance.random() / 100))) for _ in range(12)]
    return BlockResult(side, "memory:1M", BlockCase(n_bytes=SIZE), tuple(rounds), load)


MACHINE = {"cpu": "a", "kernel": "b"}


def test_json_keeps_everything_but_single_buckets() -> None:
    told = to_json([result(), result("model", 2e6)], MACHINE, {"psync": "why"})
    back, machine = from_json(json.dumps(told))
    assert machine == MACHINE
    assert [one.side for one in back] == ["paravirt", "model"]
    assert back[0].spread("iops") == result().spread("iops")
    assert back[0].case == result().case
    assert told["results"][0]["histogram_ns"] == ((1000, 2400),)
    assert told["results"][0]["inconclusive"] == ""
    assert told["skipped"] == {"psync": "why"}


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"format": 2}', '{"format": 1, "machine": {}, "results": [{}]}',
     '{"format": 1, "machine": {}, "results": 3}'],
)  # fmt: skip
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        from_json(text)


def test_json_without_rounds_is_refused() -> None:
    told = to_json([result()], MACHINE, {})
    told["results"][0]["rounds"] = []
    with pytest.raises(InvalidRequest, match="without rounds"):
        from_json(json.dumps(told))


@pytest.mark.parametrize(
    ("before", "machine", "change"),
    [
        (result(iops=0.5e6), MACHINE, "faster"),
        (result(iops=2e6), MACHINE, "slower"),
        (result(), MACHINE, "noise"),
        (result(iops=2e6), {"cpu": "another", "kernel": "b"}, "inconclusive"),
        (result(iops=2e6, tag=200.0), MACHINE, "inconclusive"),
        (result(iops=2e6, load=0.5), MACHINE, "inconclusive"),
        (result("other"), MACHINE, "new"),
    ],
)
def test_comparing_with_a_baseline(before: BlockResult, machine: dict[str, str], change: str) -> None:
    (one,) = compare_with([result()], [before], machine, here=MACHINE)
    assert one.change == change
    if change == "faster":
        assert isinstance(one.ratio, Spread)
        assert one.ratio.median == pytest.approx(2, rel=0.02)


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("pygal")
    results = [result(), result("model", 2e6), replace(result("psync"), outside_load=1.0)]
    for name in ("x.svg", "x.html"):
        check_plot(tmp_path / name)
        write_plot(tmp_path / name, results)
        text = (tmp_path / name).read_text()
        assert "<svg" in text
        assert "I/Os a second" in text
        assert "model" in text
    assert (tmp_path / "x.html").read_text().count("<svg") == 5
    with pytest.raises(InvalidRequest, match=r"\.svg or \.html"):
        check_plot(tmp_path / "x.png")


# -- this project's own


@needs_two_cpus
def test_our_own_side() -> None:
    with own_side(target_of("memory:1M"), wait="adaptive", cpus=cpus(), writes=False) as side:
        assert isinstance(side, OwnSide)
        assert side.n_bytes == SIZE
        sample: BlockSample = side.measure(BlockCase("randread", 4096, 8, SIZE), 0.05)
        assert sample.iops > 0
        assert sample.back_cpu_us is not None
        assert sample.back_cpu_us > 0
        assert sample.notified is not None
        assert len(side.pids()) == 2
        side.verify = True
        side.measure(BlockCase("randrw", 4096, 8, SIZE), 0.05)
        side.measure(BlockCase("randread", 4096, 8, SIZE), 0.05)
        assert side.check() == 2 * SIZE // 4096
        with pytest.raises(ParavirtError, match="not on a disk"):
            side.measure(BlockCase("randread", 4096, 8, 2 * SIZE), 0.05)
        assert side.measure(BlockCase("randread", 4096, 1, SIZE), 0.05).iops > 0


@needs_two_cpus
def test_an_image_is_not_written_by_reads(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    content = random.Random(1).randbytes(SIZE)
    image.write_bytes(content)
    with own_side(target_of(f"file:{image}"), wait="adaptive", cpus=cpus(), writes=False) as side:
        side.measure(BlockCase("randread", 4096, 8, SIZE), 0.05)
        with pytest.raises(ParavirtError, match="read-only"):
            side.measure(BlockCase("randwrite", 4096, 8, SIZE), 0.05)
    assert image.read_bytes() == content
