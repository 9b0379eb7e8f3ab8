# SPDX-License-Identifier: MIT
"""What others use to pass messages between two processes: a table of peers, each a small program of its own.

Every peer is one command, PEER MODE CPU CPU SECONDS BATCH REQUEST_BYTES RESPONSE_BYTES SLOTS IN_FLIGHT [verify], that
runs its two pinned processes itself and prints one line of JSON with the fields of `Sample`. MODE is as in `Case`. With
"verify" what arrives is compared with what was sent. Exit code 3, and one line on standard error: it cannot run here.
When it is killed nothing of it stays.

A peer in C is a source in `peers/`, compiled for the sizes of a case (see peer.h there). A peer in Python is a module
there, run with `python -m` (see runner.py there).
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from paravirt.testing.bench import dpdk, peers
from paravirt.testing.bench.case import MODES, Case, Mode, Sample
from paravirt.testing.bench.programs import PEERS, NotHere, Programs

_OWN_TIME_S: Final = 30.0
"""What a peer may take on top of the measurement."""

_LEAST_BYTES_IN_PYTHON: Final = 8


@dataclass(frozen=True, slots=True)
class Peer:
    """How to make one peer's command."""

    name: str
    about: str
    language: Literal["C", "Python"]
    source: str
    """A file of this folder, or a module of this package."""
    needs: str
    """A header (where the compiler finds it), or a module that can be imported."""
    package: str
    """What has these: Debian's name of it, or PyPI's."""
    batches: bool = True
    """Whether one call moves many messages; otherwise it loops over those of a batch."""
    modes: tuple[Mode, ...] = MODES
    flags: tuple[str, ...] = ()
    find_flags: Callable[[], tuple[str, ...]] = field(default=tuple)

    def command(self, case: Case, programs: Programs) -> list[str]:
        """The words of its command before MODE. Raises `NotHere` with what is missing."""
        if case.mode not in self.modes:
            raise NotHere(f"{self.name} does not measure {case.mode}")
        if self.language == "Python":
            if importlib.util.find_spec(self.needs) is None:
                raise NotHere(f"{self.name} is not installed (pip install {self.package})")
            if min(case.request_bytes, case.response_bytes) < _LEAST_BYTES_IN_PYTHON:
                raise NotHere(f"{self.name} is measured with messages of {_LEAST_BYTES_IN_PYTHON} bytes or more")
            return [sys.executable, "-m", f"{peers.__name__}.{self.source}"]
        try:
            return [
                str(programs.compile(self.name, [PEERS / self.source], *case.flags(), *self.flags, *self.find_flags()))
            ]
        except NotHere as reason:
            if f"{self.needs}:" in str(reason):
                raise NotHere(f"{self.name} needs {self.needs} (apt-get install {self.package})") from None
            raise


_TABLE: Final = (
    Peer("xen", "Xen's ring.h, with the check whether to notify", "C", "xen.c", "xen/io/ring.h", "libxen-dev",
         flags=("-DCHECK_NOTIFY=1",)),
    Peer("xen-unchecked", "Xen's ring.h, never looking whether to notify", "C", "xen.c", "xen/io/ring.h", "libxen-dev",
         flags=("-DCHECK_NOTIFY=0",)),
    Peer("rte", "DPDK's rte_ring, one each way", "C", "rte.c", "rte_config.h", "libdpdk-dev", find_flags=dpdk.flags),
    Peer("ck", "Concurrency Kit's ck_ring, one each way", "C", "ck.c", "ck_ring.h", "libck-dev", batches=False),
    Peer("boost", "boost::lockfree::spsc_queue, one each way", "C", "boost.cc", "boost/lockfree/spsc_queue.hpp",
         "libboost-dev"),
    Peer("kickmsg", "topics in shared memory", "Python", "kickmsg", "kickmsg", "kickmsg", batches=False),
    Peer("iceoryx2", "topics in shared memory", "Python", "iceoryx2", "iceoryx2", "iceoryx2", batches=False),
    Peer("faster-fifo", "byte queues with a lock", "Python", "faster_fifo", "faster_fifo", "faster-fifo"),
    Peer("pyzmq", "ZeroMQ over Unix sockets", "Python", "pyzmq", "zmq", "pyzmq"),
    Peer("pipe", "multiprocessing.Pipe", "Python", "multiprocessing_pipe", "multiprocessing", "", batches=False),
    Peer("queue", "multiprocessing.Queue", "Python", "multiprocessing_queue", "multiprocessing", "", batches=False),
    Peer("posix-ipc", "semaphores and mmap", "Python", "posix_ipc", "posix_ipc", "posix_ipc", batches=False),
    Peer("tachyon", "byte rings in shared memory", "Python", "tachyon", "tachyon", "tachyon-ipc"),
)  # fmt: skip

TABLE: Final[dict[str, Peer]] = {peer.name: peer for peer in _TABLE}


def measure_peer(
    peer: Peer, case: Case, cpus: tuple[int, int], seconds: float, programs: Programs, *, verify: bool = False
) -> Sample:
    """One sample. Raises `NotHere` when it cannot run here, `CalledProcessError` when it failed."""
    command = [*peer.command(case, programs), *case.arguments(cpus, seconds), *(["verify"] if verify else [])]
    return run_program(command, peer.name, seconds)


def run_program(command: list[str], name: str, seconds: float) -> Sample:
    """Run a measuring program: what its one line of JSON says. Raises as `measure_peer`."""
    told = run_json(command, name, seconds)
    return Sample(told["messages_per_s"], told["p50_ns"], told["p99_ns"], told["cpu_s"])


def run_json(command: list[str], name: str, seconds: float) -> dict[str, Any]:
    """The same, as it is."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds + _OWN_TIME_S)
    if done.returncode == 3:
        raise NotHere(f"{name} does not run here: {done.stderr.strip() or 'it does not say why'}")
    done.check_returncode()
    told: dict[str, Any] = json.loads(done.stdout)
    return told
