# SPDX-License-Identifier: MIT
"""`paravirt up --journal`: xenstored is killed and comes back; disks go on, and new ones can be attached."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.running import DEADLINE_S, RunningHost, ended, read_all, read_line

WORKER = Path(__file__).with_name("worker.py")
SIZE = 4 << 20

pytestmark = pytest.mark.timeout(180)

SECOND_DISK = """
import sys
import paravirt
with paravirt.Domain.from_environment() as domain:
    print("started", flush=True)
    sys.stdin.readline()
    with domain.open_disk("xvdb") as disk:
        disk.pwrite(b"x" * 4096, 0)
        print(disk.pread(4096, 0) == b"x" * 4096, domain.disks(), flush=True)
"""

SHORT = """
import paravirt
with paravirt.Domain.from_environment() as domain, domain.open_disk("xvda") as disk:
    disk.pwrite(b"x" * 4096, 0)
    print(domain.disks())
"""


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RunningHost]:
    with RunningHost("--journal", str(tmp_path / "journal")) as running:
        yield running


def kill_store(host: RunningHost) -> None:
    """Kill it, and wait until another one serves."""
    former = host.pid("xenstored")
    pidfd = os.pidfd_open(former)
    os.kill(former, signal.SIGKILL)
    assert ended(pidfd)
    os.close(pidfd)
    for _ in range(200):
        done = host.attempt("xenstore", "ls", "/")
        if done.returncode == 0:
            break
        select.select([], [], [], 0.05)
    assert host.pid("xenstored") != former


def image(path: Path) -> str:
    path.write_bytes(bytes(SIZE))
    return str(path)


def run(host: RunningHost, domain: str, *command: str) -> "subprocess.Popen[bytes]":
    return host.spawn("run", domain, "--", *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def finish(guest: "subprocess.Popen[bytes]") -> list[str]:
    out, _ = guest.communicate(timeout=DEADLINE_S)
    assert guest.returncode == 0, out
    return out.decode().splitlines()


def test_disks_go_on_and_new_ones_come(host: RunningHost, tmp_path: Path) -> None:
    for domain in ("guest", "second"):
        host.ask("domain", "create", domain)
        host.ask("vbd", "attach", domain, image(tmp_path / f"{domain}.img"))
    worker = run(host, "guest", sys.executable, str(WORKER))
    waiting = run(host, "second", sys.executable, "-c", SECOND_DISK)
    assert read_line(worker.stdout) == "ready"
    assert read_line(waiting.stdout) == "started"
    before = host.ask("vbd", "list", "--json")
    for _ in range(2):
        kill_store(host)
        for _ in range(3):
            assert read_line(worker.stdout).isdigit()
    assert host.ask("vbd", "list", "--json") == before
    host.ask("vbd", "attach", "second", image(tmp_path / "new.img"), "--dev", "xvdb")
    assert waiting.stdin is not None
    waiting.stdin.write(b"go\n")
    waiting.stdin.flush()
    assert finish(waiting) == ["True ['xvda', 'xvdb']"]
    assert (tmp_path / "new.img").read_bytes()[:4096] == b"x" * 4096
    last = finish(worker)[-1].split()
    assert last[0] == "done"
    assert last[2:] == ["0", "0"], "its ring needs no xenstored"


def test_a_host_stops_at_once_while_no_xenstored_runs(host: RunningHost, tmp_path: Path) -> None:
    """The backend waits for the next one, and must not go on waiting."""
    (tmp_path / "journal" / "journal").write_bytes(b"nonsense")  # so that no other one starts
    os.kill(host.pid("xenstored"), signal.SIGKILL)
    assert host.up.stderr is not None
    while "is damaged" not in read_line(host.up.stderr):
        pass
    host.up.send_signal(signal.SIGTERM)
    assert b"does not stop" not in read_all(host.up.stderr)
    assert host.up.wait(DEADLINE_S) == 0


def test_a_host_that_starts_again_has_its_tree_but_no_domains(tmp_path: Path) -> None:
    options = ("--journal", str(tmp_path / "journal"))
    with RunningHost(*options) as host:
        host.ask("domain", "create", "guest")
        host.ask("xenstore", "write", "/mine", "kept")
        host.ask("xenstore", "chmod", "/mine", "n0", "b1")
        assert host.ask("xenstore", "list", "/local/domain").split() == ["1"]
        assert host.stop() == 0
    with RunningHost(*options) as host:
        for _ in range(2):  # and so it stays when xenstored is killed at once
            assert host.ask("xenstore", "read", "/mine") == "kept\n"
            assert "1" not in host.attempt("xenstore", "list", "/local/domain").stdout.split()
            (mine,) = [line for line in host.ask("xenstore", "ls", "-fp", "/").splitlines() if "mine" in line]
            assert "n0" in mine
            assert "b1" not in mine
            kill_store(host)
        host.ask("domain", "create", "guest")
        assert "1" in host.ask("xenstore", "list", "/local/domain").split()


def test_a_live_update_of_a_host(host: RunningHost, tmp_path: Path) -> None:
    """Nobody notices: the supervisor, the backend, guests that run and guests that come."""
    host.ask("domain", "create", "guest")
    host.ask("vbd", "attach", "guest", image(tmp_path / "guest.img"))
    worker = run(host, "guest", sys.executable, str(WORKER))
    assert read_line(worker.stdout) == "ready"
    pids = [host.pid(name) for name in ("hypervisor", "xenstored", "backend")]
    for number in range(3):
        host.ask("domain", "create", f"new{number}")
        host.ask("vbd", "attach", f"new{number}", image(tmp_path / f"{number}.img"))
        update = host.spawn("xenstore", "live-update")
        done = host.ask("run", f"new{number}", "--", sys.executable, "-c", SHORT)  # while the update goes on
        assert done == "['xvda']\n"
        assert update.wait(DEADLINE_S) == 0
        assert read_line(worker.stdout).isdigit()
    assert [host.pid(name) for name in ("hypervisor", "xenstored", "backend")] == pids
    last = finish(worker)[-1].split()
    assert (last[0], last[2:]) == ("done", ["0", "0"])
    host.up.send_signal(signal.SIGTERM)
    assert host.up.stderr is not None
    assert b"xenstored ended" not in read_all(host.up.stderr)
    assert host.up.wait(DEADLINE_S) == 0
