# SPDX-License-Identifier: MIT
"""What the kernel offers to this process and what it refuses, found by trying."""

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from paravirt.errors import ParavirtError
from paravirt.host.launch import can_give_uids
from paravirt.ring import memory, process, vbd_engine
from paravirt.ring.process import Namespace

IDLE_SAMPLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Offer:
    """One thing the stack can use."""

    name: str
    offered: bool
    detail: str
    """What it is good for, how much of it there is, or what is done without it."""


def probe() -> list[Offer]:
    """Try everything; takes about a tenth of a second. One thread: it forks."""
    return [
        _namespaces(),
        _provider("memfd", "sealed shared memory: isolated domains", "isolated domains cannot be served"),
        _provider("posix", "POSIX shared memory: embedding, shared mode", "sealed memfd serves instead"),
        _shm_size(),
        _membarrier(),
        _uring(),
        _descriptors(),
        _locked_memory(),
        _cores(),
    ]


def can_isolate() -> str | None:
    """None if domains can be isolated here, else what the kernel answers."""
    wanted = _ALL if can_give_uids() else _ALL | Namespace.USER
    return _in_child(lambda: process.unshare(wanted))


_ALL = Namespace.MOUNT | Namespace.PID | Namespace.IPC | Namespace.NET


def _namespaces() -> Offer:
    refused = can_isolate()
    if refused is None:
        way = "own uid per domain" if can_give_uids() else "own user namespace per domain"
        return Offer("namespaces", True, f"isolated domains: {way}")
    return Offer("namespaces", False, f"{refused}: only shared domains (--shared), no isolation")


def _provider(name: memory.Provider, use: str, without: str) -> Offer:
    def attempt() -> None:
        os.close(memory.create_object(name, memory.PAGE_BYTES))

    return _try(f"{name} memory", attempt, use, without)


def _shm_size() -> Offer:
    try:
        status = os.statvfs("/dev/shm")
    except OSError as error:
        return Offer("/dev/shm", False, f"{error.strerror}: sealed memfd serves instead")
    free, size = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    return Offer("/dev/shm", True, f"{free >> 20} of {size >> 20} MiB free")


def _membarrier() -> Offer:
    try:
        scopes = process.membarrier_scopes()
    except OSError as error:
        return Offer("membarrier", False, f"{os.strerror(error.errno or 0)}: full barriers serve instead")
    return Offer("membarrier", bool(scopes), f"asymmetric fence within: {', '.join(scopes) or 'nothing'}")


def _uring() -> Offer:
    version = vbd_engine.liburing_version()
    if not version:
        return Offer("io_uring", False, "the core was built without liburing: blocking calls serve files instead")
    use = f"asynchronous I/O of files that may wait (liburing {version})"
    return _try("io_uring", process.try_io_uring, use, "blocking calls serve files instead")


def _descriptors() -> Offer:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Offer("descriptors", True, f"{soft}, daemons raise it to {hard}")


def _locked_memory() -> Offer:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    amount = "no limit" if soft == resource.RLIM_INFINITY else f"{soft >> 10} KiB"
    return Offer("locked memory", soft != 0, amount)


def _cores() -> Offer:
    usable = os.sched_getaffinity(0)
    before = _idle_ticks()
    time.sleep(IDLE_SAMPLE_S)
    after = _idle_ticks()
    ticks = os.sysconf("SC_CLK_TCK") * IDLE_SAMPLE_S
    idle = sum(1 for cpu in usable if after.get(cpu, 0) - before.get(cpu, 0) >= ticks / 2)
    detail = f"{idle} of {len(usable)} idle" + ("" if len(usable) > 1 else ": waiting never spins")
    return Offer("cores", True, detail)


def _idle_ticks() -> dict[int, int]:
    """Ticks that each core has been idle since boot (proc_stat(5))."""
    ticks = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks[int(name[3:])] = int(fields[3])
    return ticks


def _try(name: str, attempt: Callable[[], None], use: str, without: str) -> Offer:
    try:
        attempt()
    except ParavirtError as error:
        return Offer(name, False, f"{error}: {without}")
    except OSError as error:
        return Offer(name, False, f"{os.strerror(error.errno or 0)}: {without}")
    return Offer(name, True, use)


def _in_child(attempt: Callable[[], None]) -> str | None:
    """Try in a forked child what cannot be undone: None, or the kernel's answer."""
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
        finally:
            os._exit(255)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == 0 else os.strerror(code)
