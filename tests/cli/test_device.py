# SPDX-License-Identifier: MIT
"""The guide's example as daemons: served by `up`, attached, used by a guest, started again when it is killed."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.running import Place, RunningHost, ended

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
DRIVER = "compressor:ZipBack"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningHost]:
    monkeypatch.chdir(EXAMPLES)
    with RunningHost("--device", DRIVER) as running:
        yield running


@pytest.mark.parametrize("mode", ["--isolated", "--shared"])
def test_the_example_as_daemons(host: RunningHost, mode: str) -> None:
    shared = ["--shared"] if mode == "--shared" else []
    host.ask("domain", "create", *shared, "guest")
    refused = host.attempt("device", "attach", "guest", "vzip", "level=10")
    assert (refused.returncode, refused.stderr) == (2, "paravirt: level is 10, not 0 to 9\n")
    host.ask("device", "attach", "guest", "vzip", "level=9")
    backend = host.pid(DRIVER)
    pidfd = os.pidfd_open(backend)
    os.kill(backend, signal.SIGKILL)
    assert ended(pidfd)
    os.close(pidfd)
    said = host.ask("run", *shared, "guest", "--", sys.executable, "compressor.py", "guest").splitlines()
    assert said[0].startswith("136000 bytes were ")
    assert host.pid(DRIVER) != backend
    assert host.stop() == 0
    assert not host.run.exists()


def test_a_driver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    with Place() as place:
        done = place.attempt("up", "--device", "compressor:Nothing")
        assert done.returncode == 2
        assert "there is no driver compressor:Nothing" in done.stderr
        assert not place.run.exists()


def test_disks_of_ones_own_as_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES)
    own = [f"{name}=pattern_disk:{kind}" for name, kind in (("pattern", "PatternDisk"), ("upper", "UpperFilter"))]
    with RunningHost("--disk-driver", own[0], "--disk-driver", own[1]) as host:
        host.ask("domain", "create", "--shared", "guest")
        host.ask("vbd", "attach", "guest", "64M", "--driver", "upper:pattern")
        program = (
            "import paravirt\nprint(paravirt.Domain.from_environment().open_disk('xvda').pread(512, 4096)[8:16].hex())"
        )
        said = host.ask("run", "--shared", "guest", "--", sys.executable, "-c", program)
        assert said.strip() == (4096 + 8).to_bytes(8, "big").hex()
        assert host.stop() == 0
    with Place() as place:
        done = place.attempt("up", "--disk-driver", "x=pattern_disk:Nothing")
        assert done.returncode == 2
        assert "there is no driver pattern_disk:Nothing" in done.stderr
