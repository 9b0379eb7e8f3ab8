# SPDX-License-Identifier: MIT
"""`paravirt xenstore transaction`: scripts that are done as a whole or not at all."""

import re
from pathlib import Path

import pytest

from paravirt.cli.xenstore.script import Step, parse, perform
from paravirt.errors import InvalidRequest
from paravirt.xenstore.calls import StoreCalls
from tests.cli.store import StandIn, ask, mistake, output, run


class TestParse:
    def test_steps(self) -> None:
        script = (
            b"# a comment\n\n  write /a two words \\n \nread  /a\r\n  mkdir /b\n"
            b"chmod /a  n0  r5\nexpect /c\nwrite /d  x"
        )
        assert parse(script) == [
            Step(3, "write", "/a", b"two words \n "),
            Step(4, "read", "/a"),
            Step(5, "mkdir", "/b"),
            Step(6, "chmod", "/a", permissions=("n0", "r5")),
            Step(7, "expect", "/c"),
            Step(8, "write", "/d", b" x"),
        ]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            (b"remove /a", "'remove' is none of: read mkdir rm exists write expect chmod"),
            (b"read", "read wants a path"),
            (b"read /a /b", "read wants a path and nothing else"),
            (b"write", "write wants a path"),
            (b"write /\xc3\xa4 x", "write wants a path"),
            (b"write /a \\q", "\\q is no escape"),
            (b"write /a \xff", "is no UTF-8"),
            (b"chmod /a", "chmod wants a path and permissions"),
            (b"chmod /a x1", "permission 'x1' is not one of"),
        ],
    )
    def test_mistakes_name_the_line(self, line: bytes, said: str) -> None:
        with pytest.raises(InvalidRequest, match=re.escape(f"line 3: {said}")):
            parse(b"read /\n\n" + line + b"\nread /\n")


SCRIPT = b"""\
# move /a to /b
expect /a one\\x0a
write /b one\\x0a
read /b
rm /a
mkdir /c
chmod /c b0
exists /c
read /c
"""


def test_all_of_it(context: StandIn, tmp_path: Path) -> None:
    output(context, "write", "/a", "one\n")
    (tmp_path / "script").write_bytes(SCRIPT)
    assert output(context, "transaction", str(tmp_path / "script")) == "one\\n\n\n"
    assert output(context, "ls", "-fp").splitlines()[2:] == ['/b = "one\\n"   (n0)', '/c = ""   (b0)']


def test_json(context: StandIn) -> None:
    output(context, "write", "/a", "one\n")
    assert ask(context, "transaction", stdin=SCRIPT) == [
        {"line": 4, "path": "/b", "value": "one\n"},
        {"line": 9, "path": "/c", "value": ""},
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("expect /a 2", 'line 2: /a is not "2" but "1"'),
        ("expect /no 2", 'line 2: /no is not "2": it does not exist'),
        ("exists /no", "line 2: /no does not exist"),
    ],
)
def test_what_does_not_hold(context: StandIn, line: str, said: str) -> None:
    output(context, "write", "/a", "1")
    result = run(context, "transaction", stdin=f"write /b 1\n{line}\nread /b\n".encode())
    assert (result.return_value, result.stdout, result.stderr) == (1, "", f"paravirt: {said}\n")
    assert run(context, "exists", "/b").return_value == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("read /no", "line 2: /no: does not exist (ENOENT)"),
        ("rm /", "line 2: /: is not a valid request (EINVAL)"),
        ("rm /no/thing", "line 2: /no/thing: does not exist (ENOENT)"),
        ("chmod /no n0", "line 2: /no: does not exist (ENOENT)"),
        ("write bad//path x", "line 2: bad//path: is not a valid request (EINVAL)"),
        (f"write /long {'x' * 4096}", "line 2: /long: is too long (E2BIG)"),
        ("nonsense /a", "line 2: 'nonsense' is none of"),
    ],
)
def test_mistakes_name_the_line_and_undo_all(context: StandIn, line: str, said: str) -> None:
    assert said in mistake(context, "transaction", stdin=f"write /b 1\n{line}\n".encode())
    assert run(context, "exists", "/b").return_value == 1


def test_a_file_that_is_not_there(context: StandIn) -> None:
    assert "No such file or directory" in mistake(context, "transaction", "/no/file")


class TestConflict:
    @pytest.fixture
    def attempts(self, context: StandIn, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Somebody else writes /a in the middle of the first two attempts; how many there were."""
        made: list[int] = []

        def disturbed(store: StoreCalls, steps: list[Step]) -> object:
            done = perform(store, steps)
            made.append(len(made) + 1)
            if len(made) <= 2:
                with context.store() as other:
                    other.write("/a", f"{len(made)}")
            return done

        monkeypatch.setattr("paravirt.cli.xenstore.script.perform", disturbed)
        return made

    def test_it_is_tried_again(self, context: StandIn, attempts: list[int]) -> None:
        output(context, "write", "/a", "0")
        assert output(context, "transaction", stdin=b"read /a\nwrite /b x\n") == "2\n"
        assert attempts == [1, 2, 3]

    def test_but_not_for_ever(self, context: StandIn, attempts: list[int]) -> None:
        output(context, "write", "/a", "0")
        said = mistake(context, "transaction", "--attempts", "2", stdin=b"read /a\nwrite /b x\n")
        assert said == "transaction: something the transaction has seen was changed meanwhile (EAGAIN)"
        assert attempts == [1, 2]
        assert run(context, "exists", "/b").return_value == 1
