# SPDX-License-Identifier: MIT
"""The blocking client over connections that break: fake daemons for each fault, and real ones that start anew."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from paravirt.errors import Closed, NotFound, OutcomeUnknown, PeerError, QuotaReached, StoreGone, TransactionConflict
from paravirt.xenstore.client import Transaction, WatchEvent, XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.transport import SocketTransport
from paravirt.xenstore.wire import Op, encode
from tests.xenstore.fake_store import DEADLINE_S, Background, FakeStore, Peer


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeStore]:
    with FakeStore(tmp_path / "s") as fake:
        yield fake


@pytest.fixture
def client(fake: FakeStore) -> Iterator[XenstoreClient]:
    with XenstoreClient.connect(fake.path, reconnect=True) as client:
        yield client


@pytest.fixture
def peer(fake: FakeStore, client: XenstoreClient) -> Peer:
    return fake.accept()


def test_an_idle_client_comes_back(fake: FakeStore, peer: Peer, client: XenstoreClient) -> None:
    peer.close()
    second = fake.accept()
    read = Background(lambda: client.read("/a"))
    second.answer(second.next(Op.READ), b"value")
    assert read.result() == b"value"
    assert client.n_reconnects == 1
    assert not client.closed


def test_a_read_in_flight_is_repeated_and_a_write_is_not(fake: FakeStore, peer: Peer, client: XenstoreClient) -> None:
    read = Background(lambda: client.read("/a"))
    peer.next(Op.READ)
    write = Background(lambda: client.write("/b", "1"))
    peer.next(Op.WRITE)
    peer.close()
    with pytest.raises(OutcomeUnknown, match="/b"):
        write.result()
    second = fake.accept()
    second.answer(second.next(Op.READ), b"value")
    assert read.result() == b"value"


@pytest.mark.parametrize(
    "answer",
    [
        encode(Op.READ, 1000, 0, b"for nobody"),
        encode(Op.READ, 1, 0, b"")[:12] + (5000).to_bytes(4, "little") + b"x" * 5000,
        b"\xff" * 100,
    ],
    ids=["unknown request", "too long", "garbage"],
)
def test_a_daemon_that_breaks_the_protocol_is_left(
    fake: FakeStore, peer: Peer, client: XenstoreClient, answer: bytes
) -> None:
    read = Background(lambda: client.read("/a"))
    peer.next(Op.READ)
    peer.raw(answer)
    second = fake.accept()
    second.answer(second.next(Op.READ), b"value")
    assert read.result() == b"value"


def test_half_a_reply_is_none(fake: FakeStore, peer: Peer, client: XenstoreClient) -> None:
    read = Background(lambda: client.read("/a"))
    peer.raw(encode(Op.READ, peer.next(Op.READ)[1], 0, b"only half of the reply")[:20])
    peer.close()
    second = fake.accept()
    second.answer(second.next(Op.READ), b"value")
    assert read.result() == b"value"


def test_a_wrong_operation_in_a_reply_is_an_error_of_that_call(peer: Peer, client: XenstoreClient) -> None:
    read = Background(lambda: client.read("/a"))
    peer.answer(peer.next(Op.READ), op=Op.MKDIR)
    with pytest.raises(PeerError):
        read.result()


class Interrupted(Exception):
    """What a signal handler raises."""


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Make a signal handler raise in the main thread."""

    def handler(_number: int, _frame: object) -> None:
        raise Interrupted

    former = signal.signal(signal.SIGUSR1, handler)
    yield lambda: os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, former)


def test_an_interrupted_watch_is_taken_away(peer: Peer, client: XenstoreClient, interrupt: Callable[[], None]) -> None:
    asked = Background(lambda: (peer.next(Op.WATCH), interrupt()))
    with pytest.raises(Interrupted):
        client.watch("/a")
    asked.result()
    peer.next(Op.UNWATCH)
    assert client._protocol.subscriptions == {}
    assert client._protocol.sinks == set()


