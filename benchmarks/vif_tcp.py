# SPDX-License-Identifier: MIT
"""The kernel's TCP between two domains."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from functools import partial

from .harness import ROOT, Answer, Bench, Mark, NotHere, Pair

QUESTION = (
    "How fast is TCP between two domains (iperf3, large packets whole) beside a bare relay of two TAP interfaces?"
)
UNIT = "Gbit/s."
UNSHARE = ("unshare", "-U", "--map-user=1000", "--keep-caps", "-n")
LEAST_S = 1.0


def ask(bench: Bench) -> Iterable[Answer]:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    for program in ("iperf3", "ip", "nsenter", "unshare"):
        if shutil.which(program, path=path) is None:
            raise NotHere(f"{program} is not installed")
    relay = bench.compile("tap_relay", ["tap_relay.c"])
    words = [*UNSHARE, sys.executable, "-m", "benchmarks.vif_tcp_worker", str(relay)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stderr is not None
        if worker.stdout.readline() != "ready\n":
            raise NotHere(f"no such networks here: {worker.stderr.read().strip().splitlines()[-1:]}")

        def speed(name: str) -> float:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{name} {max(LEAST_S, bench.seconds)}\n")
            worker.stdin.flush()
            return float(worker.stdout.readline())

        sides = [partial(speed, name) for name in ("paravirt", "tap relay", "veth")]
        rounds, load = bench.take_turns(sides, lambda: [worker.pid])
        worker.stdin.close()
    for i, (peer, mark) in enumerate((("tap relay", Mark(ratio=0.7)), ("veth", Mark())), 1):
        pairs = [Pair(speeds[0], speeds[i], tag) for tag, speeds in rounds]
        yield bench.compare("TCP over IPv4", peer, pairs, load, mark, unit=1e9)
