# SPDX-License-Identifier: MIT
"""Stores to try the history's clients and the checker on: right ones and ones with a known mistake.

`simulate` runs clients against one of them without threads, sockets and clocks: the same seed, the same history.
`saving` is a daemon that saves its values to a file before it answers, or after every so many changes only.
"""

import os
import pickle
import random
import selectors
import socket
import sys
from pathlib import Path
from typing import Final

from paravirt.xenstore.hub import Hub
from paravirt.xenstore.session import Connection
from paravirt.xenstore.wire import ACK, Errno, Op, PacketParser, encode
from tests.xenstore.history import CONNECT, N_CLIENTS, ROOT, Answer, Client, Daemon, History, Lost, Request, Talk
from tests.xenstore.linearizability import Operation

STALE_FOR: Final = 6  # reads
HALF_FOR: Final = 30  # requests


class Store:
    """A store that does what it is asked."""

    def __init__(self) -> None:
        self.hub = Hub()
        self._own = self.hub.connect()
        self.ask_itself(Op.MKDIR, f"{ROOT}\0".encode())

    def connect(self) -> Connection:
        return self.hub.connect()

    def handle(self, link: Connection, request: Request) -> Answer:
        link.feed(encode(request.op, 1, request.transaction, request.payload))
        data = link.output()
        link.sent(len(data))
        ((op, _, _, payload),) = PacketParser().feed(data)
        return Errno(payload) if op == Op.ERROR else payload

    def ask_itself(self, op: Op, payload: bytes) -> Answer:
        return Store.handle(self, self._own, Request(op, payload))

    def put(self, path: bytes, value: Answer) -> None:
        """Give a node the value that a read of it answered."""
        if isinstance(value, bytes):
            self.ask_itself(Op.WRITE, path + b"\0" + value)
        else:
            self.ask_itself(Op.RM, path + b"\0")

    def restart(self) -> None:
        """All connections are gone; nothing else."""
        for connection in list(self.hub.connections - {self._own}):
            self.hub.disconnect(connection)


class StaleReads(Store):
    """Answers reads from a cache that it looks after too late."""

    def __init__(self) -> None:
        super().__init__()
        self._cache: dict[bytes, tuple[int, Answer]] = {}

    def handle(self, link: Connection, request: Request) -> Answer:
        if request.op is not Op.READ or request.transaction:
            return super().handle(link, request)
        n_reads, answer = self._cache.get(request.payload, (STALE_FOR, b""))
        if n_reads == STALE_FOR:
            n_reads, answer = 0, super().handle(link, request)
        self._cache[request.payload] = n_reads + 1, answer
        return answer


class ForgetsAtRestart(Store):
    """Acknowledges a write that a restart undoes: the last one."""

    def __init__(self) -> None:
        super().__init__()
        self._undo: tuple[bytes, Answer] | None = None

    def handle(self, link: Connection, request: Request) -> Answer:
        if request.op is Op.WRITE and not request.transaction:
            path = request.payload.partition(b"\0")[0]
            self._undo = path, self.ask_itself(Op.READ, path + b"\0")
        return super().handle(link, request)

    def restart(self) -> None:
        super().restart()
        if self._undo is not None:
            self.put(*self._undo)
            self._undo = None


class _KnowsChanges(Store):
    """Knows what each open transaction has changed; nothing of one that has met an error."""

    def __init__(self) -> None:
        super().__init__()
        self._changes: dict[tuple[Connection, int], list[Request] | None] = {}

    def handle(self, link: Connection, request: Request) -> Answer:
        of = link, request.transaction
        if request.op is Op.TRANSACTION_END:
            changed = self._changes.pop(of, None) or []
            return self.end(link, request, changed if request.payload == b"T\0" else [])
        answer = super().handle(link, request)
        if request.transaction and request.op in (Op.WRITE, Op.RM):
            changes = self._changes.setdefault(of, [])
            if answer != ACK:
                self._changes[of] = None
            elif changes is not None:
                changes.append(request)
        return answer

    def end(self, link: Connection, request: Request, changes: list[Request]) -> Answer:
        return super().handle(link, request)


class CommitsByHalves(_KnowsChanges):
    """Shows the last change of a transaction a while after the others."""

    def __init__(self) -> None:
        super().__init__()
        self._late: list[tuple[int, bytes, Answer]] = []
        self._n_requests = 0

    def handle(self, link: Connection, request: Request) -> Answer:
        self._n_requests += 1
        while self._late and self._late[0][0] <= self._n_requests:
            self.put(*self._late.pop(0)[1:])
        return super().handle(link, request)

    def end(self, link: Connection, request: Request, changes: list[Request]) -> Answer:
        path = changes[-1].payload.partition(b"\0")[0] if len(changes) > 1 else b"/"
        before = self.ask_itself(Op.READ, path + b"\0")
        answer = super().end(link, request, changes)
        if answer == ACK and len(changes) > 1:
            after = self.ask_itself(Op.READ, path + b"\0")
            self.put(path, before)
            self._late.append((self._n_requests + HALF_FOR, path, after))
        return answer


class IgnoresConflicts(_KnowsChanges):
    """Commits a transaction that met a conflict."""

    def end(self, link: Connection, request: Request, changes: list[Request]) -> Answer:
        answer = super().end(link, request, changes)
        if answer is not Errno.EAGAIN or not changes:
            return answer
        for change in changes:
            self.ask_itself(change.op, change.payload)
        return ACK


