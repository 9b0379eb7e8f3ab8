# SPDX-License-Identifier: MIT
"""A host from the command line: it comes up, serves, is asked, stops cleanly, and leaves nothing whatever is killed."""

import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paravirt.host.kernel import can_isolate
from paravirt.xenstore.client import XenstoreClient
from tests.host.running import DAEMONS, DEADLINE_S, Place, RunningHost, children, ended, read_all, read_line

isolation = pytest.mark.skipif(can_isolate() is not None, reason=f"the kernel gives no namespaces: {can_isolate()}")


@pytest.fixture(scope="module")
def shared_memory_before() -> set[str]:
    return set(os.listdir("/dev/shm"))


@pytest.fixture
def host(shared_memory_before: set[str]) -> Iterator[RunningHost]:
    """A host of the test's own, for tests that end it."""
    with RunningHost() as running:
        yield running
    assert set(os.listdir("/dev/shm")) <= shared_memory_before


@pytest.fixture(scope="module")
def living() -> Iterator[RunningHost]:
    """One host for all tests that leave it as it is."""
    with RunningHost() as running:
        yield running


def complaint(done: "subprocess.CompletedProcess[str]") -> str:
    assert (done.returncode, done.stdout) == (2, ""), done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def all_processes(host: RunningHost) -> list[int]:
    """pidfds of `up` and its daemons."""
    pids = [host.up.pid, *children(host.up.pid)]
    assert len(pids) == 2 + len(DAEMONS)  # and the backend of network devices
    return [os.pidfd_open(pid) for pid in pids]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does where there is nothing to wait on but its traces."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        select.select([], [], [], 0.001)


def expect_the_end(pidfds: list[int]) -> None:
    for pidfd in pidfds:
        assert ended(pidfd)
        os.close(pidfd)


class TestStart:
    def test_one_line_says_that_it_is_ready(self, living: RunningHost) -> None:
        assert living.greeting == f"host default is up, run directory {living.run}; Ctrl-C stops it"

    def test_all_daemons_are_in_sessions_of_their_own(self, living: RunningHost) -> None:
        sessions = {os.getsid(living.pid(daemon)) for daemon in DAEMONS}
        assert len(sessions) == len(DAEMONS)
        assert os.getsid(living.up.pid) not in sessions

    def test_daemons_are_closed_to_their_own_uid(self, living: RunningHost) -> None:
        for daemon in DAEMONS:
            assert Path(f"/proc/{living.pid(daemon)}/mem").stat().st_uid == 0

    def test_sockets_are_for_the_owner_alone(self, living: RunningHost) -> None:
        for name in ("hypervisor.sock", "xenstored.sock"):
            assert (living.run / name).stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("again", ["up", "hypervisor", "xenstored", "backend"])
    def test_a_second_one_is_refused(self, living: RunningHost, again: str) -> None:
        assert "is running already" in complaint(living.attempt(again))
        assert living.ask("domain", "list")

    def test_another_host_beside_it(self, living: RunningHost, host: RunningHost) -> None:
        living.ask("domain", "create", "here")
        host.ask("domain", "create", "there")
        names = {row["name"] for row in json.loads(host.ask("domain", "list", "--json"))}
        assert "there" in names
        assert "here" not in names
        living.ask("domain", "destroy", "here")

    def test_queues_of_a_disk(self) -> None:
        with RunningHost("--max-queues", "7") as host:
            host.ask("domain", "create", "guest")
            host.ask("vbd", "attach", "guest", "1M", "--driver", "memory")
            offered = host.ask("xenstore", "read", "/local/domain/0/backend/vbd/1/51712/multi-queue-max-queues")
            assert offered.strip() == "7"
            assert host.stop() == 0


