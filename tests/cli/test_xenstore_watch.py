# SPDX-License-Identifier: MIT
"""`paravirt xenstore watch`: in this process where what it sees is known before, else as a process of its own."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from tests.cli.store import DEADLINE_S, StandIn, beside, mistake, output, run
from tests.host.running import read_all, read_line


def test_each_path_tells_of_itself_first(context: StandIn) -> None:
    output(context, "write", "/a", "1")
    assert output(context, "watch", "-n", "3", "--values", "/a", "/no", "@releaseDomain") == (
        '/a /a = "1"\n/no /no (none)\n@releaseDomain @releaseDomain (none)\n'
    )
    assert output(context, "watch", "-n", "1", "/a") == "/a /a\n"


def test_json_lines(context: StandIn) -> None:
    with context.store() as store:
        store.write("/a", b"\xff")
    lines = output(context, "watch", "-n", "2", "--values", "--json", "/a", "/no").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"path": "/a", "token": "/a", "value": {"base64": "/w=="}},
        {"path": "/no", "token": "/no", "value": None},
    ]
    assert json.loads(output(context, "watch", "-n", "1", "--json", "/a")) == {"path": "/a", "token": "/a"}


def test_the_time_is_over(context: StandIn) -> None:
    result = run(context, "watch", "-n", "2", "--timeout", "0.01", "/a")
    assert (result.return_value, result.stdout) == (1, "/a /a\n")
    result = run(context, "watch", "--timeout", "0.01", "/a")
    assert (result.return_value, result.stdout) == (0, "/a /a\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bad path"], "bad path: is not a valid request (EINVAL)"),
        (["-n", "0", "/a"], "Invalid value for '--count'"),
        (["--timeout", "-1", "/a"], "Invalid value for '--timeout'"),
        (["--depth", "-1", "/a"], "Invalid value for '--depth'"),
    ],
)
def test_mistakes(context: StandIn, arguments: list[str], said: str) -> None:
    assert said in mistake(context, "watch", *arguments)


class TestAsAProcess:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Iterator[Path]:
        with XenstoreServer(tmp_path / "s").start():
            yield tmp_path / "s"

    def test_lines_come_as_it_happens(self, path: Path) -> None:
        with XenstoreClient.connect(path) as store, beside(path, "watch", "-n", "4", "--values", "/a") as watch:
            assert read_line(watch.stdout) == "/a /a (none)"
            store.write("/a/b", "one\n")
            assert read_line(watch.stdout) == '/a/b /a = "one\\n"'
            store.write("/elsewhere", "x")
            store.rm("/a/b")
            assert read_line(watch.stdout) == "/a/b /a (none)"
            store.write("/a/c/d", "two")
            assert read_line(watch.stdout) == '/a/c/d /a = "two"'
            assert watch.wait(DEADLINE_S) == 0

    def test_depth(self, path: Path) -> None:
        with XenstoreClient.connect(path) as store, beside(path, "watch", "--depth", "1", "/a") as watch:
            assert read_line(watch.stdout) == "/a /a"
            store.write("/a/b/deep", "x")
            store.write("/a/c", "x")
            assert read_line(watch.stdout) == "/a/c /a"

    def test_an_interrupt_ends_it_quietly(self, path: Path) -> None:
        with beside(path, "watch", "/a") as watch:
            assert read_line(watch.stdout) == "/a /a"
            watch.send_signal(signal.SIGINT)
            assert read_all(watch.stderr) == b""
            assert watch.wait(DEADLINE_S) == 130

    def test_the_daemon_goes(self, tmp_path: Path) -> None:
        with XenstoreServer(tmp_path / "s").start() as server, beside(tmp_path / "s", "watch", "/a") as watch:
            assert read_line(watch.stdout) == "/a /a"
            server.stop()
            assert read_all(watch.stderr) == b"paravirt: xenstored is gone\n"
            assert watch.wait(DEADLINE_S) == 2
