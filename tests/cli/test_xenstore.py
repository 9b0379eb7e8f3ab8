# SPDX-License-Identifier: MIT
"""`paravirt xenstore` against a daemon, without the rest of a host."""

import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from paravirt.cli.context import Context
from paravirt.cli.xenstore import xenstore
from paravirt.errors import InvalidRequest, XenstoreError
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer


class StandIn(Context):
    """The context of a host of which only the store runs."""

    def __init__(self, server: XenstoreServer) -> None:
        super().__init__("default", None, "info", None)
        self._server = server

    def store(self) -> XenstoreClient:
        return XenstoreClient.from_socket(self._server.connect())


@pytest.fixture
def context() -> Iterator[StandIn]:
    with XenstoreServer() as server:
        server.start()
        yield StandIn(server)


def run(context: StandIn, *arguments: str) -> Result:
    return CliRunner().invoke(xenstore, list(arguments), obj=context, standalone_mode=False)


def output(context: StandIn, *arguments: str) -> str:
    result = run(context, *arguments)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_write_and_read(context: StandIn) -> None:
    assert output(context, "write", "/a/b", "1", "/a/c", "two words") == ""
    assert output(context, "read", "/a/b", "/a/c") == "1\ntwo words\n"
    assert json.loads(output(context, "read", "/a/b", "--json")) == {"/a/b": "1"}
    with context.store() as store:
        store.write("/a/raw", b"\xff\n")
    assert output(context, "read", "/a/raw") == "\\xff\n\n"
    assert run(context, "read", "/a/raw", "--raw").stdout_bytes == b"\xff\n"


def test_trees(context: StandIn) -> None:
    output(context, "write", "/a/b/c", 'say "x"\n', "/a/d", "\\")
    assert output(context, "ls", "/a") == 'b = ""\n c = "say \\"x\\"\\n"\nd = "\\\\"\n'
    assert output(context, "ls") == (
        'tool = ""\n xenstored = ""\na = ""\n b = ""\n  c = "say \\"x\\"\\n"\n d = "\\\\"\n'
    )
    assert output(context, "ls", "--flat", "--perms", "/a/b") == '/a/b/c = "say \\"x\\"\\n"   (n0)\n'
    assert json.loads(output(context, "ls", "/a/b", "--json")) == [
        {"path": "/a/b/c", "value": 'say "x"\n', "permissions": ["n0"]}
    ]


def test_a_very_deep_tree(context: StandIn) -> None:
    with context.store() as store:
        store.write("/a" * 1500, "deep")
    assert output(context, "ls", "--flat", "/").splitlines()[-1] == "/a" * 1500 + ' = "deep"'


def test_names(context: StandIn) -> None:
    output(context, "write", "/a/z", "1", "/a/b", "1")
    assert output(context, "list", "/a") == "z\nb\n"
    assert json.loads(output(context, "list", "--json", "/a")) == ["z", "b"]


def test_removing_and_looking(context: StandIn) -> None:
    output(context, "write", "/a", "1", "/b", "1")
    assert run(context, "exists", "/a", "/b").return_value == 0
    output(context, "rm", "/a")
    assert run(context, "exists", "/a", "/b").return_value == 1


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["read", "/no"], XenstoreError, "/no: does not exist"),
        (["ls", "/no"], XenstoreError, "/no: does not exist"),
        (["list", "bad path"], XenstoreError, "bad path"),
        (["rm", "/"], XenstoreError, "/"),
        (["write", "/a"], InvalidRequest, "pairs"),
        (["write", "/a", "x" * 5000], XenstoreError, "too long"),
    ],
)
def test_mistakes_are_one_clear_line(context: StandIn, arguments: list[str], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text) as caught:
        output(context, *arguments)
    assert "\n" not in str(caught.value)
