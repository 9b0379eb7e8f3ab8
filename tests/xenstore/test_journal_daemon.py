# SPDX-License-Identifier: MIT
"""A daemon that keeps its store: it shortens the journal while it serves, and waits while it cannot write it."""

import contextlib
import os
import random
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.wire import ACK, Op, Packet, PacketParser, encode
from tests.xenstore.history import DEADLINE_S, PARAVIRT, xenstored
from tests.xenstore.journaled import journal_file

SOON_S = 0.3
"""So long nothing must come that must never come."""
LONG_BYTES = 8 << 20
N_BIG = 4000


def raw(path: Path) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(DEADLINE_S)
    connected.connect(str(path))
    return connected


def receive(connected: socket.socket) -> Packet:
    parser = PacketParser()
    while True:
        data = connected.recv(1)
        assert data, "the daemon closed the connection"
        packets = parser.feed(data)
        if packets:
            return packets[0]


def is_silent(connected: socket.socket) -> bool:
    connected.settimeout(SOON_S)
    try:
        connected.recv(1)
    except TimeoutError:
        return True
    finally:
        connected.settimeout(DEADLINE_S)
    return False


def write_much(client: XenstoreClient, n_bytes: int) -> None:
    """So much is written over and over to one node."""
    for _ in range(n_bytes // N_BIG // 50):
        with client.pipeline() as pipeline:
            for _ in range(50):
                pipeline.write("/big", b"x" * N_BIG)


def test_in_memory_there_are_no_files(tmp_path: Path) -> None:
    with xenstored(tmp_path, "--memory") as daemon:
        with XenstoreClient.from_socket(daemon.dial_now()) as client:
            client.write("/a", "1")
        daemon.kill()
        daemon.start()
        with XenstoreClient.from_socket(daemon.dial_now()) as client:
            assert not client.exists("/a")
        assert [path.name for path in tmp_path.iterdir()] == ["store.sock"]


def test_a_long_journal_is_shortened_while_it_serves(tmp_path: Path) -> None:
    path = journal_file(tmp_path / "j")
    with XenstoreServer(journal=tmp_path / "j") as server:
        server.start()
        with XenstoreClient.from_socket(server.connect()) as client:
            for i in range(3):
                for k in range(1000):
                    client.write(f"/tree/{i}/{k}", "1")
            former, n_files = path.stat().st_ino, len(os.listdir("/proc/self/fd"))
            write_much(client, LONG_BYTES + (2 << 20))
            deadline = time.monotonic() + DEADLINE_S
            while path.stat().st_ino == former:
                client.write("/other", "1")
                assert time.monotonic() < deadline, "it is never shortened"
            client.write("/last", "2")
            assert path.stat().st_size < LONG_BYTES / 2
            assert not (tmp_path / "j" / "journal.new").exists()
            assert len(os.listdir("/proc/self/fd")) == n_files
    with XenstoreServer(journal=tmp_path / "j") as server:
        server.start()
        with XenstoreClient.from_socket(server.connect()) as client:
            assert client.read("/last") == b"2"
            assert client.read("/big") == b"x" * N_BIG
            assert [len(client.ls(f"/tree/{i}")) for i in range(3)] == [1000] * 3


def test_a_snapshot_that_cannot_be_written_is_tried_again_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = journal_file(tmp_path / "j")
    with XenstoreServer(journal=tmp_path / "j") as server:
        server.start()
        (tmp_path / "j" / "journal.new").mkdir()  # in the way
        with XenstoreClient.from_socket(server.connect()) as client:
            former = path.stat().st_ino
            write_much(client, LONG_BYTES + (1 << 20))
            client.control("print", "now")
            assert "cannot be written anew for now" in caplog.text
            (tmp_path / "j" / "journal.new").rmdir()
            deadline = time.monotonic() + DEADLINE_S
            while path.stat().st_ino == former:
                write_much(client, 1 << 20)
                assert time.monotonic() < deadline, "it is never tried again"
            assert caplog.text.count("cannot be written anew") == 1


# -- kill -9 in the middle of a snapshot


class Counter:
    """Writes ever higher numbers, many at once, and knows which were acknowledged."""

    N_PLACES = 50

    def __init__(self) -> None:
        self.acknowledged = [0] * self.N_PLACES
        self.sent = [0] * self.N_PLACES
        self._number = 0

    def run(self, connected: socket.socket) -> None:
        """Until the daemon dies."""
        parser, waiting = PacketParser(), list[tuple[int, int]]()
        try:
            while True:
                data = b""
                for place in range(self.N_PLACES):
                    self._number += 1
                    waiting.append((place, self._number))
                    self.sent[place] = self._number
                    data += encode(Op.WRITE, 1, 0, b"/count/%d\0" % place + b"%d " % self._number + b"x" * 1900)
                connected.sendall(data)
                while waiting:
                    received = connected.recv(65536)
                    if not received:
                        return
                    for _, _, _, payload in parser.feed(received):
                        assert payload == ACK
                        place, number = waiting.pop(0)
                        self.acknowledged[place] = number
        except ConnectionError:
            pass
        finally:
            connected.close()

    def compare(self, client: XenstoreClient) -> None:
        for place in range(self.N_PLACES):
            found = int(client.read(f"/count/{place}").split()[0])
            assert self.acknowledged[place] <= found <= self.sent[place]
            self.acknowledged[place] = found


def test_killed_in_the_middle_of_a_snapshot(tmp_path: Path) -> None:
    chance, counter, new = random.Random(5), Counter(), tmp_path / "j" / "journal.new"
    n_seen = 0
    with xenstored(tmp_path, "--journal", str(tmp_path / "j")) as daemon:
        with XenstoreClient.from_socket(daemon.dial_now()) as client:
            for i in range(100):
                with client.pipeline() as pipeline:
                    for k in range(100):
                        pipeline.write(f"/tree/{i}/{k}", b"%d" % k)
        for attempt in range(40):
            if attempt >= 8 and n_seen:
                break
            writer = threading.Thread(target=counter.run, args=(daemon.dial_now(),))
            writer.start()
            wait_for_file(new)
            time.sleep(chance.random() * 0.02 / (attempt + 1))  # anywhere in it
            daemon.kill()
            writer.join(DEADLINE_S)
            n_seen += new.exists()
            daemon.start()
            assert not new.exists()
            with XenstoreClient.from_socket(daemon.dial_now()) as client:
                counter.compare(client)
                assert client.control("check") == "OK"
                assert len(client.ls("/tree")) == 100
                assert [client.read(f"/tree/{i}/{i}") for i in range(100)] == [b"%d" % i for i in range(100)]
    assert n_seen, "no kill was in time"


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert time.monotonic() < deadline, f"there is no {path}"
        time.sleep(0.0005)


# -- no room


@contextmanager
def limited_daemon(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    place = ["--run", str(tmp_path / "run"), "--log-level", "warning"]
    command = [*PARAVIRT, *place, "xenstored", "--socket", str(tmp_path / "s"), "--journal", str(tmp_path / "j")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline()
            yield daemon
        finally:
            daemon.kill()


def test_without_room_nothing_is_acknowledged_and_nobody_is_hurt(tmp_path: Path) -> None:
    with limited_daemon(tmp_path) as daemon, raw(tmp_path / "s") as writer, raw(tmp_path / "s") as reader:
        assert daemon.stderr is not None
        writer.sendall(encode(Op.WRITE, 1, 0, b"/a\x001"))
        assert receive(writer)[3] == ACK
        room = journal_file(tmp_path / "j").stat().st_size + 700
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        writer.sendall(encode(Op.WRITE, 2, 0, b"/a\x00" + b"x" * 1000))  # a part of it fits
        assert "cannot be written: File too large" in daemon.stderr.readline()
        reader.sendall(encode(Op.READ, 3, 0, b"/a\0"))  # what it would see is not kept yet
        assert is_silent(writer)
        assert is_silent(reader)
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert receive(writer)[1:] == (2, 0, ACK)
        assert receive(reader)[1:] == (3, 0, b"x" * 1000)
        assert "can be written again" in daemon.stderr.readline()
        daemon.kill()
        assert daemon.stderr.read() == ""
    with xenstored(tmp_path, "--journal", str(tmp_path / "j")) as again:
        with XenstoreClient.from_socket(again.dial_now()) as client:
            assert client.read("/a") == b"x" * 1000


def test_killed_without_room_nothing_is_there_by_halves(tmp_path: Path) -> None:
    with limited_daemon(tmp_path) as daemon, raw(tmp_path / "s") as writer:
        assert daemon.stderr is not None
        writer.sendall(encode(Op.WRITE, 1, 0, b"/a\x001"))
        assert receive(writer)[3] == ACK
        n_bytes = journal_file(tmp_path / "j").stat().st_size
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (n_bytes + 30, resource.RLIM_INFINITY))
        writer.sendall(encode(Op.WRITE, 2, 0, b"/a\x00" + b"x" * 1000))
        assert "cannot be written" in daemon.stderr.readline()
        daemon.kill()
        daemon.wait()
        assert journal_file(tmp_path / "j").stat().st_size == n_bytes + 30
    with xenstored(tmp_path, "--journal", str(tmp_path / "j")) as again:
        with XenstoreClient.from_socket(again.dial_now()) as client:
            assert client.read("/a") == b"1"


class Swapped:
    """Another file in the place of a journal's, while a `with` block lasts."""

    def __init__(self, server: XenstoreServer, other: str) -> None:
        assert server._journal is not None
        self._fd = server._journal._fd
        self._other = other

    def __enter__(self) -> None:
        self._former = os.dup(self._fd)
        other = os.open(self._other, os.O_WRONLY)
        os.dup2(other, self._fd, inheritable=False)
        os.close(other)

    def __exit__(self, *_: object) -> None:
        os.dup2(self._former, self._fd, inheritable=False)
        os.close(self._former)


def fill(connected: socket.socket, request: bytes) -> None:
    """Send until nothing more is taken for a while."""
    with contextlib.suppress(TimeoutError):
        while True:
            connected.sendall(request * 50)


def test_while_it_waits_for_room_it_sleeps(tmp_path: Path) -> None:
    """Also when clients send more than it can take, and others have output that nobody may see."""
    with XenstoreServer(journal=tmp_path / "j") as server:
        server.start()
        with XenstoreClient.from_socket(server.connect()) as client:
            client.write("/big", b"x" * N_BIG)
            with server.connect() as greedy, server.connect() as other:
                for connected in (greedy, other):
                    connected.settimeout(SOON_S)
                request = encode(Op.READ, 1, 0, b"/big\0")
                fill(other, request)  # its output is full, and so is its input
                with Swapped(server, "/dev/full"):
                    greedy.sendall(encode(Op.WRITE, 1, 0, b"/a\x001"))
                    fill(greedy, request)
                    before = server.hub.counters().wake_ups
                    time.sleep(SOON_S)
                    assert server.hub.counters().wake_ups - before < 10
                for connected in (greedy, other):
                    connected.settimeout(DEADLINE_S)
                assert receive(greedy)[3] == ACK
                assert receive(other)[3] == b"x" * N_BIG
            assert client.read("/a") == b"1"


@pytest.mark.parametrize("sync", [False, True])
def test_what_is_acknowledged_is_on_the_disk_if_wanted(
    tmp_path: Path, sync: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """/dev/null takes every write, but knows nothing of syncing.

    When a file cannot be synced, a later sync may succeed without what the first one lost: only another file helps.
    """
    no_new_file = tmp_path / "j" / "journal.new"
    with XenstoreServer(journal=tmp_path / "j", sync=sync) as server:
        server.start()
        with server.connect() as connected:
            connected.settimeout(DEADLINE_S)
            no_new_file.mkdir()
            with Swapped(server, "/dev/null"):
                connected.sendall(encode(Op.WRITE, 1, 0, b"/a\x001"))
                assert is_silent(connected) is sync
            if sync:
                assert is_silent(connected)
                no_new_file.rmdir()
                assert receive(connected)[3] == ACK
                assert b"/a" in journal_file(tmp_path / "j").read_bytes()
    assert ("cannot be written: Invalid argument" in caplog.text) is sync


def test_changes_that_nobody_waits_for_are_written_too(tmp_path: Path) -> None:
    with XenstoreServer(journal=tmp_path / "j") as server:
        server.start()
        before = journal_file(tmp_path / "j").stat().st_size
        with server.connect(domid=7) as connected:  # a domain is known from now on
            deadline = time.monotonic() + DEADLINE_S
            while journal_file(tmp_path / "j").stat().st_size == before:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            connected.close()


def test_a_daemon_says_in_one_line_why_it_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    journal_file(tmp_path / "j").write_bytes(b"nonsense")
    place = ["--run", str(tmp_path / "run")]
    command = [*PARAVIRT, *place, "xenstored", "--socket", str(tmp_path / "s"), "--journal", str(tmp_path / "j")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "is damaged at byte 0 of 8" in line
    assert not (tmp_path / "s").exists()
