# SPDX-License-Identifier: MIT
"""What else moves frames between two processes: a table of peers."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from typing import Final

from paravirt.testing.bench.programs import PEERS, NotHere, Programs
from paravirt.testing.bench.registry import run_json
from paravirt.testing.bench.vif.case import VifCase, VifSample, sample_of
from paravirt.testing.bench.vif.results import VifSide
from paravirt.testing.bench.vif.testpmd import TestpmdSide

_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_VETH: Final = (
    "ip link add pv0 type veth peer name pv1 && ip link set pv0 up && ip link set pv1 up && "
    'until ip link show pv1 | grep -q LOWER_UP; do sleep 0.01; done; exec "$@"'
)


class SocketSide:
    """Sockets of the kernel, in bursts of one system call: a program for each sample."""

    def __init__(self, kind: str, cpus: tuple[int, int], programs: Programs) -> None:
        """Raises `NotHere`."""
        self.name = kind
        self._cpus = cpus
        self._program = str(programs.compile("net_sockets", [PEERS / "net_sockets.c"]))
        if kind == "af-packet":
            for needed, package in (("unshare", "util-linux"), ("ip", "iproute2")):
                if shutil.which(needed, path=_PATH) is None:
                    raise NotHere(f"{kind} needs {needed} (apt-get install {package})")

    def pids(self) -> list[int]:
        return []

    def measure(self, case: VifCase, seconds: float) -> VifSample:
        """Raises `NotHere`; `CalledProcessError` when it failed."""
        if case.way != "wire" or not case.size or case.size > 1514:
            raise NotHere(f"{self.name} is measured one way, with frames of one size up to 1514")
        words = [self._program, "unix" if self.name == "unix" else "packet"]
        words += map(str, (case.size, case.burst, seconds, *self._cpus))
        if self.name == "af-packet":
            words = ["unshare", "-Urn", "sh", "-c", _VETH, "sh", *words, "pv0", "pv1"]
        try:
            told = run_json(words, self.name, seconds)
        except subprocess.CalledProcessError as error:
            raise NotHere(f"{self.name} does not run here: {error.stderr.strip()[:200]}") from None
        return sample_of(told, case)


Open = Callable[[str, tuple[int, int], Programs], VifSide]
TABLE: Final[dict[str, tuple[Open, str]]] = {
    "memif": (lambda name, cpus, _: TestpmdSide(name, cpus), "DPDK's rings in shared memory, both sides spin"),
    "virtio-user": (lambda name, cpus, _: TestpmdSide(name, cpus), "DPDK's virtio with vhost-user at the other end"),
    "af-packet": (SocketSide, "raw sockets on two ends of a veth"),
    "unix": (SocketSide, "datagrams over a pair of Unix sockets"),
}
"""By name: how to open one, and what it is."""


def open_peers(names: Iterable[str], cpus: tuple[int, int], programs: Programs) -> tuple[list[VifSide], dict[str, str]]:
    """Those that are here, and why others are not."""
    there: list[VifSide] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            there.append(TABLE[name][0](name, cpus, programs))
        except NotHere as reason:
            missing[name] = str(reason)
    return there, missing
