# SPDX-License-Identifier: MIT
"""A host of daemons, started by the command line like a user does, for tests."""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

from paravirt.host.daemon import READY_FD

DEADLINE_S = 30.0
DAEMONS = ("hypervisor", "xenstored", "backend")


def read_line(stream: IO[bytes] | None) -> str:
    """The next line of a pipe, within the deadline; reads no byte beyond it."""
    assert stream is not None
    line = b""
    while not line.endswith(b"\n"):
        assert select.select([stream], [], [], DEADLINE_S)[0], f"nothing more was said after {line!r}"
        byte = os.read(stream.fileno(), 1)
        assert byte, f"the other end is closed after {line!r}"
        line += byte
    return line.decode().strip()


def read_all(stream: IO[bytes] | None) -> bytes:
    """Everything up to the end of a pipe, which must come within the deadline."""
    assert stream is not None
    data = b""
    while select.select([stream], [], [], DEADLINE_S)[0]:
        chunk = os.read(stream.fileno(), 65536)
        if not chunk:
            return data
        data += chunk
    raise AssertionError("the other end is still open")


def ended(pidfd: int) -> bool:
    """True once the process has ended, within the deadline."""
    return bool(select.select([pidfd], [], [], DEADLINE_S)[0])


def freeze(pid: int) -> None:
    """Stop a process (SIGSTOP), every thread of it: until then the others may go on for a while."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + DEADLINE_S
    while any(_state(task) not in "TX" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < deadline, f"process {pid} does not stop"
        time.sleep(0.005)


def _state(task: Path) -> str:
    """Of a thread; X: there is none any more."""
    try:
        return (task / "stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that live."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Place:
    """A fresh run directory, and the command line on it. A context manager that takes the directory away."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="pv"))
        self.run = self.directory / "run"

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "paravirt", "--run", str(self.run), *arguments]

    def spawn(self, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
        """A command that runs beside the test."""
        return subprocess.Popen(self.command(*arguments), **options)

    @contextmanager
    def beside(self, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A command that runs beside the test, its output in a pipe, and is killed at the end."""
        with self.spawn(*arguments, stdout=subprocess.PIPE) as process:
            try:
                yield process
            finally:
                process.kill()

    def start(self, daemon: str, *arguments: str) -> "subprocess.Popen[bytes]":
        """A daemon by itself, once it serves."""
        ready, theirs = os.pipe()
        with open(ready, "rb", buffering=0) as pipe:
            environment = {**os.environ, READY_FD: str(theirs)}
            process = self.spawn(daemon, *arguments, env=environment, pass_fds=(theirs,))
            os.close(theirs)
            assert select.select([pipe], [], [], DEADLINE_S)[0], f"{daemon} does not serve"
            assert pipe.read(1) == b"1", f"{daemon} ended with status {process.wait()}"
        return process

    def ask(self, *arguments: str) -> str:
        """The output of a command that must succeed."""
        done = self.attempt(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def attempt(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """A command that may fail."""
        command = self.command(*arguments)
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class RunningHost(Place):
    """`paravirt up` in a place of its own."""

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.up = self.spawn("up", *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            self.greeting = read_line(self.up.stdout)
        except AssertionError as error:
            self.up.kill()
            said = self.up.communicate()[1].decode()
            self.close()
            raise AssertionError(f"no host: {said}") from error

    def pid(self, daemon: str) -> int:
        """Process id of one of the daemons; "--network" is the backend of network devices."""
        for child in children(self.up.pid):
            arguments = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if daemon.encode() in arguments and (daemon == "--network" or b"--network" not in arguments):
                return child
        raise AssertionError(f"no {daemon} runs")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Exit status of `up` after a signal."""
        self.up.send_signal(number)
        return self.up.wait(DEADLINE_S)

    def close(self) -> None:
        if self.up.poll() is None:
            self.stop()
        for stream in (self.up.stdout, self.up.stderr):
            if stream is not None:
                stream.close()
        super().close()
