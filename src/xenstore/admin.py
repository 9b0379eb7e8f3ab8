# SPDX-License-Identifier: MIT
"""What the requests that administer a store need of it, whichever engine holds the tree: only these interfaces.

A handler of such a request gets (hub, payload) and comes to a reply. That the client is privileged was looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from paravirt.xenstore.wire import Errno, Reply


class AdminDomain(Protocol):
    """What is shown of a domain."""

    @property
    def domid(self) -> int: ...
    @property
    def introduced(self) -> bool:
        """Whether it is served."""

    @property
    def shut_down(self) -> bool: ...
    @property
    def target(self) -> int | None:
        """The domain whose rights it also has."""

    @property
    def features(self) -> int:
        """What it may use of the server's features, a sum of bits."""

    @property
    def quotas(self) -> Mapping[str, int]:
        """Its own values by the names of `limits.QUOTAS`; not to be changed here."""

    @property
    def maxima(self) -> Mapping[str, int]:
        """The highest value seen of each quota's count; a missing one is 0."""

    @property
    def n_nodes(self) -> int: ...
    @property
    def n_watches(self) -> int: ...
    @property
    def n_transactions(self) -> int: ...
    @property
    def n_outstanding(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Statistics:
    """How large a store is now. `memory_bytes` is what counts as the domains' memory, Dom0's too."""

    nodes: int
    watches: int
    connections: int
    transactions: int
    memory_bytes: int


class ControlActions(Protocol):
    """What CONTROL does outside of the store. Paths are as the client gave them; an error is what it is told."""

    def log(self, on: bool) -> Errno | None:
        """Write the access log from now on, or no longer."""

    def log_file(self, path: str) -> Errno | None:
        """Write the access log to another file."""

    def report(self, path: str | None, text: str) -> Errno | None:
        """Append to a file, to the access log if None."""

    def print(self, text: str) -> None:
        """Say something to whoever reads the daemon's messages."""

    def check_program(self, path: str) -> str | None:
        """Why a live update cannot go on with this program; None if it can."""

    def live_update(self, program: str, command_line: str | None, timeout_s: int) -> str | None:
        """Go on as another program. Returns why not, or None: it will be done once the reply is sent."""


class NoActions:
    """For a store that is part of another program: it has no files and cannot be replaced."""

    def log(self, on: bool) -> Errno | None:
        return None

    def log_file(self, path: str) -> Errno | None:
        return Errno.ENOSYS

    def report(self, path: str | None, text: str) -> Errno | None:
        return Errno.ENOSYS

    def print(self, text: str) -> None:
        pass

    def check_program(self, path: str) -> str | None:
        return "Not supported."

    def live_update(self, program: str, command_line: str | None, timeout_s: int) -> str | None:
        return "Not supported."


class AdminState:
    """What CONTROL remembers between requests: its switches, and a live update that is being prepared."""

    def __init__(self) -> None:
        self.switches = {"obj", "io"}
        self.update_program: str | None = None
        self.update_command_line: str | None = None


class AdminHub(Protocol):
    """A store. Domids and names of quotas that are passed have been looked at, unless said otherwise."""

    @property
    def domains(self) -> Mapping[int, AdminDomain]: ...
    @property
    def actions(self) -> ControlActions: ...
    @property
    def admin_state(self) -> AdminState: ...

    def known(self, domid: int) -> AdminDomain | None:
        """The domain, if there is one with this id (any number)."""

    def introduce(self, domid: int, page: int, port: int) -> Errno | None:
        """Serve a domain (any number) over its ring page."""

    def release(self, domid: int) -> None:
        """The domain is over for the store."""

    def resume(self, domid: int) -> None:
        """The domain runs again: its next shutdown is told."""

    def set_target(self, domid: int, target: int) -> None:
        """The domain has the rights of another, too."""

    def set_features(self, domid: int, bits: int) -> None:
        """What the domain may use once it is introduced."""

    def quota(self, domid: int | None, name: str) -> int:
        """A domain's quota, or the global one."""

    def set_quota(self, domid: int | None, name: str, value: int) -> None:
        """Set a domain's quota, or the global one, which new domains get; 0 is none."""

    def quota_maxima(self, reset: bool) -> Mapping[str, int]:
        """The highest value seen of each quota's count in any guest; `reset`: since now."""

    def check(self) -> list[str]:
        """What is inconsistent, a line each."""

    def statistics(self) -> Statistics: ...

    def trace_lines(self, seq: int) -> tuple[int, list[str]]:
        """(number of the first line returned, lines) from a number on, as far as they are kept. For ten seconds from
        now on requests are traced."""


Administer = Callable[[AdminHub, bytes], Reply]
