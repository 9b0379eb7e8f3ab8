# SPDX-License-Identifier: MIT
"""Debian's xenstore-utils, written by others against the C library, talk to this daemon over its socket.

Every program with every option it has; what they say is compared with what they say of Debian's own daemon.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from paravirt.errors import NotFound
from paravirt.testing.reference_xenstored import default_cache, find_program
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from tests.needs import missing

from .reference import start_reference

DEADLINE_S = 30.0

if not shutil.which("xenstore-ls"):
    missing("Debian's xenstore-utils are not installed", module=True)

Said = tuple[int, str, str]
"""(exit code, standard output, standard error)"""


class Shell:
    """Runs the programs against one daemon."""

    def __init__(self, path: Path) -> None:
        self.environment = {**os.environ, "XENSTORED_PATH": str(path)}

    def say(self, *command: str, data: str = "") -> Said:
        """What a command comes to."""
        done = subprocess.run(
            [f"xenstore-{command[0]}", *command[1:]],
            env=self.environment,
            capture_output=True,
            input=data,
            text=True,
            errors="surrogateescape",
            timeout=DEADLINE_S,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def run(self, *command: str, status: int = 0) -> str:
        """Standard output of a command that must end with `status`."""
        code, output, errors = self.say(*command)
        assert code == status, errors
        return output

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
    shell.run("chmod", "-u", "/a/b", "w0")
    assert client.get_perms("/a/b") == client.get_perms("/a") == ["w0"]
    assert client.get_perms("/tool") == ["n0"]


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


def test_watch_many_paths_until_killed(shell: Shell, client: XenstoreClient) -> None:
    watch = shell.start("watch", "/a", "/b", "@introduceDomain", "mine")
    assert watch.stdout is not None
    with watch:
        first = {watch.stdout.readline() for _ in range(4)}
        assert first == {"/a\n", "/b\n", "@introduceDomain\n", "mine\n"}
        for path, told in (("/b/c", "/b/c\n"), ("/local/domain/0/mine", "mine\n"), ("/a", "/a\n")):
            client.write(path, "1")
            assert watch.stdout.readline() == told
        watch.terminate()


def test_twelve_hundred_children(shell: Shell, client: XenstoreClient) -> None:
    names = [f"child-number-{i}" for i in range(1200)]
    for name in names:
        client.write(f"/many/{name}", "v")
    assert shell.run("list", "/many").split() == names
    assert shell.run("list", "-p", "/many").split() == [f"/many/{name}" for name in names]
    assert shell.run("ls", "/many") == "".join(f'{name} = "v"\n' for name in names)
    assert shell.run("ls", "-f", "/many") == "".join(f'/many/{name} = "v"\n' for name in names)
    shell.run("chmod", "-r", "/many", "r0")
    assert {client.get_perms(f"/many/{name}")[0] for name in names} == {"r0"}
    shell.run("rm", "/many")
    assert client.ls("/") == ["tool"]


# -- the same for both daemons

SESSIONS = {
    "write and read": r"""
        write /a/b 1
        write /a/c two /a/d "three words" relative yes
        write -s /a/e socket
        write -R /a/raw 'a\x41\n'
        write /a/escaped 'a\x41\n\t\\'
        write /a/high '\xff\x00\x01'
        write /a/empty ''
        read /a/b /a/c
        read -p /a/b /a/c relative
        read -s /a/e
        read /a/raw /a/escaped /a/high /a/empty
        read -R /a/raw /a/escaped /a/high
        read -p -R -s /local/domain/0/relative
        read /a/b /a/missing /a/c
        read /a
        read
        write /a/b
        write /a/b 1 /a/c
        write 'bad path' 1
        write /a// 1
        write / root
        read /
        read -x /a/b
        """,
    "list and exists": """
        write /a/b/c 1 /a/d 2
        list /a
        list -p /a
        list -s /a /a/b
        list -p -s /a /a/b /
        list /a/b/c
        list /a /missing
        list relative
        list
        exists /a
        exists /a/b /a/d
        exists /a /missing
        exists -p /a
        exists -s /a
        exists
        """,
    "ls": r"""
        write /a/b/c 1 /a/d 'with "quotes" and \\ and \x01' /a/long-name-of-a-node-in-a-tree/below/below/below 2
        write /a/long 'A value that is longer than a line is: 0123456789012345678901234567890123456789012345678901234'
        ls
        ls /
        ls /a
        ls -f
        ls -f /a
        ls -p
        ls -p /a
        ls -s /a
        ls -f -p -s /a
        ls -fp /a/b
        ls /a/b/c
        ls /missing
        ls relative
        ls /a/
        ls -h
        """,
    "rm": """
        write /a/b/c 1 /a/d 2 /e/f/g 3 /h 4
        rm /a/b
        rm /a/b
        rm -s /a/b/c
        rm -t /e/f/g
        rm /a/d /h
        ls -f
        rm -t /a
        rm /
        rm
        ls -f
        """,
    "chmod": """
        write /a/b/c 1 /a/d 2
        chmod /a r0
        chmod -s /a/b b0 r0 w0
        ls -fp
        chmod -r /a w0
        ls -fp
        chmod -u /a/b/c n0 r0
        ls -fp
        chmod -u -r /a/b b0
        ls -fp
        chmod /a r0 r7
        chmod /a n7
        chmod /missing n0
        chmod /a
        chmod /a x0
        chmod
        ls -fp
        """,
}


@pytest.fixture
def both(short_path: Path) -> Iterator[tuple[Shell, Shell]]:
    """Ours and Debian's daemon."""
    with ExitStack() as stack:
        theirs = stack.enter_context(start_reference("c", short_path / "reference"))
        stack.enter_context(XenstoreServer(short_path / "s").start())
        yield Shell(short_path / "s"), Shell(theirs.socket_path)


