# SPDX-License-Identifier: MIT
"""The run directory of a host: where its sockets and locks stand, and the only way any command finds a host.

It is a directory of mode 0700 that belongs to the caller, so that nobody else and no isolated domain can reach Dom0's
sockets. Locks are open-file-description locks: the kernel frees them with their last holder, so what a killed host left
behind is known to be stale and is replaced.
"""

import errno
import fcntl
import os
import re
import stat
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, PermissionRefused

DEFAULT_HOST = "default"
SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket: `sun_path` without its final zero (unix(7))."""

_SYSTEM_BASE = Path("/run/paravirt")
_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_LONGEST = "domains/32751/hypervisor.sock"
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of a 64-bit Linux: type, whence, start, length, pid


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one host. Making one touches nothing; `create`, `lock` and `require_running` do."""

    path: Path
    host: str = DEFAULT_HOST
    base: Path | None = None
    """The directory that holds the run directories of all hosts; None when `path` was given."""

    @classmethod
    def locate(
        cls, host: str = DEFAULT_HOST, run: str | Path | None = None, *, environ: Mapping[str, str] = os.environ
    ) -> "RunDir":
        """`run`, else $PARAVIRT_RUN, else the place of `host` below /run, $XDG_RUNTIME_DIR or the temporary folder.

        Raises `InvalidRequest` for a host name that is no file name or a path too long for a socket in it.
        """
        if not _HOST_NAME.fullmatch(host):
            raise InvalidRequest(f"host name {host!r} is not made of up to 64 letters, digits and . _ -")
        given = run or environ.get("PARAVIRT_RUN")
        base = None if given else _base(environ)
        path = base / host if base else Path(os.path.abspath(given or ""))
        length = len(os.fsencode(path / _LONGEST))
        if length > SOCKET_PATH_BYTES:
            raise InvalidRequest(
                f"run directory {path} is {length - SOCKET_PATH_BYTES} bytes too long: "
                f"socket paths in it may have {SOCKET_PATH_BYTES} bytes"
            )
        return cls(path, host, base)

    @property
    def hypervisor_socket(self) -> Path:
        """Dom0's socket of the broker."""
        return self.path / "hypervisor.sock"

    @property
    def xenstored_socket(self) -> Path:
        """Dom0's socket of xenstored."""
        return self.path / "xenstored.sock"

    @property
    def network_socket(self) -> Path:
        """Where the backend of network devices says what its bridges do."""
        return self.path / "network.sock"

    @property
    def domains(self) -> Path:
        """Directory with one directory for each running domain."""
        return self.path / "domains"

    def domain_socket(self, domid: int) -> Path:
        """The broker's socket for further processes of `domid`."""
        return self.domains / str(domid) / "hypervisor.sock"

    @property
    def hidden(self) -> list[Path]:
        """What a domain must not see: this host's directory, and those of this user's other hosts."""
        return [self.path] if self.base is None else [self.path, self.base]

    def create(self) -> None:
        """Make the directory, or check the one that is there.

        Raises `PermissionRefused` when it belongs to somebody else, is open to others or cannot be made.
        """
        for path in filter(None, (self.base, self.path)):
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise PermissionRefused(f"cannot make the run directory {path}: {error.strerror}") from error
            _check_private(path)

    @contextmanager
    def lock(self, role: str) -> Iterator[None]:
        """Be the only live `role` of this host: "host", "hypervisor", "xenstored", "backend" or "backend-CLASS".

        The lock file goes when the lock is given back. Raises `AlreadyExists` when another live process has it.
        """
        path = self._lock_file(role)
        fd = self._take(path, role)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                path.unlink()
            os.close(fd)

    def locked(self, role: str) -> bool:
        """True if a live process holds the lock of `role`; asks without taking it."""
        try:
            fd = os.open(self._lock_file(role), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise PermissionRefused(f"cannot look into the run directory {self.path}: {error.strerror}") from error
        try:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        finally:
            os.close(fd)
        return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK

    @property
    def running(self) -> bool:
        """True if this host's broker lives."""
        return self.locked("hypervisor")

    def require_running(self) -> None:
        """Raise `NotFound` unless this host's broker lives, `PermissionRefused` if the directory is not ours alone."""
        if self.path.is_dir():
            _check_private(self.path)
        if not self.running:
            raise NotFound(f"host {self.host} is not running (run directory {self.path}); start it with: paravirt up")

    def sweep(self) -> None:
        """Take away what killed daemons left. What a live one has is left alone: each role is locked meanwhile."""
        doors = self.domains.glob("*/hypervisor.sock")
        own_classes = [path.stem for path in self.path.glob("backend-*.lock")]
        for role, left in (
            *((name, []) for name in ("backend", *own_classes)),
            ("backend-vif", [self.network_socket]),
            ("xenstored", [self.xenstored_socket]),
            ("hypervisor", [self.hypervisor_socket, *doors]),
        ):
            with suppress(AlreadyExists), self.lock(role):
                for path in left:
                    if path.is_socket():
                        path.unlink()

    def remove(self) -> None:
        """Take the directories away if nothing is left in them."""
        for domain in self.domains.glob("*"):
            with suppress(OSError):
                domain.rmdir()
        for directory in (self.domains, self.path, self.base):
            if directory is not None:
                with suppress(OSError):
                    directory.rmdir()

    def _lock_file(self, role: str) -> Path:
        return self.path / f"{role}.lock"

    def _take(self, path: Path, role: str) -> int:
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise PermissionRefused(f"cannot open {path}: {error.strerror}") from error
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
                if _same_file(fd, path):
                    return fd
            except OSError as error:
                os.close(fd)
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    what = f"host {self.host}" if role in ("host", "hypervisor") else f"the {role} of host {self.host}"
                    raise AlreadyExists(f"{what} is running already (run directory {self.path})") from error
                raise PermissionRefused(f"cannot lock {path}: {error.strerror}") from error
            os.close(fd)  # its former holder removed it between our open and our lock


def _base(environ: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return _SYSTEM_BASE
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime and os.path.isabs(runtime) and os.access(runtime, os.W_OK):
        return Path(runtime) / "paravirt"
    return Path(tempfile.gettempdir()) / f"paravirt-{os.geteuid()}"


def _check_private(path: Path) -> None:
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionRefused(f"run directory {path} is not a directory")
    if status.st_uid != os.geteuid():
        raise PermissionRefused(f"run directory {path} belongs to uid {status.st_uid}, not to {os.geteuid()}")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise PermissionRefused(f"run directory {path} is open to others (mode {mode:04o}); it must have mode 0700")


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
