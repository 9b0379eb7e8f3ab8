# SPDX-License-Identifier: MIT
"""`paravirt bench ring`: that every side moves the messages it says, and what is concluded; never how fast it is."""

import json
import os
import re
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from click.testing import Result as Invoked

from paravirt.cli.bench_ring import bench_ring
from paravirt.cli.bench_vbd import bench_vbd
from paravirt.cli.bench_vif import bench_vif
from paravirt.errors import InvalidRequest, NotFound
from paravirt.testing.bench import dpdk
from paravirt.testing.bench.case import MODES, PROTOCOLS, Case, Mode, Sample
from paravirt.testing.bench.machine import two_cpus
from paravirt.testing.bench.plot import check_plot, write_plot
from paravirt.testing.bench.programs import PEERS, NotHere, Programs
from paravirt.testing.bench.registry import TABLE, Peer, measure_peer
from paravirt.testing.bench.results import Result, Round, compare_with, from_json, ratio, to_json
from paravirt.testing.bench.sides import (
    OWN,
    CoreSide,
    Options,
    Own,
    PeerSide,
    able,
    open_sides,
    ring_pages,
    ring_slots,
)

from .needs import missing

C_PEERS = [peer for peer in TABLE.values() if peer.language == "C"]
BLKIF = Case("echo", 3, in_flight=64)
SMALL = Case("echo", 7, 12, 4, 16, 16)
HERE = {"cpu": "x", "kernel": "y"}


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with Programs() as made:
        yield made


@pytest.mark.parametrize(
    ("peer", "case"), [*((peer, BLKIF) for peer in C_PEERS), (TABLE["xen"], SMALL), (TABLE["rte"], SMALL)]
)
def test_a_peer_in_c_moves_every_byte(peer: Peer, case: Case, programs: Programs) -> None:
    for mode in MODES:
        try:
            seen = measure_peer(peer, replace(case, mode=mode), two_cpus(), 0.02, programs, verify=True)
        except NotHere as reason:
            missing(str(reason))
        check_sample(seen, mode)


def check_sample(seen: Sample, mode: Mode) -> None:
    assert seen.messages_per_s > 0
    assert seen.cpu_s > 0
    if mode == "pingpong":
        assert seen.p50_ns is not None
        assert seen.p99_ns is not None
        assert 0 < seen.p50_ns <= seen.p99_ns
    else:
        assert seen.p50_ns is seen.p99_ns is None


@pytest.mark.parametrize(
    ("name", "options", "case"),
    [("c", Options("spin", "full"), BLKIF), ("c", Options("sleep", "asymmetric", 1), BLKIF),
     ("c-in-place", Options("adaptive", "asymmetric"), SMALL)],
)  # fmt: skip
def test_the_c_core_moves_every_byte(name: Own, options: Options, case: Case, programs: Programs) -> None:
    side = CoreSide(name, options, two_cpus(), programs)
    for mode in MODES:
        done = run([*side.command(case), *replace(case, mode=mode).arguments(two_cpus(), 0.02), "verify"])
        assert done.returncode == 0, done.stderr
        check_sample(Sample(**json.loads(done.stdout)), mode)


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)


def test_a_byte_that_does_not_arrive_is_noticed(tmp_path: Path, programs: Programs) -> None:
    peer, source = TABLE["xen"], (PEERS / "xen.c").read_text()
    short = source.replace("&requests[i], sizeof *requests)", "&requests[i], sizeof *requests - 1)")
    assert short != source
    (tmp_path / "xen.c").write_text(short)
    try:
        peer.command(BLKIF, programs)
    except NotHere as reason:
        missing(str(reason))
    program = programs.compile("short", [tmp_path / "xen.c"], f"-I{PEERS}", *BLKIF.flags(), *peer.flags)
    done = run([str(program), *BLKIF.arguments(two_cpus(), 0.02), "verify"])
    assert (done.returncode, done.stderr) == (4, "messages arrived changed\n")


