# SPDX-License-Identifier: MIT
"""A host of separate processes that lives as long as a `with` block: for demonstrations, benchmarks and tests."""

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from paravirt.host import domains
from paravirt.host.launch import DomainProcess, launch
from paravirt.host.rundir import RunDir
from paravirt.host.supervise import Daemon, Supervisor
from paravirt.hypervisor.client import DomainInfo, Hypervisor
from paravirt.xenstore.client import XenstoreClient


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: for steps that leave something behind when they are cut in half."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:  # it may also have been the cause of the error we are leaving with
            signal.raise_signal(signal.SIGINT)


DAEMONS = ("hypervisor", "xenstored", "backend")


class TemporaryHost:
    """Hypervisor, xenstored and backends as processes, in a run directory that goes away with them."""

    def __init__(
        self,
        *,
        log_level: str = "warning",
        backend_spin_us: float | None = None,
        backend_options: Sequence[str] = (),
        memory_mib: int | None = None,
        drivers: Sequence[str] = (),
    ) -> None:
        """`backend_spin_us`: how long the backend of disks watches an empty ring before it sleeps; `backend_options`:
        more of `paravirt backend`.

        `memory_mib`: shared memory that all domains together may have; None: the hypervisor's default. `drivers`:
        backends of other device classes, each "module:Class", which is the name of its daemon, too.
        """
        self._arguments = {name: [name] for name in DAEMONS}
        self._drivers = {driver: ["backend", "--device", driver] for driver in drivers}
        self._arguments.update(self._drivers)
        if backend_spin_us is not None:
            self._arguments["backend"] += ["--spin-us", str(backend_spin_us)]
        self._arguments["backend"] += backend_options
        if memory_mib is not None:
            self._arguments["hypervisor"] += ["--memory", str(memory_mib)]
        with ExitStack() as stack:
            with uninterrupted():
                self._start_all(stack, log_level)
            self._stack = stack.pop_all()

    def _start_all(self, stack: ExitStack, log_level: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="paravirt-"))
        stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self.rundir = RunDir.locate(run=str(self.directory / "run"))
        program = [sys.executable, "-m", "paravirt", "--run", str(self.rundir.path)]
        self.supervisor = Supervisor([*program, "--log-level", log_level])
        stack.callback(self.supervisor.close)
        self.start("hypervisor")
        self.start("xenstored")
        self.hypervisor = stack.enter_context(Hypervisor.connect(self.rundir.hypervisor_socket))
        self.store = stack.enter_context(XenstoreClient.connect(self.rundir.xenstored_socket))
        for name in ("backend", *self._drivers):
            self.start(name)

    def start(self, name: str) -> None:
        """Start one of the daemons (again) and wait until it serves."""
        self.supervisor.start(Daemon(name, self._arguments[name]))

    def pid(self, name: str) -> int:
        """Process id of a daemon that runs."""
        pid = self.supervisor.pid(name)
        assert pid is not None
        return pid

    def create_domain(self, name: str, *, isolated: bool = True) -> DomainInfo:
        """A new domain, with a home in xenstore."""
        return domains.create(self.hypervisor, self.store, name, isolated=isolated)

    def run(
        self,
        domain: DomainInfo,
        command: list[str],
        *,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
    ) -> DomainProcess:
        """Start `command` as the first process of `domain`, isolated as the domain is."""
        fd = self.hypervisor.domain_socket(domain.domid)
        try:
            process = launch(
                command,
                domid=domain.domid,
                hypervisor_fd=fd,
                isolated=domain.isolated,
                hide=[self.directory, *self.rundir.hidden],
                domain_socket=self.rundir.domain_socket(domain.domid),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )
        finally:
            os.close(fd)
        self.hypervisor.set_init(domain.domid, process.pidfd)
        return process

    def close(self) -> None:
        """Stop everything and remove the directory. Harmless when repeated."""
        with uninterrupted():
            self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
