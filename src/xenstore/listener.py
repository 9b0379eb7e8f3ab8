# SPDX-License-Identifier: MIT
"""A listening Unix socket that replaces a stale one but never a live one."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from typing import Final

from paravirt.errors import AlreadyExists, InvalidRequest, NotFound, PermissionRefused

PATH_MAX_BYTES: Final = 107
BACKLOG: Final = 512
_CREDENTIALS: Final = struct.Struct("3i")


def listen(path: str) -> socket.socket:
    """A non-blocking listening socket at `path`, for this user alone.

    Raises `AlreadyExists` if somebody serves it or it is another kind of file.
    """
    if len(os.fsencode(path)) > PATH_MAX_BYTES:
        raise InvalidRequest(f"the path of a socket may have {PATH_MAX_BYTES} bytes, this one is longer: {path}")
    folder = os.path.dirname(path) or "."
    try:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"no directory for the socket: {folder}: {error.strerror}") from error
    try:
        fcntl.flock(folder_fd, fcntl.LOCK_EX)  # two daemons that start at once must not replace each other's socket
        _remove_stale(path)
        return _bind(path)
    finally:
        os.close(folder_fd)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise AlreadyExists(f"{path} is there and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code in (0, errno.EAGAIN, errno.EINPROGRESS):
        raise AlreadyExists(f"another daemon serves {path}")
    if code == errno.ECONNREFUSED:
        os.unlink(path)
    elif code != errno.ENOENT:
        raise PermissionRefused(f"{path}: {os.strerror(code)}")


def _bind(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise PermissionRefused(f"{path}: {error.strerror}") from error
    return listener


def identity(path: str) -> tuple[int, int] | None:
    """What file a path names now, to tell it from a later one."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def unlink_own(path: str, own: tuple[int, int] | None) -> None:
    """Remove the socket if it is still the one that was made."""
    if own is not None and identity(path) == own:
        with contextlib.suppress(OSError):
            os.unlink(path)


def peer_may_be_dom0(client: socket.socket) -> bool:
    """Whether the process at the other end has the daemon's user or is root."""
    raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, uid, _gid = _CREDENTIALS.unpack(raw)
    return uid in (0, os.geteuid())