def test_a_killed_program_leaves_no_process(programs: Programs) -> None:
    side = CoreSide("c", Options("spin"), two_cpus(), programs)
    process = subprocess.Popen([*side.command(BLKIF), *BLKIF.arguments(two_cpus(), 60)])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while not (found := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.01)
    (child,) = found
    process.send_signal(signal.SIGKILL)
    process.wait()
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("change", [{"request_bytes": 113}, {"slots": 256}, {"response_bytes": 8}])
def test_a_program_refuses_what_it_was_not_compiled_for(change: dict[str, int], programs: Programs) -> None:
    side = CoreSide("c", Options("spin"), two_cpus(), programs)
    assert run([*side.command(BLKIF), *replace(BLKIF, **change).arguments(two_cpus(), 0.01)]).returncode == 2


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["python", "python-in-place"])
def test_python_sides(name: Own, processes: int, programs: Programs) -> None:
    options = Options("adaptive", "asymmetric", processes)
    with open_sides([name], [], SMALL, options, two_cpus(), programs) as (side,):
        for mode in MODES:
            seen = side.measure(replace(SMALL, mode=mode), 0.02)
            check_sample(seen, mode)
            assert seen.notified is not None
            assert seen.notified <= 2
            assert seen.sleeps is not None
        assert len(side.pids()) == processes
        with pytest.raises(InvalidRequest, match="do not fit a ring"):
            side.measure(Case(in_flight=1024, slots=1024), 0.02)


def test_what_is_not_here_is_named(programs: Programs) -> None:
    absent = replace(TABLE["kickmsg"], name="absent", needs="no_such_module", package="absent")
    header = replace(TABLE["ck"], name="header", source="no_such.c")
    sides = [PeerSide(peer, two_cpus(), programs) for peer in (absent, header)]
    there, why = able(sides, BLKIF)
    assert there == []
    assert why["absent"] == "absent is not installed (pip install absent)"
    assert "header does not compile" in why["header"]
    with pytest.raises(NotHere, match="8 bytes or more"):
        TABLE["pipe"].command(SMALL, programs)


