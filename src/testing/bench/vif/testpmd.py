# SPDX-License-Identifier: MIT
"""DPDK's own measuring program on both sides of a wire in memory, each on a CPU: one sends, one takes.

Which of two speeds it finds differs from start to start, so each sample is a start of both.
"""

import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from paravirt.testing.bench.machine import cpu_seconds
from paravirt.testing.bench.programs import NotHere
from paravirt.testing.bench.vif.case import VifCase, VifSample, sample_of

PROGRAM: Final = "dpdk-testpmd"
PACKAGE: Final = "dpdk-dev"
KINDS: Final = ("memif", "virtio-user")
_SETTLE_S: Final = 0.2
_PATIENCE_S: Final = 10.0


class _Testpmd:
    """One of the two processes."""

    def __init__(self, name: str, cpus: tuple[int, int], device: str, memory: list[str], options: list[str]) -> None:
        """`cpus`: that frames are moved on, and another one, for its commands."""
        words = [
            "stdbuf",
            "-oL",
            PROGRAM,
            "--lcores",
            f"0@{cpus[1]},1@{cpus[0]}",
            *memory,
            "--no-pci",
            "--file-prefix",
            name,
        ]
        words += ["--no-telemetry", "--vdev", device, "--", "-i", "--nb-cores=1", "--total-num-mbufs=16384", *options]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
        self.pid = self._process.pid

    def ask(self, command: str = "", until: str = "testpmd> ") -> str:
        """What it says to a command, or when it starts, as far as that. Raises `NotHere` when it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if command:
            with suppress(BrokenPipeError):
                self._process.stdin.write(f"{command}\n".encode())
                self._process.stdin.flush()
        said, deadline = "", time.monotonic() + _PATIENCE_S
        while until not in said:
            ready = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            came = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not came:
                reason = said.strip().splitlines()[-1:] or ["it says nothing"]
                raise NotHere(f"{PROGRAM} does not run: {reason[0].strip()[:200]}")
            said += came.decode(errors="replace")
        return said

    def received(self) -> int:
        """Frames so far."""
        found = re.search(r"RX-packets:\s*(\d+)", self.ask("show port stats 0", "Tx-pps"))
        if found is None:
            raise NotHere(f"{PROGRAM} tells of no frames")
        return int(found[1])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class TestpmdSide:
    """DPDK's memif, or its virtio-user with vhost-user at the other end."""

    __test__ = False  # no test of pytest's

    def __init__(self, kind: str, cpus: tuple[int, int]) -> None:
        """Raises `NotHere`."""
        if shutil.which(PROGRAM) is None:
            raise NotHere(f"{kind} needs {PROGRAM} (apt-get install {PACKAGE})")
        self.name = kind
        self._cpus = cpus

    def pids(self) -> list[int]:
        return []

    def measure(self, case: VifCase, seconds: float) -> VifSample:
        """Raises `NotHere`."""
        if case.way != "wire" or not case.size:
            raise NotHere(f"{self.name} is measured one way, with frames of one size")
        with self._pair(case) as (taker, sender):
            for one in (taker, sender):
                one.ask("start", "packets/burst")
            time.sleep(_SETTLE_S)
            before = taker.received(), time.perf_counter(), self._cpu(sender), self._cpu(taker)
            time.sleep(seconds)
            after = taker.received(), time.perf_counter(), self._cpu(sender), self._cpu(taker)
        arrived, took, front, back = (now - then for now, then in zip(after, before, strict=True))
        told: dict[str, Any] = {"arrived": arrived, "seconds": took, "front_cpu_s": front, "back_cpu_s": back}
        if not arrived:
            raise NotHere(f"no frame came through {self.name}")
        return sample_of(told, case)

    @staticmethod
    def _cpu(one: _Testpmd) -> float:
        return cpu_seconds(one.pid)

    @contextmanager
    def _pair(self, case: VifCase) -> Iterator[tuple[_Testpmd, _Testpmd]]:
        front, back = self._cpus
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pv-dpdk-")))
            memory = ["--no-huge", "-m", "256"] if self.name == "memif" else ["--in-memory", "-m", "256"]
            taking, sending = self._devices(folder)
            sizes = [f"--txpkts={case.size}", f"--burst={case.burst}", "--forward-mode=txonly"]
            taker = _Testpmd(
                f"{folder.name}-b", (back, front), taking, memory, ["--forward-mode=rxonly", f"--burst={case.burst}"]
            )
            stack.callback(taker.close)
            taker.ask()
            sender = _Testpmd(f"{folder.name}-f", (front, back), sending, memory, sizes)
            stack.callback(sender.close)
            sender.ask()
            yield taker, sender

    def _devices(self, folder: Path) -> tuple[str, str]:
        """Of the taker and of the sender."""
        if self.name == "memif":
            common = f"net_memif0,socket={folder}/s,socket-abstract=no,rsize=10,role="
            return f"{common}server", f"{common}client"
        return f"net_vhost0,iface={folder}/s", f"net_virtio_user0,path={folder}/s,queue_size=1024"
