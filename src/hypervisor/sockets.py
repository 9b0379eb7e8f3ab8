# SPDX-License-Identifier: MIT
"""The broker's sockets: listening ones in the run directory, and messages with descriptors that never block."""

import array
import errno
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from paravirt.errors import AlreadyExists, InvalidRequest, PeerError, PermissionRefused
from paravirt.hypervisor.messages import MAX_FDS, MESSAGE_BYTES

_CREDENTIALS = struct.Struct("3i")
BACKLOG = 64
SEND_BUFFER_BYTES = 8192
"""A reader that does not read holds back this much and the descriptors beside it, then it is not listened to."""
_MAX_PATH_BYTES = 107


def make_pair() -> tuple[socket.socket, socket.socket]:
    """(the broker's end, the process' end). Whoever gets the latter is named with its messages."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limit_backlog(ours)
    name_senders(ours, True)
    return ours, theirs


def name_senders(ours: socket.socket, on: bool) -> None:
    """Whether the kernel says with each message which process sent it."""
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, on)


def peer_pid(ours: socket.socket) -> int:
    """The process that connected."""
    pid: int = _CREDENTIALS.unpack(ours.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    return pid


def limit_backlog(ours: socket.socket) -> None:
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def listen(path: Path, uid: int | None = None) -> socket.socket:
    """A listening socket of mode 0600, owned by `uid` if that is given. A stale one is replaced.

    Raises `AlreadyExists` when a process listens there, `InvalidRequest` for a path that is too long,
    `PermissionRefused`.
    """
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise InvalidRequest(f"the socket path {path} is longer than {_MAX_PATH_BYTES} bytes")
    if path.is_socket():
        _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Nobody can connect before listen(), so the rights are set in time.
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        if uid is not None:
            os.chown(path, uid, -1)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(f"{path} exists and is no socket of ours") from error
        raise PermissionRefused(f"cannot listen at {path}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _remove_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError:
            pass  # it listens, or speaks another type of socket: somebody is there
    raise AlreadyExists(f"another hypervisor listens at {path}")


class Received(NamedTuple):
    """A message and its descriptors, which are the caller's."""

    data: bytes
    fds: list[int]
    lost_fds: bool
    """This process could not hold all of them."""
    pid: int
    """Of the sender, if the socket names senders; else 0."""


def receive(ours: socket.socket) -> Received | None:
    """One message; None at the other side's end.

    Raises `BlockingIOError` when there is none, `PeerError` for an oversized message or too many descriptors.
    """
    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize) + socket.CMSG_SPACE(_CREDENTIALS.size)
    try:
        data, ancillary, flags, _ = ours.recvmsg(
            MESSAGE_BYTES + 1, space, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionError:
        return None
    fds, pid = array.array("i"), 0
    for level, kind, part in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(part[: len(part) - len(part) % fds.itemsize])
        elif level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(part) == _CREDENTIALS.size:
            pid = _CREDENTIALS.unpack(part)[0]
    lost_fds = bool(flags & socket.MSG_CTRUNC)
    if flags & socket.MSG_TRUNC or len(fds) > MAX_FDS or (lost_fds and len(fds) == MAX_FDS):
        close_all(fds)
        raise PeerError("a message that is too long, or has too many descriptors")
    if not data and not fds:
        return None
    return Received(data, list(fds), lost_fds, pid)


def send(ours: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Raises `BlockingIOError` when it would block, `OSError`."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    ours.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
