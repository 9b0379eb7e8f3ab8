# SPDX-License-Identifier: MIT
"""`paravirt ring dump`, `stuck`, `record`, `show`, `replay` and `grant list` on a host of daemons at work."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from paravirt.cli import main
from tests.host.running import DEADLINE_S, Place, RunningHost, freeze, read_line

RING = "vbd/1/51712"
WORKER = """
import sys, paravirt
with paravirt.Domain.from_environment() as domain, domain.open_disk() as disk:
    print("ready", flush=True)
    for line in sys.stdin:
        for i in range(int(line)):
            disk.pwrite(bytes([i % 256]) * 4096, i % 64 * 4096)
            disk.pread(4096, i % 64 * 4096)
        print("done", flush=True)
"""

pytestmark = pytest.mark.timeout(180)


class Disk(RunningHost):
    """A host with a guest that has a disk. Commands run in this process, which saves each its start."""

    def attempt(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        out, error = io.StringIO(), io.StringIO()
        command = self.command(*arguments)[2:]
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(error):
            patch.setattr(sys, "argv", command)
            status = main._run()
        return subprocess.CompletedProcess(command, status, out.getvalue(), error.getvalue())

    def __init__(self) -> None:
        super().__init__()
        self.ask("domain", "create", "--shared", "guest")
        self.ask("vbd", "attach", "guest", "1M", "--driver", "memory")

    @contextmanager
    def worker(self) -> Iterator["subprocess.Popen[bytes]"]:
        """A process of the guest that has the disk open and does as many rounds as it reads."""
        command = ("run", "--shared", "guest", "--", sys.executable, "-c", WORKER)
        with self.spawn(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert read_line(process.stdout) == "ready"
            yield process
            process.stdin.close()
            process.wait(DEADLINE_S)

    def work(self, worker: "subprocess.Popen[bytes]", rounds: int, *, wait: bool = True) -> None:
        assert worker.stdin is not None
        worker.stdin.write(b"%d\n" % rounds)
        worker.stdin.flush()
        if wait:
            assert read_line(worker.stdout) == "done"


@pytest.fixture(scope="module")
def host() -> Iterator[Disk]:
    with Disk() as running:
        yield running


def test_a_ring_at_rest(host: Disk) -> None:
    with host.worker() as worker:
        host.work(worker, 3)
        text = host.ask("ring", "dump", RING, "--all", "--after", "0.05")
        assert "idle" in text
        assert f"process {host.pid('backend')} running, asleep" in text
        assert "old" in text
        told = json.loads(host.ask("ring", "dump", RING, "--json", "--after", "0.05"))
        assert (told["shared"]["req_prod"], told["front"]["prod"], told["back"]["cons"]) == (6, 6, 6)
        assert (told["stuck"], told["entries"], told["in_flight"]) == ([], [], 0)
        assert host.ask("ring", "stuck", "--json", "--after", "0.05") == "[]\n"
        assert host.ask("ring", "stuck", "--after", "0.05") == "1 ring, none is stuck\n"
        grants = json.loads(host.ask("grant", "list", "guest", "--json"))
        assert {grant["device"] for grant in grants} == {RING}
        assert all(grant["is_ring"] and grant["writing"] and not grant["leaked"] for grant in grants)
        assert all(grant["age_s"] is not None and grant["pid"] for grant in grants)
        assert RING in host.ask("grant", "list")
        assert RING not in host.ask("grant", "list", "--leaked")


def test_a_stopped_backend_is_told_and_what_it_owes(host: Disk) -> None:
    backend = host.pid("backend")
    with host.worker() as worker:
        freeze(backend)
        try:
            host.work(worker, 1, wait=False)
            deadline = time.monotonic() + DEADLINE_S
            while (done := host.attempt("ring", "stuck", RING, "--after", "0.1")).returncode == 0:
                assert time.monotonic() < deadline
            assert done.returncode == 1
            assert f"its process {backend} is stopped" in done.stdout
            text = host.ask("ring", "dump", RING, "--after", "0.1")
            assert "stuck: backend: 1 request not taken for" in text
            assert "not taken" in text
            assert re.search(": (read|write) id", text)
            assert "page" in text
        finally:
            os.kill(backend, signal.SIGCONT)
        assert read_line(worker.stdout) == "done"
        assert host.attempt("ring", "stuck", "--after", "0.05").returncode == 0


def test_recorded_shown_and_replayed(host: Disk, tmp_path: Path) -> None:
    file = tmp_path / "disk.pcapng"
    with host.worker() as worker:
        host.work(worker, 1)
        with host.spawn("ring", "record", RING, "-o", str(file), stderr=subprocess.PIPE) as recorder:
            deadline = time.monotonic() + DEADLINE_S
            while not file.exists() or not is_logging(host, worker, file):
                assert time.monotonic() < deadline
            host.work(worker, 50)
            time.sleep(0.1)
            recorder.send_signal(signal.SIGINT)
            said = recorder.communicate(timeout=DEADLINE_S)[1].decode()
        assert recorder.returncode == 0, said
        assert "ended: asked" in said
        refused = host.attempt("ring", "record", RING, "-o", str(file), "--seconds", "0.1")
        assert refused.returncode == 2
        assert "--force" in refused.stderr
    lines = host.ask("ring", "show", str(file)).splitlines()
    assert lines[0].startswith(f"{RING} of domain 1, blkif, 128 entries")
    assert "> " in lines[1]
    only = [json.loads(line) for line in host.ask("ring", "show", str(file), "--ops", "write", "--json").splitlines()]
    assert only[0]["device"] == RING
    assert {each["entry"]["kind"] for each in only[1:]} == {"write"}
    assert len(host.ask("ring", "show", str(file), "--direction", "response", "-n", "5").splitlines()) == 6
    with file.open("rb") as stdin:
        assert subprocess.check_output(host.command("ring", "show", "-"), stdin=stdin).decode().splitlines() == lines
    with subprocess.Popen(
        host.command("ring", "show", str(file)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as shower:
        assert shower.stdout is not None
        shower.stdout.close()
        assert (shower.wait(DEADLINE_S), shower.stderr and shower.stderr.read()) == (128 + signal.SIGPIPE, b"")
    nothing = host.attempt("ring", "show", str(file), "--ops", "wriet").stderr
    assert "no message is like that; its operations are " in nothing
    assert "write" in nothing
    done = host.attempt("ring", "replay", str(file), "guest", "--speed", "0", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert report["requests"] >= 100
    assert (report["different"], report["unanswered"]) == (0, 0)
    host.ask("vbd", "attach", "guest", "4096", "--driver", "memory", "--dev", "xvdb")
    done = host.attempt("ring", "replay", str(file), "guest", "--speed", "0", "--device", "vbd/51728")
    assert done.returncode == 1
    assert "now write status -1 is error" in done.stdout
    host.ask("vbd", "detach", "guest", "xvdb")


def is_logging(host: Disk, worker: "subprocess.Popen[bytes]", file: Path) -> bool:
    """Whether the recorder gets what the ring does."""
    host.work(worker, 1)
    time.sleep(0.02)
    return len(host.attempt("ring", "show", str(file)).stdout.splitlines()) > 1 or file.stat().st_size > 4096


def test_a_recorder_that_is_killed(host: Disk, tmp_path: Path) -> None:
    """What it wrote is read, and the next one begins at once."""
    file, second = tmp_path / "killed.pcapng", tmp_path / "second.pcapng"
    with host.worker() as worker:
        with host.spawn("ring", "record", RING, "-o", str(file)) as recorder:
            deadline = time.monotonic() + DEADLINE_S
            while not file.exists() or file.stat().st_size < 8192:
                host.work(worker, 20)
                assert time.monotonic() < deadline
            recorder.kill()
        shown = host.attempt("ring", "show", str(file))
        assert shown.returncode == 1
        assert "write id" in shown.stdout
        assert "the file ends in the middle of a block" in shown.stderr or "was not ended" in shown.stderr
        host.ask("ring", "record", RING, "-o", str(second), "--seconds", "0.2")
        assert host.attempt("ring", "show", str(second)).returncode == 0


def test_a_front_end_gets_recorded_answers(host: Disk, tmp_path: Path) -> None:
    file = tmp_path / "r.pcapng"
    with host.worker() as worker:
        with host.spawn("ring", "record", RING, "-o", str(file), stderr=subprocess.PIPE) as recorder:
            while not file.exists():
                time.sleep(0.01)
            time.sleep(0.3)
            host.work(worker, 2)
            time.sleep(0.1)
            recorder.send_signal(signal.SIGTERM)
            recorder.communicate(timeout=DEADLINE_S)
    reader = "import sys, paravirt\nwith paravirt.Domain.from_environment() as d, d.open_disk('xvdc') as disk:\n"
    reader += " for i in range(2):\n  disk.pwrite(bytes(4096), i * 4096); print(disk.pread(4096, i * 4096)[:4].hex())\n"
    command = ("ring", "replay", str(file), "guest", "--to", "front", "--device", "vbd/51744", "--data", "pattern")
    with host.spawn(*command, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as replaying:
        assert "answers as recorded" in read_line(replaying.stderr)
        read = Place.attempt(host, "run", "--shared", "guest", "--", sys.executable, "-c", reader).stdout
        assert read.split() == ["01000000", "03000000"]
        out, error = replaying.communicate(timeout=DEADLINE_S)
    assert replaying.returncode == 0, error
    assert json.loads(out)["requests"] == 4


def test_a_recorder_whose_host_ends(tmp_path: Path) -> None:
    """It says that the host is gone, not that something is wrong with the file, which has what came until then."""
    file = tmp_path / "host.pcapng"
    with Disk() as host, host.worker() as worker:
        host.work(worker, 1)
        with host.spawn("ring", "record", RING, "-o", str(file), stderr=subprocess.PIPE) as recorder:
            deadline = time.monotonic() + DEADLINE_S
            while not file.exists() or not is_logging(host, worker, file):
                assert time.monotonic() < deadline
            assert host.stop() == 0
            said = recorder.communicate(timeout=DEADLINE_S)[1].decode()
        assert (recorder.returncode, said) == (2, "paravirt: the hypervisor is gone, or has closed this connection\n")
        assert "write id" in host.ask("ring", "show", str(file))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("ring", "dump", "vbd/9/9"), "there is no ring 'vbd/9/9'"),
        (("ring", "show", "/nowhere"), "/nowhere: No such file or directory"),
        (("ring", "show", "/dev/null"), "/dev/null: at byte 0: this is no recording of a ring"),
        (("ring", "show", "/"), "/: Is a directory"),
        (("ring", "replay", "/dev/zero", "guest"), "/dev/zero: at byte 0: this is no pcapng file"),
        (("ring", "record", "vbd/9/9", "-o", "x"), "there is no ring 'vbd/9/9'"),
        (("grant", "list", "nobody"), "there is no domain nobody"),
        (("ring", "show", "/dev/null", "--driver", "nothing"), "'nothing' is not of the form module:Class"),
    ],
)
def test_mistakes_are_named_in_one_line(host: Disk, arguments: tuple[str, ...], what: str) -> None:
    done = host.attempt(*arguments)
    assert done.returncode == 2
    assert what in done.stderr
    assert len(done.stderr.splitlines()) == 1
