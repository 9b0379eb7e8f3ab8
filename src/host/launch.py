# SPDX-License-Identifier: MIT
"""Start a command as a domain's process, isolated from the host or not.

*Isolated* is what the promises are about: own uid (as root) or own user namespace, own mount, pid, IPC and network
namespaces, no capabilities, no way to new ones, the host's run directory out of sight, /proc of its own, a read-only
file tree with empty /run, /tmp, /var/tmp and /dev/shm. *Shared* is a plain process of the same uid: no claim is made.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

from paravirt import errors
from paravirt.errors import InvalidRequest, ParavirtError, TimedOut
from paravirt.host.plan import COMMAND_FD, VISIBLE_SOCKET, Plan
from paravirt.host.reach import View, everywhere, needs_of, view_for
from paravirt.ring import process

GUEST_UID_BASE = 0x7E00_0000
"""As root, domain n runs with uid and gid GUEST_UID_BASE + n."""

GUEST_UID_END = GUEST_UID_BASE + 0x7FF0
"""The first uid behind those of the last domain."""

START_TIMEOUT_S = 30.0

_HOSTS_OWN = ("PARAVIRT_", "XDG_RUNTIME_DIR", "DBUS_", "SSH_", "TMUX", "GPG_", "DISPLAY", "WAYLAND_", "XAUTHORITY")
_PACKET_BYTES = 65536


def guest_uid(domid: int) -> int | None:
    """The uid of isolated processes of `domid`; None where the caller cannot give them one (is not root)."""
    return GUEST_UID_BASE + domid if can_give_uids() else None


def can_give_uids() -> bool:
    """True for root in earnest: with the rights for it, and in a user namespace that has the uids of guests."""
    if not process.may_become_others():
        return False
    ranges = [map(int, line.split()) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= GUEST_UID_BASE and first + n >= GUEST_UID_END for first, _, n in ranges)


def launch(
    command: Sequence[str],
    *,
    domid: int,
    hypervisor_fd: int,
    isolated: bool = True,
    network: bool = False,
    hide: Iterable[Path] = (),
    expose: Iterable[Path] = (),
    domain_socket: Path | None = None,
    directory: Path | None = None,
    environment: Mapping[str, str] | None = None,
    stdin: int | IO[Any] | None = None,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
) -> "DomainProcess":
    """Start `command` as the first process of `domid` and return once it runs.

    The command finds its connected broker socket in $PARAVIRT_FD (a copy of `hypervisor_fd`, which stays the caller's)
    and, for further processes, `domain_socket` at $PARAVIRT_SOCKET; `python3` is the interpreter of the caller. An
    isolated domain sees `expose` (read-only) beside what its command needs, and never sees `hide`. `directory` is the
    working directory (default: the caller's; "/" where the domain may not enter it). `stdin`, `stdout` and `stderr` are
    as for `subprocess.Popen`.

    `network`: an isolated command administers the network namespace that it is in: it may make interfaces there and
    give them addresses. That is a user namespace of its own, so rights there are none elsewhere.

    Raises `NotFound` or `PermissionRefused` when the command cannot be run or the kernel refuses to isolate.
    """
    if not command:
        raise InvalidRequest("no command to run")
    uid = guest_uid(domid) if isolated else None
    if uid is not None and domain_socket is not None:
        os.chown(domain_socket, uid, uid)
    directory = Path.cwd() if directory is None else directory
    environment = _environment(os.environ if environment is None else environment, isolated, uid, domain_socket)
    hidden = sorted({place for path in hide for place in everywhere(path)})
    view = View([], [])
    if isolated:
        view = view_for([*needs_of(command, directory, environment), *expose], uid=uid)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plan = Plan(
        command=list(command),
        environment=environment,
        directory=str(directory),
        launcher=os.getpid(),
        status_fd=theirs.fileno(),
        hypervisor_fd=hypervisor_fd,
        isolated=isolated,
        network=network and isolated,
        uid=uid,
        cover=view.cover,
        expose=[path for path in view.expose if not any(Path(path).is_relative_to(hiding) for hiding in hidden)],
        hide=hidden,
        socket=str(domain_socket) if isolated and domain_socket else None,
    )
    with ours:
        with theirs:
            keeper = _start_keeper(plan, stdin, stdout, stderr)
        pid, pidfd = _await_start(ours, keeper)
    return DomainProcess(keeper, pid, pidfd, list(command))


class DomainProcess:
    """A running command of a domain; a context manager that ends it.

    `pid` and `pidfd` are those of the domain's init: when it ends, all processes of an isolated domain end.
    """

    def __init__(self, keeper: "subprocess.Popen[Any]", pid: int, pidfd: int, command: list[str]) -> None:
        self._keeper = keeper
        self.pid = pid
        self.pidfd = pidfd
        self.command = command

    @property
    def stdin(self) -> IO[Any] | None:
        return self._keeper.stdin

    @property
    def stdout(self) -> IO[Any] | None:
        return self._keeper.stdout

    @property
    def stderr(self) -> IO[Any] | None:
        return self._keeper.stderr

    def poll(self) -> int | None:
        """The exit status as a shell gives it (128 + signal number if one killed the command); None: it still runs."""
        code = self._keeper.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the end and return the exit status. Raises `TimedOut`."""
        try:
            self._keeper.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TimedOut(f"{self.command[0]} still runs after {timeout_s} s") from error
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the command (init hands it on); nothing happens if it has ended."""
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass

    def kill(self) -> None:
        """End all processes of the domain at once."""
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill what still runs and free the descriptors."""
        self.kill()
        self.wait()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DomainProcess {self.command[0]!r} init {self.pid} status {self.poll()}>"


def _environment(
    given: Mapping[str, str], isolated: bool, uid: int | None, domain_socket: Path | None
) -> dict[str, str]:
    """The command's environment: without what names places of the host that it cannot or must not use."""
    own = "PARAVIRT_" if not isolated else _HOSTS_OWN
    environment = {name: value for name, value in given.items() if not name.startswith(own)}
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment.get("PATH", os.defpath)])
    environment["PARAVIRT_FD"] = str(COMMAND_FD)
    if domain_socket is not None:
        environment["PARAVIRT_SOCKET"] = VISIBLE_SOCKET if isolated else str(domain_socket)
    if uid is not None:
        environment["HOME"] = "/tmp"
    return environment


