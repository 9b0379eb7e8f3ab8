# SPDX-License-Identifier: MIT
"""What a hostile guest does to Dom0: the latency of Dom0's reads while a domain floods xenstored, beside quiet moments.

The guest is a domain of a real host. It shares a CPU with Dom0's reader and runs only while that waits, so that what is
seen is the daemon's work for the guest and not the scheduler's.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from paravirt.testing.temporary import TemporaryHost

from .harness import Bench, Mark, alone, pin
from .xenstore_cells import Row
from .xenstore_daemons import Load, LoadGenerator, Running, rss_bytes

FLOODS = ("unread", "writes", "junk", "watches", "transactions", "deep", "wide")
GUEST_CONNECTIONS = 4
ENDED = "ended"
NODES = 2000
FLOOD_LONGER_S = 0.1
LATENCY = Mark(most_ratio=5)
GROWTH = Mark(most_value=32, unit=1, unit_name="MiB")
"""What one guest may make the daemon keep: its quotas are a few MiB."""


class Flooder:
    """A guest that floods on demand."""

    def __init__(self, generator: LoadGenerator, kind: str, to: IO[bytes], said: IO[bytes]) -> None:
        self._generator = generator
        self._kind = kind
        self._to, self._said = to, said
        self._read("ready")

    def _read(self, wanted: str) -> None:
        while (line := self._said.readline().decode().strip()) != wanted:
            if line in ("", ENDED):
                raise RuntimeError(f"the flood of {self._kind} did not say {wanted}")

    def start(self, seconds: float) -> None:
        """Returns when the flood is there."""
        command = self._generator.command("flood", kind=self._kind, seconds=seconds, polite=True)
        self._to.write(json.dumps(command).encode() + b"\n")
        self._to.flush()
        self._read("flooding")

    def wait(self) -> None:
        self._read(ENDED)


@contextmanager
def flooder(host: TemporaryHost, generator: LoadGenerator, kind: str) -> Iterator[Flooder]:
    """A guest of a domain of its own, for one kind of flood."""
    domain = host.create_domain(f"flood-{kind}", isolated=False)
    command = [sys.executable, "-m", "benchmarks.xenstore_guest", str(GUEST_CONNECTIONS)]
    with host.run(domain, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        yield Flooder(generator, kind, guest.stdin, guest.stdout)


def isolation(bench: Bench, generator: LoadGenerator) -> Iterator[Row]:
    """For each kind of flood two lines: Dom0's latency, and what the daemon's memory grew by."""
    with TemporaryHost(log_level="error") as host:
        pid = host.pid("xenstored")
        pin(pid, bench.cpus[0])
        daemon = Running("quiet", host.rundir.xenstored_socket, pid)
        generator.run("populate", daemon, nodes=NODES, depth=32)
        for kind in FLOODS:
            with flooder(host, generator, kind) as guest:
                yield _flooded(bench, generator, daemon, guest, kind)


def _flooded(bench: Bench, generator: LoadGenerator, daemon: Running, guest: Flooder, kind: str) -> Row:
    row = Row("isolation", f"flood of {kind}", NODES)
    before = daemon.rss_bytes()
    grown: list[float] = []
    flooded: list[Load] = []
    quiet: list[Load] = []

    def read() -> Load:
        return generator.run("read", daemon, nodes=NODES, seconds=bench.seconds, verify=True)

    def under_flood() -> float:
        guest.start(bench.seconds + FLOOD_LONGER_S)
        flooded.append(read())
        grown.append((rss_bytes(daemon.pid) - before) / 2**20)
        guest.wait()
        return flooded[-1].p99_us

    def at_rest() -> float:
        quiet.append(read())
        return quiet[-1].p99_us

    # The guest's CPU time is not this process' to see: what it uses is no outside load.
    pairs, _ = bench.interleave(under_flood, at_rest, lambda: [daemon.pid])
    row.samples = {"flooded": flooded, "quiet": quiet}
    row.answers = [
        bench.compare(f"{row.name}: Dom0's p99, us", "quiet", pairs, 0.0, LATENCY, unit=1),
        alone(f"{row.name}: memory, MiB", [max(grown)], GROWTH, tag=pairs[0].cache_line_ns, load=0.0, unit=1),
    ]
    return row