def test_the_headers_that_a_peer_misses(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paravirt.testing.bench.registry.PEERS", tmp_path)
    (tmp_path / "ck.c").write_text("#include <no_such_header.h>\n")
    with pytest.raises(NotHere, match=r"ck needs no_such_header.h \(apt-get install libck-dev\)"):
        replace(TABLE["ck"], needs="no_such_header.h").command(BLKIF, programs)


def test_no_package_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotFound, match="apt-get is missing"):
        dpdk.fetch(tmp_path / "dpdk")
    monkeypatch.setenv(dpdk.VARIABLE, str(tmp_path))
    (tmp_path / "usr/include/dpdk").mkdir(parents=True)
    dpdk.fetch(dpdk.folder())
    assert f"-I{tmp_path}/usr/include/dpdk" in dpdk.flags()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"batch": 0}, "a batch of 0"),
        ({"batch": 129}, "a batch of 129 does not fit 128"),
        ({"in_flight": 129}, "129 requests in flight do not fit 128 slots"),
        ({"slots": 100}, "a power of two"),
        ({"request_bytes": 0}, "a byte at least"),
        ({"mode": "x"}, "a mode is one of"),
    ],
)
def test_what_is_no_case(change: dict[str, int], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        replace(Case(), **change)


@pytest.mark.parametrize("sizes", [*PROTOCOLS.values(), (1, 1), (4000, 64)])
def test_pages_and_slots(sizes: tuple[int, int]) -> None:
    for slots in (1, 2, 8, 16):
        assert ring_slots(ring_pages(slots, *sizes), *sizes) >= slots
    for pages in (1, 3, 16):
        assert ring_pages(ring_slots(pages, *sizes), *sizes) <= pages
    with pytest.raises(InvalidRequest, match="fit no ring of 16 pages"):
        ring_pages(65536, *sizes)


# What is concluded.


def result(rates: list[float], *, tag: float = 100, load: float = 0.0, mode: Mode = "echo", side: str = "c") -> Result:
    if mode == "pingpong":
        rounds = [Round(tag, Sample(1e9 / ns, ns, 2 * ns, 0.1)) for ns in rates]
    else:
        rounds = [Round(tag, Sample(rate, None, None, 0.1)) for rate in rates]
    return Result(side, Case(mode), Options() if side in OWN else None, tuple(rounds), load)


def around(middle: float, part: float = 0.1, n: int = 12) -> list[float]:
    return [middle * (1 + part * (2 * i / (n - 1) - 1)) for i in range(n)]


@pytest.mark.parametrize(
    ("new", "old", "change", "why"),
    [
        (result(around(30)), result(around(20)), "faster", ""),
        (result(around(20)), result(around(30)), "slower", ""),
        (result(around(20)), result(around(21)), "noise", ""),
        (result(around(30, 0.9)), result(around(20, 0.9)), "noise", ""),
        (result(around(20), mode="pingpong"), result(around(30), mode="pingpong"), "faster", ""),
        (result(around(30), mode="pingpong"), result(around(20), mode="pingpong"), "slower", ""),
        (result(around(30), mode="pingpong"), result(around(20)), "new", ""),
        (result(around(30), side="xen"), result(around(20)), "new", ""),
        (result(around(30, n=9)), result(around(20)), "inconclusive", "only 9 of one distance, 10 are needed"),
        (result(around(30)), result(around(20), load=0.3), "inconclusive", "outside load of 30% of a CPU"),
        (result(around(30)), result(around(20), tag=200), "inconclusive", "the two have no distance of CPUs in common"),
        (result(around(30), tag=9e9), result(around(20), tag=9e9), "inconclusive",
         "the two have no distance of CPUs in common"),
    ],
)  # fmt: skip
def test_changes(new: Result, old: Result, change: str, why: str) -> None:
    (seen,) = compare_with([new], [old], HERE, here=HERE)
    assert (seen.change, seen.why) == (change, why)


def test_the_ratio_to_a_baseline() -> None:
    (seen,) = compare_with([result(around(30, 0.0))], [result(around(20, 0.0))], HERE, here=HERE)
    assert seen.ratio is not None
    assert (seen.ratio.median, seen.ratio.low, seen.ratio.high) == (1.5, 1.5, 1.5)
    (seen,) = compare_with([result(around(30))], [result(around(20))], {**HERE, "cpu": "z"}, here=HERE)
    assert (seen.change, seen.why) == ("inconclusive", "another cpu: z")


def test_distances_that_both_have_are_compared() -> None:
    mixed = result(around(30))
    mixed = replace(mixed, rounds=mixed.rounds + tuple(Round(200, Sample(1, None, None, 0.1)) for _ in range(20)))
    assert mixed.distance == "far"
    (seen,) = compare_with([mixed], [result(around(20))], HERE, here=HERE)
    assert seen.change == "faster"


@pytest.mark.parametrize(
    ("seen", "why"),
    [
        (result(around(1)), ""),
        (result(around(1, n=3)), "only 3 of one distance, 10 are needed"),
        (result(around(1), load=0.5), "outside load of 50% of a CPU"),
        (result(around(1), tag=500), "the CPUs were disturbed"),
    ],
)
def test_doubts(seen: Result, why: str) -> None:
    assert seen.doubt == why


def test_sides_are_compared_round_by_round() -> None:
    first, second = result([10.0, 20.0, 40.0]), result([5.0, 10.0, 20.0], side="xen")
    seen = ratio(second, first)
    assert seen is not None
    assert (seen.low, seen.median, seen.high) == (0.5, 0.5, 0.5)


def test_results_as_json() -> None:
    results = [result(around(3)), result(around(4), mode="pingpong"), result(around(5), side="xen", load=0.5)]
    told = json.loads(json.dumps(to_json(results, HERE, {"ck": "not there"})))
    assert from_json(json.dumps(told)) == (results, HERE)
    assert told["skipped"] == {"ck": "not there"}
    first, second, third = told["results"]
    assert (first["counted"], first["distance"], first["inconclusive"]) == (12, "near", "")
    assert first["messages_per_s"]["median"] == pytest.approx(3)
    assert first["p50_ns"] is None
    assert second["p50_ns"]["median"] == pytest.approx(4)
    assert third["inconclusive"] == "outside load of 50% of a CPU"
    assert third["options"] is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "machine": {}, "results": [{}]}',
     '{"format": 1, "machine": 7, "results": []}', "7", "null"],
)  # fmt: skip
def test_what_is_no_baseline(text: str) -> None:
    with pytest.raises(InvalidRequest):
        from_json(text)


@pytest.mark.parametrize(
    ("part", "value"),
    [("case", {"batch": 0}), ("case", {"x": 1}), ("options", {"wait": ["spin"]}), ("options", 7), ("rounds", []),
     ("rounds", [{}]), ("rounds", 7), ("outside_load", "x")],
)  # fmt: skip
def test_a_baseline_with_something_wrong(part: str, value: object) -> None:
    told = to_json([result(around(3))], HERE, {})
    told["results"][0][part] = value
    with pytest.raises(InvalidRequest):
        from_json(json.dumps(told))


# Plots.


def test_an_svg_file(tmp_path: Path) -> None:
    pytest.importorskip("pygal")
    path = tmp_path / "rings.svg"
    few = result(around(7, n=2), side="xen")
    check_plot(path, ["echo"])
    write_plot(path, [result(around(3)), few])
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = [text for element in root.iter() for text in (element.text or "").split("\n")]
    assert {"c", "xen", "32"} <= set(words)
    assert any("inconclusive: only 2 of one distance" in word for word in words)
    loaded = [value for element in root.iter() for name, value in element.items() if name.endswith(("href", "src"))]
    assert loaded == []


