# SPDX-License-Identifier: MIT
"""The daemon's sockets: start and stop, hostile clients, slow clients, leaks."""

import os
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.errors import AlreadyExists, Closed, InvalidRequest, NotFound, XenstoreError
from paravirt.xenstore.client import XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.wire import Op, PacketParser, encode

DEADLINE_S = 30.0

DAEMON = """
import sys
from paravirt.xenstore.server import XenstoreServer
server = XenstoreServer(sys.argv[1])
print("ready", flush=True)
server.serve_forever()
print("stopped", flush=True)
"""


def start_daemon(path: Path) -> "subprocess.Popen[str]":
    """A daemon in a process of its own, accepting connections."""
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON, str(path)], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == "ready\n"
    return daemon


@pytest.fixture
def server(tmp_path: Path) -> Iterator[XenstoreServer]:
    with XenstoreServer(tmp_path / "s") as server:
        yield server.start()


@pytest.fixture
def client(server: XenstoreServer) -> Iterator[XenstoreClient]:
    with XenstoreClient.from_socket(server.connect()) as client:
        yield client


def raw(server: XenstoreServer, domid: int = 0) -> socket.socket:
    connected = server.connect(domid)
    connected.settimeout(DEADLINE_S)
    return connected


def receive(connected: socket.socket, n_packets: int) -> list[tuple[int, int, int, bytes]]:
    parser, packets = PacketParser(), []
    while len(packets) < n_packets:
        data = connected.recv(65536)
        assert data, "the daemon closed the connection"
        packets += parser.feed(data)
    return packets


def send_until_full(connected: socket.socket, request: bytes) -> int:
    """Send one request again and again until the daemon has stopped reading; how many bytes went out."""
    sent = 0
    try:
        while True:
            sent += connected.send(request)
    except TimeoutError:
        return sent


def is_closed(connected: socket.socket) -> bool:
    try:
        while connected.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_both_transports_reach_one_tree(tmp_path: Path) -> None:
    with XenstoreServer(tmp_path / "s") as server:
        server.start()
        with XenstoreClient.connect(tmp_path / "s") as first, XenstoreClient.from_socket(server.connect()) as second:
            first.write("/a", "1")
            assert second.read("/a") == b"1"
    assert not (tmp_path / "s").exists()
    with pytest.raises(NotFound):
        XenstoreClient.connect(tmp_path / "s")


def test_the_socket_is_for_its_owner_alone(server: XenstoreServer, tmp_path: Path) -> None:
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600


def test_requests_sent_before_it_serves_are_answered(tmp_path: Path) -> None:
    server = XenstoreServer(tmp_path / "s")
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(tmp_path / "s"))
    connected.settimeout(DEADLINE_S)
    connected.sendall(encode(Op.READ, 3, 0, b"/tool\0"))
    with server.start():
        assert receive(connected, 1) == [(Op.READ, 3, 0, b"")]
    connected.close()


def test_a_live_socket_is_not_replaced(tmp_path: Path) -> None:
    with XenstoreServer(tmp_path / "s").start():
        with pytest.raises(AlreadyExists):
            XenstoreServer(tmp_path / "s")
        XenstoreClient.connect(tmp_path / "s").close()
    (tmp_path / "file").write_text("not a socket")
    with pytest.raises(AlreadyExists):
        XenstoreServer(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "not a socket"


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="107"):
        XenstoreServer(tmp_path / ("x" * 107))
    with pytest.raises(NotFound):
        XenstoreServer(tmp_path / "missing" / "s")


