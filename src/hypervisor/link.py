# SPDX-License-Identifier: MIT
"""The client's end of a connection: one request and its reply at a time, over the C client of c_ext/pv_hv.h."""

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paravirt.errors import (
    AlreadyExists,
    Closed,
    HypervisorError,
    HypervisorGone,
    NotFound,
    ParavirtError,
    PeerError,
    PermissionRefused,
    ResourceLimit,
)
from paravirt.hypervisor.messages import MAX_FDS, Op, get_text, new_message
from paravirt.ring._core import ffi, lib

CData = Any

_CREDENTIALS = struct.Struct("3i")
_GONE = (-errno.EPIPE, -errno.ECONNRESET, -errno.ENOTCONN)
_ERRORS: dict[int, type[ParavirtError]] = {
    errno.EPERM: PermissionRefused,
    errno.ESRCH: NotFound,
    errno.ENOENT: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.ENOSPC: ResourceLimit,
    errno.ENOMEM: ResourceLimit,
}


def refusal(code: int, text: str) -> ParavirtError:
    """The error that a refusal of the broker means."""
    kind = _ERRORS.get(code)
    return kind(text) if kind else HypervisorError(text, code)


class Reply:
    """A reply and its descriptors. A context manager: what was not taken is closed at the end."""

    def __init__(self, message: CData, fds: list[int]) -> None:
        self.message = message
        self._fds = fds

    def take_fd(self) -> int:
        """The next descriptor, now the caller's. Raises `ResourceLimit` when this process could not hold it."""
        return self.take_fds(1)[0]

    def take_fds(self, n: int) -> list[int]:
        """The next `n` descriptors, all or none."""
        if len(self._fds) < n:
            raise ResourceLimit("this process can hold no more descriptors")
        taken, self._fds = self._fds[:n], self._fds[n:]
        return taken

    def __enter__(self) -> "Reply":
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class Link:
    """Thread-safe. A forked child gets `Closed`; once the broker died every call raises `HypervisorGone`."""

    def __init__(self, connected: socket.socket) -> None:
        """Takes the socket, and greets. Raises `HypervisorGone`."""
        self._socket: socket.socket | None = connected
        self._lock = threading.Lock()
        self._seq = 0
        self._pid = os.getpid()

    def call(self, op: Op, fill: Callable[[CData], None] | None = None, *, send_fd: int = -1) -> Reply:
        """One operation; `fill` writes the payload of the request.

        A reply that is an error is raised as what it means: `PermissionRefused`, `NotFound`, `AlreadyExists`,
        `ResourceLimit`, `HypervisorError`.
        """
        request, reply, fds = new_message(op), ffi.new("struct pv_hv_message *"), ffi.new("int[]", MAX_FDS)
        if fill is not None:
            fill(request)
        with self._lock:
            self._check_open()
            assert self._socket is not None
            self._seq = (self._seq + 1) % 2**32
            request.header.seq = self._seq
            result = lib.pv_hv_send(self._socket.fileno(), request, send_fd)
            if not result:
                result = self._receive(self._socket.fileno(), reply, fds)
        if result in _GONE:
            raise HypervisorGone("the hypervisor is gone, or has closed this connection")
        if result < 0:
            raise PeerError(f"the hypervisor does not speak our protocol: {os.strerror(-result)}")
        answer = Reply(reply, list(fds[0:result]))
        if reply.header.status:
            with answer:
                raise refusal(-reply.header.status, get_text(reply.failure.text))
        return answer

    def do(self, op: Op, fill: Callable[[CData], None] | None = None, *, send_fd: int = -1) -> None:
        """An operation whose reply says nothing."""
        with self.call(op, fill, send_fd=send_fd):
            pass

    def do_quietly(self, op: Op, fill: Callable[[CData], None]) -> None:
        """For what is to be closed: a broker that is gone, or knows nothing of it any more, has closed it already."""
        with contextlib.suppress(ParavirtError):
            self.do(op, fill)

    def _receive(self, fd: int, reply: CData, fds: CData) -> int:
        result = -errno.EINTR
        while result == -errno.EINTR:  # back in Python, so that signal handlers run
            result = lib.pv_hv_receive(fd, self._seq, reply, fds, MAX_FDS)
        return result

    def identity(self) -> str:
        """The broker's process: its id and when it started."""
        self._check_open()
        assert self._socket is not None
        pid, _, _ = _CREDENTIALS.unpack(
            self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        try:
            started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except OSError:
            started = "gone"
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {pid} {started}"

    @property
    def closed(self) -> bool:
        return self._socket is None

    def _check_open(self) -> None:
        if self._socket is None:
            raise Closed("this connection to the hypervisor is closed")
        if os.getpid() != self._pid:
            raise Closed("this connection to the hypervisor belongs to the parent of this process")

    def close(self) -> None:
        """Calls that other threads are in end with `HypervisorGone`. Harmless when repeated."""
        connected = self._socket
        if connected is None:
            return
        if os.getpid() == self._pid:
            # A forked child must not shut down what its parent uses.
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._socket = None
        self._socket = None
        connected.close()
