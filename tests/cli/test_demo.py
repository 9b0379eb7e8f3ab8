# SPDX-License-Identifier: MIT
"""The demonstration, short; and that Ctrl-C at any moment leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "paravirt", "demo", "--seconds", "0.2"]

pytestmark = pytest.mark.timeout(120)


def left_behind(directory: Path) -> list[str]:
    """Files of ours, and processes whose environment says they are of this test."""
    files = [str(path) for path in directory.iterdir()]
    shared = [name for name in os.listdir("/dev/shm") if name.startswith("paravirt")]
    processes = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(str(directory)) in line:
            processes.append(line.replace(b"\0", b" ").decode())
    return files + shared + processes


def start(directory: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        COMMAND,
        env={**os.environ, "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: sockets stand below it."""
    with tempfile.TemporaryDirectory(prefix="pv-", dir="/tmp") as made:
        yield Path(made)


def test_every_check_holds(directory: Path) -> None:
    with start(directory) as demo:
        said, errors = demo.communicate(timeout=100)
    assert demo.returncode == 0, said + errors
    assert "NOT TRUE" not in said
    assert "Every check held." in said
    assert "same SHA-256 as the file" in said
    for row in ("ring, batch 1", "ring, batch 32", "disk, 4 KiB x 1", "disk, 4 KiB x 32"):
        assert row in said
    assert left_behind(directory) == []


def test_a_check_that_does_not_hold(directory: Path) -> None:
    """The others are made all the same, and it is named; in JSON the story goes to standard error."""
    code = (
        "import paravirt.cli.demo as demo, paravirt.cli.main as main; demo._same_blocks = lambda *_: False; main.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "demo", "--seconds", "0.1", "--json"],
        env={**os.environ, "TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert answer["checks"]["failed"] == ["all 64 read back from the file"]
    assert "no process is left" in answer["checks"]["held"]
    assert [row["what"] for row in answer["measured"]][0::3] == ["ring, batch 1", "disk, 4 KiB x 1"]
    assert "NOT TRUE" in done.stderr
    assert left_behind(directory) == []


@pytest.mark.parametrize("line", range(1, 14, 2))
def test_ctrl_c_leaves_nothing(directory: Path, line: int) -> None:
    """Interrupted after so many lines of output."""
    with start(directory) as demo:
        assert demo.stdout is not None
        for _ in range(line):
            demo.stdout.readline()
        os.killpg(demo.pid, signal.SIGINT)
        said, errors = demo.communicate(timeout=60)
    assert demo.returncode == 130, said + errors
    deadline = time.monotonic() + 10
    while left_behind(directory) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_behind(directory) == []
