# SPDX-License-Identifier: MIT
"""What else moves blocks: a table of peers, each a program of its own (blk.h) and, where it has two sides, a server.

A peer is given the same blocks as the disk it is measured beside: the same file; and for a disk in memory a file in
memory or what the server has for that. Where there is nothing of the kind `NotHere` says so.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from paravirt.testing.bench.machine import pin
from paravirt.testing.bench.programs import PEERS, RING_PARTS, NotHere, Programs
from paravirt.testing.bench.registry import run_json
from paravirt.testing.bench.vbd import with_parent
from paravirt.testing.bench.vbd.case import BlockCase, BlockSample, sample_of
from paravirt.testing.bench.vbd.own import process_cpu_s
from paravirt.testing.bench.vbd.target import Target, file_in_memory

_PARTS: Final = ("histogram", "pattern")
_START_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """What one measurement stands on."""

    target: Target
    n_bytes: int
    cpus: tuple[int, int]
    programs: Programs
    folder: Path
    """For sockets."""
    stack: ExitStack
    """What it undoes when it ends is undone after the measurement."""

    def file(self, who: str) -> Path:
        """The file that is measured, or one in memory of its size. Raises `NotHere`."""
        if self.target.path is not None:
            return self.target.path
        if self.target.kind != "memory":
            raise NotHere(f"{who} has nothing like {self.target.spec}")
        return self.stack.enter_context(file_in_memory(self.n_bytes))


Open = Callable[[Place], tuple[str, "subprocess.Popen[bytes] | None"]]
"""What the program is given as its TARGET, and the server. Raises `NotHere`."""


@dataclass(frozen=True, slots=True)
class BlockPeer:
    """How to measure one peer."""

    name: str
    about: str
    source: str
    open: Open
    package: str = ""
    """What has the header it needs: Debian's name."""
    header: str = ""
    core: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()

    def program(self, programs: Programs) -> Path:
        """Raises `NotHere` with what is missing."""
        try:
            return programs.compile(self.name, [PEERS / self.source], *self.libraries, core=(*_PARTS, *self.core))
        except NotHere as reason:
            if self.header and f"{self.header}:" in str(reason):
                raise NotHere(f"{self.name} needs {self.header} (apt-get install {self.package})") from None
            raise


class PeerSide:
    """A peer: a program for each sample, beside a server that stays."""

    def __init__(self, peer: BlockPeer, place: Place) -> None:
        """Raises `NotHere`."""
        self.name = peer.name
        self._cpus = place.cpus
        self._program = peer.program(place.programs)
        self.target, self._server = peer.open(place)
        """What its program is given."""
        if self._server is not None:
            pin(self._server.pid, place.cpus[1])

    def measure(self, case: BlockCase, seconds: float, *, verify: bool = False) -> BlockSample:
        """Raises `NotHere`; `CalledProcessError` when it failed."""
        if case.queues != 1:
            raise NotHere(f"{self.name} is measured with one queue")
        before = self._server_cpu_s()
        words = [
            str(self._program),
            *case.arguments(self.target, self._cpus, seconds),
            *(["verify"] if verify else []),
        ]
        told: dict[str, Any] = run_json(words, self.name, seconds)
        after = self._server_cpu_s()
        return sample_of(told, case.block_bytes, None if before is None or after is None else after - before)

    def pids(self) -> list[int]:
        return [] if self._server is None else [self._server.pid]

    def _server_cpu_s(self) -> float | None:
        return None if self._server is None else process_cpu_s(self._server.pid)


def _alone(place: Place, who: str) -> tuple[str, None]:
    return str(place.file(who)), None


def _serve(place: Place, command: Sequence[str], package: str) -> "subprocess.Popen[bytes]":
    """Start a server, which ends with the measurement. Raises `NotHere`."""
    program = shutil.which(command[0])
    if program is None:
        raise NotHere(f"{command[0]} is not installed (apt-get install {package})")
    parent = os.pidfd_open(os.getpid())
    try:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", with_parent.__name__, str(parent), program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[parent],
        )
    finally:
        os.close(parent)
    place.stack.callback(_end, server)
    return server


