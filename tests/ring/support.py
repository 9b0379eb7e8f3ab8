# SPDX-License-Identifier: MIT
"""What the ring tests share: messages, pairs of ends, the peer process, C programs compiled on the spot."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from paravirt.ring.event import EventPort, EventWaiter, Half, from_half, make_pair
from paravirt.ring.memory import Mapping, create_object
from paravirt.ring.shared import BackRing, FrontRing

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
C_CORE = ROOT / "c_ext"
EVENT_SOURCES = ("pv_event", "pv_home", "pv_spin", "pv_wait", "pv_wait_late")
RING_SOURCES = (*EVENT_SOURCES, "pv_ring", "pv_ring_wait")
"""What a C program with a ring is linked of."""
DEADLINE_S = 30
COMPILER = os.environ.get("PARAVIRT_TEST_CC", "gcc")
RUNNER = os.environ.get("PARAVIRT_TEST_RUNNER")
"""Where COMPILER is for another architecture: what runs its programs."""

REQUEST = np.dtype([("id", "<u8"), ("words", "<u8", 13)])
RESPONSE = np.dtype([("id", "<u8"), ("sum", "<u8")])
NEAR_WRAP = 2**32 - 1000


def requests(first_id: int, count: int) -> Any:
    """`count` requests with ids from `first_id` and words made from the id."""
    batch = np.zeros(count, REQUEST)
    batch["id"] = np.arange(first_id, first_id + count, dtype=np.uint64)
    batch["words"] = batch["id"][:, None] * np.uint64(0x9E3779B97F4A7C15) + np.arange(13, dtype=np.uint64)
    return batch


def answers(batch: Any) -> Any:
    """The right responses to requests: their id and the sum of their words."""
    out = np.zeros(len(batch), RESPONSE)
    out["id"] = batch["id"]
    out["sum"] = batch["words"].sum(axis=1, dtype=np.uint64)
    return out


@dataclass
class Pair:
    """Both ends of a ring in this process, with an event channel between them."""

    front: FrontRing
    back: BackRing
    front_waiter: EventWaiter
    front_port: EventPort
    back_waiter: EventWaiter
    back_port: EventPort
    mapping: Mapping

    def header(self) -> list[int]:
        """req_prod, req_event, rsp_prod, rsp_event as they stand in shared memory."""
        return np.frombuffer(bytes(self.mapping.view[:16]), "<u4").tolist()

    def set_header(self, word: int, value: int) -> None:
        """What a hostile peer does: word 0 req_prod, 1 req_event, 2 rsp_prod, 3 rsp_event."""
        self.mapping.view[4 * word : 4 * word + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")


@contextmanager
def ring_pair(
    pages: int = 1, *, start: int = 0, bell: Any = "eventfd", types: Any = (REQUEST, RESPONSE), **options: Any
) -> Iterator[Pair]:
    """`options`: of both ends, as `FrontRing.create` has them."""
    fd = create_object("memfd", pages * 4096)
    with Mapping(fd, pages * 4096) as mapping:
        os.close(fd)
        first, second = make_pair(bell)
        front_waiter, front_port = from_half(first)
        back_waiter, back_port = from_half(second)
        made = FrontRing.create(mapping, *types, port=front_port, start=start, **options)
        with front_waiter, back_waiter, made as front:
            with BackRing.attach(mapping, *types, port=back_port, **options) as back:
                yield Pair(front, back, front_waiter, front_port, back_waiter, back_port, mapping)


@contextmanager
def peer_process(command: list[str], memory_fd: int, half: Half) -> Iterator["subprocess.Popen[str]"]:
    """A process that gets the ring's memory and one half of the channel as its first arguments."""
    process = subprocess.Popen(
        [*command, str(memory_fd), *map(str, half)],
        pass_fds=(memory_fd, *half),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    half.close()
    try:
        yield process
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def output_of(process: "subprocess.Popen[str]") -> IO[str]:
    assert process.stdout is not None
    return process.stdout


def python_peer(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"tests.ring.{module}", *arguments]


def compile_c(target: Path, sources: list[Path], *flags: str) -> Path:
    """Compile a C program together with parts of the core; fails the test with the compiler's words.

    Programs without `flags` of their own get those of PARAVIRT_TEST_CFLAGS: counters, in a measurement of coverage.
    """
    command = [COMPILER, "-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Wno-unused-parameter", *flags, f"-I{C_CORE}"]
    if not flags:
        command += os.environ.get("PARAVIRT_TEST_CFLAGS", "").split()
    program = target.with_suffix(".foreign") if RUNNER else target
    done = subprocess.run(
        [*command, *map(str, sources), "-o", str(program), "-pthread"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if RUNNER:
        target.write_text(f'#!/bin/sh\nexec {RUNNER} {program} "$@"\n')
        target.chmod(0o755)
    return target


def need_xen_header() -> None:
    """Xen's own ring.h: without it the test fails where everything must be there, else it is skipped."""
    header = Path("/usr/include/xen/io/ring.h")
    if not header.exists():
        reason = f"{header} is missing; install libxen-dev"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def run_c(command: list[Any], *, timeout: float | None, environment: dict[str, str] | None = None) -> str:
    """What a C program says; fails the test with its own words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
