# SPDX-License-Identifier: MIT
"""How many single 4 KiB reads a guest does on a memory disk, beside Python's own os.pread of a file in memory."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import IO

from paravirt.host import vbd
from paravirt.ring.memory import create_object
from paravirt.testing.temporary import TemporaryHost

from .harness import Answer, Bench, Mark

QUESTION = "How many 4 KiB reads a second does one thread of a guest do, one at a time?"
SIZE = 16 << 20
WAYS = {"both spin": (1e6, Mark(value=0.1e6, ratio=0.6)), "adaptive": (30.0, Mark()), "both sleep": (0.0, Mark())}


def ask(bench: Bench) -> Iterable[Answer]:
    for way, (spin_us, mark) in WAYS.items():
        with TemporaryHost(backend_spin_us=spin_us) as host:
            backend = host.pid("backend")
            os.sched_setaffinity(backend, {bench.cpus[0]})
            domain = host.create_domain("bench", isolated=False)
            vbd.attach(host.store, domain.domid, str(SIZE), driver="memory")
            command = [sys.executable, "-m", "benchmarks.vbd_guest", str(bench.cpus[1]), str(int(spin_us * 1000))]
            with host.run(domain, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
                assert guest.stdin is not None
                assert guest.stdout is not None
                said = guest.stdout
                said.readline()

                def ours(to: "IO[bytes]" = guest.stdin, said: "IO[bytes]" = said) -> float:
                    to.write(f"{bench.seconds}\n".encode())
                    to.flush()
                    return float(said.readline())

                pids = [backend, guest.pid]
                pairs, load = bench.interleave(ours, lambda: plain(bench.seconds), pids.copy)
                yield bench.compare(way, "os.pread", pairs, load, mark)


def plain(seconds: float) -> float:
    """os.pread of a file in memory: no split at all."""
    fd = create_object("memfd", SIZE)
    try:
        offsets = [place * 7919 % (SIZE // 4096) * 4096 for place in range(SIZE // 4096)]
        reads, start = 0, time.perf_counter()
        end = start + seconds
        while time.perf_counter() < end:
            for offset in offsets[:64]:
                os.pread(fd, 4096, offset)
            reads += 64
            offsets = offsets[64:] + offsets[:64]
        return reads / (time.perf_counter() - start)
    finally:
        os.close(fd)
