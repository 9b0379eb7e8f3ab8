# SPDX-License-Identifier: MIT
"""`paravirt xenstore dump` and `restore`: what is dumped comes back exactly, and a bad file changes nothing."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravirt.cli.xenstore.dumpfile import Node, decode, encode
from paravirt.errors import InvalidRequest
from paravirt.xenstore.server import XenstoreServer
from tests.cli.store import StandIn, ask, mistake, output, run

GOOD: dict[str, Any] = {
    "format": "paravirt xenstore dump",
    "version": 1,
    "path": "/a",
    "nodes": [
        {"path": "/a", "value": "top", "permissions": ["n0"]},
        {"path": "/a/z", "value": {"base64": "/w=="}, "permissions": ["r0", "b0"]},
        {"path": "/a/z/deep", "value": "", "permissions": ["n0"]},
        {"path": "/a/b", "value": "ä\n\0", "permissions": ["w0"]},
    ],
}


def change(path: list[str | int], value: object) -> bytes:
    """The good file with one thing in it changed."""
    document = copy.deepcopy(GOOD)
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(document).encode()


class TestFormat:
    def test_decode(self) -> None:
        assert decode(json.dumps(GOOD).encode()) == (
            "/a",
            [
                Node("/a", b"top", ("n0",)),
                Node("/a/z", b"\xff", ("r0", "b0")),
                Node("/a/z/deep", b"", ("n0",)),
                Node("/a/b", "ä\n\0".encode(), ("w0",)),
            ],
        )

    def test_encode(self) -> None:
        root, nodes = decode(json.dumps(GOOD).encode())
        text = "".join(encode(root, nodes))
        assert json.loads(text) == GOOD
        assert text.count("\n") == 1 + len(nodes), "a line for each node"

    @given(st.lists(st.binary(max_size=50), max_size=5), st.binary(max_size=50))
    def test_any_value_comes_back(self, values: list[bytes], top: bytes) -> None:
        nodes = [Node("/", top, ("n0",)), *(Node(f"/{i}", value, ("b1", "r2")) for i, value in enumerate(values))]
        assert decode("".join(encode("/", nodes)).encode()) == ("/", nodes)

    @given(
        st.recursive(
            st.none() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner)
                | st.dictionaries(
                    st.sampled_from(["format", "version", "path", "nodes", "value", "permissions"]), inner
                )
            ),
        )
    )
    def test_any_json_is_refused_with_a_reason(self, document: Any) -> None:
        for text in (json.dumps(document).encode(), change(["nodes"], [document]), change(["nodes", 1], document)):
            with pytest.raises(InvalidRequest):
                decode(text)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"", "the dump is no JSON"),
            (b"\xff", "the dump is no JSON"),
            (b"[" * 100_000, "the dump is no JSON"),
            (b"[]", "this is no dump of a store"),
            (change(["format"], "x"), "this is no dump of a store"),
            (change(["version"], 2), "this dump has version 2; known is 1"),
            (change(["more"], 2), "the dump has an unknown part: more"),
            (change(["path"], 1), "the dump has no path or no nodes"),
            (change(["nodes"], []), "the dump has no path or no nodes"),
            (change(["path"], "/b"), "entry 1 (/a): the first node is not /b"),
            (change(["nodes", 1], 5), "entry 2: a node has exactly path, value and permissions"),
            (change(["nodes", 1, "x"], 5), "entry 2 (/a/z): a node has exactly path, value and permissions"),
            (change(["nodes", 1, "path"], 5), "entry 2: the path is not absolute"),
            (change(["nodes", 1, "path"], "a"), "entry 2 (a): the path is not absolute"),
            (change(["nodes", 1, "path"], "/ä"), "entry 2 (/ä): the path is not absolute"),
            (change(["nodes", 1, "path"], "/a/"), "entry 2 (/a/): the path is not valid"),
            (change(["nodes", 1, "path"], "/a b"), "entry 2 (/a b): the path is not valid"),
            (change(["nodes", 1, "path"], "/a/b"), "entry 3 (/a/z/deep): its parent does not come before it"),
            (change(["nodes", 2, "path"], "/a/z"), "entry 3 (/a/z): it is there twice"),
            (change(["nodes", 3, "path"], "/"), "entry 4 (/): its parent does not come before it"),
            (change(["nodes", 3, "path"], "/x"), "entry 4 (/x): its parent does not come before it"),
            (change(["nodes", 3, "value"], 1), 'entry 4 (/a/b): the value is neither text nor {"base64": ...}'),
            (change(["nodes", 3, "value"], {"base64": "-"}), "entry 4 (/a/b): the value is no base64"),
            (change(["nodes", 3, "value"], "x" * 4092), "entry 4 (/a/b): path and value are longer than the 4095"),
            (change(["nodes", 3, "permissions"], []), "entry 4 (/a/b): it has no permissions"),
            (change(["nodes", 3, "permissions"], "n0"), "entry 4 (/a/b): it has no permissions"),
            (change(["nodes", 3, "permissions"], ["n0", 1]), "entry 4 (/a/b): permission 1 is none"),
            (change(["nodes", 3, "permissions"], ["q0"]), "entry 4 (/a/b): permission 'q0' is none"),
            (change(["nodes", 3, "permissions"], ["n0"] * 2000), "entry 4 (/a/b): it has more permissions than fit"),
        ],
    )
    def test_what_is_wrong_is_named(self, text: bytes, said: str) -> None:
        with pytest.raises(InvalidRequest, match=re.escape(said)) as caught:
            decode(text)
        assert "\n" not in str(caught.value)

    def test_the_longest_value(self) -> None:
        decode(change(["nodes", 3, "value"], "x" * 4091))


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "dump").write_text(json.dumps(GOOD))
    return str(tmp_path / "dump")


def fill(context: StandIn) -> None:
    output(context, "write", "/a", "top", "/a/z/deep", "", "/a/b", "1", "/other", "kept")
    with context.store() as store:
        store.write("/a/z", bytes(range(256)))
    output(context, "chmod", "/a/z", "r0", "b0")


class TestThereAndBack:
    def test_dump(self, context: StandIn) -> None:
        fill(context)
        document = json.loads(output(context, "dump", "/a"))
        assert [node["path"] for node in document["nodes"]] == ["/a", "/a/z", "/a/z/deep", "/a/b"]
        assert json.loads(output(context, "dump", "--atomic", "/a")) == document
        assert document["nodes"][3] == {"path": "/a/b", "value": "1", "permissions": ["n0"]}

    def test_a_relative_path(self, context: StandIn) -> None:
        output(context, "write", "x/y", "1")
        paths = [node["path"] for node in json.loads(output(context, "dump", "x"))["nodes"]]
        assert paths == ["/local/domain/0/x", "/local/domain/0/x/y"]

    @pytest.mark.parametrize("options", [[], ["--atomic"], ["--batch", "1"], ["--batch", "3"], ["--prune"]])
    @pytest.mark.parametrize("path", ["/", "/a"])
    def test_an_empty_store_becomes_the_same(self, context: StandIn, path: str, options: list[str]) -> None:
        fill(context)
        text = output(context, "dump", path)
        with XenstoreServer() as server:
            other = StandIn(server.start())
            output(other, "restore", *options, "-", stdin=text.encode())
            assert output(other, "dump", path) == text
            assert output(other, "ls", "-fp", "/a") == output(context, "ls", "-fp", "/a")

    def test_many_nodes(self, context: StandIn) -> None:
        output(context, "mkdir", *(f"/many/{i}/x" for i in range(700)))
        text = output(context, "dump", "/many")
        output(context, "rm", "/many")
        assert output(context, "restore", "-", stdin=text.encode()) == (
            "nodes in the file: 1401; made: 1401, written: 0, permissions changed: 0, removed: 0\n"
        )
        assert output(context, "dump", "/many") == text


class TestRestore:
    def test_only_what_differs_is_written(self, context: StandIn, file: str) -> None:
        output(context, "restore", file)
        output(context, "write", "/a", "changed", "/a/new/x", "1")
        output(context, "chmod", "/a/b", "n0")
        output(context, "rm", "/a/z/deep")
        assert ask(context, "restore", file) == [
            {"change": "write", "path": "/a"},
            {"change": "make", "path": "/a/z/deep"},
            {"change": "chmod", "path": "/a/b"},
        ]
        assert ask(context, "restore", file) == []
        assert run(context, "exists", "/a/new/x").return_value == 0

    @pytest.mark.parametrize("options", [[], ["--atomic"], ["--batch", "1"]])
    def test_prune(self, context: StandIn, file: str, options: list[str]) -> None:
        output(context, "restore", file)
        text = output(context, "dump", "/a")
        output(context, "write", "/a/new/x", "1", "/a/z/y", "1", "/b", "1", "/a/b", "x")
        assert output(context, "restore", "--prune", *options, file) == (
            "nodes in the file: 4; made: 0, written: 1, permissions changed: 0, removed: 2\n"
        )
        assert output(context, "dump", "/a") == text
        assert run(context, "exists", "/b").return_value == 0

    @pytest.mark.parametrize("options", [[], ["--atomic"]])
    def test_dry_run(self, context: StandIn, file: str, options: list[str]) -> None:
        empty = output(context, "ls", "-fp")
        said = output(context, "restore", "--dry-run", "--prune", *options, file).splitlines()
        assert said == [
            *(f"make {node['path']}" for node in GOOD["nodes"]),
            "nodes in the file: 4; would be made: 4, written: 0, permissions changed: 0, removed: 0",
        ]
        assert output(context, "ls", "-fp") == empty
        output(context, "restore", file)
        output(context, "write", "/a/new", "1", "/a", "x")
        full = output(context, "dump")
        said = output(context, "restore", "--dry-run", "--prune", *options, file).splitlines()
        assert said[:-1] == ["write /a", "rm /a/new"]
        assert output(context, "dump") == full

    def test_a_bad_file_changes_nothing(self, context: StandIn) -> None:
        before = output(context, "dump")
        text = change(["nodes", 3, "permissions"], ["x"])
        assert mistake(context, "restore", "-", stdin=text) == "entry 4 (/a/b): permission 'x' is none"
        assert output(context, "dump") == before

    def test_an_owner_that_is_not_there(self, context: StandIn) -> None:
        before = output(context, "dump")
        text = change(["nodes", 3, "permissions"], ["n77"])
        said = mistake(context, "restore", "--atomic", "-", stdin=text)
        assert said == "/a/b: its owner, domain 77, does not exist (ENOENT)"
        assert output(context, "dump") == before

    @pytest.mark.parametrize("options", [[], ["--atomic"]])
    def test_somebody_else_writes_meanwhile(
        self, context: StandIn, file: str, options: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from paravirt.cli.xenstore import backup

        def disturbed(original: Callable[..., None], n_times: int = 1) -> Callable[..., None]:
            def send(*arguments: Any) -> None:
                nonlocal n_times
                original(*arguments)
                if n_times:
                    n_times -= 1
                    output(context, "write", "/a/b", "theirs")

            return send

        monkeypatch.setattr(backup, "_set_permissions", disturbed(backup._set_permissions))
        output(context, "restore", *options, file)
        assert output(context, "read", "/a/b") == "\\xc3\\xa4\\n\\000\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dump", "/no"], "/no: does not exist (ENOENT)"),
        (["dump", "--atomic", "/no"], "/no: does not exist (ENOENT)"),
        (["restore", "/no/file"], "No such file or directory"),
        (["restore", "--batch", "0", "-"], "Invalid value for '--batch'"),
    ],
)
def test_mistakes(context: StandIn, arguments: list[str], said: str) -> None:
    assert said in mistake(context, *arguments)
