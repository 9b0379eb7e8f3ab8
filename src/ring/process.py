# SPDX-License-Identifier: MIT
"""Rights and namespaces of the calling process (`c_ext/pv_process.h` says what each does, and in which order).

Everything here raises `OSError` with what was tried: callers say what that means for the user.
"""

import os
import select
import signal
from enum import IntFlag

from paravirt.ring._core import ffi, lib


class Namespace(IntFlag):
    """Kinds of namespaces for `unshare`. `PID` counts for children only."""

    MOUNT = lib.PV_NEW_MOUNT
    IPC = lib.PV_NEW_IPC
    USER = lib.PV_NEW_USER
    PID = lib.PV_NEW_PID
    NET = lib.PV_NEW_NET


class MountFlag(IntFlag):
    """Flags for `mount`."""

    NONE = 0
    NOSUID = lib.PV_MOUNT_NOSUID
    NODEV = lib.PV_MOUNT_NODEV
    NOEXEC = lib.PV_MOUNT_NOEXEC
    BIND = lib.PV_MOUNT_BIND
    RECURSIVE = lib.PV_MOUNT_RECURSIVE
    PRIVATE = lib.PV_MOUNT_PRIVATE


def set_dumpable(on: bool) -> None:
    """False: other processes of this uid can neither trace this one nor open its memory and descriptors."""
    _check(lib.pv_set_dumpable(on), "change of dumpable")


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that made this process ends; end now if its process, the pidfd `parent`, did already.

    A change of uid or capabilities forgets it, so it comes after those.
    """
    _check(lib.pv_set_death_signal(signal.SIGKILL), "parent-death signal")
    poller = select.poll()
    poller.register(parent, select.POLLIN)
    if poller.poll(0):
        os._exit(128 + signal.SIGKILL)


def forbid_new_privileges() -> None:
    """No later exec can give rights."""
    _check(lib.pv_set_no_new_privileges(), "no-new-privileges")


def lock_capabilities() -> None:
    """Empty the bounding set and make uid 0 mean nothing; needs CAP_SETPCAP."""
    _check(lib.pv_lock_capabilities(), "drop of the capability bounding set")


def keep_network_rights() -> None:
    """In user and network namespaces of its own: be an administrator of that network, and nothing else for good."""
    _check(lib.pv_keep_network_rights(), "choice of capabilities")


def drop_capabilities() -> None:
    """Give up every capability."""
    _check(lib.pv_drop_capabilities(), "drop of capabilities")


def may_become_others() -> bool:
    """True if this process may change uids and mount without a user namespace of its own (is root in earnest)."""
    wanted = lib.PV_CAP_SYS_ADMIN | lib.PV_CAP_SETUID | lib.PV_CAP_SETGID
    return bool(lib.pv_has_capabilities(wanted))


def unshare(namespaces: Namespace) -> None:
    """Move into new namespaces."""
    names = ", ".join(str(part.name).lower() for part in namespaces)
    _check(lib.pv_unshare(namespaces), f"new {names} namespaces")


def mount(source: str, target: str, kind: str = "", flags: MountFlag = MountFlag.NONE, options: str = "") -> None:
    """Mount `source` at `target`; `kind` is the file system's type, "" for binds and changes of propagation."""
    status = lib.pv_mount(
        os.fsencode(source),
        os.fsencode(target),
        kind.encode() or ffi.NULL,
        flags,
        options.encode() or ffi.NULL,
    )
    _check(status, f"mount of {kind or source} on {target}")


def make_mounts_read_only(path: str) -> None:
    """Make the mount at `path` and all below it read-only."""
    _check(lib.pv_mounts_read_only(os.fsencode(path)), f"change of the mounts below {path}")


def bring_loopback_up() -> None:
    """Bring the loopback device of this network namespace up."""
    _check(lib.pv_loopback_up(), "start of the loopback device")


def membarrier_scopes() -> list[str]:
    """Where the kernel offers the asymmetric fence: "process", "host" (between processes that opt in)."""
    offered = lib.pv_membarrier_commands()
    _check(offered, "membarrier")
    scopes = {"process": lib.PV_MEMBARRIER_PRIVATE, "host": lib.PV_MEMBARRIER_GLOBAL}
    return [name for name, bit in scopes.items() if offered & bit]


def try_io_uring() -> None:
    """Make and drop an io_uring."""
    _check(lib.pv_try_io_uring(), "io_uring")


def _check(status: int, what: str) -> None:
    if status < 0:
        raise OSError(-status, f"{what}: {os.strerror(-status)}")