class TestDomains:
    def test_create_list_destroy(self, living: RunningHost) -> None:
        domid = int(living.ask("domain", "create", "guest"))
        rows = {row["domid"]: row for row in json.loads(living.ask("domain", "list", "--json"))}
        assert rows[domid]["name"] == "guest"
        assert rows[domid]["isolated"] is True
        assert re.search(rf"{domid}\s+guest\s+yes", living.ask("domain", "list"))
        assert living.ask("xenstore", "read", f"/local/domain/{domid}/name").strip() == "guest"
        living.ask("domain", "destroy", "guest")
        assert domid not in {row["domid"] for row in json.loads(living.ask("domain", "list", "--json"))}

    def test_mistakes(self, living: RunningHost) -> None:
        living.ask("domain", "create", "taken")
        assert "taken" in complaint(living.attempt("domain", "create", "taken"))
        for bad in ("a/b", "12", "", "x" * 64):
            assert "domain name" in complaint(living.attempt("domain", "create", bad))
        for unknown in (("domain", "destroy", "nobody"), ("run", "nobody", "--", "true"), ("vbd", "list", "nobody")):
            assert complaint(living.attempt(*unknown)) == "paravirt: there is no domain nobody"
        living.ask("domain", "destroy", "taken")

    def test_dom0_is_not_to_be_destroyed(self, living: RunningHost) -> None:
        complaint(living.attempt("domain", "destroy", "0"))


