# SPDX-License-Identifier: MIT
"""The other processes of the tests: `python -m tests.hypervisor.actor ROLE ARGUMENTS`.

Each says "ready" (and what the test needs to know) on standard output, then goes on until it is killed or its standard
input ends.
"""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.server import BrokerServer

ROOT = Path(__file__).parents[2]


class Actor:
    """Another process, as the test sees it."""

    def __init__(self, role: str, *arguments: object, pass_fds: Sequence[int] = ()) -> None:
        command = [sys.executable, "-m", "tests.hypervisor.actor", role, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, pass_fds=pass_fds, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.words = self.read()

    def read(self) -> list[str]:
        """The words after "ready" of the next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        assert line[:1] == ["ready"], f"the process failed: {line}"
        return line[1:]

    def tell(self) -> None:
        """Let it take its next step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.send_signal(signal.SIGKILL)
        self.close()

    def close(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        status = self.process.wait(timeout=30)
        self.process.stdout.close()
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.close()


def ready(*words: object) -> None:
    print("ready", *words, flush=True)


def step() -> None:
    """Wait until the test says so; end when it has ended."""
    if not sys.stdin.readline():
        sys.exit(0)


def broker(run: str) -> None:
    """A broker of its own."""
    server = BrokerServer(Path(run))
    ready()
    server.serve_forever()


def init() -> None:
    """The first process of a domain: only lives."""
    ready()
    step()


def mapper(fd: str, granter: str, remote_port: str, *grefs: str) -> None:
    """Binds a port, pins references, asks for an unmap notification, and waits to be killed."""
    hypervisor = Hypervisor.from_fd(int(fd))
    channel = hypervisor.bind_interdomain(hypervisor.waiter(), int(granter), int(remote_port))
    numbers = [int(gref) for gref in grefs]
    arena = hypervisor.foreign_arena(int(granter), numbers[0])
    pages = arena.map_pages(numbers)
    pages.set_unmap_notify(port=channel.port, clear_byte=0)
    ready(channel.port)
    step()


def guest(path: str) -> None:
    """A process of a domain: shares one page, answers every event by copying a byte."""
    with Hypervisor.connect(path) as hypervisor:
        arena = hypervisor.create_arena(0, 4)
        run = arena.allocate(1)
        waiter = hypervisor.waiter()
        channel = hypervisor.alloc_unbound(waiter, 0)
        ready(hypervisor.domid, arena.grant(run.gref), channel.port)
        while True:
            waiter.wait(channel, timeout_s=30)
            if run.view[0] == 255:
                return
            if run.view[1] != run.view[0]:
                run.view[1] = run.view[0]
                channel.notify()


def crowd(path: str, n: str) -> None:
    """Many objects of one process, so that its death has much to clean."""
    hypervisor = Hypervisor.connect(path)
    waiter = hypervisor.waiter()
    kept = [(hypervisor.alloc_unbound(waiter, 0), hypervisor.create_arena(0, 2)) for _ in range(int(n))]
    ready(len(kept))
    step()


ROLES = {"broker": broker, "init": init, "mapper": mapper, "guest": guest, "crowd": crowd}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
