# SPDX-License-Identifier: MIT
"""Clients that do random operations on few keys of a store and write down what they saw, also when connections die.

A client is a generator: it yields requests and is sent the answers, or is thrown `Lost` if the connection died before
the answer. So the same client runs over a socket (`drive`) and in a simulation.
"""

import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from paravirt.xenstore.wire import ACK, Errno, Op, Packet, PacketParser, encode, strings
from tests.xenstore.linearizability import Kind, Operation, Step

DEADLINE_S: Final = 30.0
N_CLIENTS: Final = 8
KEYS: Final = ("a", "b", "c", "d", "e", "f")
ROOT: Final = "/history"  # is there from the start: removing a missing key is fine then
READER: Final = 100
PARAVIRT: Final = (sys.executable, "-P", "-m", "paravirt")

Answer = bytes | Errno


class Request(NamedTuple):
    op: Op
    payload: bytes
    transaction: int = 0


CONNECT: Final = None
"""Yielded for a new connection instead of the one there was."""

Talk = Generator[Request | None, Answer, None]


class Lost(Exception):
    """The connection died before the answer."""


class History:
    """What all clients did, from any thread. It is complete when it has `n_operations`."""

    def __init__(self, n_operations: int) -> None:
        self.n_operations = n_operations
        self.operations: list[Operation] = []
        self._changed = threading.Condition()

    @property
    def complete(self) -> bool:
        return len(self.operations) >= self.n_operations

    def add(self, operation: Operation) -> None:
        with self._changed:
            self.operations.append(operation)
            self._changed.notify_all()

    def wait_for(self, n_operations: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.operations) >= n_operations, DEADLINE_S), "clients hang"


class Ask(NamedTuple):
    """One thing to do to one key, or to look at all keys (DIRECTORY)."""

    op: Op
    key: str
    value: bytes = b""

    def request(self, transaction: int) -> Request:
        if self.op is Op.DIRECTORY:
            return Request(self.op, f"{ROOT}\0".encode(), transaction)
        return Request(self.op, f"{ROOT}/{self.key}\0".encode() + self.value, transaction)

    def effect(self) -> tuple[Step, ...]:
        if self.op is Op.WRITE:
            return (Step(Kind.WRITE, self.key, self.value),)
        return (Step(Kind.RM, self.key),) if self.op is Op.RM else ()

    def steps(self, answer: Answer) -> tuple[Step, ...]:
        """What was done and seen, by the answer."""
        if self.op is Op.DIRECTORY:
            assert isinstance(answer, bytes), answer
            names = strings(answer)
            return tuple(Step(Kind.EXISTS, key, key.encode() in names) for key in KEYS)
        if self.op in (Op.WRITE, Op.RM):
            assert answer == ACK, answer
            return self.effect()
        assert isinstance(answer, bytes) or answer is Errno.ENOENT, answer
        value = answer if isinstance(answer, bytes) else None
        if self.op is Op.READ:
            return (Step(Kind.READ, self.key, value),)
        return (Step(Kind.EXISTS, self.key, value is not None),)


class Client:
    """Does random operations until the history is complete.

    `dies_whole`: a connection is lost only when the whole store is gone, so that a request without an answer is done
    before that or never.
    """

    def __init__(
        self,
        number: int,
        history: History,
        chance: random.Random,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        dies_whole: bool = False,
    ) -> None:
        self._number = number
        self._history = history
        self._chance = chance
        self._clock = clock
        self._dies_whole = dies_whole
        self._n_values = 0

    def run(self) -> Talk:
        yield from self._connect()
        while not self._history.complete:
            try:
                yield from self._transaction() if self._chance.random() < 0.3 else self._single(self._any())
            except Lost:
                yield from self._connect()

    def prepare(self) -> Talk:
        """Make the directory of the keys."""
        yield CONNECT
        answer = yield Request(Op.MKDIR, f"{ROOT}\0".encode())
        assert answer == ACK

    def read_all(self) -> Talk:
        """Look at every key, in one transaction and one by one."""
        yield CONNECT
        asks = [Ask(Op.READ, key) for key in KEYS]
        yield from self._transaction([Ask(Op.DIRECTORY, ""), *asks], commit=True)
        for ask in asks:
            yield from self._single(ask)

    def _connect(self) -> Talk:
        while True:
            try:
                yield CONNECT
            except Lost:
                continue
            return

    def _any(self) -> Ask:
        op = self._chance.choices([Op.READ, Op.WRITE, Op.RM, Op.GET_PERMS, Op.DIRECTORY], [10, 6, 2, 1, 1])[0]
        value = b""
        if op is Op.WRITE:
            self._n_values += 1
            value = b"%d.%d" % (self._number, self._n_values)
        return Ask(op, self._chance.choice(KEYS), value)

    def _single(self, ask: Ask) -> Talk:
        called = self._clock()
        try:
            answer = yield ask.request(0)
        except Lost:
            self._note(called, None, ask.effect())
            raise
        self._note(called, self._clock(), ask.steps(answer))

    def _transaction(self, asks: Sequence[Ask] | None = None, *, commit: bool | None = None) -> Talk:
        """Its place in the order is that of its end: a commit finds all that it looked at as it was, or fails."""
        if asks is None:
            asks = [self._any() for _ in range(self._chance.randrange(1, 5))]
        if commit is None:
            commit = self._chance.random() < 0.9
        started = yield Request(Op.TRANSACTION_START, b"\0")
        assert isinstance(started, bytes), started
        number = int(started.rstrip(b"\0"))
        steps: list[Step] = []
        doomed = False
        for ask in asks:
            answer = yield ask.request(number)
            if ask.op is Op.RM and isinstance(answer, Errno):
                doomed = True  # it has seen directory and key at different times
            else:
                steps += ask.steps(answer)
        called = self._clock()
        try:
            answer = yield Request(Op.TRANSACTION_END, b"T\0" if commit else b"F\0", number)
        except Lost:
            if commit and not doomed:
                self._note(called, None, steps, transaction=True)
            raise
        assert answer == ACK or (commit and answer in (Errno.EAGAIN, Errno.ENOMEM)), answer
        assert not (commit and doomed and answer == ACK), "a transaction at odds with itself was committed"
        self._note(called, self._clock(), steps, transaction=True, failed=not commit or answer != ACK)

    def _note(
        self,
        called: int,
        answered: int | None,
        steps: Sequence[Step],
        *,
        transaction: bool = False,
        failed: bool = False,
    ) -> None:
        gone_at = self._clock() if answered is None and self._dies_whole else None
        self._history.add(
            Operation(self._number, called, answered, tuple(steps), transaction, failed=failed, gone_at=gone_at)
        )


