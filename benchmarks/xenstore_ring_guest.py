# SPDX-License-Identifier: MIT
"""A guest that talks to xenstored through its ring page: `xenstore_ring.c` in a process of its own.

Arguments: LIBRARY CPU PID and, under a pretended hypervisor, PAGE EVENTS_FD EVENTS_PATH PORT; else it is a process of a
domain and says the port of its event channel first. Then it waits for a line, which says that it is introduced, and
answers each further line, a JSON object with depth, writes and seconds, with what was measured.
"""

import ctypes
import json
import os
import sys
from contextlib import ExitStack
from typing import Any

from paravirt.hypervisor.client import DOM0, XENSTORE_GREF, Hypervisor
from paravirt.ring._core import ffi
from paravirt.ring.memory import PAGE_BYTES, Mapping

NODES = 100


class Setup(ctypes.Structure):
    """`struct ring_setup`."""

    _fields_ = (
        ("page", ctypes.c_void_p),
        ("rx_inbox", ctypes.c_void_p),
        ("tx_inbox", ctypes.c_void_p),
        ("rx_slot", ctypes.c_uint32),
        ("tx_slot", ctypes.c_uint32),
        ("rx_bell_fd", ctypes.c_int32),
        ("tx_bell_fd", ctypes.c_int32),
        ("events_fd", ctypes.c_int32),
        ("port", ctypes.c_uint32),
        ("events_path", ctypes.c_char_p),
        ("pid", ctypes.c_int32),
        ("nodes", ctypes.c_uint32),
        ("depth", ctypes.c_uint32),
        ("writes", ctypes.c_uint32),
        ("seconds", ctypes.c_double),
    )


class Result(ctypes.Structure):
    """`struct ring_result`."""

    _fields_ = (
        ("operations", ctypes.c_uint64),
        ("errors", ctypes.c_uint64),
        ("mismatches", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("p50_us", ctypes.c_double),
        ("p99_us", ctypes.c_double),
        ("max_us", ctypes.c_double),
        ("cpu_us", ctypes.c_double),
    )


def address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


def pretended(stack: ExitStack, page: str, events_fd: str, events_path: str, port: str) -> Setup:
    """The ring page is a file, events are datagrams."""
    fd = os.open(page, os.O_RDWR)
    stack.callback(os.close, fd)
    memory = stack.enter_context(Mapping(fd, PAGE_BYTES))
    sys.stdin.readline()
    return Setup(
        page=memory.address,
        events_fd=int(events_fd),
        port=int(port),
        events_path=os.fsencode(events_path),
    )


def own(stack: ExitStack) -> Setup:
    """A domain's own page and a channel to Dom0."""
    hypervisor = stack.enter_context(Hypervisor.from_environment())
    memory = hypervisor.reserved_page(XENSTORE_GREF).memory
    waiter = hypervisor.waiter()
    channel = hypervisor.alloc_unbound(waiter, DOM0)
    print(channel.port, flush=True)
    sys.stdin.readline()
    channel.refresh()
    (inbox,) = waiter.inboxes
    core = channel.core
    return Setup(
        page=memory.address,
        rx_inbox=address(inbox.core),
        tx_inbox=address(core.tx),
        rx_slot=core.rx_slot,
        tx_slot=core.tx_slot,
        rx_bell_fd=inbox.bell_fd,
        tx_bell_fd=core.tx_bell,
    )


def main(library: str, cpu: str, pid: str, *others: str) -> None:
    os.sched_setaffinity(0, {int(cpu)})
    run = ctypes.CDLL(library).xenstore_ring_run
    with ExitStack() as stack:
        setup = pretended(stack, *others) if others else own(stack)
        setup.pid, setup.nodes = int(pid), NODES
        print("ready", flush=True)
        for line in sys.stdin:
            for name, value in json.loads(line).items():
                setattr(setup, name, value)
            result = Result()
            run(ctypes.byref(setup), ctypes.byref(result))
            print(json.dumps({name: getattr(result, name) for name, _ in Result._fields_}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
