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
