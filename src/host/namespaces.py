# SPDX-License-Identifier: MIT
"""An isolated domain's namespaces, its view of the files, and the rights it gives up; in this order.

As root the domain gets a uid of its own; otherwise a user namespace, in which only the launcher's own uid exists. Both
get mount, pid, IPC and network namespaces: what the host's processes leave in /run, /tmp and /dev/shm, their /proc
entries, System V objects and abstract sockets are out of sight. The rest of the file tree is read-only.
"""

import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from paravirt.errors import PermissionRefused
from paravirt.host.plan import VISIBLE_SOCKET, Plan
from paravirt.ring import process
from paravirt.ring.process import MountFlag, Namespace

_NO_PROGRAMS = MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
_TUN = "/dev/net/tun"
_NO_DEVICES = MountFlag.NOSUID | MountFlag.NODEV


def enter(plan: Plan) -> None:
    """Move this process into new namespaces; its children are in the new pid namespace.

    Raises `PermissionRefused` where the kernel does not give them.
    """
    wanted = Namespace.MOUNT | Namespace.PID | Namespace.IPC | Namespace.NET
    uid, gid = os.geteuid(), os.getegid()
    try:
        process.unshare(wanted if plan.uid is not None else wanted | Namespace.USER)
        if plan.uid is None:
            _map_ids(uid, gid)
    except OSError as error:
        raise PermissionRefused(
            f"the kernel refuses to isolate a domain ({error.strerror}); "
            "allow user namespaces, be root, or use --shared, which isolates nothing"
        ) from error
    process.mount("none", "/", flags=MountFlag.PRIVATE | MountFlag.RECURSIVE)
    process.bring_loopback_up()


def build_view(plan: Plan) -> None:
    """Make the domain's file tree; in the first process of the new pid namespace.

    The host's mounts came into this namespace as one locked unit, so a domain that makes namespaces of its own cannot
    take a cover away again.
    """
    door = os.open(plan.socket, os.O_PATH | os.O_CLOEXEC) if plan.socket else None
    os.umask(0o022)
    process.make_mounts_read_only("/")
    process.mount("proc", "/proc", "proc", _NO_PROGRAMS)
    if os.path.isdir("/dev/pts"):
        process.mount("devpts", "/dev/pts", "devpts", MountFlag.NOSUID | MountFlag.NOEXEC, "newinstance,ptmxmode=0666")
    arrange(plan.cover, plan.expose)
    if plan.network and plan.uid is not None:
        _open_tun_to_all()
    for path in plan.hide:
        if os.path.isdir(path):
            process.mount("tmpfs", path, "tmpfs", _NO_PROGRAMS, "mode=0500,nr_inodes=1")
            process.make_mounts_read_only(path)
    if door is not None:
        _bind(door, VISIBLE_SOCKET)
    os.umask(0o077)


def _open_tun_to_all() -> None:
    """A /dev/net/tun that the domain's uid may open, where root alone may: what it gives needs rights over a network
    anyhow. Where no device may be made, there is none.
    """
    if not os.path.exists(_TUN):
        return
    device = os.stat(_TUN).st_rdev
    process.mount("tmpfs", os.path.dirname(_TUN), "tmpfs", MountFlag.NOSUID | MountFlag.NOEXEC, "mode=0755,nr_inodes=2")
    with suppress(OSError):
        os.mknod(_TUN, 0o666 | stat.S_IFCHR, device)
        os.chmod(_TUN, 0o666)
    process.make_mounts_read_only(os.path.dirname(_TUN))


def arrange(cover: Iterable[str], expose: Iterable[str]) -> None:
    """Make each of `cover` an empty directory and show `expose`, which may lie below them, at the same paths.

    What is to be seen is held by descriptors before anything is covered.
    """
    shown = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in expose if os.path.exists(path)}
    for path in cover:
        mode = "1777" if path.endswith(("/tmp", "/shm")) else "0755"
        process.mount("tmpfs", path, "tmpfs", _NO_DEVICES, f"mode={mode}")
    for path, fd in shown.items():
        _bind(fd, path)


def give_up_rights(plan: Plan) -> None:
    """Become the domain's uid, without groups, capabilities and ways to get any."""
    process.lock_capabilities()
    if plan.uid is not None:
        os.setgroups([])
        os.setresgid(plan.uid, plan.uid, plan.uid)
        os.setresuid(plan.uid, plan.uid, plan.uid)
    process.drop_capabilities()
    if plan.network:
        _administer_network()
    process.forbid_new_privileges()
    process.set_dumpable(False)


def _administer_network() -> None:
    """A network namespace of a user namespace of its own, as whoever we are by now: rights there are none elsewhere.

    The files are still those of the namespaces around it, in which there is no right left.
    """
    uid, gid = os.geteuid(), os.getegid()
    process.set_dumpable(True)  # else what is to be written below /proc/self is not ours
    try:
        process.unshare(Namespace.USER | Namespace.NET)
        _map_ids(uid, gid)
    except OSError as error:
        raise PermissionRefused(
            f"the kernel refuses a domain a network of its own ({error.strerror}): that needs user namespaces"
        ) from error
    process.bring_loopback_up()
    process.keep_network_rights()


def _map_ids(uid: int, gid: int) -> None:
    """Nobody else is in our user namespace."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _bind(fd: int, path: str) -> None:
    """Show what `fd` holds at `path`, whose parent directories are made where they are missing."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.isdir(f"/proc/self/fd/{fd}"):
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_CLOEXEC, 0o600))
    process.mount(f"/proc/self/fd/{fd}", path, flags=MountFlag.BIND | MountFlag.RECURSIVE)
    os.close(fd)
