# SPDX-License-Identifier: MIT
"""`paravirt xenstore trace`: what a fake daemon says was asked, and what the real one says."""

import json
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paravirt.cli.xenstore.trace import FROM_NOW, Record, parse
from paravirt.errors import PeerError
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.wire import Op
from tests.cli.fake_store import FakeStore
from tests.cli.store import DEADLINE_S, beside, mistake, output, run
from tests.host.running import read_all, read_line

LINES = [
    "1700000000.123 0.4 - READ /a OK 12",
    "1700000000.124 1.9 7 WRITE /local/domain/1/data OK 30",
    "1700000000.125 1.9 - READ /local/domain/1/database ENOENT 3",
    "1700000000.126 2.5 - TRANSACTION_START - OK 1",
    "... 12 lines lost",
    "1700000000.127 2.5 8 SET_PERMS /local/domain/1/data/x,n0,r1 OK 1",
]


def tracer(*answers: str) -> Callable[[int, bytes], bytes]:
    """Answers with these texts, one after the other; then ends the connection."""
    left = list(answers)

    def answer(op: int, payload: bytes) -> bytes:
        assert op == Op.CONTROL
        if not left:
            raise ConnectionError
        return left.pop(0).encode()

    return answer


class TestParse:
    def test_records(self) -> None:
        assert [parse(line) for line in LINES] == [
            Record(1700000000.123, 0, 4, None, "READ", "/a", "OK", 12),
            Record(1700000000.124, 1, 9, 7, "WRITE", "/local/domain/1/data", "OK", 30),
            Record(1700000000.125, 1, 9, None, "READ", "/local/domain/1/database", "ENOENT", 3),
            Record(1700000000.126, 2, 5, None, "TRANSACTION_START", "", "OK", 1),
            12,
            Record(1700000000.127, 2, 5, 8, "SET_PERMS", "/local/domain/1/data/x,n0,r1", "OK", 1),
        ]

    @pytest.mark.parametrize("line", ["", "nonsense", "... lines lost", "x 0.4 - READ /a OK 12"])
    def test_what_cannot_be_read(self, line: str) -> None:
        with pytest.raises(PeerError, match="cannot be read"):
            parse(line)

    @pytest.mark.parametrize(
        ("asked", "path", "yes"),
        [
            ("0.1 - WRITE /a/b", "/a", True),
            ("0.1 - WRITE /a/b", "/", True),
            ("0.1 - WATCH /a/b,token", "/a/b", True),
            ("0.1 - WRITE /a/b", "/a/b/c", False),
            ("0.1 - WRITE /a/bc", "/a/b", False),
            ("7.1 - READ data/x", "/local/domain/7/data", True),
            ("7.1 - READ data/x", "/local/domain/0", False),
            ("7.1 - WATCH @releaseDomain,t", "@releaseDomain", True),
            ("7.1 - WATCH @releaseDomain,t", "/local/domain/7", False),
            ("0.1 2 TRANSACTION_END T", "/", False),
        ],
    )
    def test_paths(self, asked: str, path: str, yes: bool) -> None:
        record = parse(f"1.0 {asked} OK 1")
        assert isinstance(record, Record)
        assert record.concerns(path) is yes


ANSWERS = (f"2\n{LINES[0]}\n{LINES[1]}\n", "2\n", "3\n" + LINES[2] + "\n", "3\n", "18\n" + "\n".join(LINES[3:]) + "\n")


class TestFollowing:
    def test_every_line_once(self) -> None:
        with FakeStore(tracer(*ANSWERS)) as store:
            result = run(store, "trace", "-n", "5", "--interval", "0")
        assert result.exception is None
        assert result.stdout.splitlines() == [line for line in LINES if "lost" not in line]
        assert result.stderr == "paravirt: 12 lines lost\n"
        asked = [payload.split(b"\0")[1] for _, payload in store.asked]
        assert asked == [b"%d" % FROM_NOW, b"2", b"2", b"3", b"3"]

    @pytest.mark.parametrize(
        ("filters", "numbers"),
        [
            (["--domid", "1"], [1, 2]),
            (["--domid", "0", "--domid", "2"], [0, 3, 5]),
            (["--op", "read"], [0, 2]),
            (["--op", "SET_PERMS", "--op", "WRITE"], [1, 5]),
            (["--path", "/local/domain/1/data"], [1, 5]),
            (["--path", "/local/domain/1/data", "--domid", "2", "--op", "set_perms"], [5]),
        ],
    )
    def test_filters(self, filters: list[str], numbers: list[int]) -> None:
        with FakeStore(tracer(*ANSWERS)) as store:
            said = output(store, "trace", "--interval", "0", "-n", str(len(numbers)), *filters)
        assert said.splitlines() == [LINES[number] for number in numbers]

    def test_its_own_questions_are_left_out(self) -> None:
        own = "1700000000.124 0.4 - CONTROL trace 1 OK 2"
        with FakeStore(tracer(f"2\n{own}\n{LINES[0]}\n")) as store:
            assert output(store, "trace", "-n", "1") == f"{LINES[0]}\n"

    def test_json(self) -> None:
        with FakeStore(tracer(*ANSWERS)) as store:
            said = output(store, "trace", "--json", "-n", "1", "--op", "WRITE", "--interval", "0")
        assert json.loads(said) == {
            "time": 1700000000.124,
            "domid": 1,
            "connection": 9,
            "transaction": 7,
            "op": "WRITE",
            "arguments": "/local/domain/1/data",
            "reply": "OK",
            "us": 30.0,
        }

    @pytest.mark.parametrize(
        ("answer", "said"),
        [
            ("EINVAL\0", f"trace {FROM_NOW}: is not a valid request (EINVAL)"),
            ("none\n", "xenstored answered a question for the trace with 'none'"),
            ("1\nwhat\n", "xenstored wrote a trace that cannot be read: 'what'"),
        ],
    )
    def test_a_daemon_that_has_none(self, answer: str, said: str) -> None:
        with FakeStore(tracer(answer)) as store:
            assert mistake(store, "trace") == said

    def test_an_operation_that_is_none(self) -> None:
        with FakeStore(tracer()) as store:
            assert "'none' is no operation" in mistake(store, "trace", "--op", "none")


class TestTheRealDaemon:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Iterator[Path]:
        with XenstoreServer(tmp_path / "s").start():
            yield tmp_path / "s"

    def test_what_it_has_kept(self, path: Path) -> None:
        with XenstoreClient.connect(path) as store:
            store.control("trace", "0")
            store.write("/traced/node", "value")
        with beside(path, "trace", "--kept", "-n", "1", "--op", "write", "--path", "/traced") as trace:
            record = parse(read_line(trace.stdout))
            assert trace.wait(DEADLINE_S) == 0
        assert isinstance(record, Record)
        assert (record.domid, record.op, record.arguments, record.reply) == (0, "WRITE", "/traced/node", "OK")

    def test_live_and_an_interrupt(self, path: Path) -> None:
        with XenstoreClient.connect(path) as store, beside(path, "trace", "--path", "/node", "--json") as trace:
            assert trace.stdout is not None
            deadline = time.monotonic() + DEADLINE_S
            while not select.select([trace.stdout], [], [], 0.01)[0]:  # it does not say from when on it looks
                assert time.monotonic() < deadline, "nothing was traced"
                store.exists("/node")
            record = json.loads(read_line(trace.stdout))
            assert (record["op"], record["arguments"], record["reply"]) == ("READ", "/node", "ENOENT")
            trace.send_signal(signal.SIGINT)
            assert read_all(trace.stderr) == b""
            assert trace.wait(DEADLINE_S) == 130
