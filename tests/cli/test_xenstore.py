# SPDX-License-Identifier: MIT
"""`paravirt xenstore`: looking at nodes and changing them, against a daemon without the rest of a host."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from paravirt.cli.xenstore import xenstore
from paravirt.errors import InvalidRequest, XenstoreError
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.wire import Op
from tests.cli.fake_store import FakeStore
from tests.cli.store import DEADLINE_S, StandIn, ask, mistake, output, run

ALL_BYTES = bytes(range(256))


class TestLooking:
    def test_read(self, context: StandIn) -> None:
        output(context, "write", "/a/b", "1", "/a/c", "two words")
        assert output(context, "read", "/a/b", "/a/c", "/a/b") == "1\ntwo words\n1\n"
        assert ask(context, "read", "/a/b") == {"/a/b": "1"}

    def test_read_odd_bytes(self, context: StandIn) -> None:
        with context.store() as store:
            store.write("/a/raw", b"\xff\n")
        assert output(context, "read", "/a/raw") == "\\xff\\n\n"
        assert run(context, "read", "/a/raw", "--raw").stdout_bytes == b"\xff\n"
        assert ask(context, "read", "/a/raw") == {"/a/raw": {"base64": "/wo="}}

    def test_trees(self, context: StandIn) -> None:
        output(context, "write", "/a/b/c", 'say "x"\n', "/a/d", "\\")
        assert output(context, "ls", "/a") == 'b = ""\n c = "say "x"\\n"\nd = "\\\\"\n'
        assert output(context, "ls") == (
            'tool = ""\n xenstored = ""\na = ""\n b = ""\n  c = "say "x"\\n"\n d = "\\\\"\n'
        )
        assert output(context, "ls", "--flat", "--perms", "/a/b") == '/a/b/c = "say "x"\\n"   (n0)\n'
        assert ask(context, "ls", "/a/b") == [{"path": "/a/b/c", "value": 'say "x"\n', "permissions": ["n0"]}]

    def test_a_tree_of_nothing(self, context: StandIn) -> None:
        output(context, "mkdir", "/a")
        assert output(context, "ls", "/a") == ""
        assert ask(context, "ls", "/a") == []

    def test_a_relative_tree(self, context: StandIn) -> None:
        output(context, "write", "a/b", "1")
        assert output(context, "ls", "-f", "a") == 'a/b = "1"\n'

    def test_a_very_deep_tree(self, context: StandIn) -> None:
        with context.store() as store:
            store.write("/a" * 1500, "deep")
        assert output(context, "ls", "--flat", "/").splitlines()[-1] == "/a" * 1500 + ' = "deep"'

    def test_more_children_than_one_reply_holds(self, context: StandIn) -> None:
        names = [f"name-{i}" for i in range(1000)]
        output(context, "mkdir", *(f"/a/{name}" for name in names))
        assert output(context, "ls", "/a") == "".join(f'{name} = ""\n' for name in names)

    def test_many_nodes_are_asked_for_at_once(self) -> None:
        names = b"".join(b"%d\0" % i for i in range(200))

        def answer(op: int, payload: bytes) -> bytes:
            if op == Op.DIRECTORY:
                return names if payload == b"/a\0" else b""
            return b"n0\0" if op == Op.GET_PERMS else b"value"

        with FakeStore(answer) as store:
            assert len(output(store, "ls", "-p", "/a").splitlines()) == 200
        assert store.most_at_once > 50

    def test_names(self, context: StandIn) -> None:
        output(context, "write", "/a/z", "1", "/a/b", "1")
        assert output(context, "list", "/a") == "z\nb\n"
        assert ask(context, "list", "/a") == ["z", "b"]

    def test_exists(self, context: StandIn) -> None:
        output(context, "write", "/a", "1", "/b", "1")
        assert run(context, "exists", "/a", "/b").return_value == 0
        output(context, "rm", "/a")
        assert run(context, "exists", "/a", "/b").return_value == 1


class TestChanging:
    def test_write_with_escapes(self, context: StandIn) -> None:
        with context.store() as store:
            store.write("/bytes", ALL_BYTES)
            shown = output(context, "read", "/bytes").rstrip("\n")
            output(context, "write", "-e", "/copy", shown)
            output(context, "write", "/literal", shown)
            assert store.read("/copy") == ALL_BYTES
            assert store.read("/literal") == shown.encode()

    def test_write_is_all_or_nothing(self, context: StandIn) -> None:
        assert mistake(context, "write", "/a", "1", "bad path", "2") == "bad path: is not a valid request (EINVAL)"
        assert run(context, "exists", "/a").return_value == 1

    def test_mkdir(self, context: StandIn) -> None:
        output(context, "write", "/a", "kept")
        output(context, "mkdir", "/a", "/b/c")
        assert output(context, "ls") == 'tool = ""\n xenstored = ""\na = "kept"\nb = ""\n c = ""\n'

    def test_rm(self, context: StandIn) -> None:
        output(context, "mkdir", "/a/b/c", "/a/d")
        output(context, "rm", "/a/b")
        assert output(context, "ls", "-f", "/a") == '/a/d = ""\n'

    def test_rm_and_empty_parents(self, context: StandIn) -> None:
        output(context, "write", "/a", "full", "/a/b/c/d", "1", "/a/x/y", "1", "/top/one", "1")
        output(context, "rm", "--tidy", "/a/b/c/d", "/top/one")
        assert output(context, "ls", "-f") == (
            '/tool = ""\n/tool/xenstored = ""\n/a = "full"\n/a/x = ""\n/a/x/y = "1"\n'
        )

    def test_rm_of_siblings_and_their_parents(self, context: StandIn) -> None:
        output(context, "mkdir", "/a/b/c", "/a/b/d")
        output(context, "rm", "-t", "/a/b/c", "/a/b/d")
        assert output(context, "list") == "tool\n"

    def test_rm_of_relative_paths(self, context: StandIn) -> None:
        output(context, "mkdir", "a/b", "c")
        output(context, "rm", "-t", "a/b")
        assert output(context, "list", "/local/domain/0") == "c\n"

    def test_chmod(self, context: StandIn) -> None:
        output(context, "mkdir", "/a/b/c", "/a/d")
        output(context, "chmod", "/a/b", "r0", "b0")
        assert output(context, "ls", "-fp", "/a") == ('/a/b = ""   (r0,b0)\n/a/b/c = ""   (n0)\n/a/d = ""   (n0)\n')

    def test_chmod_of_all_below(self, context: StandIn) -> None:
        output(context, "mkdir", "/a/b/c", "/a/d", "/e")
        output(context, "chmod", "-r", "/a", "w0")
        assert output(context, "ls", "-fp").splitlines()[2:] == [
            *(f'/{path} = ""   (w0)' for path in ("a", "a/b", "a/b/c", "a/d")),
            '/e = ""   (n0)',
        ]

    def test_chmod_of_all_above(self, context: StandIn) -> None:
        with context.store() as store:
            root = store.get_perms("/")
            output(context, "mkdir", "/a/b/c", "/a/d")
            output(context, "chmod", "-u", "/a/b", "b0")
            shown = [store.get_perms(path) for path in ("/", "/a", "/a/b", "/a/b/c", "/a/d")]
        assert shown == [root, ["b0"], ["b0"], ["n0"], ["n0"]]

    def test_chmod_of_a_special_node(self, context: StandIn) -> None:
        output(context, "chmod", "@releaseDomain", "b0")
        with context.store() as store:
            assert store.get_perms("@releaseDomain") == ["b0"]

    def test_tidy(self, context: StandIn) -> None:
        output(context, "write", "/a/full", "1", "/a/x/y/z", "", "/a/v/w", "", "/a/v", "2", "/b", "")
        would = output(context, "tidy", "--dry-run", "/a")
        assert ask(context, "tidy", "--dry-run", "/a") == would.split()
        assert run(context, "exists", "/a/x/y/z").return_value == 0
        assert output(context, "tidy", "/a") == would == "/a/v/w\n/a/x/y/z\n/a/x/y\n/a/x\n"
        assert output(context, "ls", "-f", "/a") == '/a/full = "1"\n/a/v = "2"\n'
        assert output(context, "tidy", "/b") == ""
        assert run(context, "exists", "/b").return_value == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["read", "/no"], "/no: does not exist (ENOENT)"),
        (["ls", "/no"], "/no: does not exist (ENOENT)"),
        (["list", "bad path"], "bad path: is not a valid request (EINVAL)"),
        (["rm", "/"], "/: is not a valid request (EINVAL)"),
        (["rm", "/no/thing"], "/no/thing: does not exist (ENOENT)"),
        (["rm", "-t", "/no/thing"], "/no/thing: does not exist (ENOENT)"),
        (["mkdir", "/a", "/a//b"], "/a//b: is not a valid request (EINVAL)"),
        (["write", "/a"], "write wants pairs of a path and a value"),
        (["write", "/a", "x" * 5000], "/a: is too long (E2BIG)"),
        (["write", "-e", "/a", "\\q"], "\\q is no escape: there are \\t \\n \\r \\\\ \\xHH and \\NNN (octal)"),
        (["write", "-e", "/a", "x\\"], "\\ is no escape: there are \\t \\n \\r \\\\ \\xHH and \\NNN (octal)"),
        (["chmod", "/no", "n0"], "/no: does not exist (ENOENT)"),
        (["chmod", "/", "x0"], "permission 'x0' is not one of n, r, w, b and a domain id up to 65535, such as r5"),
        (["chmod", "/", "n0", "r65536"], "permission 'r65536' is not one of"),
        (["chmod", "-r", "/no", "n0"], "/no: does not exist (ENOENT)"),
        (["tidy", "/no"], "/no: does not exist (ENOENT)"),
        (["read", "/ä"], "'/ä' has characters that no path has"),
        (["read", "--raw", "--json", "/"], "--raw and --json exclude each other"),
    ],
)
def test_mistakes_are_one_clear_line(context: StandIn, arguments: list[str], text: str) -> None:
    before = output(context, "ls", "-fp")
    assert text in mistake(context, *arguments)
    assert output(context, "ls", "-fp") == before


def test_kinds_of_mistakes(context: StandIn) -> None:
    assert isinstance(run(context, "read", "/no").exception, XenstoreError)
    assert isinstance(run(context, "write", "/no").exception, InvalidRequest)


class TestHelp:
    def test_every_command_ends_with_an_example_that_is_right(self) -> None:
        for name, command in xenstore.commands.items():
            _, _, line = (command.epilog or "").partition("Example:\n  paravirt xenstore ")
            first, *arguments = shlex.split(line.split(" > ")[0].split(" && ")[0], comments=False)
            assert first == name
            if "domain.json" in arguments or "changes.txt" in arguments:
                arguments[-1] = "-"
            command.make_context(name, arguments)

    def test_commands_that_print_records_have_json(self) -> None:
        with_json = {
            name
            for name, command in xenstore.commands.items()
            if any(isinstance(parameter, click.Option) and "--json" in parameter.opts for parameter in command.params)
        }
        without = {"write", "mkdir", "rm", "chmod", "exists", "dump", "control", "live-update"}
        assert with_json == set(xenstore.commands) - without


class TestWhichStore:
    """`paravirt` as a process; two stores and no host."""

    def ask(self, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "paravirt", *arguments],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            env={**os.environ, **environment},
            check=False,
        )
        return done.stdout if done.returncode == 0 else f"{done.returncode} {done.stderr}"

    def test_the_order(self, tmp_path: Path) -> None:
        one, two = (str(tmp_path / name) for name in ("one", "two"))
        with XenstoreServer(one).start(), XenstoreServer(two).start():
            for path in (one, two):
                with XenstoreClient.connect(path) as store:
                    store.write("/name", path)
            name = ("xenstore", "read", "/name")
            assert self.ask("xenstore", "--socket", one, "read", "/name") == f"{one}\n"
            assert self.ask(*name, XENSTORED_PATH=two) == f"{two}\n"
            assert self.ask("xenstore", "--socket", one, "read", "/name", XENSTORED_PATH=two) == f"{one}\n"
            run = str(tmp_path / "run")
            assert self.ask(*name, XENSTORED_PATH=two, PARAVIRT_RUN=run) == f"{two}\n"
            for chosen in (("--run", run), ("--host", "default")):
                said = self.ask(*chosen, *name, XENSTORED_PATH=two, PARAVIRT_RUN=run)
                assert said.startswith("2 paravirt: host default is not running")
            assert self.ask("--run", run, "xenstore", "--socket", one, "read", "/name") == f"{one}\n"
            assert self.ask(*name, XENSTORED_PATH="", PARAVIRT_RUN=run).startswith("2 paravirt: host default is not")

    def test_nobody_there(self, tmp_path: Path) -> None:
        said = self.ask("xenstore", "--socket", str(tmp_path / "no"), "ls")
        assert said == f"2 paravirt: no xenstored serves {tmp_path}/no: No such file or directory\n"


@pytest.mark.skipif(
    not shutil.which("xenstore-ls") and os.environ.get("CI") != "true",
    reason="Debian's xenstore-utils are not installed",
)
def test_values_are_shown_as_debians_programs_do(tmp_path: Path) -> None:
    """Each byte by itself, as xenstore-ls cuts long values."""
    with XenstoreServer(tmp_path / "s").start(), XenstoreClient.connect(tmp_path / "s") as store:
        for byte in ALL_BYTES:
            store.write(f"/bytes/{byte}", bytes([byte]))
        theirs = subprocess.run(
            ["xenstore-ls", "-f", "/bytes"],
            env={**os.environ, "XENSTORED_PATH": str(tmp_path / "s")},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=True,
        )
        ours = TestWhichStore().ask("xenstore", "--socket", str(tmp_path / "s"), "ls", "-f", "/bytes")
    assert ours.splitlines() == theirs.stdout.splitlines()
