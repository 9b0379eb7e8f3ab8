# SPDX-License-Identifier: MIT
"""Requests through a domain's xenstore ring page: our daemon beside the C daemon, with the same guest in C.

Ours is a real host and the guest a process of a domain, with memory and event channels of our hypervisor. The C daemon
has a pretended hypervisor, whose event channels are datagrams.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from paravirt.hypervisor.client import XENSTORE_GREF
from paravirt.testing.reference_xenstored import ReferenceDaemon
from paravirt.testing.temporary import TemporaryHost
from paravirt.xenstore.client import XenstoreClient

from .harness import Bench, Mark, pin
from .xenstore_cells import Claim, Row, judge
from .xenstore_daemons import OURS, STRICT, C, Load

CORE = ("stream", "event", "wait", "wait_late", "spin", "home")
DOMID = 1
FIRST_PORT = 1000
"""The reference daemon's port of domain n is this + n."""
TWICE = Mark(ratio=2.0)
CELLS = ((0, 1, TWICE), (0, 8, TWICE), (1, 1, Mark()), (1, 8, Mark()))
"""Writes or reads, requests in flight, what is claimed against the C daemon."""


class RingGuest:
    """The measured guest process."""

    def __init__(self, pids: list[int], to: IO[bytes], said: IO[bytes]) -> None:
        """`pids`: its own process' and the daemon's."""
        self.pids = pids
        self._to, self._said = to, said

    def line(self) -> str:
        """What it says next."""
        line = self._said.readline().decode().strip()
        if not line:
            raise RuntimeError("the guest on the ring ended")
        return line

    def tell(self, what: str) -> None:
        self._to.write(what.encode() + b"\n")
        self._to.flush()

    def measure(self, writes: int, depth: int, seconds: float) -> Load:
        """One sample."""
        self.tell(json.dumps({"writes": writes, "depth": depth, "seconds": seconds}))
        told = json.loads(self.line())
        per_second = told["operations"] / told["seconds"]
        return Load(
            mode="ring",
            per_second=per_second,
            events=0,
            eagain=0,
            first_error="",
            lost=0,
            unfinished=0,
            load_cpu_us=0.0,
            **told,
        )


@contextmanager
def ours(library: Path, bench: Bench) -> Iterator[RingGuest]:
    """A guest of a host of its own."""
    with TemporaryHost(log_level="error") as host:
        pid = host.pid("xenstored")
        pin(pid, bench.cpus[0])
        domain = host.create_domain("ring", isolated=False)
        command = [sys.executable, "-m", "benchmarks.xenstore_ring_guest", str(library), str(bench.cpus[1]), str(pid)]
        with host.run(domain, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            guest = RingGuest([process.pid, pid], process.stdin, process.stdout)
            host.store.introduce(domain.domid, XENSTORE_GREF, int(guest.line()))
            guest.tell("introduced")
            guest.line()
            yield guest


@contextmanager
def reference(library: Path, bench: Bench) -> Iterator[RingGuest]:
    """A guest of the C daemon."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="paravirt-"))
        daemon = stack.enter_context(ReferenceDaemon("c", directory))
        pin(daemon.pid, bench.cpus[0])
        end = daemon.add_domain(DOMID)
        with XenstoreClient.connect(daemon.socket_path) as store:
            store.mkdir(f"/local/domain/{DOMID}/data")
            store.set_perms(f"/local/domain/{DOMID}/data", [f"n{DOMID}"])
        events_fd = end._events.fileno()
        channel = [str(events_fd), str(daemon.folder / "events"), str(FIRST_PORT + DOMID)]
        page = str(daemon.folder / f"dom{DOMID}.page")
        command = ["benchmarks.xenstore_ring_guest", str(library), str(bench.cpus[1]), str(daemon.pid), page, *channel]
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(events_fd,),
            )
        )
        assert process.stdin is not None
        assert process.stdout is not None
        stack.callback(process.kill)
        guest = RingGuest([process.pid, daemon.pid], process.stdin, process.stdout)
        guest.tell("introduced")
        guest.line()
        yield guest


def ring(bench: Bench, with_peer: bool) -> Iterator[Row]:
    """Reads and writes of a guest, one and eight in flight."""
    library = bench.compile(
        "xenstore_ring.so", ["xenstore_ring.c", "xenstore_client.c"], CORE, *STRICT, "-shared", "-fPIC"
    )
    with ExitStack() as stack:
        sides = {OURS: stack.enter_context(ours(library, bench))}
        if with_peer:
            sides[C] = stack.enter_context(reference(library, bench))
        for writes, depth, mark in CELLS:
            yield _measure(bench, sides, writes, depth, mark)


def _measure(bench: Bench, sides: dict[str, RingGuest], writes: int, depth: int, mark: Mark) -> Row:
    def sampler(guest: RingGuest) -> Callable[[], Load]:
        return lambda: guest.measure(writes, depth, bench.seconds)

    samplers = [sampler(guest) for guest in sides.values()]
    rounds, load = bench.take_turns(samplers, lambda: [pid for guest in sides.values() for pid in guest.pids])
    row = Row("ring", f"ring {'write' if writes else 'read'}, {depth} in flight", 0)
    row.samples = {name: [samples[i] for _, samples in rounds] for i, name in enumerate(sides)}
    judge(row, [Claim(C, "rate", mark), Claim(C, "cpu")], [tag for tag, _ in rounds], load)
    return row
