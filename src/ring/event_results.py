# SPDX-License-Identifier: MIT
"""How waits and notifications end, what is counted of them, and the errors that the C core's numbers mean."""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from paravirt.errors import Closed, InvalidRequest, PeerError, ResourceLimit
from paravirt.ring._core import lib

_MAX_TIMEOUT_S = 1e9


class WaitResult(IntEnum):
    """How a wait ended."""

    TIMEOUT = lib.PV_WAIT_TIMEOUT
    EVENT = lib.PV_WAIT_EVENT
    KICKED = lib.PV_WAIT_KICKED
    """`EventWaiter.kick` was called; told once."""
    STALE = lib.PV_WAIT_STALE
    """Some channel of this waiter was bound or closed, or its peer died; told once a change."""


class NotifyResult(IntEnum):
    """What became of a notification."""

    SUPPRESSED = lib.PV_NOTIFY_SUPPRESSED
    """Delivered; the receiver was awake, had it masked, or was told already."""
    RANG = lib.PV_NOTIFY_RANG
    """Delivered, and the doorbell was written (one system call)."""
    STALE = lib.PV_NOTIFY_STALE
    """Not delivered: the binding changed and nobody could say to what."""
    UNBOUND = lib.PV_NOTIFY_UNBOUND
    """Dropped silently: there is no peer."""


@dataclass(frozen=True, slots=True)
class WaiterStatistics:
    """Counted since the waiter was made."""

    sleeps: int
    """System calls that waited."""
    wakeups: int
    """Of these: ended by a doorbell or a kick, not by time or a signal."""
    unheard: int = 0
    """Times a doorbell that had rung for nothing too often was left unheard for a while."""


@dataclass(frozen=True, slots=True)
class PortStatistics:
    """Counted since the port was made."""

    sent: int
    """Notifications that had a peer."""
    rang: int
    """Of these: the doorbell was written."""
    merged: int
    """Of these: the peer had an untaken event already."""
    dropped: int
    """Notifications without a peer."""
    received: int
    """Events taken."""
    spurious: int
    """Of these, in late-EOI mode: ended as one without work."""
    eoi_delayed_ns: int
    """Sum of the delays that these cost."""


def check_status(status: int, what: str) -> int:
    """Turn a negative errno of the C core into the error it means."""
    if status >= 0:
        return status
    if status == -errno.ECHILD:
        raise Closed(f"{what} belongs to the parent of this process")
    if status == -errno.EBADF:
        raise Closed(f"{what}: its event channel is closed")
    if status == -errno.EPROTO:
        raise PeerError(f"{what}: the shared page has the wrong magic or version")
    if status == -errno.EBUSY:
        raise InvalidRequest(f"{what}: another thread waits here; kick it and let it do this")
    if status in (-errno.ENOMEM, -errno.EMFILE, -errno.ENFILE, -errno.ENOSPC):
        raise ResourceLimit(f"{what}: {os.strerror(-status)}")
    raise OSError(-status, f"{what}: {os.strerror(-status)}")


def timeout_to_ns(timeout_s: float | None) -> int:
    """For the C core: -1 is no limit. Raises `InvalidRequest` for a negative timeout."""
    if timeout_s is None:
        return -1
    if not timeout_s >= 0:
        raise InvalidRequest(f"a timeout is 0 or more seconds, not {timeout_s}")
    return int(min(timeout_s, _MAX_TIMEOUT_S) * 1e9)


def resume_on_signal(wait: Callable[[int, int], int], spin_ns: int, timeout_s: float | None) -> int:
    """Call `wait(spin_ns, timeout_ns)` again with what is left as long as it is interrupted.

    Python runs its signal handlers in between.
    """
    timeout_ns = timeout_to_ns(timeout_s)
    start_ns = time.monotonic_ns()
    status = wait(spin_ns, timeout_ns)
    while status == lib.PV_WAIT_INTERRUPTED:
        spent_ns = time.monotonic_ns() - start_ns
        status = wait(max(0, spin_ns - spent_ns), -1 if timeout_ns < 0 else max(0, timeout_ns - spent_ns))
    return status
