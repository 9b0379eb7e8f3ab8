# SPDX-License-Identifier: MIT
"""Rights and namespaces of a process, one call at a time, each looked at from outside the call that made the change."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from paravirt.ring._core import ffi, lib

from ..faults import failing
from ..forked import in_child

PR_GET_PDEATHSIG, PR_GET_DUMPABLE = 2, 3
NEW = lib.PV_NEW_USER | lib.PV_NEW_MOUNT | lib.PV_NEW_NET | lib.PV_NEW_IPC
PROBE = "from paravirt.ring._core import lib; raise SystemExit(lib.pv_unshare({}) != 0)"
needs_namespaces = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", PROBE.format(NEW)], check=False).returncode != 0,
    reason="this kernel makes no user namespaces here",
)


def status(field: str) -> str:
    """A line of /proc/self/status."""
    lines = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return lines[field].strip()


def capabilities(field: str) -> int:
    return int(status(field), 16)


def prctl(option: int) -> int:
    value = ctypes.c_int(-1)
    result = ctypes.CDLL(None).prctl(option, ctypes.byref(value))
    return value.value if option == PR_GET_PDEATHSIG else int(result)


def test_what_a_process_gives_up() -> None:
    def child() -> None:
        for on in (0, 1):
            assert lib.pv_set_dumpable(on) == 0
            assert prctl(PR_GET_DUMPABLE) == on
        assert lib.pv_set_death_signal(signal.SIGUSR1) == 0
        assert prctl(PR_GET_PDEATHSIG) == signal.SIGUSR1
        assert lib.pv_set_death_signal(1000) == -errno.EINVAL
        assert status("NoNewPrivs") == "0"
        assert lib.pv_set_no_new_privileges() == 0
        assert status("NoNewPrivs") == "1"
        assert lib.pv_drop_capabilities() == 0
        assert [capabilities(name) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")] == [0] * 4
        assert lib.pv_has_capabilities(lib.PV_CAP_SYS_ADMIN) == 0
        assert lib.pv_lock_capabilities() == -errno.EPERM, "that needs one of them"

    assert in_child(child) == 0


@needs_namespaces
def test_the_first_process_of_a_user_namespace_can_lose_its_rights_for_good() -> None:
    def child() -> None:
        assert lib.pv_unshare(lib.PV_NEW_USER) == 0
        assert lib.pv_has_capabilities(lib.PV_CAP_SYS_ADMIN | lib.PV_CAP_SETUID | lib.PV_CAP_SETGID) == 1
        with failing("prctl", errno.EPERM, at=2, times=1):
            assert lib.pv_lock_capabilities() == -errno.EPERM
        assert lib.pv_lock_capabilities() == 0
        assert capabilities("CapBnd") == 0
        assert capabilities("CapEff") != 0, "those it has it keeps until it drops them"

    assert in_child(child) == 0


@needs_namespaces
def test_mounts_and_networks_of_its_own(tmp_path: Path) -> None:
    target = os.fsencode(tmp_path)

    def child() -> None:
        user, group = os.getuid(), os.getgid()
        assert lib.pv_unshare(NEW) == 0
        for name, text in (("uid_map", f"0 {user} 1"), ("setgroups", "deny"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
        flags = lib.PV_MOUNT_NOSUID | lib.PV_MOUNT_NODEV
        assert lib.pv_mount(b"none", target + b"/missing", b"tmpfs", flags, ffi.NULL) == -errno.ENOENT
        assert lib.pv_mount(b"none", target, b"tmpfs", flags, b"size=64k,mode=777") == 0
        (tmp_path / "before").write_text("x")
        assert lib.pv_mounts_read_only(target) == 0
        with pytest.raises(OSError, match="Read-only"):
            (tmp_path / "after").write_text("x")
        assert lib.pv_mounts_read_only(target + b"/missing") == -errno.ENOENT
        with socket.socket() as before, pytest.raises(OSError, match="unreachable"):
            before.connect(("127.0.0.1", 9))
        assert lib.pv_loopback_up() == 0
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            pass

    assert in_child(child) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("function", "call"), [("socket", 1), ("ioctl", 1), ("ioctl", 2)])
def test_a_loopback_that_does_not_come_up(function: str, call: int) -> None:
    before = os.listdir("/proc/self/fd")
    with failing(function, errno.EPERM, at=call):
        # The second question is the change: without rights it fails by itself.
        assert lib.pv_loopback_up() == -errno.EPERM
    assert os.listdir("/proc/self/fd") == before


def test_what_the_kernel_does_not_know() -> None:
    with failing("syscall", errno.ENOSYS):
        assert lib.pv_membarrier_commands() == -errno.ENOSYS
        assert lib.pv_try_io_uring() == -errno.ENOSYS
        assert lib.pv_has_capabilities(0) == 0, "not known is not there"
    with failing("syscall", result=os.open("/dev/null", os.O_RDONLY)):
        assert lib.pv_try_io_uring() == 0, "and closes it"
    with failing("prctl", errno.EPERM):
        assert lib.pv_drop_capabilities() == -errno.EPERM
        assert lib.pv_set_dumpable(1) == -errno.EPERM
