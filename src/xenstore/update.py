# SPDX-License-Identifier: MIT
"""What a live update hands from one program to the next: descriptors, connections and, without a journal, the tree.

The next program is started in the place of this one (exec), so descriptors stay open and the process keeps its id. What
they mean stands in two memory objects: the engine's state (c_ext/pv_xs_state.c) and a snapshot in the journal's form.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol, Self

from paravirt.errors import DamagedJournal, InvalidRequest
from paravirt.ring._core import ffi, lib

if TYPE_CHECKING:
    from paravirt.xenstore.core import CoreHub

ENVIRONMENT: Final = "PARAVIRT_XENSTORED_UPDATE"
"""In the next program: the descriptors of state, tree and listening socket, commas between; -1 for none."""


class NextProgram(Protocol):
    """How a daemon goes on as another program."""

    def why_not(self, program: str, command_line: str | None, timeout_s: float) -> str | None:
        """Why that program cannot take over, None if it can. Tries, for at most so long."""

    def become(self, program: str, command_line: str | None, handover: Handover) -> None:
        """Does not return, unless by `OSError`."""


class Handover:
    """Descriptors for the next program, which it inherits. A context manager: what is not handed over is closed."""

    def __init__(self, state_fd: int, tree_fd: int, listener: socket.socket | None, client_fds: list[int]) -> None:
        self.listener = listener
        self._state_fd = state_fd
        self._tree_fd = tree_fd
        self._client_fds = client_fds

    # -- the program that goes

    @classmethod
    def of(cls, hub: CoreHub, listener: socket.socket | None, *, with_tree: bool) -> Self:
        """What `hub` has, as it is now."""
        state_fd = _memory("state", _state_of(hub))
        tree_fd = -1
        if with_tree:
            tree_fd = os.memfd_create("xenstored-tree", os.MFD_CLOEXEC)
            lib.pv_xs_snapshot_start(hub.core, tree_fd)
            while (status := lib.pv_xs_snapshot_step(hub.core, 1 << 20)) == 0:
                pass
            lib.pv_xs_snapshot_abort(hub.core)
            if status < 0:
                raise OSError(-status, os.strerror(-status))
        return cls(state_fd, tree_fd, listener, hub.socket_fds())

    def inherit(self) -> dict[str, str]:
        """Let the next program have the descriptors: what to add to its environment."""
        for fd in self._all():
            os.set_inheritable(fd, True)
        listener_fd = self.listener.fileno() if self.listener is not None else -1
        return {ENVIRONMENT: f"{self._state_fd},{self._tree_fd},{listener_fd}"}

    def _all(self) -> list[int]:
        fds = [self._state_fd, self._tree_fd, *self._client_fds]
        if self.listener is not None:
            fds.append(self.listener.fileno())
        return [fd for fd in fds if fd >= 0]

    # -- the program that comes

    @classmethod
    def from_environment(cls) -> Self | None:
        """What a former program has left for this one, None if there was none."""
        text = os.environ.pop(ENVIRONMENT, None)
        if text is None:
            return None
        try:
            state_fd, tree_fd, listener_fd = map(int, text.split(","))
            listener = socket.socket(fileno=listener_fd) if listener_fd >= 0 else None
        except (ValueError, OSError) as error:
            raise InvalidRequest(f"{ENVIRONMENT} does not name what a former xenstored has left: {text!r}") from error
        if listener is not None:
            os.set_inheritable(listener_fd, False)
        return cls(state_fd, tree_fd, listener, [])

    def restore(self, hub: CoreHub, *, with_tree: bool) -> None:
        """Give a new hub what the former one had; `with_tree`: the tree too. The hub's loop is open."""
        if with_tree and self._tree_fd >= 0:
            tree, n_good = _content(self._tree_fd), ffi.new("uint64_t *")
            if lib.pv_xs_journal_load(hub.core, tree, len(tree), n_good) or n_good[0] != len(tree):
                raise DamagedJournal("the tree of the former xenstored cannot be read")
        state = _content(self._state_fd)
        if lib.pv_xs_state_load(hub.core, state, len(state)):
            raise DamagedJournal("the connections of the former xenstored cannot be read")
        for fd in hub.socket_fds():
            os.set_inheritable(fd, False)
        self.close()

    def close(self) -> None:
        """Let go of the memory objects. The sockets are the hub's, for this program alone."""
        for fd in self._all():
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)
        for fd in (self._state_fd, self._tree_fd):
            if fd >= 0:
                os.close(fd)
        self._state_fd = self._tree_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _state_of(hub: CoreHub) -> bytes:
    pointer = ffi.new("uint8_t **")
    n_bytes = lib.pv_xs_state_save(hub.core, pointer)
    try:
        return bytes(ffi.buffer(pointer[0], n_bytes))
    finally:
        lib.pv_xs_state_free(pointer[0])


def _memory(name: str, data: bytes) -> int:
    fd = os.memfd_create(f"xenstored-{name}", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return fd


def _content(fd: int) -> bytes:
    n_bytes = os.fstat(fd).st_size
    if not n_bytes:
        return b""
    with mmap.mmap(fd, n_bytes, access=mmap.ACCESS_READ) as data:
        return bytes(data)
