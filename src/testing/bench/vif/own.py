# SPDX-License-Identifier: MIT
"""This project's network device as a side: a process with guests, a bridge and a switch (`worker`)."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from paravirt.errors import ParavirtError
from paravirt.testing.bench.vif import worker
from paravirt.testing.bench.vif.case import VifCase, VifSample, sample_of

NAME: Final = "paravirt"


class OwnSide:
    """Measured in one process, which stands still but for its samples: it spins, and would take CPUs from others."""

    name = NAME

    def __init__(self, process: "subprocess.Popen[str]", *, verify: bool = False) -> None:
        self._process = process
        self.verify = verify
        """Fill every frame with what follows from its number; where a guest takes it, it is looked at."""
        self._hear()
        self._stand()

    def measure(self, case: VifCase, seconds: float) -> VifSample:
        return sample_of(self.run(case, seconds), case)

    def run(self, case: VifCase, seconds: float) -> dict[str, Any]:
        """What the process says of one case. Raises `ParavirtError`."""
        self._process.send_signal(signal.SIGCONT)
        try:
            job = {"way": case.way, "seconds": seconds, "burst": case.burst, "sizes": case.sizes, "verify": self.verify}
            assert self._process.stdin is not None
            self._process.stdin.write(f"{json.dumps(job)}\n")
            self._process.stdin.flush()
            told = self._hear()
        finally:
            self._stand()
        if told.get("misplaced") or told.get("wrong"):
            raise ParavirtError(f"{told['misplaced']} frames came in another order, {told['wrong']} with other bytes")
        return told

    def pids(self) -> list[int]:
        return [self._process.pid]

    def _stand(self) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGSTOP)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ParavirtError("the measured process has ended")
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise ParavirtError(told["error"])
        return told


@contextmanager
def own_side(case: VifCase, cpus: tuple[int, int], *, verify: bool = False) -> Iterator[OwnSide]:
    """For cases with these pages and this way to wait."""
    words = [sys.executable, "-m", worker.__name__, *map(str, cpus), str(case.pages), case.wait]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield OwnSide(process, verify=verify)
        finally:
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
