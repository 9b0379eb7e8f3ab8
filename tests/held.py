# SPDX-License-Identifier: MIT
"""What a host in this process holds, to be compared with what it held before."""

import gc
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import paravirt

DEADLINE_S = 20.0


class Held(NamedTuple):
    """What the whole host holds, all of it being in this process."""

    descriptors: int
    threads: int
    mappings: int
    bytes: int

    @classmethod
    def now(cls, host: paravirt.Host) -> "Held":
        gc.collect()
        maps = Path("/proc/self/maps").read_text().splitlines()
        ours = sum("memfd:paravirt" in line or "/dev/shm/paravirt" in line for line in maps)
        used = host.hypervisor.info().used_bytes
        return cls(_descriptors(), len(os.listdir("/proc/self/task")), ours, used)


def _descriptors() -> int:
    """But for timers: who waits for events makes one when he first needs it, and has two others from the beginning."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the list itself
            found += os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[timerfd]"
    return found


def settled(condition: Callable[[], bool]) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