def test_a_page_of_all_modes(tmp_path: Path) -> None:
    pytest.importorskip("pygal")
    path = tmp_path / "rings.html"
    check_plot(path, MODES)
    write_plot(path, [result(around(3)), result(around(4), mode="pingpong")])
    page = path.read_text()
    assert page.startswith("<!doctype html>")
    figures = page.split("<figure>")[1:]
    assert len(figures) == 2
    for figure in figures:
        assert ElementTree.fromstring(figure.partition("</figure>")[0]).tag.endswith("svg")


def test_what_is_no_plot(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"an .svg or .html file"):
        check_plot(tmp_path / "x.png", ["echo"])
    with pytest.raises(InvalidRequest, match="one mode"):
        check_plot(tmp_path / "x.svg", MODES)


# The command.


def invoke(*arguments: str) -> Invoked:
    return CliRunner().invoke(bench_ring, arguments)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--peers", "xen,what"], "no peer what; there are xen"),
        (["--slots", "32", "--pages", "1"], "give one"),
        (["--mode", "x"], "not one of"),
        (["--processes", "3"], "not in the range"),
        (["--baseline", "/no/such/file"], "does not exist"),
        (["--pairs", "0"], "not in the range"),
    ],
)
def test_usage_errors(arguments: list[str], why: str) -> None:
    seen = invoke(*arguments)
    assert seen.exit_code == 2
    assert why in " ".join(seen.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--slots", "33"], "a power of two"),
        (["--slots", "65536"], "fit no ring of 16 pages"),
        (["--batch", "64", "--pages", "1"], "a batch of 64 does not fit 32"),
        (["--in-flight", "500"], "500 requests in flight"),
        (["--request-bytes", "70000"], "fits 4 pages"),
        (["--plot", "x.png"], "an .svg or .html file"),
        (["--mode", "echo", "--mode", "oneway", "--plot", "x.svg"], "one mode"),
        (["--baseline", __file__], "not what `paravirt bench ring --json` prints"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], why: str) -> None:
    seen = invoke(*arguments)
    assert isinstance(seen.exception, InvalidRequest)
    assert why in str(seen.exception)


def test_a_run_and_its_own_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr("tempfile.tempdir", None)
    options = ["--batch", "2", "--protocol", "netif-tx", "--slots", "64", "--in-flight", "32", "--seconds", "0.02"]
    options += ["--pairs", "2", "--wait", "spin"]
    told = invoke(*options, "--json", "--side", "python", "--side", "c", "--mode", "echo", "--mode", "pingpong")
    assert told.exit_code == 0, told.output
    first = json.loads(told.stdout)["results"][0]
    assert first["case"] == {
        "mode": "echo", "batch": 2, "request_bytes": 12, "response_bytes": 4, "slots": 64, "in_flight": 32
    }  # fmt: skip
    assert first["options"] == {"wait": "spin", "fence": "full", "processes": 2}
    assert [(one["side"], one["case"]["mode"], len(one["rounds"])) for one in json.loads(told.stdout)["results"]] == [
        ("python", "echo", 2), ("c", "echo", 2), ("python", "pingpong", 2), ("c", "pingpong", 2)
    ]  # fmt: skip
    (tmp_path / "before.json").write_text(told.stdout)
    again = invoke(*options, "--side", "python", "--baseline", str(tmp_path / "before.json"))
    assert again.exit_code == 0, again.output
    assert "speed beside the baseline" in again.output
    assert "are inconclusive" in again.output
    assert os.listdir(scratch) == []


def test_without_a_compiler_python_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = invoke("--batch", "2", "--seconds", "0.02", "--pairs", "1", "--peers", "xen")
    assert seen.exit_code == 0, seen.output
    text = " ".join(seen.output.split())
    for what in ("distance of the CPUs", "c", "xen"):
        assert f" {what}: there is no compiler here (gcc)" in text
    assert "the CPUs were disturbed" in text
    assert invoke("--side", "c", "--pairs", "1").exit_code == 1


def test_the_guide_names_everything() -> None:
    guide = (Path(__file__).parent.parent / "docs/benchmarks.md").read_text()
    for name in (*TABLE, *PROTOCOLS, *MODES, *OWN):
        assert name in guide, name
    known = {
        option
        for command in (bench_ring, bench_vbd, bench_vif)
        for parameter in command.params
        for option in parameter.opts
    }
    used = set(re.findall(r"--[a-z][a-z-]*", guide)) - {"--help"}
    assert used <= known
    assert len(used) > 12
