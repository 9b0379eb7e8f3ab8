# SPDX-License-Identifier: MIT
"""Daemons as child processes: start in order and wait until each is ready, watch, restart, stop in reverse order.

Each daemon is in a session of its own, so Ctrl-C reaches the supervisor alone, and has a pipe on which it says that it
serves (`host/daemon.py` is its half).
"""

import logging
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType

from paravirt.errors import ParavirtError
from paravirt.host.daemon import READY_FD, STOP_SIGNALS, SUPERVISOR

READY_S = 30.0
STOP_S = 10.0
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0
LIVED_WELL_S = 10.0
"""A daemon that lived as long starts again without delay."""

_log = logging.getLogger("paravirt.supervise")


@dataclass(frozen=True, slots=True)
class Daemon:
    """What to start: arguments of the program, and whether a crash is followed by a restart."""

    name: str
    arguments: Sequence[str]
    restart: bool = False


@dataclass(slots=True)
class _Child:
    daemon: Daemon
    process: "subprocess.Popen[bytes]"
    pidfd: int
    started: float


@dataclass(slots=True)
class _Waiting:
    daemon: Daemon
    due: float


@dataclass(slots=True)
class Backoff:
    delays: dict[str, float] = field(default_factory=dict)

    def next_delay(self, name: str, lived_s: float) -> float:
        """Seconds to wait before the next start: none after a good life, else twice the last, bounded."""
        if lived_s >= LIVED_WELL_S:
            self.delays.pop(name, None)
            return 0.0
        delay = self.delays.get(name, FIRST_DELAY_S)
        self.delays[name] = min(2 * delay, LONGEST_DELAY_S)
        return delay


class DaemonFailed(ParavirtError):
    """A daemon ended before it was ready; `status` is its exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Supervisor:
    """Starts, watches and stops daemons. One thread uses it; signals end `watch` through `stop_on_signals`.

    Daemons die with the *thread* that started them (so the kernel tells of a parent's death): it has to last.
    """

    def __init__(self, program: Sequence[str]) -> None:
        """`program`: what runs every daemon, with the arguments that all of them get."""
        self._program = list(program)
        self._children: list[_Child] = []
        self._waiting: list[_Waiting] = []
        self._backoff = Backoff()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.stopping = False
        self.lost: list[str] = []
        """Names of daemons that ended by themselves and were not restarted."""

    def start(self, daemon: Daemon) -> None:
        """Start one and wait until it is ready. Raises `DaemonFailed` if it ends first or takes too long."""
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        # No daemon has matrices to multiply: numpy's threads for that would only take time to start.
        environment = {
            "OPENBLAS_NUM_THREADS": "1",
            **os.environ,
            READY_FD: str(ready_write),
            SUPERVISOR: str(os.getpid()),
        }
        with open(ready_read, "rb", buffering=0) as ready:
            try:
                child = subprocess.Popen(
                    [*self._program, *daemon.arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=(ready_write,),
                    start_new_session=True,
                )
            finally:
                os.close(ready_write)
            self._children.append(_Child(daemon, child, os.pidfd_open(child.pid), time.monotonic()))
            poller = select.poll()
            poller.register(ready, select.POLLIN)
            poller.register(self._wake_read, select.POLLIN)
            if not poller.poll(READY_S * 1000):
                child.kill()
                raise DaemonFailed(f"{daemon.name} was not ready within {READY_S:.0f} s", child.wait())
            if not self.stopping and ready.read(1) != b"1":
                raise DaemonFailed(f"{daemon.name} did not start (status {child.wait()})", child.wait())

    def pid(self, name: str) -> int | None:
        """Process id of a running daemon."""
        return next((child.process.pid for child in self._children if child.daemon.name == name), None)

    def kill(self, name: str) -> None:
        """End a daemon with SIGKILL and forget it, as a crash would; for tests of what the others do then."""
        for child in [child for child in self._children if child.daemon.name == name]:
            child.process.kill()
            child.process.wait()
            self._children.remove(child)
            os.close(child.pidfd)

    def watch(self) -> None:
        """Until `request_stop`: restart what crashed and may be restarted, say what is lost."""
        while not self.stopping:
            for child in self._ended(self._next_due()):
                self._bury(child)
            now = time.monotonic()
            for waiting in [entry for entry in self._waiting if entry.due <= now]:
                self._waiting.remove(waiting)
                self._restart(waiting.daemon)

    def request_stop(self) -> None:
        """End `watch` (and a `start` that waits); safe in a signal handler."""
        self.stopping = True
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def stop_on_signals(self) -> None:
        """SIGINT, SIGTERM and SIGHUP request a stop."""

        def handle(number: int, frame: FrameType | None) -> None:
            self.request_stop()

        for number in STOP_SIGNALS:
            signal.signal(number, handle)

    def stop(self) -> None:
        """SIGTERM to each in reverse order of start, SIGKILL if that takes too long."""
        self._waiting.clear()
        for child in reversed(self._children):
            child.process.terminate()
            try:
                child.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                _log.error("%s does not stop: killed", child.daemon.name)
                child.process.kill()
                child.process.wait()
            os.close(child.pidfd)
        self._children.clear()

    def close(self) -> None:
        self.stop()
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _next_due(self) -> float | None:
        if not self._waiting:
            return None
        return max(0.0, min(entry.due for entry in self._waiting) - time.monotonic())

    def _ended(self, timeout_s: float | None) -> list[_Child]:
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        for child in self._children:
            poller.register(child.pidfd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(None if timeout_s is None else timeout_s * 1000)}
        return [child for child in self._children if child.pidfd in ready]

    def _bury(self, child: _Child) -> None:
        status = child.process.wait()
        self._children.remove(child)
        os.close(child.pidfd)
        if self.stopping:
            return
        how = f"signal {-status}" if status < 0 else f"status {status}"
        if not child.daemon.restart:
            _log.error("%s ended (%s): what runs goes on, new calls to it fail", child.daemon.name, how)
            self.lost.append(child.daemon.name)
            return
        delay = self._backoff.next_delay(child.daemon.name, time.monotonic() - child.started)
        _log.warning("%s ended (%s): starting again in %.1f s", child.daemon.name, how, delay)
        self._waiting.append(_Waiting(child.daemon, time.monotonic() + delay))

    def _restart(self, daemon: Daemon) -> None:
        try:
            self.start(daemon)
            _log.info("%s runs again", daemon.name)
        except DaemonFailed as error:
            _log.warning("%s", error)  # its end is seen by `watch`, which waits longer before the next try
