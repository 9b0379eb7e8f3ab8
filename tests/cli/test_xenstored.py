# SPDX-License-Identifier: MIT
"""`paravirt xenstored` as a user starts it: ready when it says so, its place on the file system, its options."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from paravirt.cli import up
from paravirt.cli.xenstored import QUOTA_FIELDS, Choice
from paravirt.errors import NotFound, XenstoreError
from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.server import BrokerServer
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.limits import QUOTAS, Limits
from tests.host.running import DEADLINE_S, Place, read_all, read_line


@pytest.fixture
def place() -> Iterator[Place]:
    with Place() as place:
        yield place


@contextmanager
def by_hand(place: Place, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """The daemon without a supervisor, once it has said that it is ready."""
    with place.spawn("xenstored", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            line = read_line(process.stdout)
            assert line.startswith("xenstored serves "), line
            assert line.endswith("; Ctrl-C stops it"), line
            yield process
        finally:
            process.kill()


def refusal(place: Place, *arguments: str) -> str:
    """The one line of a daemon that does not start."""
    done = place.attempt("xenstored", *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    return line.removeprefix("paravirt: ")


class TestReadyAndStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_it_serves_when_it_says_so_and_leaves_nothing(self, place: Place, number: signal.Signals) -> None:
        path = place.directory / "store"
        with by_hand(place, "--socket", str(path)) as process:
            with XenstoreClient.connect(path) as store:
                store.write("/key", "value")
                assert store.read("/key") == b"value"
                process.send_signal(number)
                assert process.wait(DEADLINE_S) == 0
            assert read_all(process.stderr) == b""
        assert list(place.directory.iterdir()) == []

    def test_its_place_in_the_run_directory(self, place: Place) -> None:
        with by_hand(place) as process:
            assert "only clients of Dom0 are served" in read_line(process.stderr)
            with XenstoreClient.connect(place.run / "xenstored.sock") as store:
                assert store.ls("/") == ["tool"]
            assert "is running already" in refusal(place)
            process.terminate()
            assert process.wait(DEADLINE_S) == 0
        assert not place.run.exists()

    def test_a_supervised_one_says_nothing(self, place: Place) -> None:
        path = place.directory / "store"
        read, write = os.pipe()
        with open(read, "rb", buffering=0) as ready:
            environment = {**os.environ, "PARAVIRT_READY_FD": str(write)}
            with place.spawn(
                "xenstored", "--socket", str(path), env=environment, pass_fds=(write,), stdout=subprocess.PIPE
            ) as process:
                os.close(write)
                assert ready.read(1) == b"1"
                XenstoreClient.connect(path).close()
                process.terminate()
                assert read_all(process.stdout) == b""
                assert process.wait(DEADLINE_S) == 0


class TestPlace:
    def test_a_stale_socket_is_replaced(self, place: Place) -> None:
        path = place.directory / "store"
        with by_hand(place, "--socket", str(path)) as process:
            process.kill()
            process.wait(DEADLINE_S)
        assert path.is_socket()
        with by_hand(place, "--socket", str(path)), XenstoreClient.connect(path) as store:
            assert store.exists("/")

    def test_a_live_one_is_not(self, place: Place) -> None:
        path = place.directory / "store"
        with by_hand(place, "--socket", str(path)), XenstoreClient.connect(path) as store:
            assert refusal(place, "--socket", str(path)) == f"another daemon serves {path}"
            assert store.exists("/")
            with XenstoreClient.connect(path) as another:
                assert another.exists("/")

    def test_nor_a_socket_of_somebody_else(self, place: Place) -> None:
        path = place.directory / "store"
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            other.listen()
            assert refusal(place, "--socket", str(path)) == f"another daemon serves {path}"
        assert path.is_socket()

    def test_nor_another_file(self, place: Place) -> None:
        path = place.directory / "store"
        path.write_text("mine")
        assert refusal(place, "--socket", str(path)) == f"{path} is there and is not a socket"
        assert path.read_text() == "mine"

    def test_no_such_directory(self, place: Place) -> None:
        assert "no directory for the socket" in refusal(place, "--socket", str(place.directory / "no" / "store"))

    def test_a_path_that_is_too_long(self, place: Place) -> None:
        assert "may have 107 bytes" in refusal(place, "--socket", str(place.directory / ("x" * 108)))


class TestHypervisor:
    @pytest.fixture
    def broker(self, place: Place) -> Iterator[BrokerServer]:
        place.run.mkdir(mode=0o700)
        with BrokerServer(place.run) as broker:
            yield broker

    def test_its_domains_are_served_under_the_quotas(self, place: Place, broker: BrokerServer) -> None:
        path = place.directory / "store"
        arguments = ("--socket", str(path), "--hypervisor", str(place.run / "hypervisor.sock"), "--quota", "nodes=4")
        with ExitStack() as stack:
            process = stack.enter_context(by_hand(place, *arguments))
            store = stack.enter_context(XenstoreClient.connect(path))
            dom0 = stack.enter_context(Hypervisor.from_fd(broker.connect(0)))
            domid = dom0.create_domain("guest", isolated=False).domid
            store.mkdir(f"/local/domain/{domid}")
            store.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
            domain = stack.enter_context(Hypervisor.from_fd(broker.connect(domid)))
            guest = stack.enter_context(XenstoreClient.from_socket(domain.store_connection()))
            guest.write("a", "1")
            guest.write("b", "2")
            assert store.read(f"/local/domain/{domid}/b") == b"2"
            with pytest.raises(XenstoreError, match="ENOSPC"):
                guest.write("c", "3")
            process.terminate()
            assert process.wait(DEADLINE_S) == 0

    def test_with_a_socket_only_dom0_is_served(self, place: Place, broker: BrokerServer) -> None:
        with (
            by_hand(place, "--socket", str(place.directory / "store")),
            Hypervisor.from_fd(broker.connect(0)) as dom0,
            pytest.raises(NotFound),
        ):
            dom0.store_connection()

    def test_nobody_there(self, place: Place) -> None:
        path = place.directory / "no.sock"
        said = refusal(place, "--socket", str(place.directory / "store"), "--hypervisor", str(path))
        assert said == f"no hypervisor runs at {path}"
        assert list(place.directory.iterdir()) == []


class TestOptions:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--memory", "--journal", "x"], "--memory and --journal exclude each other"),
            (["--sync"], "--sync is of no use without --journal"),
            (["--sync", "--memory"], "--sync is of no use without --journal"),
            (["--quota", "nodes"], "nodes wants a number, not ''"),
            (["--quota", "nodes=-1"], "nodes wants a number, not '-1'"),
            (["--quota", "none=1"], "there is no quota 'none', only: nodes watches"),
            (["--watch-event-timeout", "-1"], "Invalid value for '--watch-event-timeout'"),
        ],
    )
    def test_mistakes(self, place: Place, arguments: list[str], said: str) -> None:
        assert said in refusal(place, "--socket", str(place.directory / "store"), *arguments)
        assert list(place.directory.iterdir()) == []

    def test_memory(self, place: Place) -> None:
        path = place.directory / "store"
        with by_hand(place, "--memory", "--socket", str(path)), XenstoreClient.connect(path) as store:
            assert store.exists("/")

    def test_what_is_not_said_is_left_to_the_server(self) -> None:
        assert Choice().server_options() == {}

    def test_what_is_said_reaches_the_server(self) -> None:
        choice = Choice(Path("j"), True, Path("log"), quotas=(("nodes", 5), ("path-max", 6), ("node-size", 0)))
        assert choice.server_options() == {
            "limits": Limits(nodes=5, path_bytes=6, node_bytes=0),
            "journal": Path("j"),
            "sync": True,
            "access_log": Path("log"),
        }

    def test_every_quota_reaches_the_server(self) -> None:
        assert list(QUOTA_FIELDS) == list(QUOTAS)
        choice = Choice(quotas=tuple((name, i) for i, name in enumerate(QUOTAS)), watch_event_timeout_s=1.5)
        limits = choice.server_options()["limits"]
        assert list(limits.quotas().values()) == list(range(len(QUOTAS)))
        assert limits.watch_event_timeout_ms == 1500

    def test_the_daemon_says_the_quotas_that_it_was_given(self, place: Place) -> None:
        path = place.directory / "store"
        options = ("--quota", "soft-memory=7", "--quota", "watches=0", "--quota", "watches=9")
        with by_hand(place, "--socket", str(path), *options), XenstoreClient.connect(path) as store:
            assert (store.get_quota("soft-memory"), store.get_quota("watches")) == (7, 9)
            assert store.get_quota("nodes") == Limits().nodes

    def test_up_passes_the_journal_on(self) -> None:
        daemons = {daemon.name: daemon.arguments for daemon in up._daemons(None, Path("store"), (), (), None)}
        assert daemons["xenstored"] == ("xenstored", "--journal", str(Path.cwd() / "store"))
        assert {daemon.name: daemon.arguments for daemon in up._daemons(None, None, (), (), None)}["xenstored"] == (
            "xenstored",
        )
