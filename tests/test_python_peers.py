# SPDX-License-Identifier: MIT
"""The peers that are Python libraries: they move what they say, and leave nothing behind; never how fast they are."""

import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paravirt.testing.bench import peers
from paravirt.testing.bench.peers.runner import CANNOT_RUN, Messages, message, number_of, parse, pieces

PEERS = sorted(module.name for module in pkgutil.iter_modules(peers.__path__) if module.name != "runner")
ALWAYS_HERE = {"multiprocessing_pipe", "multiprocessing_queue", "posix_ipc"}
DEADLINE_S = 40
LIMIT = 1 << 20


def two_cpus() -> list[str]:
    cpus = sorted(os.sched_getaffinity(0))
    return [str(cpus[0]), str(cpus[-1])]


def command(peer: str, mode: str, seconds: float = 0.05, *, batch: int = 8) -> list[str]:
    sizes = [str(number) for number in (batch, 112, 16, 64, 32)]
    return [sys.executable, "-m", f"{peers.__name__}.{peer}", mode, *two_cpus(), str(seconds), *sizes]


def run(peer: str, mode: str, *, batch: int = 8) -> dict[str, Any]:
    """What it tells. Skips where the library is not installed."""
    whole = [*command(peer, mode, batch=batch), "verify"]
    done = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    if done.returncode == CANNOT_RUN and peer not in ALWAYS_HERE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_all_are_found() -> None:
    assert {"kickmsg", "iceoryx2", "faster_fifo", "pyzmq", "tachyon", *ALWAYS_HERE} == set(PEERS)


@pytest.mark.parametrize("peer", PEERS)
def test_every_request_is_answered(peer: str) -> None:
    told = run(peer, "echo")
    assert told["messages_per_s"] > 0
    assert told["arrived"] == told["sent"] > 32
    assert told["sum"] == sum(range(told["sent"])) == told["arrived_sum"] == told["answered_sum"]
    assert told["p50_ns"] is told["p99_ns"] is None
    assert told["cpu_s"] > 0


@pytest.mark.parametrize("peer", ["posix_ipc", "faster_fifo", "pyzmq"])
def test_one_way(peer: str) -> None:
    told = run(peer, "oneway")
    assert told["arrived"] == told["sent"] > 0
    assert told["arrived_sum"] == told["sum"]
    assert told["messages_per_s"] > 0


@pytest.mark.parametrize("peer", PEERS)
def test_ping_pong(peer: str) -> None:
    told = run(peer, "pingpong")
    assert told["sent"] == told["arrived"] > 0
    assert told["answered_sum"] == told["sum"]
    assert 0 < told["p50_ns"] <= told["p99_ns"]


def children(pid: int) -> set[int]:
    """Of this process, and theirs."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    found = {int(child) for task in tasks for child in task.read_text().split()}
    return found.union(*(children(child) for child in found))


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "XZ"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(what: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("peer", ["kickmsg", "posix_ipc"])
def test_who_kills_the_first_kills_all(peer: str, tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command(peer, "echo", 30), env=environment, stderr=subprocess.PIPE) as process:
        wait_until(lambda: process.poll() is not None or len(children(process.pid)) == 2)
        if process.poll() == CANNOT_RUN and peer not in ALWAYS_HERE:
            pytest.skip(f"{peer} is not installed")
        both = children(process.pid)
        assert len(both) == 2
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: all(is_gone(pid) for pid in both))
    left = set(os.listdir("/dev/shm")) - before
    assert not [name for name in left if "paravirt-peer" in name]


def test_a_library_that_is_missing() -> None:
    blocked = "import runpy, sys; sys.modules['zmq'] = None; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    python, _, module, *arguments = command("pyzmq", "echo")
    done = subprocess.run(
        [python, "-c", blocked, module, *arguments], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    assert done.returncode == CANNOT_RUN
    assert done.stderr.splitlines() == ["pyzmq is not installed (pip install pyzmq)"]
    assert not done.stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("round 0 1 1 8 112 16 64 32", "a mode is one of echo"),
        ("echo 0 1 1 8 112 16 64 32 what", "a mode is one of echo"),
        ("echo 0 1 1 8 112 16 64", "not enough values"),
        ("echo 0 1 1 0 112 16 64 32", "counts are 1 or more"),
        ("echo 0 1 1 8 4 16 64 32", "messages 8 bytes or more"),
        ("echo 0 1 soon 8 112 16 64 32", "could not convert"),
    ],
)
def test_bad_arguments(arguments: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse(arguments.split())


def test_bad_arguments_are_told() -> None:
    done = subprocess.run(
        [*command("posix_ipc", "what")], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    assert done.returncode == 2
    assert "IN_FLIGHT" in done.stderr


def test_messages() -> None:
    plain, numbered = Messages(16, 4, numbered=False), Messages(16, 4, numbered=True)
    assert plain.some(4) == [bytes(16)] * 4
    assert plain.some(2) == [bytes(16)] * 2
    assert [number_of(each) for each in [*numbered.some(4), *numbered.some(3)]] == list(range(7))
    assert (numbered.sent, numbered.sum) == (7, 21)
    assert [number_of(each) for each in numbered.answers([message(9, 112), message(5, 112)])] == [9, 5]
    assert len(message(1, 112)) == 112
    assert list(pieces(10, 4)) == [4, 4, 2]
