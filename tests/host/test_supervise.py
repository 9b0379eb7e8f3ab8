# SPDX-License-Identifier: MIT
"""Daemons are started in order, watched, restarted within bounds and stopped in reverse; they die with their parent."""

import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paravirt.host import supervise
from paravirt.host.supervise import Daemon, DaemonFailed, Supervisor

FAKE = str(Path(__file__).with_name("fake_daemon.py"))
DEADLINE_S = 30.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with Supervisor([sys.executable, FAKE]) as running:
        yield running


def daemon(name: str, log: Path, *behaviour: str, restart: bool = False) -> Daemon:
    return Daemon(name, (name, str(log), *behaviour), restart)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does; there is nothing to wait on but its traces."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        select.select([], [], [], 0.01)


def watching(supervisor: Supervisor) -> threading.Thread:
    thread = threading.Thread(target=supervisor.watch)
    thread.start()
    return thread


def test_start_returns_when_the_daemon_serves(supervisor: Supervisor, log: Path) -> None:
    supervisor.start(daemon("one", log))
    assert log.read_text().startswith("one start")
    assert supervisor.pid("one") is not None
    assert supervisor.pid("two") is None


def test_each_has_a_session_of_its_own_and_all_the_descriptors(supervisor: Supervisor, log: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        supervisor.start(daemon("one", log))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    pid = supervisor.pid("one")
    assert log.read_text() == f"one start pid={pid} session={pid} limit=True\n"


def test_its_memory_and_descriptors_are_closed_to_its_own_uid(supervisor: Supervisor, log: Path) -> None:
    supervisor.start(daemon("one", log))
    status = Path(f"/proc/{supervisor.pid('one')}/mem").stat()
    assert status.st_uid == 0  # the kernel gives the entries of undumpable processes to root


def test_stop_in_reverse_order(log: Path) -> None:
    with Supervisor([sys.executable, FAKE]) as supervisor:
        for name in ("one", "two", "three"):
            supervisor.start(daemon(name, log))
    assert [line.split()[0] for line in log.read_text().splitlines() if line.endswith("stop")] == [
        "three",
        "two",
        "one",
    ]


def test_one_that_does_not_stop_is_killed(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "STOP_S", 0.2)
    with Supervisor([sys.executable, FAKE]) as supervisor:
        supervisor.start(daemon("one", log, "stubborn"))
        pidfd = os.pidfd_open(supervisor.pid("one") or 0)
    assert select.select([pidfd], [], [], 0)[0]
    os.close(pidfd)


def test_one_that_ends_before_it_serves(supervisor: Supervisor, log: Path) -> None:
    with pytest.raises(DaemonFailed, match=r"one did not start \(status 5\)") as caught:
        supervisor.start(daemon("one", log, "fail", "5"))
    assert caught.value.status == 5


def test_one_that_never_serves(supervisor: Supervisor, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "READY_S", 0.5)
    with pytest.raises(DaemonFailed, match="not ready"):
        supervisor.start(daemon("one", log, "mute"))


def test_a_crashed_one_runs_again(supervisor: Supervisor, log: Path) -> None:
    supervisor.start(daemon("one", log, restart=True))
    first = supervisor.pid("one")
    assert first is not None
    thread = watching(supervisor)
    os.kill(first, signal.SIGKILL)
    until(lambda: supervisor.pid("one") not in (None, first))
    until(lambda: log.read_text().count("start") == 2)
    supervisor.request_stop()
    thread.join(DEADLINE_S)
    assert supervisor.lost == []


def test_one_that_may_not_be_restarted_is_lost_and_named(
    supervisor: Supervisor, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.start(daemon("one", log))
    supervisor.start(daemon("two", log))
    thread = watching(supervisor)
    with caplog.at_level(logging.ERROR, "paravirt.supervise"):
        os.kill(supervisor.pid("one") or 0, signal.SIGKILL)
        until(lambda: supervisor.lost == ["one"])
    assert "one ended (signal 9)" in caplog.text
    assert supervisor.pid("two") is not None
    supervisor.request_stop()
    thread.join(DEADLINE_S)


def test_back_off_doubles_up_to_a_bound_and_forgets_after_a_good_life() -> None:
    backoff = supervise.Backoff()
    delays = [backoff.next_delay("one", 0.0) for _ in range(9)]
    assert delays[:3] == [0.1, 0.2, 0.4]
    assert delays[-1] == supervise.LONGEST_DELAY_S
    assert backoff.next_delay("two", 0.0) == 0.1
    assert backoff.next_delay("one", supervise.LIVED_WELL_S) == 0.0
    assert backoff.next_delay("one", 0.0) == 0.1


def test_stop_ends_a_start_that_waits(supervisor: Supervisor, log: Path) -> None:
    supervisor.request_stop()
    supervisor.start(daemon("one", log, "mute"))
    assert supervisor.stopping


def test_daemons_die_with_a_killed_supervisor(log: Path) -> None:
    code = (
        "import sys\nfrom paravirt.host.supervise import Daemon, Supervisor\n"
        f"with Supervisor([sys.executable, {FAKE!r}]) as supervisor:\n"
        f"    supervisor.start(Daemon('one', ('one', {str(log)!r})))\n"
        "    print(supervisor.pid('one'), flush=True)\n    supervisor.watch()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        assert select.select([pidfd], [], [], DEADLINE_S)[0]
        os.close(pidfd)
    assert "stop" not in log.read_text()


def test_a_daemon_whose_supervisor_is_somebody_else_ends_at_once(log: Path) -> None:
    environment = {**os.environ, "PARAVIRT_SUPERVISOR": "1"}
    done = subprocess.run([sys.executable, FAKE, "one", str(log)], env=environment, timeout=DEADLINE_S, check=False)
    assert done.returncode == 128 + signal.SIGKILL
    assert not log.exists()


def test_without_a_supervisor_it_serves_until_a_signal(log: Path) -> None:
    with subprocess.Popen([sys.executable, FAKE, "one", str(log)]) as alone:
        until(log.exists)
        alone.send_signal(signal.SIGTERM)
        assert alone.wait(DEADLINE_S) == 0
    assert log.read_text().splitlines()[-1] == "one stop"