def test_an_interrupted_start_is_aborted(peer: Peer, client: XenstoreClient, interrupt: Callable[[], None]) -> None:
    asked = Background(lambda: (peer.next(Op.TRANSACTION_START), interrupt()))
    with pytest.raises(Interrupted):
        client.transaction()
    start, _ = asked.result()
    peer.answer(start, b"9\0")
    while not client._protocol.has_output:  # the next call sends it
        threading.Event().wait(0.001)
    read = Background(lambda: client.read("/a"))
    abort = peer.next(Op.TRANSACTION_END)
    assert (abort[2], abort[3]) == (9, b"F\0")
    peer.answer(abort)
    peer.answer(peer.next(Op.READ), b"1")
    assert read.result() == b"1"


def test_an_interrupted_call_harms_no_other(peer: Peer, client: XenstoreClient, interrupt: Callable[[], None]) -> None:
    asked = Background(lambda: (peer.next(Op.READ), interrupt()))
    with pytest.raises(Interrupted):
        client.read("/a")
    late, _ = asked.result()
    peer.answer(late, b"nobody waits for this")
    read = Background(lambda: client.read("/b"))
    peer.answer(peer.next(Op.READ), b"1")
    assert read.result() == b"1"


def test_what_an_interruption_kept_from_going_out_goes_out_later(
    peer: Peer, client: XenstoreClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = client._transport
    with monkeypatch.context() as patch:

        def interrupted(data: bytes, counts: list[int]) -> None:
            raise Interrupted

        patch.setattr(transport, "send", interrupted)
        with client.pipeline() as pipeline:
            first, second = pipeline.read("/a"), pipeline.read("/b")
            with pytest.raises(Interrupted):
                pipeline.flush()
            patch.undo()
            value = Background(lambda: first.value)
            for path in (b"/a\0", b"/b\0"):
                packet = peer.next(Op.READ)
                assert packet[3] == path
                peer.answer(packet, path)
            assert value.result() == b"/a\0"
        assert second.value == b"/b\0"


def test_half_a_request(fake: FakeStore, client: XenstoreClient, peer: Peer) -> None:
    """The daemon never saw the end of it, but the client cannot know that."""
    write = Background(lambda: client.write("/a", "x" * 3000))
    peer.socket.recv(100)
    peer.close()
    with pytest.raises(OutcomeUnknown):
        write.result()
    fake.accept()


class Unsendable(SocketTransport):
    """Nothing can be sent over it."""

    def send(self, data: bytes, counts: list[int]) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def test_what_could_not_be_sent_is_sent_over_the_next_connection() -> None:
    ours, theirs = socket.socketpair()
    next_ours, next_theirs = socket.socketpair()

    class Again:
        def connect_nowait(self) -> SocketTransport:
            return SocketTransport(next_ours)

    with XenstoreClient(Unsendable(ours), connector=Again()) as client:
        write = Background(lambda: client.write("/a", "1"))
        peer = Peer(next_theirs)
        packet = peer.next(Op.WRITE)
        assert packet[3] == b"/a\x001"
        peer.answer(packet)
        write.result()
    theirs.close()
    next_theirs.close()


def test_calls_while_there_is_no_daemon_wait_for_it(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ExitStack() as stack:
        with FakeStore(path) as fake:
            client = stack.enter_context(XenstoreClient.connect(path, reconnect=True))
            fake.accept()
        write = Background(lambda: client.write("/a", "1"))
        second = stack.enter_context(FakeStore(path)).accept()
        second.answer(second.next(Op.WRITE))
        write.result()


def test_an_open_transaction_is_a_conflict_for_ever(fake: FakeStore, peer: Peer, client: XenstoreClient) -> None:
    started = Background(client.transaction)
    peer.answer(peer.next(Op.TRANSACTION_START), b"5\0")
    transaction = started.result()
    write = Background(lambda: transaction.write("/a", "1"))
    assert peer.next(Op.WRITE)[2] == 5
    peer.close()
    with pytest.raises(TransactionConflict):
        write.result()
    fake.accept()
    with pytest.raises(TransactionConflict):
        transaction.read("/a")
    with pytest.raises(TransactionConflict):
        transaction.commit()


def test_a_commit_in_flight_has_an_unknown_outcome(fake: FakeStore, peer: Peer, client: XenstoreClient) -> None:
    started = Background(client.transaction)
    peer.answer(peer.next(Op.TRANSACTION_START), b"5\0")
    commit = Background(started.result().commit)
    peer.next(Op.TRANSACTION_END)
    peer.close()
    with pytest.raises(OutcomeUnknown):
        commit.result()
    fake.accept()


def test_a_start_in_flight_is_repeated(fake: FakeStore, peer: Peer, client: XenstoreClient) -> None:
    started = Background(client.transaction)
    peer.next(Op.TRANSACTION_START)
    peer.close()
    second = fake.accept()
    second.answer(second.next(Op.TRANSACTION_START), b"6\0")
    transaction = started.result()
    read = Background(lambda: transaction.read("/a"))
    packet = second.next(Op.READ)
    assert packet[2] == 6
    second.answer(packet, b"1")
    assert read.result() == b"1"
    abort = Background(transaction.abort)
    second.answer(second.next(Op.TRANSACTION_END))
    abort.result()


def test_after_the_time_limit_the_store_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with FakeStore(path) as fake:
        client = XenstoreClient.connect(path, reconnect=True, reconnect_timeout_s=0.05)
        peer = fake.accept()
        queue = client.watch_queue()
        read = Background(lambda: client.read("/a"))
        peer.next(Op.READ)
        fake.path.rename(tmp_path / "elsewhere")
        peer.close()
        with pytest.raises(StoreGone, match=r"0\.05 s"):
            read.result()
        with pytest.raises(StoreGone):
            queue.get(DEADLINE_S)
        with pytest.raises(StoreGone):
            client.write("/a", "1")
        assert client.closed
        client.close()
        (tmp_path / "elsewhere").rename(path)


def test_closing_does_not_wait_for_a_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with FakeStore(path) as fake:
        client = XenstoreClient.connect(path, reconnect=True, reconnect_timeout_s=10 * DEADLINE_S)
        fake.accept()
    write = Background(lambda: client.write("/a", "1"))
    client.close()
    with pytest.raises(Closed):
        write.result()


def test_a_watch_that_is_refused_by_the_next_daemon_is_an_error(
    fake: FakeStore, peer: Peer, client: XenstoreClient
) -> None:
    watched = Background(lambda: client.watch("/a"))
    peer.answer(peer.next(Op.WATCH))
    events = watched.result()
    peer.close()
    second = fake.accept()
    second.refuse(second.next(Op.WATCH), "ENOSPC")
    for _ in range(2):
        with pytest.raises(QuotaReached, match="/a"):
            next(events)


def test_without_reconnection_a_broken_connection_is_the_end(fake: FakeStore) -> None:
    with XenstoreClient.connect(fake.path) as client:
        peer = fake.accept()
        write = Background(lambda: client.write("/a", "1"))
        peer.next(Op.WRITE)
        peer.close()
        with pytest.raises(StoreGone):
            write.result()


def test_much_that_waits_is_sent_while_replies_are_read(tmp_path: Path) -> None:
    """More requests than a daemon takes in before it wants its replies to be read."""
    path = tmp_path / "s"
    with ExitStack() as stack:
        with FakeStore(path) as fake:
            client = stack.enter_context(XenstoreClient.connect(path, reconnect=True))
            fake.accept()
        writes = [Background(lambda i=i: client.write(f"/big/{i}", "x" * 4000)) for i in range(20)]
        with XenstoreServer(path).start():
            for write in writes:
                write.result()
            with client.pipeline() as pipeline:
                results = [pipeline.read(f"/big/{i % 20}") for i in range(500)]
            assert {len(result.value) for result in results} == {4000}


def test_a_daemon_that_closes_each_connection_at_once_is_not_asked_for_ever() -> None:
    n_connections = 0

    def again() -> socket.socket:
        nonlocal n_connections
        n_connections += 1
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours

    with XenstoreClient.from_socket(again(), again=again, reconnect_timeout_s=0.1) as client:
        with pytest.raises(StoreGone, match=r"0\.1 s"):
            client.read("/a")
    assert 1 < n_connections < 50


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_whoever_makes_connections_leaves_nobody_waiting() -> None:
    ours, theirs = socket.socketpair()

    def again() -> socket.socket:
        raise RuntimeError("a defect")

    with XenstoreClient.from_socket(ours, again=again) as client:
        theirs.close()
        with pytest.raises(StoreGone, match="a defect"):
            client.read("/a")


def restart(server: XenstoreServer, path: Path) -> XenstoreServer:
    server.stop()
    return XenstoreServer(path).start()


def test_watches_outlive_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = XenstoreServer(path).start()
    with XenstoreClient.connect(path, reconnect=True) as client:
        with client.watch("/a", "token") as events, client.watch("/b", depth=1) as others:
            assert next(events) == WatchEvent("/a", "token")
            assert next(others) == WatchEvent("/b", "/b")
            for _ in range(3):
                server = restart(server, path)
                assert next(events) == WatchEvent("/a", "token")
                assert next(others) == WatchEvent("/b", "/b")
                client.write("/a/x", "1")
                assert next(events) == WatchEvent("/a/x", "token")
                client.write("/b/x", "1")
                assert next(others) == WatchEvent("/b/x", "/b")
        client.read("/tool")
        assert server.hub.domains[0].n_watches == 0
    server.stop()


def test_a_change_while_nobody_served_is_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = XenstoreServer(path).start()
    with XenstoreClient.connect(path, reconnect=True) as client:
        found = Background(lambda: client.wait_for("/state", lambda value: value == b"4", DEADLINE_S))
        while not server.hub.domains[0].n_watches:
            pass
        server.stop()
        server = XenstoreServer(path)
        with XenstoreClient.from_socket(server.connect()) as other:
            wrote = Background(lambda: other.write("/state", "4"))
            server.start()
            wrote.result()
        assert found.result() == b"4"
    server.stop()


def test_transact_comes_through_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = XenstoreServer(path).start()
    with XenstoreClient.connect(path, reconnect=True) as client:
        runs = 0

        def move(transaction: Transaction) -> None:
            nonlocal runs, server
            transaction.write("/a", "1")
            runs += 1
            if runs == 1:
                server = restart(server, path)
            transaction.write("/b", "1")

        client.transact(move)
        assert runs == 2
        with client.transaction(attempts=3) as transaction:
            transaction.write("/c", "1")
            server = restart(server, path)
            transaction.write("/d", "1")
        assert client.ls("/") == ["tool", "c", "d"]
        server = restart(server, path)
        with client.transaction(attempts=3) as transaction:
            transaction.write("/e", "1")
            server = restart(server, path)
        assert client.ls("/") == ["tool", "e"]
    server.stop()


def test_another_socket_from_whoever_gave_the_first() -> None:
    server = XenstoreServer().start()
    servers = [server]

    def again() -> socket.socket:
        return servers[-1].connect()

    with XenstoreClient.from_socket(server.connect(), again=again) as client:
        client.write("/a", "1")
        servers.append(XenstoreServer().start())
        server.stop()
        assert client.ls("/") == ["tool"]
        assert client.n_reconnects == 1
    servers[-1].stop()


def test_restarts_leave_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def use(n_restarts: int) -> None:
        server = XenstoreServer(path).start()
        with XenstoreClient.connect(path, reconnect=True) as client:
            queue = client.watch("/a")
            for _ in range(n_restarts):
                server = restart(server, path)
                while client.n_reconnects == 0:
                    pass
                assert client.read("/tool") == b""
            queue.close()
        server.stop()

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    use(1)
    before = count()
    use(5)
    assert count() == before


def test_nobody_serves_at_first(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        XenstoreClient.connect(tmp_path / "s", reconnect=True)
