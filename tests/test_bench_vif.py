# SPDX-License-Identifier: MIT
"""What `paravirt bench vif` is made of: frames arrive whole, counts add up, values are judged; never how fast it is."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import paravirt
from paravirt.backend.bridge import Bridge
from paravirt.cli.bench_vif import bench_vif
from paravirt.errors import Closed, InvalidRequest, TimedOut
from paravirt.frontend.vif import Vif
from paravirt.ring.netif import Burst
from paravirt.ring.netload import HEADER_BYTES, MOST_BURST, NetLoad, NetLoadResult, Way
from paravirt.testing.bench.programs import NotHere, Programs
from paravirt.testing.bench.rounds import Round
from paravirt.testing.bench.vif.case import WAYS, VifCase, VifSample, sample_of
from paravirt.testing.bench.vif.own import own_side
from paravirt.testing.bench.vif.peers import TABLE, open_peers
from paravirt.testing.bench.vif.results import VifResult, compare_with, from_json, to_json
from tests import needs

CPUS = sorted(os.sched_getaffinity(0))[:2]
HERE = {"cpu": "a", "kernel": "b"}

needs_two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="two CPUs are needed")


def cpus() -> tuple[int, int]:
    return CPUS[0], CPUS[-1]


# -- the load


@pytest.fixture
def two() -> Iterator[tuple[Vif, Vif, Bridge]]:
    """Two guests on a bridge that knows both."""
    with paravirt.Host() as host, host.bridge() as bridge:
        bridge.set_hold(30.0)  # the machine may be busy with something else
        vifs = []
        for name in ("one", "other"):
            domain = host.create_domain(name)
            host.attach_vif(domain)
            vifs.append(domain.open_vif())
        for vif in vifs:
            vif.announce()
        for vif in vifs:
            while vif.receive(timeout_s=0.05):
                pass
        yield vifs[0], vifs[1], bridge


def take_beside(vif: Vif, load: NetLoad) -> tuple[threading.Thread, list[NetLoadResult]]:
    found: list[NetLoadResult] = []
    thread = threading.Thread(target=lambda: found.append(vif.queue_end().run(load, takes=True)))
    thread.start()
    return thread, found


@pytest.mark.parametrize("sizes", [(HEADER_BYTES,), (64, 570, 1518), (4096, 4097), (65535,)])
def test_every_frame_of_a_load_arrives_in_order_and_whole(two: tuple[Vif, Vif, Bridge], sizes: tuple[int, ...]) -> None:
    one, other, _ = two
    taker = NetLoad(Way.TAKE, seconds=0.5, burst=32, sizes=sizes, verify=True)
    thread, found = take_beside(other, taker)
    load = NetLoad(Way.SEND, seconds=0.05, burst=32, sizes=sizes, to=other.mac, source=one.mac, verify=True)
    sent = one.queue_end().run(load, takes=False)
    thread.join()
    taken = found[0]
    assert sent.sent == taken.taken > 0
    assert sent.sent_bytes == taken.taken_bytes
    assert (taken.misplaced, taken.missing, taken.wrong, taken.foreign) == (0, 0, 0, 0)
    assert sent.cpu_s > 0
    assert sent.seconds >= 0.05


def numbered(to: bytes, number: int, rest: bytes = b"") -> bytes:
    return (to + bytes((2, 0, 0, 0, 0, 9)) + b"\x88\xb5" + number.to_bytes(8, "little") + bytes(8) + rest).ljust(
        60, b"\0"
    )


def test_what_is_lost_misplaced_wrong_or_of_others_is_found(two: tuple[Vif, Vif, Bridge]) -> None:
    one, other, _ = two
    taker = NetLoad(Way.TAKE, seconds=0.3, verify=True)
    thread, found = take_beside(other, taker)
    frames = [numbered(other.mac, number) for number in (0, 5, 3)]
    frames.append((other.mac + one.mac + b"\x08\x00").ljust(60, b"\0"))
    one.send(frames)
    thread.join()
    result = found[0]
    assert (result.taken, result.foreign) == (3, 1)
    assert result.missing == 4  # 1 to 4, before the 5 came
    assert result.misplaced == 1
    assert result.wrong == 3  # none has the bytes that follow from its number


def test_round_trips_are_measured_and_reflected(two: tuple[Vif, Vif, Bridge]) -> None:
    one, other, bridge = two
    reflector = NetLoad(Way.REFLECT, seconds=10.0)
    thread, reflected = take_beside(other, reflector)
    load = NetLoad(Way.TRIP, seconds=0.05, burst=4, sizes=(64,), to=other.mac, source=one.mac, verify=True)
    found = one.queue_end().run(load, takes=False)
    reflector.stop()
    thread.join()
    assert found.sent == found.taken == reflected[0].taken == found.latency.n > 0
    assert found.latency.least_ns > 0
    assert (found.misplaced, found.missing, found.wrong) == (0, 0, 0)
    leg = bridge.port("vif1.0").legs[0]
    bridge.wire(leg, leg)
    again = NetLoad(Way.TRIP, seconds=0.05, burst=1, to=one.mac, source=one.mac)
    assert one.queue_end().run(again, takes=False).taken > 0
    null = bridge.add_null("null")
    bridge.wire(leg, null.legs[0])
    with pytest.raises(TimedOut):
        one.queue_end().run(NetLoad(Way.TRIP, seconds=0.05, burst=1, to=one.mac, source=one.mac), takes=False)


def test_a_load_ends_with_its_device(two: tuple[Vif, Vif, Bridge]) -> None:
    one, _, _ = two
    one.close()
    with pytest.raises(Closed):
        one.queue_end().run(NetLoad(Way.SEND, seconds=0.01), takes=False)


@pytest.mark.parametrize(
    "bad",
    [
        {"burst": 0},
        {"burst": MOST_BURST + 1},
        {"sizes": ()},
        {"sizes": (HEADER_BYTES - 1,)},
        {"sizes": (65536,)},
        {"sizes": (64,) * 9},
        {"seconds": 0.0},
    ],
)
def test_what_is_no_load(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        NetLoad(Way.SEND, **({"seconds": 1.0} | bad))  # type: ignore[arg-type]


# -- null ports and wires


def test_wires_and_null_ports(two: tuple[Vif, Vif, Bridge]) -> None:
    one, other, bridge = two
    null = bridge.add_null("null")
    legs = [bridge.port(name).legs[0] for name in ("vif1.0", "vif2.0")]
    packet = (b"\2\0\0\0\0\7" + one.mac + b"\x88\xb5").ljust(60, b"\0")
    bridge.wire(legs[0], null.legs[0])
    assert one.send([packet] * 3) == 3
    assert other.receive(timeout_s=0.2) == []
    assert null.legs[0].counters().out_packets == 3
    bridge.wire(legs[0], legs[1])
    one.send([packet])
    assert other.receive(timeout_s=5.0) == [packet]
    bridge.wire(legs[0], None)
    one.send([packet])
    assert other.receive(timeout_s=5.0) == [packet]  # flooded: nobody knows the station
    bridge.wire(legs[0], legs[0])
    one.send([packet])
    assert one.receive(timeout_s=5.0) == [packet]
    bridge.remove_port(null)
    burst = Burst.of([packet])
    assert one.send(burst) == 1


# -- sides


@needs_two_cpus
def test_each_way_is_measured() -> None:
    first = VifCase(wait="adaptive")
    with own_side(first, cpus(), verify=True) as own:
        for way in WAYS:
            case = replace(first, way=way, size=0 if way == "guests" else 64, burst=1 if way == "echo" else 32)
            told = own.run(case, 0.05)
            assert told["sent"] >= told["arrived"] > 0
            sample = sample_of(told, case)
            assert sample.pps > 0
            assert sample.gbit_per_s == pytest.approx(sample.pps * case.mean_bytes * 8 / 1e9)
            if way == "echo":
                assert sample.p50_ns is not None
                assert sample.p99_ns is not None
                assert 0 < sample.p50_ns <= sample.p99_ns
            if way in ("guests", "echo"):
                assert (told["misplaced"], told["wrong"], told["missing"]) == (0, 0, 0)


@needs_two_cpus
@pytest.mark.parametrize("name", list(TABLE))
def test_each_peer_moves_frames(name: str) -> None:
    case = VifCase(size=64)
    with Programs() as programs:
        there, why = open_peers([name], cpus(), programs)
        if not there:
            needs.missing(why[name])
        try:
            sample = there[0].measure(case, 0.1)
        except NotHere as reason:
            pytest.skip(str(reason))
        assert sample.pps > 0
        assert sample.front_cpu_ns is not None
        with pytest.raises(NotHere):
            there[0].measure(VifCase("echo"), 0.1)


# -- values


@pytest.mark.parametrize(
    "bad",
    [
        {"way": "up"},
        {"size": 13},
        {"size": 70000},
        {"burst": 0},
        {"burst": 1000},
        {"pages": 3},
        {"wait": "hope"},
    ],
)
def test_what_cannot_be_measured(bad: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        VifCase(**bad)  # type: ignore[arg-type]


def result(pps: float, side: str = "paravirt", **case: object) -> VifResult:
    sample = VifSample(pps, pps * 512 / 1e9, p50_ns=900.0)
    return VifResult(side, VifCase(**case), (Round(100.0, sample),) * 12, 0.0)  # type: ignore[arg-type]


def test_json_and_back_and_compared() -> None:
    results = [result(10e6), result(5e6, "memif"), result(1e6, way="echo", burst=1)]
    text = json.dumps(to_json(results, HERE, {"unix": "no compiler"}))
    told = json.loads(text)
    assert told["results"][0]["pps"]["median"] == 10e6
    assert told["results"][0]["p99_ns"] is None
    assert told["skipped"] == {"unix": "no compiler"}
    back, machine = from_json(text)
    assert machine == HERE
    assert back == results
    changes = compare_with([result(20e6), result(1e6, size=1500)], back, machine, here=HERE)
    assert [(one.change, one.ratio.median if one.ratio else None) for one in changes] == [
        ("faster", 2.0),
        ("new", None),
    ]
    other = compare_with([result(20e6)], back, {"cpu": "c", "kernel": "b"}, here=HERE)
    assert other[0].change == "inconclusive"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "machine": {}, "results": [{}]}'])
def test_no_results(text: str) -> None:
    with pytest.raises(InvalidRequest):
        from_json(text)


# -- the command


@needs_two_cpus
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_the_command(tmp_path: Path) -> None:
    before, plot = tmp_path / "before.json", tmp_path / "chart.html"
    words = ["--way", "wire", "--way", "echo", "--size", "64", "--pairs", "1", "--runtime", "0.02"]
    first = CliRunner().invoke(bench_vif, [*words, "--compare", "unix", "--json"])
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert [(one["side"], one["case"]["way"], one["case"]["burst"]) for one in told["results"]] == [
        ("paravirt", "wire", 64),
        ("unix", "wire", 64),
        ("paravirt", "echo", 1),
    ]
    before.write_text(first.stdout)
    shown = CliRunner().invoke(bench_vif, [*words, "--baseline", str(before), "--plot", str(plot)])
    assert shown.exit_code == 0, shown.output
    assert "Mpps" in shown.output
    assert "speed beside the baseline" in shown.output
    assert "<svg" in plot.read_text()


def test_mistakes_of_the_command(tmp_path: Path) -> None:
    no_json = tmp_path / "no.json"
    no_json.write_text("{}")
    for words in (
        ["--compare", "carrier-pigeon"],
        ["--size", "10"],
        ["--plot", "chart.png"],
        ["--baseline", str(no_json)],
    ):
        failed = CliRunner().invoke(bench_vif, words)
        assert failed.exit_code, words
