# SPDX-License-Identifier: MIT
"""The daemon's half of supervision: what a process of Dom0 does to itself before it serves."""

import os
import resource
import signal
import threading
from contextlib import suppress
from typing import Protocol

from paravirt.ring import process

READY_FD = "PARAVIRT_READY_FD"
"""Environment: where a daemon writes one byte once it serves."""

SUPERVISOR = "PARAVIRT_SUPERVISOR"
"""Environment: pid of the process that started this one and with which it dies."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Service(Protocol):
    """Anything that serves until another thread says stop."""

    def serve_forever(self) -> None: ...

    def stop(self) -> None: ...


def become_daemon() -> "StopRequest":
    """Close this process to others of its uid, die with its supervisor, raise the soft limit of descriptors.

    From here on SIGTERM, SIGINT and SIGHUP do nothing but make the stop request that `serve` waits for.
    """
    process.set_dumpable(False)
    supervisor = os.environ.pop(SUPERVISOR, None)
    if supervisor is not None:
        pidfd = os.pidfd_open(os.getppid())
        process.die_with_parent(pidfd)
        os.close(pidfd)
        if os.getppid() != int(supervisor):
            os._exit(128 + signal.SIGKILL)
    ready = os.environ.get(READY_FD)
    if ready is not None:
        os.set_inheritable(int(ready), False)
    raise_descriptor_limit()
    return StopRequest()


class StopRequest:
    """Signals as bytes in a pipe: whichever thread of whatever library the kernel picks, none is lost."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: None)

    def wait(self) -> None:
        os.read(self._read, 1)

    def stop(self) -> None:
        """End the wait, as a signal does; from any thread."""
        with suppress(BlockingIOError):  # as many requests as fit the pipe are there already
            os.write(self._write, b"\0")


def serve(service: Service, request: StopRequest) -> None:
    """Tell the supervisor that `service` is ready, and serve in this thread until a stop is requested."""

    def stop_on_request() -> None:
        request.wait()
        service.stop()

    threading.Thread(target=stop_on_request, name="signals", daemon=True).start()
    _tell_ready()
    service.serve_forever()


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open descriptors to the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _tell_ready() -> None:
    ready = os.environ.pop(READY_FD, None)
    if ready is not None:
        with suppress(BrokenPipeError):
            os.write(int(ready), b"1")
        os.close(int(ready))