class TestRun:
    @pytest.fixture
    def guest(self, living: RunningHost) -> Iterator[str]:
        living.ask("domain", "create", "guest")
        yield "guest"
        living.attempt("domain", "destroy", "guest")

    @pytest.fixture
    def plain(self, living: RunningHost) -> Iterator[str]:
        living.ask("domain", "create", "--shared", "plain")
        yield "plain"
        living.attempt("domain", "destroy", "plain")

    @isolation
    def test_output_and_status_are_the_commands(self, living: RunningHost, guest: str) -> None:
        done = living.attempt("run", guest, "--", "sh", "-c", "echo out; echo err >&2; exit 9")
        assert (done.returncode, done.stdout, done.stderr) == (9, "out\n", "err\n")

    @isolation
    def test_a_signal_is_for_the_command(self, living: RunningHost, guest: str) -> None:
        code = "import signal; signal.signal(15, lambda *_: exit(4)); print('ready', flush=True); signal.pause()"
        with living.beside("run", guest, "--", "python3", "-c", code) as process:
            assert read_line(process.stdout) == "ready"
            process.terminate()
            read_all(process.stdout)
            assert process.wait(DEADLINE_S) == 4

    @isolation
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_the_end_of_the_launcher_ends_the_domain(
        self, living: RunningHost, guest: str, number: signal.Signals
    ) -> None:
        code = "import signal; print('ready', flush=True); signal.pause()"
        with living.beside("run", guest, "--", "python3", "-c", code) as process:
            assert read_line(process.stdout) == "ready"
            process.send_signal(number)
            read_all(process.stdout)
            process.wait(DEADLINE_S)

    @isolation
    def test_the_domain_knows_itself(self, living: RunningHost, guest: str) -> None:
        code = (
            "import os; from paravirt.hypervisor.client import Hypervisor\n"
            "with Hypervisor.from_environment() as one, Hypervisor.connect(os.environ['PARAVIRT_SOCKET']) as two:\n"
            "    print(one.domid, two.domid, one.isolated)"
        )
        domid = next(row["domid"] for row in json.loads(living.ask("domain", "list", "--json")) if row["name"] == guest)
        assert living.ask("run", guest, "--", "python3", "-c", code).split() == [str(domid), str(domid), "True"]

    @isolation
    def test_commands_come_and_go_together_or_one_after_the_other(self, living: RunningHost, guest: str) -> None:
        with living.beside("run", guest, "--", "sh", "-c", "echo ready; sleep 1000") as first:
            assert read_line(first.stdout) == "ready"
            assert living.ask("run", guest, "--", "echo", "two") == "two\n"
            assert first.poll() is None
            first.terminate()
            first.wait(DEADLINE_S)
        assert living.ask("run", guest, "--", "echo", "three") == "three\n"

    @isolation
    def test_the_domain_ends_with_its_init(self, living: RunningHost, guest: str) -> None:
        with (
            living.beside("run", "--init", guest, "--", "sh", "-c", "echo ready; sleep 1000") as init,
            living.beside("run", guest, "--", "sh", "-c", "echo ready; sleep 1000") as other,
        ):
            assert [read_line(process.stdout) for process in (init, other)] == ["ready", "ready"]
            assert "init process already" in complaint(living.attempt("run", "--init", guest, "--", "sleep", "1000"))
            init.terminate()
            assert init.wait(DEADLINE_S) == 128 + signal.SIGTERM
            assert other.wait(DEADLINE_S) == 128 + signal.SIGKILL
        assert complaint(living.attempt("run", guest, "--", "true")) == "paravirt: there is no domain guest"
        assert living.attempt("xenstore", "ls", "/local/domain/0").stdout.count("guest") == 0

    @isolation
    @pytest.mark.parametrize("options", [[], ["--init"]])
    def test_destroy_ends_its_processes(self, living: RunningHost, guest: str, options: list[str]) -> None:
        with living.beside("run", *options, guest, "--", "sh", "-c", "echo ready; sleep 1000") as process:
            assert read_line(process.stdout) == "ready"
            living.ask("domain", "destroy", guest)
            read_all(process.stdout)
            assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL

    def test_shared(self, living: RunningHost, plain: str) -> None:
        assert living.ask("run", "--shared", plain, "--", "id", "-u").strip() == str(os.geteuid())

    def test_info_claims_nothing_for_it(self, living: RunningHost, plain: str) -> None:
        answer = json.loads(living.ask("info", "--json"))
        claims = {domain["name"]: domain["claim"] for domain in answer["host"]["domains"]}
        assert claims[plain].startswith("NO isolation claim is made")
        assert re.search(rf"{plain}\s+shared\s+NO isolation claim is made", living.ask("info"))

    def test_the_level_is_the_domains(self, living: RunningHost, guest: str, plain: str) -> None:
        assert "nothing isolates it" in complaint(living.attempt("run", plain, "--", "true"))
        assert "is isolated" in complaint(living.attempt("run", "--shared", guest, "--", "true"))

    def test_a_command_that_is_not_there(self, living: RunningHost, plain: str) -> None:
        done = living.attempt("run", "--shared", plain, "--", "no-such-command")
        assert complaint(done) == "paravirt: command not found: no-such-command"
        assert living.ask("run", "--shared", plain, "--", "true") == "", "the domain did not survive the mistake"

    def test_options_of_the_command_are_the_commands(self, living: RunningHost, plain: str) -> None:
        assert living.ask("run", "--shared", plain, "echo", "--shared", "-x", "--", "y") == "--shared -x -- y\n"

    def test_options_may_stand_behind_the_domain(self, living: RunningHost, plain: str) -> None:
        assert living.ask("run", plain, "--shared", "--", "echo", "--shared", "--", "x") == "--shared -- x\n"

    def test_a_path_to_expose_that_is_not_there(self, living: RunningHost, guest: str) -> None:
        assert "does not exist" in complaint(living.attempt("run", "--expose", "/none", guest, "--", "true"))


