# SPDX-License-Identifier: MIT
"""The xenstore daemons that are compared, each a fresh process, and the load generator that is put on them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paravirt.errors import ParavirtError
from paravirt.host.supervise import Daemon, Supervisor
from paravirt.testing.reference_xenstored import ReferenceDaemon, default_cache, find_program, find_shim

from .harness import Bench, NotHere, pin

OURS, C, OX = "ours", "C xenstored 4.17", "oxenstored 4.17"
SIDES = (OURS, C, OX)
SOURCES = ("xenstore_load.c", "xenstore_tree.c", "xenstore_client.c", "xenstore_flood.c", "xenstore_domains.c")
STRICT = ("-Wall", "-Wextra", "-Werror")
LOAD_TIMEOUT_S = 300.0
WRONG_ANSWERS = 1
"""Exit status of the load generator that was told to look, and saw some."""


@dataclass(frozen=True, slots=True)
class Running:
    """A daemon that runs."""

    name: str
    socket: Path
    pid: int

    def rss_bytes(self) -> int:
        """Memory it has resident."""
        return rss_bytes(self.pid)


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Load:
    """What the load generator says: one JSON object, see `xenstore_load.c`."""

    mode: str
    seconds: float
    operations: int
    per_second: float
    events: int
    """Watch events read."""
    eagain: int
    """Transactions that had to be repeated."""
    errors: int
    first_error: str
    mismatches: int
    """Answers with wrong contents, when they were looked at."""
    lost: int
    """Connections that the daemon closed."""
    unfinished: int
    """Devices that did not connect in time."""
    p50_us: float
    p99_us: float
    max_us: float
    cpu_us: float | None
    """CPU time of the daemon for one operation."""
    load_cpu_us: float
    """CPU time of the load generator for one operation; near the time an operation takes, it is the limit."""

    @property
    def clean(self) -> bool:
        """Every answer was the right one."""
        return not (self.errors or self.mismatches or self.lost or self.unfinished)


class LoadGenerator:
    """Runs `xenstore_load` on one CPU, once for each measurement."""

    def __init__(self, program: Path, cpu: int | None = None) -> None:
        self.program = program
        self._cpu = [] if cpu is None else ["--cpu", str(cpu)]

    @classmethod
    def compile(cls, bench: Bench) -> "LoadGenerator":
        """Raises `NotHere` without a C compiler."""
        return cls(bench.compile("xenstore_load", SOURCES, (), *STRICT), bench.cpus[1])

    def command(self, mode: str, **options: Any) -> list[str]:
        """`options` are those of the program, with _ for -; True is one without a value."""
        given = [
            word
            for name, value in options.items()
            for word in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
            if value is not False
        ]
        return [str(self.program), mode, *self._cpu, *given]

    def run(self, mode: str, daemon: Running, **options: Any) -> Load:
        """Raises `RuntimeError` with what the program says if the daemon broke."""
        command = self.command(mode, socket=daemon.socket, pid=daemon.pid, **options)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LOAD_TIMEOUT_S)
        if done.returncode not in (0, WRONG_ANSWERS):
            raise RuntimeError(f"{daemon.name}: {mode}: {done.stderr.strip()}")
        return Load(**json.loads(done.stdout))


@contextmanager
def started(name: str, *, cpu: int | None = None, arguments: Sequence[str] = ()) -> Iterator[Running]:
    """A fresh daemon, pinned to `cpu`. `arguments` are for ours: more of `paravirt xenstored`.

    Raises `NotHere` when it is not on this machine.
    """
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="paravirt-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        if name == OURS:
            socket = directory / "socket"
            program = [sys.executable, "-P", "-m", "paravirt", "--run", str(directory / "run"), "--log-level", "error"]
            supervisor = Supervisor(program)
            stack.callback(supervisor.close)
            supervisor.start(Daemon("xenstored", ["xenstored", "--socket", str(socket), *arguments]))
            pid = supervisor.pid("xenstored")
            assert pid is not None
        else:
            try:
                daemon = stack.enter_context(ReferenceDaemon("c" if name == C else "ox", directory))
            except ParavirtError as error:
                raise NotHere(str(error)) from error
            socket, pid = daemon.socket_path, daemon.pid
        if cpu is not None:
            pin(pid, cpu)
        yield Running(name, socket, pid)


def available(names: Sequence[str] = SIDES) -> list[str]:
    """Those of the daemons that this machine has."""
    found = []
    for name in names:
        try:
            if name != OURS:
                find_program("c" if name == C else "ox", default_cache())
                find_shim(default_cache())
        except ParavirtError:
            continue
        found.append(name)
    return found
