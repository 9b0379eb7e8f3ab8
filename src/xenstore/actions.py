# SPDX-License-Identifier: MIT
"""What CONTROL does outside of the store (`admin.ControlActions`): the access log, reports, messages, live update."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from paravirt.errors import InvalidRequest
from paravirt.ring._core import lib
from paravirt.xenstore.wire import Errno

if TYPE_CHECKING:
    from paravirt.xenstore.core import CoreHub

log = logging.getLogger(__name__)

Update = Callable[[str, str | None, int], str | None]


class Actions:
    """Of a daemon. A context manager."""

    def __init__(self, hub: CoreHub, access_log: str | os.PathLike[str] | None, update: Update | None) -> None:
        """`access_log`: written from the start. `update`: plans to go on as another program."""
        self._hub = hub
        self._update = update
        self._path: str | None = None
        self._fd = -1
        self._on = False
        if access_log is not None:
            path = os.fspath(access_log)
            refusal = self.log_file(path)
            if refusal is not None:
                raise InvalidRequest(f"the access log {path} cannot be written ({refusal.name})")
            self.log(True)

    def log(self, on: bool) -> Errno | None:
        """Write the access log from now on, or no longer."""
        self._on = on  # if nobody has named a file yet, once somebody does
        self._apply()
        return None

    def log_file(self, path: str) -> Errno | None:
        """Write the access log to another file."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY, 0o600)
        except (OSError, ValueError):
            return Errno.EINVAL
        former, self._fd, self._path = self._fd, fd, path
        self._apply()
        if former >= 0:
            os.close(former)
        return None

    def _apply(self) -> None:
        lib.pv_xs_trace_to(self._hub.core, self._fd if self._on else -1)

    def report(self, path: str | None, text: str) -> Errno | None:
        """Append to a file, to the access log if None, or else to the daemon's messages."""
        try:
            if path is not None:
                with open(path, "a") as file:
                    file.write(text)
            elif self._fd >= 0:
                os.write(self._fd, text.encode())
            else:
                for line in text.splitlines():
                    log.warning("%s", line)
        except (OSError, ValueError):
            return Errno.EINVAL
        return None

    def print(self, text: str) -> None:
        """Say something to whoever reads the daemon's messages."""
        log.warning("%s", text.encode(errors="backslashreplace").decode())

    def check_program(self, path: str) -> str | None:
        """Why a live update cannot go on with this program; None if it can."""
        if self._update is None:
            return "Not supported."
        return None if shutil.which(path) else f"{path} is not a program"

    def live_update(self, program: str, command_line: str | None, timeout_s: int) -> str | None:
        """Go on as another program, once the reply is sent."""
        return self._update(program, command_line, timeout_s) if self._update is not None else "Not supported."

    def close(self) -> None:
        """Write no access log any more."""
        fd, self._fd = self._fd, -1
        self._on = False
        self._apply()
        if fd >= 0:
            os.close(fd)
