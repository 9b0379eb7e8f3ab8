# SPDX-License-Identifier: MIT
"""NBD servers for tests: real ones as processes, and one that says what it is told."""

import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paravirt.backend.disks import Disk, open_disk
from paravirt.errors import InvalidRequest
from paravirt.protocol import nbd
from paravirt.protocol.nbd import Option, Reply
from tests import needs

DEADLINE_S = 30
Conversation = Callable[[socket.socket], None]


def connect(path: Path, options: str = "", *, read_only: bool = False) -> Disk:
    """The disk of the server at `path`; with a short `timeout`, when the machine is not too busy for that."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return open_disk(f"nbd{options}", f"unix:{path}", read_only=read_only)
        except InvalidRequest as error:
            if "timed out" not in str(error) or time.monotonic() > deadline:
                raise


class Server:
    """A program that serves on a Unix socket until it is killed; can be started again."""

    def __init__(self, path: Path, *command: str) -> None:
        if shutil.which(command[0]) is None:
            needs.missing(f"{command[0]} is not installed")
        self.path, self._command = path, command
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, env=needs.own_environment())
        deadline = time.monotonic() + DEADLINE_S
        while not is_listening(self.path):
            assert self._process.poll() is None, f"{self._command[0]} has ended"
            assert time.monotonic() < deadline, f"{self._command[0]} does not listen"
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """A signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


@contextmanager
def running(path: Path, *command: str) -> Iterator[Server]:
    server = Server(path, *command)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def nbdkit(path: Path, *arguments: str) -> tuple[str, ...]:
    return ("nbdkit", "--foreground", "--exit-with-parent", "--unix", str(path), *arguments)


@contextmanager
def scripted(path: Path, *conversations: Conversation) -> Iterator[None]:
    """Has one conversation after the other, each on a connection of its own."""

    def serve() -> None:
        for conversation in conversations:
            client, _ = listener.accept()
            with client:
                client.settimeout(DEADLINE_S)
                try:
                    conversation(client)
                except OSError:
                    pass  # the client has had enough

    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(DEADLINE_S)
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            while thread.is_alive():
                is_listening(path)  # nobody came: its turn is over
                thread.join(0.01)
    path.unlink(missing_ok=True)


def receive(client: socket.socket, n_bytes: int) -> bytes:
    data = b""
    while len(data) < n_bytes:
        piece = client.recv(n_bytes - len(data))
        if not piece:
            raise ConnectionError
        data += piece
    return data


def greet(client: socket.socket, flags: int = 3) -> None:
    client.sendall(nbd.GREETING.pack(b"NBDMAGIC", nbd.NEW_MAGIC, flags))
    receive(client, 4)


def take_option(client: socket.socket) -> tuple[int, bytes]:
    _, option, length = nbd.OPTION.unpack(receive(client, nbd.OPTION.size))
    return option, receive(client, length)


def reply(client: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    client.sendall(nbd.OPTION_REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


def shake_hands(
    client: socket.socket,
    *,
    size_bytes: int = 1 << 20,
    flags: int = 1 | 4 | 32 | 64,
    structured: bool = True,
    blocks: tuple[int, int, int] | None = None,
) -> None:
    """An honest handshake."""
    greet(client)
    take_option(client)
    reply(client, Option.STRUCTURED_REPLY, Reply.ACK if structured else Reply.UNSUPPORTED)
    take_option(client)
    reply(client, Option.GO, Reply.INFO, struct.pack(">H", nbd.Info.EXPORT) + nbd.EXPORT.pack(size_bytes, flags))
    if blocks is not None:
        reply(client, Option.GO, Reply.INFO, struct.pack(">H", nbd.Info.BLOCK_SIZE) + nbd.BLOCK_SIZES.pack(*blocks))
    reply(client, Option.GO, Reply.ACK)


def take_request(client: socket.socket) -> tuple[int, int, int, int]:
    """(command, cookie, offset, length) of the next."""
    _, _, command, cookie, offset, length = nbd.REQUEST.unpack(receive(client, nbd.REQUEST.size))
    return command, cookie, offset, length


def chunk(kind: int, cookie: int, data: bytes = b"", *, done: bool = True) -> bytes:
    return nbd.STRUCTURED_REPLY.pack(nbd.STRUCTURED_REPLY_MAGIC, done, kind, cookie, len(data)) + data


def simple(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie) + data