def test_a_killed_daemon_leaves_a_socket_that_is_replaced(tmp_path: Path) -> None:
    daemon = start_daemon(tmp_path / "s")
    daemon.kill()
    daemon.communicate(timeout=DEADLINE_S)
    assert (tmp_path / "s").exists()
    with XenstoreServer(tmp_path / "s").start(), XenstoreClient.connect(tmp_path / "s") as client:
        assert client.ls("/") == ["tool"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_daemon_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    daemon = start_daemon(tmp_path / "s")
    client = XenstoreClient.connect(tmp_path / "s")
    client.write("/a", "1")
    daemon.send_signal(number)
    out, _ = daemon.communicate(timeout=DEADLINE_S)
    assert (daemon.returncode, out) == (0, "stopped\n")
    assert not (tmp_path / "s").exists()
    client.close()


def test_stop_from_another_thread_and_twice(tmp_path: Path) -> None:
    server = XenstoreServer(tmp_path / "s")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with XenstoreClient.from_socket(server.connect()) as client:
        client.write("/a", "1")
    server.stop()
    server.stop()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert not (tmp_path / "s").exists()
    with pytest.raises(Closed):
        server.connect()
    with pytest.raises(Closed):
        server.start()


def test_a_daemon_that_never_ran_leaves_nothing(tmp_path: Path) -> None:
    XenstoreServer(tmp_path / "s").stop()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("length", [4097, 0x80000000, 0xFFFFFFFF])
def test_a_payload_that_is_too_long_closes_that_socket_alone(
    server: XenstoreServer, client: XenstoreClient, length: int
) -> None:
    hostile = raw(server, 5)
    hostile.sendall(encode(Op.GET_DOMAIN_PATH, 1, 0, b"5\0") + struct.pack("<IIII", 2, 2, 0, length))
    assert receive(hostile, 1)[0][3] == b"/local/domain/5\0"
    assert is_closed(hostile)
    hostile.close()
    assert client.read("/tool") == b""


def test_random_bytes_harm_nobody(server: XenstoreServer, client: XenstoreClient) -> None:
    chance = random.Random(4)
    for _ in range(200):
        hostile = raw(server, chance.choice([0, 5]))
        try:
            hostile.sendall(chance.randbytes(chance.randrange(1, 3000)))
            op, length = chance.randrange(30), chance.randrange(200)
            hostile.sendall(struct.pack("<IIII", op, 1, chance.randrange(2), length) + chance.randbytes(length))
        except OSError:
            pass  # closed already
        hostile.close()
    assert client.ls("/") == ["tool"]


def test_a_request_byte_by_byte(server: XenstoreServer) -> None:
    with raw(server) as slow:
        for byte in encode(Op.WRITE, 9, 0, b"/slow\0value"):
            slow.sendall(bytes([byte]))
        assert receive(slow, 1) == [(Op.WRITE, 9, 0, b"OK\0")]


def test_a_client_that_never_reads_stops_only_itself(server: XenstoreServer, client: XenstoreClient) -> None:
    client.write("/big", b"x" * 4000)
    client.set_perms("/big", ["r0"])
    with raw(server, 5) as deaf:
        deaf.settimeout(0.2)  # until the daemon has stopped reading, which is what is waited for
        request = encode(Op.READ, 1, 0, b"/big\0")
        sent = send_until_full(deaf, request)
        assert client.read("/big") == b"x" * 4000
        assert server.hub.domains[5].memory_bytes < 1 << 20
        deaf.settimeout(DEADLINE_S)
        assert len(receive(deaf, sent // len(request))) == sent // len(request)


def test_a_client_that_ignores_its_events_costs_little(server: XenstoreServer, client: XenstoreClient) -> None:
    client.write("/a", "0")
    client.set_perms("/a", ["r0"])
    with raw(server, 5) as deaf:
        deaf.sendall(encode(Op.WATCH, 1, 0, b"/a\0" + b"t" * 3000 + b"\0"))
        receive(deaf, 2)
        for i in range(3000):
            client.write("/a", str(i))
        assert server.hub.domains[5].memory_bytes < 20_000


def test_writing_a_watched_node_often_keeps_memory_flat() -> None:
    from tests.xenstore.story import World

    world = World()
    world.send("dom0", Op.WATCH, b"/a\0t\0")
    deaf = world.client("dom0")
    deaf.sent(1)
    writer = world.client("dom0b")
    requests = encode(Op.WRITE, 1, 0, b"/a\0value") * 100
    most = 0
    for _ in range(1000):
        writer.feed(requests)
        writer.sent(writer.n_output_bytes)
        most = max(most, deaf.n_output_bytes)
    assert 0 < most < 200


def test_a_mistake_of_ours_fails_one_request_and_no_other(
    server: XenstoreServer, client: XenstoreClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("paravirt.xenstore.control._text", fail)
    with pytest.raises(XenstoreError) as failed:
        client.control("help")
    assert failed.value.name == "EIO"
    assert "CONTROL" in caplog.text
    assert client.ls("/") == ["tool"]


def test_a_thousand_connections_leave_nothing(server: XenstoreServer, tmp_path: Path) -> None:
    path = tmp_path / "s"

    with XenstoreClient.connect(path) as witness:

        def count() -> tuple[int, int]:
            while server.hub.statistics().connections > 1:
                witness.read("/tool")
            witness.read("/tool")  # the wake-up that ended the last of them is over
            return threading.active_count(), len(os.listdir("/proc/self/fd"))

        before = count()
        for i in range(1000):
            with XenstoreClient.connect(path) as client:
                client.write(f"/n{i % 10}", "x")
                if i % 10 == 0:
                    client.watch_queue().add("/n0")
                    client.transaction()
        assert count() == before
    assert server.hub.statistics().watches == 0
    assert server.hub.domains[0].n_transactions == 0


def test_without_descriptors_it_waits_for_one_to_come_free(tmp_path: Path) -> None:
    daemon = start_daemon(tmp_path / "s")
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (20, 20))
    clients = [socket.socket(socket.AF_UNIX) for _ in range(30)]
    for connected in clients:
        connected.settimeout(DEADLINE_S)
        connected.connect(str(tmp_path / "s"))
        connected.sendall(encode(Op.READ, 1, 0, b"/tool\0"))
    for connected in clients:  # the last ones are served as the first ones leave
        assert receive(connected, 1)[0][0] == Op.READ
        connected.close()
    daemon.terminate()
    daemon.communicate(timeout=DEADLINE_S)
    assert daemon.returncode == 0
