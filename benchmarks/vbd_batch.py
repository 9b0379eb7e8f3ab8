# SPDX-License-Identifier: MIT
"""Batches of reads from Python: of a guest's disk, and by libnbd's asynchronous calls from nbdkit's memory plugin."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from paravirt.errors import NotFound
from paravirt.host import vbd
from paravirt.testing.debian import unpack
from paravirt.testing.temporary import TemporaryHost

from .harness import Answer, Bench, Mark, NotHere, pin
from .vbd_batch_worker import BATCH

QUESTION = f"How many 4 KiB reads a second does a Python program get in batches of {BATCH}, beside libnbd's?"
UNIT = "Thousands a second."
SIZE = 64 << 20


def ask(bench: Bench) -> Iterable[Answer]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paravirt-bench-")))
        theirs, their_pids = _libnbd(bench, folder, stack)
        ours, our_pids = _guest(bench, stack)
        pairs, load = bench.interleave(ours, theirs, lambda: [*their_pids, *our_pids])
        yield bench.compare(f"batches of {BATCH}", "libnbd", pairs, load, Mark(ratio=10.0), unit=1000)


def _guest(bench: Bench, stack: ExitStack) -> tuple[Callable[[], float], list[int]]:
    host = stack.enter_context(TemporaryHost(log_level="error"))
    domain = host.create_domain("bench", isolated=False)
    vbd.attach(host.store, domain.domid, str(SIZE), driver="memory")
    backend = host.pid("backend")
    pin(backend, bench.cpus[1])
    command = [sys.executable, "-m", "benchmarks.vbd_batch_worker", "disk", str(SIZE)]
    process = stack.enter_context(host.run(domain, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    stack.callback(process.send_signal, signal.SIGTERM)
    pin(process.pid, bench.cpus[0])
    return _asker(bench, process.stdin, process.stdout), [backend, process.pid]


def _libnbd(bench: Bench, folder: Path, stack: ExitStack) -> tuple[Callable[[], float], list[int]]:
    """Raises `NotHere`."""
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        raise NotHere("nbdkit is not installed (apt-get install nbdkit)")
    socket = folder / "nbd"
    server = subprocess.Popen(
        [nbdkit, "--foreground", "--exit-with-parent", "--unix", socket, "memory", f"size={SIZE}"]
    )
    stack.callback(server.wait)
    stack.callback(server.kill)
    pin(server.pid, bench.cpus[1])
    try:
        for package in ("python3-libnbd", "libnbd0"):
            unpack(package, folder / "debian")
    except NotFound as error:
        raise NotHere(f"libnbd for Python: {error}") from None
    modules = folder / "debian/usr/lib/python3/dist-packages"
    libraries = [str(each.parent) for each in (folder / "debian/usr/lib").glob("*/libnbd.so.0")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(modules)]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
    }
    command = [sys.executable, "-m", "benchmarks.vbd_batch_worker", str(socket), str(SIZE)]
    pipe = subprocess.PIPE
    process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment))
    stack.callback(process.kill)
    pin(process.pid, bench.cpus[0])
    assert process.stderr is not None
    try:
        return _asker(bench, process.stdin, process.stdout), [server.pid, process.pid]
    except ValueError:
        raise NotHere(f"libnbd for Python: {process.stderr.read().decode().strip().splitlines()[-1]}") from None


def _asker(bench: Bench, to: "IO[bytes] | None", said: "IO[bytes] | None") -> Callable[[], float]:
    """What has a worker measure. Raises `ValueError` when it has not started."""
    assert to is not None
    assert said is not None
    json.loads(said.readline())

    def ask_once() -> float:
        to.write(f"{bench.seconds}\n".encode())
        to.flush()
        return float(said.readline())

    return ask_once
