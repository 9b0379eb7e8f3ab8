# SPDX-License-Identifier: MIT
"""The comparison of xenstore daemons: what the load generator says is true, and so is the judgement; never a time."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.harness import Bench, Mark, Spread, alone, pin
from benchmarks.xenstore import measure
from benchmarks.xenstore_cells import Claim, Row, cells, judge
from benchmarks.xenstore_daemons import OURS, OX, SOURCES, STRICT, C, Load, LoadGenerator, Running, available, started
from benchmarks.xenstore_isolation import FLOODS, NODES, Flooder, flooder
from benchmarks.xenstore_ring import CORE, ring
from benchmarks.xenstore_table import show
from paravirt.testing.temporary import TemporaryHost
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.wire import Op, PacketParser, encode

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 50
BRIEF_S = 0.05
TREE_NODES = 500
DOMID = 7

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    with Bench(pairs=2, seconds=BRIEF_S) as bench:
        yield bench


@pytest.fixture(scope="module")
def generator(bench: Bench) -> LoadGenerator:
    """Compiled without a warning."""
    return LoadGenerator(bench.compile("xenstore_load", SOURCES, (), *STRICT))


@pytest.fixture(scope="module")
def daemon(generator: LoadGenerator) -> Iterator[Running]:
    """Ours, with the tree that the load generator makes."""
    with started(OURS) as daemon:
        load = generator.run("populate", daemon, nodes=TREE_NODES, depth=32, verify=True)
        assert load.clean
        assert load.operations == TREE_NODES + 100 + 1000 + 64 * 3
        yield daemon


# The load generator.


def test_what_populate_makes(daemon: Running) -> None:
    with XenstoreClient.connect(daemon.socket) as store:
        assert len(store.ls("/bench/w1000")) == 1000
        assert len(store.ls("/bench/w100")) == 100
        assert len(store.ls("/bench/d0")) == 100
        assert len(store.read("/bench/d4/n99")) == 8
        assert not store.exists("/bench/d5")


MODES: tuple[tuple[str, dict[str, int]], ...] = (
    ("read", {}),
    ("read", {"connections": 8, "depth": 16}),
    ("write", {"connections": 4}),
    ("perms", {}),
    ("miss", {}),
    ("directory-100", {}),
    ("directory-1000", {"connections": 2}),
    ("directory-part", {}),
    ("transaction", {"connections": 3}),
    ("watch", {"connections": 5}),
    ("domains", {"domains": 6}),
)


@pytest.mark.parametrize(("mode", "options"), MODES)
def test_every_answer_is_right(daemon: Running, generator: LoadGenerator, mode: str, options: dict[str, int]) -> None:
    seconds = TIMEOUT_S if mode == "domains" else BRIEF_S  # the most it may take
    load = generator.run(mode, daemon, nodes=TREE_NODES, seconds=seconds, verify=True, **options)
    assert load.clean, load
    assert load.operations > 0
    assert load.cpu_us is not None
    assert 0 < load.p50_us <= load.p99_us <= load.max_us
    assert (load.operations == 18) or mode != "domains"
    assert (load.events == 5 * load.operations) or mode != "watch"


def test_transactions_write(daemon: Running, generator: LoadGenerator) -> None:
    with XenstoreClient.connect(daemon.socket) as store:
        for i in range(3):
            store.write(f"/bench/t0/k{i}", "before")
        generator.run("transaction", daemon, seconds=BRIEF_S)
        assert all(store.read(f"/bench/t0/k{i}").isdigit() for i in range(3))


def lie(op: int, payload: bytes) -> tuple[int, bytes]:
    """What the dishonest daemon answers."""
    lies = {Op.DIRECTORY: b"000\x00000\0", Op.GET_PERMS: b"n1\0", Op.WRITE: b"NO\0", Op.READ: b"12345678"}
    return (op, lies[Op(op)]) if payload != b"/bench/no/such\0" else (Op.ERROR, b"EACCES\0")


@contextmanager
def dishonest(path: Path) -> Iterator[Running]:
    """A daemon whose answers look well and are wrong."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            parser = PacketParser()
            with client:
                while data := client.recv(65536):
                    for op, request_id, transaction_id, payload in parser.feed(data):
                        answer, body = lie(op, payload)
                        client.sendall(encode(answer, request_id, transaction_id, body))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Running("liar", path, os.getpid())
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("mode", ["read", "write", "perms", "miss", "directory-100", "directory-1000"])
def test_wrong_answers_are_seen(tmp_path: Path, generator: LoadGenerator, mode: str) -> None:
    with dishonest(tmp_path / "socket") as liar:
        load = generator.run(mode, liar, nodes=3, seconds=BRIEF_S, verify=True)
    assert load.operations > 0
    assert load.mismatches > 0
    assert not load.clean


