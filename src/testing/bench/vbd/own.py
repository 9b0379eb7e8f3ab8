# SPDX-License-Identifier: MIT
"""This project's block device as a side: a domain's process that loads its disk, and the backend beside it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any, Final

from paravirt.errors import ParavirtError
from paravirt.host import domains, vbd
from paravirt.host.launch import DomainProcess, launch
from paravirt.host.rundir import RunDir
from paravirt.hypervisor.client import Hypervisor
from paravirt.ring.blkload import LoadJob
from paravirt.ring.waiting import Wait
from paravirt.testing.bench.machine import pin
from paravirt.testing.bench.vbd import guest
from paravirt.testing.bench.vbd.case import BlockCase, BlockSample, sample_of
from paravirt.testing.bench.vbd.target import Target
from paravirt.testing.temporary import TemporaryHost

NAME: Final = "paravirt"
DISK: Final = "xvda"

BACKEND_SPIN_US: Final[dict[Wait, float | None]] = {"adaptive": None, "spin": 1e6, "sleep": 0.0}

_FILL_BYTES: Final = 128 << 10
_PATIENCE_S: Final = 30.0


def process_cpu_s(pid: int) -> float:
    """CPU time of a process so far, to the nanosecond; raises `OSError` when it is gone."""
    return time.clock_gettime(~pid << 3 | 2)  # the kernel's clock id of a process, as clock_getcpuclockid(3) makes it


class OwnSide:
    """A disk of a domain."""

    name = NAME

    def __init__(
        self, process: "DomainProcess | subprocess.Popen[bytes]", backend: int | None, *, stops: bool = False
    ) -> None:
        """`process` runs `guest`; `backend`: process id, where it is in sight.

        `stops`: it is stopped but for the samples; always looking for requests, it would take the CPU from the peers.
        """
        self._process, self._backend, self._stops = process, backend, stops
        self.verify = False
        """Check every block that is read; the region is written first."""
        self._verified: list[BlockCase] = []
        self.n_bytes = int(self._hear()["bytes"])

    def measure(self, case: BlockCase, seconds: float) -> BlockSample:
        if self.verify and case not in self._verified:
            self._verified.append(case)
        told, back_cpu_s = self.load(*self._jobs(case, seconds))
        return sample_of(told, case.block_bytes, back_cpu_s, told["notified"], told["sleeps"])

    def check(self) -> int:
        """Read all blocks that were verified once more; how many are as they were written. Raises `ParavirtError`."""
        return sum(
            self.load(*(replace(job, rw="read", seconds=0.0, requests=job.n_blocks) for job in jobs))[0]["verified"]
            for jobs in map(self._jobs, self._verified)
        )

    def _jobs(self, case: BlockCase, seconds: float = 1.0) -> list[LoadJob]:
        return [case.job(seconds, queue=queue, verify=self.verify) for queue in range(case.queues)]

    def load(self, *jobs: LoadJob) -> tuple[dict[str, Any], float | None]:
        """Run a load on each queue; what `guest` says of all, and the backend's CPU time. Raises `ParavirtError`."""
        self.let_run()
        try:
            return self._load(*jobs)
        finally:
            if self._stops and self._backend is not None:
                os.kill(self._backend, signal.SIGSTOP)

    def let_run(self) -> None:
        """The backend, if it is stopped."""
        if self._stops and self._backend is not None:
            os.kill(self._backend, signal.SIGCONT)

    def _load(self, *jobs: LoadJob) -> tuple[dict[str, Any], float | None]:
        before = self._backend_cpu_s()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{json.dumps({'jobs': [asdict(job) for job in jobs]})}\n".encode())
            self._process.stdin.flush()
        told = self._hear()
        after = self._backend_cpu_s()
        if told["errors"]:
            raise ParavirtError(f"the disk failed {told['errors']} of the requests")
        if told["wrong"]:
            raise ParavirtError(f"what was read is not what was written: {told['first_wrong']}")
        return told, None if before is None or after is None else after - before

    def fill(self, n_bytes: int) -> None:
        """Write all of it, so that nothing is read that was never there."""
        block = min(_FILL_BYTES, n_bytes // 512 * 512)
        self.load(LoadJob("write", block, 8, n_bytes=n_bytes, requests=-(-n_bytes // block)))

    def pids(self) -> list[int]:
        return [self._process.pid, *([] if self._backend is None else [self._backend])]

    def _backend_cpu_s(self) -> float | None:
        return None if self._backend is None else process_cpu_s(self._backend)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ParavirtError("the measuring process of the domain has ended")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise ParavirtError(f"in the domain: {told['error']}")
        return told


def command(disk: str, cpu: int, wait: Wait) -> list[str]:
    """Of the domain's process."""
    return [sys.executable, "-m", guest.__name__, disk, str(cpu), wait]


@contextmanager
def own_side(
    target: Target,
    *,
    wait: Wait,
    cpus: tuple[int, int],
    writes: bool,
    isolated: bool = False,
    backend_options: Sequence[str] = (),
) -> Iterator[OwnSide]:
    """A disk of a domain of a host that is made for it and gone afterwards, its two ends on two CPUs.

    `writes`: the disk may be written. A disk in memory is filled, because pages that nobody has written are all one.
    `backend_options`: of `paravirt backend`.
    """
    driver, _, spec = target.spec.partition(":")
    spin_us = BACKEND_SPIN_US[wait]
    with TemporaryHost(log_level="error", backend_spin_us=spin_us, backend_options=backend_options) as host:
        backend = host.pid("backend")
        pin(backend, cpus[1])
        domain = host.create_domain("bench", isolated=isolated)
        read_only = target.kind not in ("memory", "null") and not writes
        vbd.attach(host.store, domain.domid, spec, driver=driver, device=DISK, mode="r" if read_only else "w")
        words = command(DISK, cpus[0], wait)
        with host.run(domain, words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            side = OwnSide(process, backend, stops=wait == "spin")
            try:
                if target.kind == "memory":
                    side.fill(side.n_bytes)
                yield side
            finally:
                side.let_run()


@contextmanager
def domain_side(
    connect: Callable[[], Hypervisor], rundir: RunDir, domain: str, disk: str, *, wait: Wait, cpus: tuple[int, int]
) -> Iterator[OwnSide]:
    """A disk of a domain of a host that runs, for Dom0: a process is started in the domain."""
    with connect() as hypervisor:
        info = domains.find(hypervisor, domain)
        fd = hypervisor.domain_socket(info.domid)
        try:
            process = launch(
                command(disk, cpus[0], wait),
                domid=info.domid,
                hypervisor_fd=fd,
                isolated=info.isolated,
                hide=rundir.hidden,
                domain_socket=rundir.domain_socket(info.domid),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        finally:
            os.close(fd)
        with process:
            hypervisor.add_process(info.domid, process.pidfd)
            yield OwnSide(process, None)


@contextmanager
def inside_side(disk: str, *, wait: Wait, cpus: tuple[int, int]) -> Iterator[OwnSide]:
    """A disk of the domain that this process is in."""
    fd = os.environ.get("PARAVIRT_FD", "")
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command(disk, cpus[0], wait), stdin=pipe, stdout=pipe, pass_fds=[int(fd)] if fd.isdecimal() else []
    ) as process:
        try:
            yield OwnSide(process, None)
        finally:
            process.terminate()