def _end(server: "subprocess.Popen[bytes]") -> None:
    server.kill()
    server.wait()
    if server.stderr is not None:
        server.stderr.close()


def _await(server: "subprocess.Popen[bytes]", socket: Path, name: str) -> None:
    deadline = time.monotonic() + _START_S
    while not socket.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            said = (server.stderr.read() if server.stderr else b"").decode(errors="replace").strip().splitlines()
            raise NotHere(f"{name} does not serve here: {said[-1] if said else 'it does not say why'}")
        time.sleep(0.01)


def _nbdkit(place: Place) -> tuple[str, "subprocess.Popen[bytes]"]:
    socket = place.folder / "nbdkit"
    plugins = {"null": ["null", f"size={place.n_bytes}"], "memory": ["memory", f"size={place.n_bytes}"]}
    plugin = plugins.get(place.target.kind) or ["file", f"file={place.file('nbdkit')}"]
    server = _serve(place, ["nbdkit", "--foreground", "--unix", str(socket), *plugin], "nbdkit")
    _await(server, socket, "nbdkit")
    return str(socket), server


def _qemu(place: Place) -> tuple[str, "subprocess.Popen[bytes]"]:
    socket = place.folder / "qemu"
    if place.target.kind == "null":
        disk = f"driver=null-co,size={place.n_bytes},read-zeroes=off"
    else:
        path = str(place.file("qemu-storage-daemon")).replace(",", ",,")
        disk = f"driver=file,filename={path},aio=io_uring,locking=off"  # the other side has it open, too
    export = f"type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket},iothread=io"
    command = ["qemu-storage-daemon", "--blockdev", f"{disk},node-name=disk", "--object", "iothread,id=io"]
    server = _serve(place, [*command, "--export", export], "qemu-system-common")
    _await(server, socket, "qemu-storage-daemon")
    return str(socket), server


def _model(place: Place) -> tuple[str, None]:
    if place.target.kind not in ("null", "memory"):
        raise NotHere(f"the model has nothing like {place.target.spec}")
    return place.target.kind, None


_TABLE: Final = (
    BlockPeer("psync", "pread and pwrite of the same file, no split at all", "blk_psync.c",
              lambda place: _alone(place, "psync")),
    BlockPeer("io_uring", "io_uring on the same file, no split at all", "blk_uring.c",
              lambda place: _alone(place, "io_uring"), "liburing-dev", "liburing.h", libraries=("-luring",)),
    BlockPeer("nbdkit", "nbdkit's null, memory or file plugin, by one Unix socket", "blk_nbd.c", _nbdkit),
    BlockPeer("qemu-storage-daemon", "QEMU's vhost-user-blk, null-co or the same file", "blk_vhost.c", _qemu),
    BlockPeer("model", "the least there can be: a ring and a memcpy, nothing checked", "blk_model.c", _model,
              core=RING_PARTS),
)  # fmt: skip

TABLE: Final[dict[str, BlockPeer]] = {peer.name: peer for peer in _TABLE}


@contextmanager
def open_peers(
    names: Sequence[str], target: Target, n_bytes: int, cpus: tuple[int, int], programs: Programs
) -> Iterator[tuple[list[PeerSide], dict[str, str]]]:
    """The peers of these names that can be measured beside a target of `n_bytes`, and why the others cannot."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paravirt-bench-")))
        sides, missing = [], {}
        for name in names:
            own = stack.enter_context(ExitStack())
            try:
                sides.append(PeerSide(TABLE[name], Place(target, n_bytes, cpus, programs, folder, own)))
            except NotHere as reason:
                own.close()
                missing[name] = str(reason)
        yield sides, missing
