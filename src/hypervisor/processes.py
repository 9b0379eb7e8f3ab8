# SPDX-License-Identifier: MIT
"""The processes that Dom0 has started for domains, as pidfds: init's end is the domain's, which is the others' end."""

import contextlib
import errno
import logging
import os
import selectors
import signal
from collections.abc import Callable
from pathlib import Path

from paravirt.errors import ResourceLimit
from paravirt.hypervisor.rules import Refused

log = logging.getLogger(__name__)


class Processes:
    """Owns the pidfds that it takes. Its callbacks run in the selector's loop."""

    def __init__(self, selector: selectors.BaseSelector, init_ended: Callable[[int], None]) -> None:
        """`init_ended(domid)`: end the domain."""
        self._selector = selector
        self._init_ended = init_ended
        self._inits: dict[int, int] = {}
        self._others: dict[int, set[int]] = {}

    def set_init(self, domid: int, pidfd: int) -> None:
        """Raises `Refused` (EEXIST, EINVAL), `ResourceLimit`."""
        if domid in self._inits:
            raise Refused(errno.EEXIST, f"domain {domid} has an init process already")
        _check_pidfd(pidfd)
        self._inits[domid] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._end_of_init(domid))

    def add(self, domid: int, pidfd: int) -> None:
        """One that is killed when the domain ends. Raises `Refused` (EINVAL), `ResourceLimit`."""
        _check_pidfd(pidfd)
        self._others.setdefault(domid, set()).add(pidfd)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._end_of_other(domid, pidfd))

    def kill(self, domid: int) -> None:
        """The domain has ended."""
        for pidfd in [self._inits.pop(domid, None), *self._others.pop(domid, ())]:
            if pidfd is not None:
                self._selector.unregister(pidfd)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.close(pidfd)

    def kill_all(self) -> None:
        for domid in {*self._inits, *self._others}:
            self.kill(domid)

    def _end_of_init(self, domid: int) -> None:
        log.info("the init process of domain %d ended", domid)
        self._init_ended(domid)

    def _end_of_other(self, domid: int, pidfd: int) -> None:
        self._others[domid].remove(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)


def _check_pidfd(fd: int) -> None:
    try:
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except OSError as error:
        raise ResourceLimit(f"the descriptor cannot be looked at: {error.strerror}") from error
    if "\nPid:" not in info:
        raise Refused(errno.EINVAL, "the descriptor is no pidfd")