def test_a_daemon_that_is_not_there(tmp_path: Path, generator: LoadGenerator) -> None:
    with pytest.raises(RuntimeError, match="No such file"):
        generator.run("read", Running("nobody", tmp_path / "socket", os.getpid()))


def test_a_daemon_that_hangs_up(tmp_path: Path, generator: LoadGenerator) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def hang_up() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        with pytest.raises(RuntimeError, match=r"hung up|Broken pipe|reset"):
            generator.run("read", Running("brief", tmp_path / "socket", os.getpid()))
        thread.join(TIMEOUT_S)


@pytest.mark.parametrize("arguments", [["read"], ["what", "--socket", "x"], ["read", "--socket", "x", "--depth", "y"]])
def test_the_command_line_is_looked_at(generator: LoadGenerator, arguments: list[str]) -> None:
    done = subprocess.run([generator.program, *arguments], capture_output=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert done.stderr


@pytest.mark.parametrize("kind", FLOODS)
def test_a_guest_floods_and_dom0_is_served(tmp_path: Path, generator: LoadGenerator, kind: str) -> None:
    with XenstoreServer(tmp_path / "socket").start() as server:
        fds = [server.connect(DOMID).detach() for _ in range(2)]
        with XenstoreClient.connect(tmp_path / "socket") as store:
            store.mkdir(f"/local/domain/{DOMID}/data")
            store.set_perms(f"/local/domain/{DOMID}/data", [f"n{DOMID}"])
            command = [*generator.command("flood", kind=kind, seconds=BRIEF_S, polite=True)]
            command += [word for fd in fds for word in ("--fd", str(fd))]
            done = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
            for fd in fds:
                os.close(fd)
            assert store.exists("/")
    announced, told = done.stdout.splitlines()
    assert announced == "flooding"
    load = Load(**json.loads(told))
    assert load.operations > 0 or kind == "unread"
    assert load.lost == 0


# The judgement.


def load(per_second: float = 100e3, cpu_us: float = 5.0, **others: Any) -> Load:
    values = {
        "mode": "read", "seconds": 1.0, "operations": 1, "events": 0, "eagain": 0, "errors": 0, "first_error": "",
        "mismatches": 0, "lost": 0, "unfinished": 0, "p50_us": 1.0, "p99_us": 1.0, "max_us": 1.0,
        "load_cpu_us": 1.0,
    }  # fmt: skip
    return Load(per_second=per_second, cpu_us=cpu_us, **{**values, **others})


def row_of(ours: Load, theirs: Load, count: int = 15) -> Row:
    return Row("read", "read", 10, {OURS: [ours] * count, C: [theirs] * count})


@pytest.mark.parametrize(
    ("ours", "theirs", "claim", "verdict"),
    [
        (load(100e3), load(100e3), Claim(C, "rate", Mark(ratio=1.0)), "met"),
        (load(99e3), load(100e3), Claim(C, "rate", Mark(ratio=1.0)), "missed"),
        (load(1), load(100e3), Claim(C, "rate"), "-"),
        (load(cpu_us=5.0), load(cpu_us=5.0), Claim(C, "cpu", Mark(most_ratio=1.0)), "met"),
        (load(cpu_us=5.1), load(cpu_us=5.0), Claim(C, "cpu", Mark(most_ratio=1.0)), "missed"),
        (load(200e3, errors=1, first_error="EIO"), load(100e3), Claim(C, "rate", Mark(ratio=1.0)), "missed"),
        (load(200e3, mismatches=1), load(100e3), Claim(C, "rate", Mark(ratio=1.0)), "missed"),
        (load(200e3, mismatches=1), load(100e3), Claim(C, "rate"), "-"),
    ],
)
def test_verdicts(ours: Load, theirs: Load, claim: Claim, verdict: str) -> None:
    row = row_of(ours, theirs)
    judge(row, [claim], [100.0] * 15, 0.0)
    assert [answer.verdict for answer in row.answers] == [verdict]


def test_what_is_inconclusive() -> None:
    claims = [Claim(C, "rate", Mark(ratio=1.0))]
    few = row_of(load(), load(), 9)
    judge(few, claims, [100.0] * 9, 0.0)
    disturbed = row_of(load(), load())
    judge(disturbed, claims, [100.0] * 15, 0.2)
    assert [row.answers[0].verdict for row in (few, disturbed)] == ["inconclusive", "inconclusive"]
    enough = row_of(load(), load(), 3)
    judge(enough, claims, [100.0] * 3, 0.0, fewest=3)
    assert enough.answers[0].verdict == "met"


def test_a_peer_that_is_not_here_is_not_compared() -> None:
    row = row_of(load(), load())
    judge(row, [Claim(OX, "rate", Mark(ratio=1.0))], [100.0] * 15, 0.0)
    assert row.answers == []


def test_trouble_is_told() -> None:
    row = row_of(load(), replace(load(), errors=2, first_error="ENOSYS", eagain=3))
    judge(row, [Claim(C)], [100.0] * 15, 0.0)
    assert row.notes == [f"{C}: 30 errors, the first ENOSYS, 45 conflicts"]


def test_marks() -> None:
    assert str(Mark(most_value=400, unit=1, unit_name="bytes")) == "<= 400 bytes"
    assert str(Mark(ratio=2, most_ratio=5)) == ">= 2 x, <= 5 x"
    limit = Mark(most_value=10, unit=1)
    assert [limit.judge(Spread.of([value]), None) for value in (9.0, 10.0, 11.0)] == ["met", "met", "missed"]
    answer = alone("memory", [390.0, 400.0, 420.0], Mark(most_value=400), tag=1e6, load=1.0, unit=1)
    assert (answer.verdict, answer.theirs, answer.ours.median) == ("met", None, 400.0)


def test_what_is_claimed() -> None:
    marks = {
        (cell.name, claim.peer, claim.measure): str(claim.mark) for cell in cells(100_000) for claim in cell.claims
    }
    assert marks["read 1x1", C, "rate"] == ">= 0.9 x"
    assert marks["write 64x16", C, "rate"] == ">= 1 x"
    assert marks["read 8x1", C, "cpu"] == "<= 1 x"
    assert marks["transaction 8x1", C, "rate"] == ">= 5 x"
    assert marks["transaction 8x1", OX, "rate"] == ">= 1.5 x"
    assert marks["directory of 1000 1x1", C, "rate"] == ">= 1 x"
    assert marks["watch, 64 watchers", C, "rate"] == ">= 1 x"
    small = {cell.name: cell.claims[0].mark for cell in cells(10_000)}
    assert small["transaction 8x1"] == Mark()


def test_turns_are_taken(bench: Bench) -> None:
    order: list[str] = []

    def side(name: str) -> str:
        order.append(name)
        return name

    rounds, _ = bench.take_turns([lambda: side("a"), lambda: side("b"), lambda: side("c")])
    assert order == ["a", "b", "c", "b", "c", "a"]
    assert [samples for _, samples in rounds] == [["a", "b", "c"]] * 2


def test_more_rounds_while_the_cpus_move(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench(pairs=10, extra=8) as bench:
        tags = iter([50.0, 100.0] * 20)
        monkeypatch.setattr(bench, "cache_line_ns", lambda: next(tags))
        assert len(bench.take_turns([lambda: 1])[0]) == 18
        steady = iter([50.0] * 3 + [100.0] * 20)
        monkeypatch.setattr(bench, "cache_line_ns", lambda: next(steady))
        assert len(bench.take_turns([lambda: 1])[0]) == 13


def test_pin_takes_all_threads() -> None:
    code = "import threading; e = threading.Event(); threading.Thread(target=e.wait).start(); print(); input(); e.set()"
    cpu = min(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        pin(process.pid, cpu)
        tasks = [int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()]
        assert len(tasks) == 2
        assert all(os.sched_getaffinity(task) == {cpu} for task in tasks)
        process.communicate(b"\n", timeout=TIMEOUT_S)


def test_the_table() -> None:
    row = row_of(load(120e3), load(100e3))
    judge(row, [Claim(C, "rate", Mark(ratio=1.0)), Claim(C, "cpu", Mark(most_ratio=0.5))], [100.0] * 15, 0.0)
    console = Console(record=True, width=80, file=io.StringIO())
    show(console, [row])
    text = console.export_text()
    assert "120.0" in text
    assert "1.20 (1.2-1.2)" in text
    assert "met C >= 1 x; missed C CPU <= 0.5 x" in text
    assert "1 met, 1 missed, 0 inconclusive" in text


def test_what_breaks_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> Iterator[Row]:
        yield row_of(load(), load())
        raise RuntimeError("no host")

    monkeypatch.setattr("benchmarks.xenstore.isolation", breaks)
    measured, row = measure(bench, [10], ["isolation"])
    assert measured.samples
    assert row.notes == ["BROKEN: no host"]
    console = Console(record=True, file=io.StringIO())
    show(console, [row])
    assert "isolation: BROKEN: no host" in console.export_text()


def test_a_flood_that_does_not_begin(generator: LoadGenerator) -> None:
    guest = Flooder(generator, "deep", io.BytesIO(), io.BytesIO(b"ready\nended\n"))
    with pytest.raises(RuntimeError, match="did not say flooding"):
        guest.start(1)


# The whole.


def test_a_comparison(tmp_path: Path) -> None:
    target = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.xenstore", "--quick", "--verify", "--only", "populate,watch,domains"]
    done = subprocess.run(
        [*command, "--json", target], cwd=ROOT, capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    assert "1,000 nodes" in done.stdout
    rows = {row["name"]: row for row in json.loads(target.read_text())["rows"]}
    assert {"populate", "memory, bytes a node", "watch, 8 watchers", "20 domains start, s"} <= set(rows)
    for name in ("populate", "watch, 8 watchers", "20 domains start, s"):
        assert set(rows[name]["samples"]) == set(available())
        for sample in rows[name]["samples"][OURS]:
            assert (sample["errors"], sample["mismatches"], sample["unfinished"]) == (0, 0, 0)


@pytest.mark.parametrize("arguments", [["--only", "what"], ["--nodes", "many"]])
def test_bad_arguments(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.xenstore", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 2


@pytest.mark.parametrize("name", [C, OX])
def test_the_load_is_right_for_the_references(generator: LoadGenerator, name: str) -> None:
    if name not in available():
        assert os.environ.get("CI") != "true", "the reference daemons are missing"
        pytest.skip("needs the reference daemons: python -m paravirt.testing.reference_xenstored")
    with started(name) as daemon:
        for mode in ("populate", "read", "write", "directory-1000", "transaction", "watch"):
            options = {"nodes": TREE_NODES, "connections": 2, "seconds": BRIEF_S, "verify": True}
            assert generator.run(mode, daemon, **options).clean, mode


def test_a_guest_of_a_host_floods(bench: Bench, generator: LoadGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with TemporaryHost(log_level="error") as host:
        daemon = Running("ours", host.rundir.xenstored_socket, host.pid("xenstored"))
        assert generator.run("populate", daemon, nodes=NODES, depth=32).clean
        with flooder(host, generator, "wide") as guest:
            guest.start(BRIEF_S)
            assert generator.run("read", daemon, nodes=NODES, seconds=BRIEF_S, verify=True).clean
            guest.wait()


def test_a_ring_is_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.compile("ring.so", ["xenstore_ring.c", "xenstore_client.c"], CORE, *STRICT, "-shared", "-fPIC")
    monkeypatch.chdir(ROOT)
    rows = list(ring(bench, C in available()))
    assert [row.name for row in rows][:2] == ["ring read, 1 in flight", "ring read, 8 in flight"]
    for row in rows:
        assert all(sample.clean and sample.operations for samples in row.samples.values() for sample in samples)