def _start_keeper(plan: Plan, stdin: Any, stdout: Any, stderr: Any) -> "subprocess.Popen[Any]":
    plan_fd = os.memfd_create("paravirt-plan", os.MFD_CLOEXEC)
    with open(plan_fd, "wb") as file:
        file.write(plan.dump())
        file.flush()
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "paravirt.host.sandbox", str(plan_fd)],
            pass_fds=(plan_fd, plan.status_fd, plan.hypervisor_fd),
            start_new_session=True,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )


def _await_start(status: socket.socket, keeper: "subprocess.Popen[Any]") -> tuple[int, int]:
    """Init's pid and pidfd, once the command runs; otherwise the error that the keeper or init reports."""
    status.settimeout(START_TIMEOUT_S)
    pid, pidfd = 0, -1
    try:
        while True:
            data, fds, _, _ = socket.recv_fds(status, _PACKET_BYTES, 1)
            if not data:
                break
            report = json.loads(data)
            if "error" in report:
                raise getattr(errors, report["kind"])(report["error"])
            pid, pidfd = report["pid"], fds[0]
        if pidfd < 0:
            raise ParavirtError(f"the domain's process ended before its command ran (status {keeper.wait()})")
    except BaseException as error:
        keeper.kill()
        keeper.wait()
        if pidfd >= 0:
            os.close(pidfd)
        if isinstance(error, TimeoutError):
            raise TimedOut(f"the domain's command did not start within {START_TIMEOUT_S:.0f} s") from error
        raise
    return pid, pidfd
