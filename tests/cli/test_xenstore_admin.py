# SPDX-License-Identifier: MIT
"""`paravirt xenstore control` and `quota`, against a daemon that answers as the interface says."""

import json
from collections.abc import Iterator

import pytest

from paravirt.cli.xenstored import QUOTA_FIELDS
from paravirt.xenstore.wire import Op
from tests.cli.fake_store import FakeStore
from tests.cli.store import StandIn, ask, mistake, output


class Daemon(FakeStore):
    """Has two quotas, for all and for domain 1, and echoes CONTROL."""

    def __init__(self) -> None:
        super().__init__(self.reply)
        self.quotas = {(b"nodes",): 1000, (b"soft-memory",): 0, (b"1", b"nodes"): 5, (b"1", b"soft-memory"): 6}

    def reply(self, op: int, payload: bytes) -> bytes:
        words = tuple(payload.split(b"\0")[:-1])
        if op == Op.CONTROL:
            return b"EINVAL\0" if words[0] == b"unknown" else b"+".join(words) + b"\0"
        if op == Op.GET_QUOTA and not words:
            return b"nodes soft-memory\0"
        key = words if op == Op.GET_QUOTA else words[:-1]
        if key not in self.quotas:
            return b"ENOENT\0" if key[0].isdigit() else b"EINVAL\0"
        if op == Op.GET_QUOTA:
            return b"%d\0" % self.quotas[key]
        self.quotas[key] = int(words[-1])
        return b"OK\0"


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


class TestControl:
    def test_words_go_and_the_answer_comes(self, daemon: Daemon) -> None:
        assert output(daemon, "control", "quota", "max", "-r") == "quota+max+-r\n"
        assert daemon.asked == [(Op.CONTROL, b"quota\0max\0-r\0")]

    def test_an_answer_of_lines(self, daemon: Daemon) -> None:
        assert output(daemon, "control", "one\n") == "one\n"

    def test_it_is_refused(self, daemon: Daemon) -> None:
        said = mistake(daemon, "control", "unknown", "word")
        assert said == "unknown word: is not a valid request (EINVAL)"

    def test_nothing_to_say(self, daemon: Daemon) -> None:
        assert "Missing argument" in mistake(daemon, "control")


class TestQuota:
    def test_all(self, daemon: Daemon) -> None:
        rows = [line.split() for line in output(daemon, "quota").splitlines() if line.strip()]
        assert [rows[0], *rows[2:]] == [["Quota", "Value"], ["nodes", "1000"], ["soft-memory", "0"]]
        assert json.loads(output(daemon, "quota", "--json")) == [
            {"name": "nodes", "value": 1000},
            {"name": "soft-memory", "value": 0},
        ]

    def test_of_one_domain(self, daemon: Daemon) -> None:
        assert json.loads(output(daemon, "quota", "1", "--json")) == [
            {"name": "nodes", "value": 5},
            {"name": "soft-memory", "value": 6},
        ]

    def test_one(self, daemon: Daemon) -> None:
        assert output(daemon, "quota", "nodes") == "1000\n"
        assert output(daemon, "quota", "1", "nodes") == "5\n"
        assert json.loads(output(daemon, "quota", "1", "nodes", "--json")) == [{"name": "nodes", "value": 5}]

    def test_set(self, daemon: Daemon) -> None:
        assert output(daemon, "quota", "nodes", "7") == ""
        assert output(daemon, "quota", "1", "nodes", "8") == ""
        assert (daemon.quotas[b"nodes",], daemon.quotas[b"1", b"nodes"]) == (7, 8)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["no"], "quota no: is not a valid request (EINVAL)"),
            (["2", "nodes"], "quota nodes of domain 2: does not exist (ENOENT)"),
            (["2", "nodes", "5"], "quota nodes of domain 2: does not exist (ENOENT)"),
            (["nodes", "many"], "the value of a quota is a number, not 'many'"),
            (["1", "nodes", "2", "3"], "quota wants at most a domain id, a name and a value"),
        ],
    )
    def test_mistakes(self, daemon: Daemon, words: list[str], said: str) -> None:
        assert mistake(daemon, "quota", *words) == said


class TestTheRealDaemon:
    def test_quotas(self, context: StandIn) -> None:
        before = {row["name"]: row["value"] for row in ask(context, "quota")}
        assert before["nodes"] == int(output(context, "quota", "nodes")) == 1000
        assert set(before) == set(QUOTA_FIELDS)
        output(context, "quota", "nodes", "7")
        assert {row["name"]: row["value"] for row in ask(context, "quota")} == {**before, "nodes": 7}
        assert "EINVAL" in mistake(context, "quota", "nonsense")

    def test_control(self, context: StandIn) -> None:
        assert "trace" in output(context, "control", "help")
        assert "EINVAL" in mistake(context, "control", "nonsense")
