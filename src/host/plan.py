# SPDX-License-Identifier: MIT
"""What a launcher tells the processes it starts for a domain."""

import json
from dataclasses import asdict, dataclass
from typing import Self

VISIBLE_SOCKET = "/run/paravirt/hypervisor.sock"
"""Where an isolated domain finds the broker's socket for its further processes."""

COMMAND_FD = 3
"""The descriptor that PARAVIRT_FD names in the domain's first process."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to start one command. Paths are the host's."""

    command: list[str]
    environment: dict[str, str]
    directory: str
    launcher: int
    """Pid of the launcher: when it dies, the domain does."""
    status_fd: int
    hypervisor_fd: int
    isolated: bool
    network: bool
    """It administers a network of its own."""
    uid: int | None
    """The domain's uid; None: stay with the launcher's, in a user namespace."""
    cover: list[str]
    """Directories that become empty ones of the domain's own."""
    expose: list[str]
    """Paths below `cover` that are there nevertheless, read-only."""
    hide: list[str]
    """Directories that must not be seen, wherever they are."""
    socket: str | None
    """The broker's socket for further processes of the domain."""

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def load(cls, data: bytes) -> Self:
        return cls(**json.loads(data))