# -- over sockets


class Wire:
    """A connection that asks one thing at a time. Raises `ConnectionError` when it has died."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._socket.settimeout(DEADLINE_S)
        self._parser = PacketParser()
        self._request_id = 0

    def ask(self, request: Request) -> Answer:
        self._request_id += 1
        self._socket.sendall(encode(request.op, self._request_id, request.transaction, request.payload))
        packets: list[Packet] = []
        while not packets:
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError
            packets = self._parser.feed(data)
        ((op, request_id, transaction, payload),) = packets
        assert (request_id, transaction) == (self._request_id, request.transaction)
        if op == Op.ERROR:
            return Errno(payload)
        assert op == request.op
        return payload

    def close(self) -> None:
        self._socket.close()


def drive(talk: Talk, dial: Callable[[], socket.socket]) -> None:
    """Run a client over sockets. A `ConnectionError` of `dial` is a lost connection too."""
    wire: Wire | None = None
    try:
        request = next(talk)
        while True:
            try:
                answer: Answer = b""
                if request is not CONNECT:
                    assert wire is not None
                    answer = wire.ask(request)
                else:
                    if wire is not None:
                        wire.close()
                    wire = Wire(dial())
            except ConnectionError:
                request = talk.throw(Lost())
            else:
                request = talk.send(answer)
    except StopIteration:
        pass
    finally:
        if wire is not None:
            wire.close()


def run_clients(history: History, dial: Callable[[], socket.socket], seed: int, *, dies_whole: bool = False) -> None:
    """Let all clients run, each in a thread, until the history is complete."""
    with Clients(history, dial, seed, dies_whole=dies_whole):
        pass


class Clients:
    """Runs the clients in threads; leaving it waits for them and raises what they raised."""

    def __init__(
        self, history: History, dial: Callable[[], socket.socket], seed: int, *, dies_whole: bool = False
    ) -> None:
        self._threads = ThreadPoolExecutor(N_CLIENTS)
        self._results = []
        for number in range(N_CLIENTS):
            client = Client(number, history, random.Random(f"{seed}.{number}"), dies_whole=dies_whole)
            self._results.append(self._threads.submit(drive, client.run(), dial))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()
        for result in self._results:
            result.result()


class Daemon:
    """A store in a process of its own that can be killed and started again. A context manager."""

    def __init__(self, command: Sequence[str], path: Path) -> None:
        """`command` makes it listen on the socket `path` and then say one line, also when a killed one left that."""
        self._command = command
        self._path = path
        self._open = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it accepts connections of ours; `dial` waits for `open`."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the store does not start"

    def open(self) -> None:
        self._open.set()

    def kill(self) -> None:
        """SIGKILL; `dial` waits from now on."""
        self._open.clear()
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def dial_now(self) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(str(self._path))
        except (ConnectionError, FileNotFoundError) as error:
            connected.close()
            raise ConnectionResetError from error
        return connected

    def dial(self) -> socket.socket:
        """A connection, as soon as clients may have one."""
        if not self._open.wait(DEADLINE_S):
            raise TimeoutError
        return self.dial_now()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.open()


def xenstored(directory: Path, *options: str) -> Daemon:
    """This project's daemon; all it has is in `directory`."""
    path = directory / "store.sock"
    place = ["--run", str(directory / "run"), "--log-level", "error"]
    return Daemon([*PARAVIRT, *place, "xenstored", "--socket", str(path), *options], path)


def run_with_kills(daemon: Daemon, *, n_operations: int, n_kills: int, seed: int) -> list[Operation]:
    """Kill the daemon at random times while clients run; after each new start look at everything before they go on."""
    chance = random.Random(seed)
    history = History(n_operations)
    reader = Client(READER, history, chance)
    drive(reader.prepare(), daemon.dial_now)
    daemon.open()
    with Clients(history, daemon.dial, seed, dies_whole=True):
        try:
            for n in sorted(chance.sample(range(n_operations), n_kills)):
                history.wait_for(n)
                time.sleep(chance.random() * 0.002)  # anywhere in a request, not just after an answer
                daemon.kill()
                daemon.start()
                drive(reader.read_all(), daemon.dial_now)
                daemon.open()
        except BaseException:
            history.n_operations = 0
            daemon.open()
            raise
    return history.operations
