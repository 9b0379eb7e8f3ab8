# SPDX-License-Identifier: MIT
"""NBD by this project's plugin over the ring, beside nbdkit's own memory: the same client, all servers on one CPU."""

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from paravirt.host import vbd
from paravirt.testing.bench.vbd.case import BlockCase
from paravirt.testing.bench.vbd.peers import TABLE, BlockPeer, PeerSide, Place
from paravirt.testing.bench.vbd.results import measure
from paravirt.testing.bench.vbd.target import target_of
from paravirt.testing.temporary import TemporaryHost

from .harness import Answer, Bench, Mark, Pair, pin
from .vbd_load import iops

QUESTION = "Is a domain's disk of memory, exported to NBD, nearly as fast as nbdkit's memory plugin?"
UNIT = "Thousands a second."
SIZE = 64 << 20
NBDKIT = "nbdkit"
CASES = {
    "4 KiB at random, 1 in flight": BlockCase(depth=1, wait="spin"),
    "4 KiB at random, 32 in flight": BlockCase(depth=32, wait="spin"),
    "128 KiB in order, 8 in flight": BlockCase(rw="read", block_bytes=128 << 10, depth=8, wait="spin"),
}


def ask(bench: Bench) -> Iterable[Answer]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paravirt-bench-")))
        place = Place(target_of(f"memory:{SIZE}"), SIZE, bench.cpus, bench.programs, folder, stack)
        sides = [ExportSide(place), PeerSide(TABLE[NBDKIT], place)]
        for side in sides:  # what nobody has written is no memory yet
            side.measure(BlockCase(n_bytes=SIZE), 0.01, verify=True)
        for what, case in CASES.items():
            ours, theirs = measure(bench, sides, place.target.spec, case)
            pairs = [
                Pair(iops(mine.sample), iops(other.sample), mine.cache_line_ns)
                for mine, other in zip(ours.rounds, theirs.rounds, strict=True)
            ]
            yield bench.compare(what, NBDKIT, pairs, ours.outside_load, Mark(ratio=0.7), unit=1000)


class ExportSide(PeerSide):
    """A host with a domain that exports its disk."""

    def __init__(self, place: Place) -> None:
        self._pids: list[int] = []
        super().__init__(BlockPeer("export", "a domain's disk", TABLE[NBDKIT].source, self._open), place)

    def _open(self, place: Place) -> tuple[str, None]:
        host = place.stack.enter_context(TemporaryHost(log_level="error"))
        domain = host.create_domain("bench", isolated=False)
        vbd.attach(host.store, domain.domid, str(place.n_bytes), driver="memory")
        socket = place.folder / "export"
        words = [sys.executable, "-m", "paravirt", "vbd", "export", "xvda", "--socket", str(socket)]
        process = place.stack.enter_context(host.run(domain, words, stdout=subprocess.PIPE))
        place.stack.callback(process.send_signal, signal.SIGTERM)
        assert process.stdout is not None
        process.stdout.readline()  # it is served
        self._pids = [host.pid("backend"), process.pid, *_children(process.pid)]
        for pid in self._pids:
            pin(pid, place.cpus[1])
        return str(socket), None

    def pids(self) -> list[int]:
        return self._pids


def _children(pid: int) -> list[int]:
    own = [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]
    return [*own, *(each for child in own for each in _children(child))]