# -- the simulation


class _Peer:
    """A client and the request it waits with; `answer` is None until the request is done."""

    def __init__(self, talk: Talk) -> None:
        self.talk = talk
        self.link: Connection | None = None
        self.request = next(talk)
        self.answer: Answer | None = None


class Simulation:
    """Clients of one store. Each step one of them goes on: its request is done, or its answer arrives.

    `loss`: how likely it is that a request is lost with its connection instead of done: it is done without an answer,
    later, or never. `restarts`: how likely a restart of the store is, at each step.
    """

    def __init__(self, store: Store, seed: int, n_operations: int, *, loss: float, restarts: float) -> None:
        self.history = History(n_operations)
        self._store = store
        self._chance = random.Random(seed)
        self._loss = loss
        self._restarts = restarts
        self._now = 0
        self._late: list[tuple[Connection, Request]] = []
        self._peers = []
        for number in range(N_CLIENTS):
            client = Client(number, self.history, self._chance, clock=lambda: self._now, dies_whole=not loss)
            self._peers.append(_Peer(client.run()))

    def run(self) -> None:
        chance = self._chance
        while self._peers:
            self._now += 1
            if chance.random() < self._restarts:
                self._restart()
            if self._late and chance.random() < 0.02:
                link, request = self._late.pop(chance.randrange(len(self._late)))
                self._store.handle(link, request)
                self._store.hub.disconnect(link)
            peer = chance.choice(self._peers)
            try:
                self._step(peer)
            except StopIteration:
                self._peers.remove(peer)

    def _step(self, peer: _Peer) -> None:
        if peer.answer is not None:
            answer, peer.answer = peer.answer, None
            peer.request = peer.talk.send(answer)
        elif peer.request is CONNECT or peer.link is None:
            peer.link = self._store.connect()
            peer.answer = b""
        elif self._chance.random() < self._loss:
            self._lose(peer.link, peer.request)
            peer.request = peer.talk.throw(Lost())
        else:
            peer.answer = self._store.handle(peer.link, peer.request)

    def _lose(self, link: Connection, request: Request) -> None:
        fate = self._chance.choice(["never", "now", "later"])
        if fate == "later":
            self._late.append((link, request))
            return
        if fate == "now":
            self._store.handle(link, request)
        self._store.hub.disconnect(link)

    def _restart(self) -> None:
        self._store.restart()
        self._late.clear()
        for peer in list(self._peers):
            peer.answer = None
            try:
                peer.request = peer.talk.throw(Lost())
            except StopIteration:
                self._peers.remove(peer)


def simulate(
    store: Store, seed: int, *, n_operations: int = 1000, loss: float = 0.0, restarts: float = 0.0
) -> list[Operation]:
    """A history of this store."""
    simulation = Simulation(store, seed, n_operations, loss=loss, restarts=restarts)
    simulation.run()
    return simulation.history.operations


# -- the daemon


class SavedStore(Store):
    """Its values come from a file and go there after every so many changes."""

    def __init__(self, file: Path, every: int) -> None:
        super().__init__()
        self._file = file
        self._every = every
        self._n_changes = 0
        if file.exists():
            for path, value in pickle.loads(file.read_bytes()).items():
                self.put(path, value)

    def handle(self, link: Connection, request: Request) -> Answer:
        answer = super().handle(link, request)
        if request.op in (Op.WRITE, Op.RM, Op.MKDIR, Op.TRANSACTION_END):
            self._n_changes += 1
            if self._n_changes % self._every == 0:
                values = {path: node.value for path, node in self.hub.store.nodes.items()}
                scratch = self._file.with_suffix(".new")
                scratch.write_bytes(pickle.dumps(values))
                os.replace(scratch, self._file)
        return answer


def saving(directory: Path, *, every: int) -> Daemon:
    """This module as a daemon, with what it has in `directory`."""
    path = directory / "store.sock"
    return Daemon([sys.executable, "-m", __name__, str(path), str(directory / "values"), str(every)], path)


def serve(path: str, store: Store) -> None:
    """Serve clients until the process is killed; a line says when it begins."""
    selector = selectors.DefaultSelector()
    links: dict[socket.socket, tuple[Connection, PacketParser]] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        Path(path).unlink(missing_ok=True)
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    links[client] = store.connect(), PacketParser()
                    selector.register(client, selectors.EVENT_READ)
                    continue
                client = key.fileobj  # type: ignore[assignment]
                link, parser = links[client]
                try:
                    data = client.recv(65536)
                    for op, request_id, transaction, payload in parser.feed(data):
                        answer = store.handle(link, Request(Op(op), payload, transaction))
                        reply = (Op.ERROR, answer.value) if isinstance(answer, Errno) else (op, answer)
                        client.sendall(encode(reply[0], request_id, transaction, reply[1]))
                except ConnectionError:
                    data = b""
                if not data:
                    store.hub.disconnect(link)
                    selector.unregister(client)
                    links.pop(client)
                    client.close()


if __name__ == "__main__":
    serve(sys.argv[1], SavedStore(Path(sys.argv[2]), int(sys.argv[3])))