class TestStop:
    def test_a_stop_while_it_starts(self) -> None:
        """Wherever in the start it comes, what was started is stopped and nothing is left."""
        with Place() as place:
            for after in ("host.lock", "hypervisor.sock", "xenstored.lock", "backend.lock"):
                with place.spawn("up", stdout=subprocess.PIPE) as up:
                    until(lambda path=place.run / after: path.exists())
                    pidfds = [os.pidfd_open(child) for child in children(up.pid)]
                    up.terminate()
                    assert up.wait(DEADLINE_S) == 0, after
                    expect_the_end(pidfds)
                    assert not place.run.exists(), after

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_signal_stops_it_and_nothing_is_left(self, host: RunningHost, number: signal.Signals) -> None:
        pidfds = all_processes(host)
        assert host.stop(number) == 0
        expect_the_end(pidfds)
        assert not host.run.exists()
        assert b"Traceback" not in read_all(host.up.stderr)

    @isolation
    def test_domains_end_with_it(self, host: RunningHost) -> None:
        host.ask("domain", "create", "guest")
        with host.beside("run", "guest", "--", "sh", "-c", "echo ready; sleep 1000") as process:
            assert read_line(process.stdout) == "ready"
            assert host.stop() == 0
            read_all(process.stdout)
            assert process.wait(DEADLINE_S) == 128 + signal.SIGKILL
            assert not host.run.exists()

    def test_a_killed_parent_takes_all_along_and_the_place_can_be_used_again(self, host: RunningHost) -> None:
        host.ask("domain", "create", "guest")
        pidfds = all_processes(host)
        host.up.kill()
        expect_the_end(pidfds)
        host.up.wait(DEADLINE_S)
        assert "is not running" in complaint(host.attempt("domain", "list"))
        with host.beside("up") as again:
            assert "is up" in read_line(again.stdout)
            assert [row["name"] for row in json.loads(host.ask("domain", "list", "--json")) if row["domid"]] == []
            again.terminate()
            assert again.wait(DEADLINE_S) == 0
            assert not host.run.exists()

    def test_a_killed_backend_runs_again(self, host: RunningHost) -> None:
        first = host.pid("backend")
        os.kill(first, signal.SIGKILL)
        assert "backend ended (signal 9): starting again" in read_line(host.up.stderr)
        assert "backend runs again" in read_line(host.up.stderr)
        assert host.pid("backend") != first
        assert host.stop() == 0

    @pytest.mark.parametrize("daemon", ["hypervisor", "xenstored"])
    def test_another_killed_daemon_is_named_and_the_stop_is_clean(self, host: RunningHost, daemon: str) -> None:
        pidfds = all_processes(host)
        os.kill(host.pid(daemon), signal.SIGKILL)
        until_said(host, f"{daemon} ended (signal 9)")
        complaint(host.attempt("domain", "create", "guest"))
        assert host.stop() == 1
        expect_the_end(pidfds)
        assert not [path for path in host.run.rglob("*") if path.is_file()]
        with host.beside("up") as again:
            assert "is up" in read_line(again.stdout)
            again.terminate()
            assert again.wait(DEADLINE_S) == 0

    def test_a_daemon_that_cannot_start_is_one_line(self) -> None:
        with Place() as place:
            place.run.mkdir(mode=0o700)
            (place.run / "xenstored.sock").touch()
            assert "is not a socket" in complaint(place.attempt("up"))
            assert sorted(path.name for path in place.run.iterdir()) == ["xenstored.sock"]


class TestAlone:
    """Each daemon without `up`."""

    def test_each_by_itself(self, shared_memory_before: set[str]) -> None:
        with Place() as place:
            started = [place.start(daemon) for daemon in DAEMONS]
            place.ask("domain", "create", "guest")
            assert "guest" in place.ask("domain", "list")
            for process in reversed(started):
                process.terminate()
                assert process.wait(DEADLINE_S) == 0
            assert not place.run.exists()

    def test_the_backend_needs_a_host(self) -> None:
        with Place() as place:
            assert "is not running" in complaint(place.attempt("backend"))

    def test_xenstored_needs_none(self) -> None:
        with Place() as place:
            path = place.directory / "store"
            process = place.start("xenstored", "--socket", str(path))
            with XenstoreClient.connect(path) as store:
                store.write("/key", "value")
                assert store.read_text("/key") == "value"
            process.terminate()
            assert process.wait(DEADLINE_S) == 0
            assert not path.exists()
            assert not place.run.exists()


def until_said(host: RunningHost, text: str) -> None:
    while text not in read_line(host.up.stderr):
        pass
