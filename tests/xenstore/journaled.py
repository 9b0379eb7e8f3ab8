# SPDX-License-Identifier: MIT
"""What tests of the journal share: a hub that is asked without a loop, its journal in memory, all it has as a value."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paravirt.ring._core import ffi, lib
from paravirt.xenstore.core import CoreConnection, CoreHub
from paravirt.xenstore.limits import QUOTAS
from paravirt.xenstore.wire import Errno, Op, PacketParser, encode, strings
from tests.xenstore.story import FakeDomains

Answer = bytes | Errno
EXISTING = frozenset(range(6))
SPECIAL = ("@introduceDomain", "@releaseDomain")


class Store:
    """A hub with a journal in a memory file. A context manager."""

    def __init__(self) -> None:
        self.hub = CoreHub(control=FakeDomains(set(EXISTING)))
        self.clients: dict[int, CoreConnection] = {}
        self.fd = self._memory()
        self.snapshot_fd = -1
        lib.pv_xs_snapshot_start(self.hub.core, self.fd)
        while not self._step(1000, self.fd):
            pass
        lib.pv_xs_snapshot_adopt(self.hub.core)

    def _memory(self) -> int:
        return os.memfd_create("journal", os.MFD_CLOEXEC)

    def _step(self, n_nodes: int, _fd: int) -> bool:
        status = lib.pv_xs_snapshot_step(self.hub.core, n_nodes)
        assert status in (0, 1)
        return bool(status)

    def ask(self, domid: int, op: Op, payload: bytes, transaction: int = 0) -> Answer:
        """One request of a domain's connection, and its answer; events are thrown away."""
        client = self.clients.get(domid)
        if client is None or client.closed:
            client = self.clients[domid] = self.hub.connect(domid)
        client.feed(encode(op, 1, transaction, payload))
        return answer_of(client)

    def leave(self) -> None:
        """All clients go, and what they have with them."""
        for client in self.clients.values():
            self.hub.disconnect(client)
        self.clients.clear()

    def journal(self) -> bytes:
        """All that a restart would find."""
        assert lib.pv_xs_journal_flush(self.hub.core) == 0
        return content(self.fd)

    # -- a snapshot that is written while things change

    def begin_snapshot(self) -> None:
        self.snapshot_fd = self._memory()
        lib.pv_xs_snapshot_start(self.hub.core, self.snapshot_fd)

    def step_snapshot(self, n_nodes: int) -> bool:
        """Whether it is complete."""
        return self._step(n_nodes, self.snapshot_fd)

    def adopt_snapshot(self) -> None:
        """Its file is the journal from now on."""
        while not self.step_snapshot(3):
            pass
        assert lib.pv_xs_journal_flush(self.hub.core) == 0
        lib.pv_xs_snapshot_adopt(self.hub.core)
        os.close(self.fd)
        self.fd, self.snapshot_fd = self.snapshot_fd, -1

    def abort_snapshot(self) -> None:
        lib.pv_xs_snapshot_abort(self.hub.core)
        os.close(self.snapshot_fd)
        self.snapshot_fd = -1

    def close(self) -> None:
        lib.pv_xs_snapshot_abort(self.hub.core)
        lib.pv_xs_journal_to(self.hub.core, -1, 0, 0)
        self.hub.close()
        for fd in (self.fd, self.snapshot_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.snapshot_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def answer_of(client: CoreConnection) -> Answer:
    data = client.output()
    client.sent(len(data))
    packets = [packet for packet in PacketParser().feed(data) if packet[0] != Op.WATCH_EVENT]
    ((op, _, _, payload),) = packets
    return Errno(payload) if op == Op.ERROR else payload


def loaded(journal: bytes) -> tuple[int, int, CoreHub]:
    """(status, bytes that are whole, a hub that has what the file says)."""
    hub = CoreHub(control=FakeDomains(set(EXISTING)))
    n_good = ffi.new("uint64_t *")
    return lib.pv_xs_journal_load(hub.core, journal, len(journal), n_good), n_good[0], hub


def everything(hub: CoreHub) -> dict[str, Any]:
    """All that a restart must keep. Nobody is connected but who asks."""
    assert hub.check() == []
    client = hub.connect(0)

    def ask(op: Op, path: str) -> bytes:
        client.feed(encode(op, 1, 0, path.encode() + b"\0"))
        answer = answer_of(client)
        assert isinstance(answer, bytes), (op, path, answer)
        return answer

    nodes: dict[str, Any] = {}
    left = ["/"]
    while left:
        path = left.pop()
        children = strings(ask(Op.DIRECTORY, path))
        nodes[path] = (children, ask(Op.READ, path), ask(Op.GET_PERMS, path))
        left += [f"{path.rstrip('/')}/{name.decode()}" for name in children]
    special = [ask(Op.GET_PERMS, name) for name in SPECIAL]
    hub.disconnect(client)
    domains = {
        domid: (
            domain.introduced,
            domain.shut_down,
            domain.target,
            domain.features,
            dict(domain.quotas),
            domain.n_nodes,
            domain.memory_bytes,
            domain.ring_location,
        )
        for domid, domain in hub.domains.items()
    }
    quotas = {name: hub.quota(None, name) for name in QUOTAS}
    return {"nodes": nodes, "special": special, "domains": domains, "quotas": quotas}


def journal_file(directory: Path) -> Path:
    return directory / "journal"
