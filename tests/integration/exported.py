# SPDX-License-Identifier: MIT
"""Exports of disks for tests with NBD clients that are not ours."""

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from paravirt.errors import NotFound
from paravirt.frontend.nbdkit import find_nbdkit, find_plugin
from tests import needs
from tests.host.running import DEADLINE_S, RunningHost, children, read_line

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def need(*programs: str) -> None:
    """Skip without them, or without nbdkit and its plugin."""
    for program in programs:
        if shutil.which(program, path=PATH) is None:
            needs.missing(f"{program} is not installed")
    try:
        find_nbdkit()
        find_plugin()
    except NotFound as error:
        needs.missing(str(error))


def client(*command: str, timeout_s: float = 90.0) -> str:
    """Run an NBD client, which must succeed; what it says."""
    environment = {**os.environ, "PATH": PATH}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def attached_image(host: RunningHost, content: bytes) -> Iterator[Path]:
    """The file behind xvda of the guest; it is removed with the host."""
    path = host.directory / "disk.img"
    path.write_bytes(content)
    host.ask("vbd", "attach", "guest", str(path))
    yield path
    host.ask("vbd", "detach", "guest", "xvda")


class Export:
    """A running `paravirt vbd export`."""

    def __init__(self, process: "subprocess.Popen[bytes]", path: Path) -> None:
        self.process, self.path = process, path
        self.uri = read_line(process.stdout).rpartition(" ")[2]

    def nbdkit(self) -> int:
        """Process id of nbdkit, which is a descendant."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            for pid in descendants(self.process.pid):
                if Path(f"/proc/{pid}/comm").read_text().startswith("nbdkit"):
                    return pid
            time.sleep(0.01)
        raise AssertionError("no nbdkit runs")

    def stop(self) -> int:
        """In good order; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)


def descendants(pid: int) -> list[int]:
    try:
        own = children(pid)
    except FileNotFoundError:
        return []
    return [*own, *(each for child in own for each in descendants(child))]


@contextmanager
def exported(host: RunningHost, *options: str, disk: str = "xvda", domain: str = "guest") -> Iterator[Export]:
    path = host.directory / "nbd.sock"
    command = ("vbd", "export", disk, "--domain", domain, "--socket", str(path), *options)
    with host.beside(*command) as process:
        export = Export(process, path)
        yield export
        if process.poll() is None:
            assert export.stop() == 0
            assert not path.exists()


class Killer:
    """Kills the backend of a host `times` times while a `with` block lasts; each time the host starts it anew, a little
    later than the last time.
    """

    def __init__(
        self, host: RunningHost, times: int = 3, pause_s: float = 0.7, chance: random.Random | None = None
    ) -> None:
        """`pause_s`: before each time; with `chance` that is the longest pause, and some are none."""
        self.killed = 0
        self._host, self._times, self._pause_s, self._chance = host, times, pause_s, chance
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _pause(self) -> float:
        return self._pause_s if self._chance is None else max(0.0, self._chance.uniform(-0.3, 1.0)) * self._pause_s

    def _run(self) -> None:
        while self.killed < self._times and not self._stop.wait(self._pause()):
            try:
                os.kill(self._host.pid("backend"), signal.SIGKILL)
            except (AssertionError, ProcessLookupError, FileNotFoundError):
                continue  # there is none at the moment
            self.killed += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