@pytest.mark.parametrize("session", SESSIONS.values(), ids=SESSIONS)
def test_they_say_the_same_of_both_daemons(both: tuple[Shell, Shell], session: str) -> None:
    ours, theirs = both
    for line in session.strip().splitlines():
        command = shlex.split(line)
        assert ours.say(*command) == theirs.say(*command), line


# -- xenstore-control, which comes with the daemons


@pytest.fixture
def control(shell: Shell) -> Shell:
    """A shell that has xenstore-control too."""
    try:
        programs = find_program("c", default_cache()).parent
    except NotFound as error:
        missing(str(error))
    shell.environment["PATH"] = f"{shell.environment['PATH']}{os.pathsep}{programs}"
    return shell


def control_says(shell: Shell, *command: str, status: int = 0) -> str:
    done = subprocess.run(
        ["/usr/bin/env", "xenstore-control", *command],
        env=shell.environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout if not status else done.stderr


def test_control(control: Shell) -> None:
    commands = control_says(control, "help")
    for name in ("check", "log", "live-update", "logfile", "memreport", "print", "quota", "quota-soft", "help"):
        assert f"\n{name} " in f"\n{commands}"
    for command in (("check",), ("log", "on"), ("log", "off"), ("log", "+wrl"), ("log", "-wrl"), ("print", "text")):
        assert control_says(control, *command) == "OK\n"
    assert "wrl     : off" in control_says(control, "log")
    assert "not supported" in control_says(control, "nonsense", status=3)
    assert "not supported" in control_says(control, "log", "nonsense", status=3)


def test_control_of_quotas(control: Shell) -> None:
    assert "watches          :      128 " in control_says(control, "quota")
    assert control_says(control, "quota", "set", "watches", "100") == "OK\n"
    assert "watches          :      100 " in control_says(control, "quota")
    assert "not supported" in control_says(control, "quota", "set", "nonsense", "1", status=3)
    assert control_says(control, "quota-soft", "set", "memory", "1000") == "OK\n"
    assert "memory           :     1000 " in control_says(control, "quota-soft")
    domain = control_says(control, "quota", "0")
    assert domain.startswith("Domain 0:\nnodes            :        3 ")
    assert control_says(control, "quota", "max").startswith("Max. seen")
