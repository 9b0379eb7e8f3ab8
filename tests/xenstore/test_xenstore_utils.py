# SPDX-License-Identifier: MIT
"""Debian's xenstore-utils, written by others against the C library, talk to this daemon over its socket."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer

DEADLINE_S = 30.0

if not shutil.which("xenstore-ls") and os.environ.get("CI") != "true":
    pytest.skip("Debian's xenstore-utils are not installed", allow_module_level=True)


class Shell:
    """Runs the programs against one daemon."""

    def __init__(self, path: Path) -> None:
        self.environment = {**os.environ, "XENSTORED_PATH": str(path)}

    def run(self, *command: str, status: int = 0) -> str:
        """Standard output of a command that must end with `status`."""
        done = subprocess.run(
            [f"xenstore-{command[0]}", *command[1:]],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout

    def start(self, *command: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [f"xenstore-{command[0]}", *command[1:]], env=self.environment, stdout=subprocess.PIPE, text=True
        )


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with XenstoreServer(tmp_path / "s").start():
        yield Shell(tmp_path / "s")


@pytest.fixture
def client(shell: Shell) -> Iterator[XenstoreClient]:
    with XenstoreClient.connect(shell.environment["XENSTORED_PATH"]) as client:
        yield client


def test_write_read_list_and_remove(shell: Shell) -> None:
    shell.run("write", "/a/b", "1", "/a/c", "two")
    assert shell.run("read", "/a/b", "/a/c") == "1\ntwo\n"
    assert shell.run("read", "-p", "/a/b") == "/a/b: 1\n"
    assert shell.run("list", "/a") == "b\nc\n"
    assert shell.run("list", "-p", "/a") == "/a/b\n/a/c\n"
    shell.run("exists", "/a/b")
    shell.run("rm", "/a/b")
    shell.run("exists", "/a/b", status=1)
    shell.run("rm", "-t", "/a/c")  # and what becomes empty above
    assert shell.run("ls") == 'tool = ""\n xenstored = ""\n'


def test_errors_are_errors(shell: Shell) -> None:
    shell.run("read", "/no", status=1)
    shell.run("list", "/no", status=1)
    shell.run("rm", "/no/such", status=1)
    shell.run("write", "/bad path", "1", status=1)


def test_trees(shell: Shell) -> None:
    shell.run("write", "/a/b", "line\ntwo", "/a/c/d", "")
    assert shell.run("ls", "/a") == 'b = "line\\ntwo"\nc = ""\n d = ""\n'
    assert shell.run("ls", "-f", "/a") == '/a/b = "line\\ntwo"\n/a/c = ""\n/a/c/d = ""\n'


def test_permissions(shell: Shell, client: XenstoreClient) -> None:
    client.write("/a/b", "1")
    shell.run("chmod", "/a", "n0", "r0")
    assert client.get_perms("/a") == ["n0", "r0"]
    assert client.get_perms("/a/b") == ["n0"]
    shell.run("chmod", "-r", "/a", "b0")
    assert client.get_perms("/a/b") == ["b0"]
    assert shell.run("ls", "-fp", "/a") == '/a/b = "1"   (b0)\n'


def test_watch(shell: Shell, client: XenstoreClient) -> None:
    watch = shell.start("watch", "-n", "3", "/a")
    assert watch.stdout is not None
    assert watch.stdout.readline() == "/a\n"
    client.write("/a/x", "1")
    assert watch.stdout.readline() == "/a/x\n"
    client.rm("/a")
    assert watch.stdout.readline() == "/a\n"
    watch.communicate(timeout=DEADLINE_S)
    assert watch.returncode == 0


def test_twelve_hundred_children(shell: Shell, client: XenstoreClient) -> None:
    names = [f"child-number-{i}" for i in range(1200)]
    for name in names:
        client.write(f"/many/{name}", "v")
    assert shell.run("list", "/many").split() == names
    assert shell.run("ls", "/many") == "".join(f'{name} = "v"\n' for name in names)
    shell.run("rm", "/many")
    assert client.ls("/") == ["tool"]
