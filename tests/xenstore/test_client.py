# SPDX-License-Identifier: MIT
"""The client library against a running daemon."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paravirt.errors import Closed, InvalidRequest, NotFound, PeerError, StoreGone, XenstoreError
from paravirt.xenstore.client import Transaction, TransactionConflict, WatchEvent, XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from tests.xenstore.test_server import DEADLINE_S, start_daemon


@pytest.fixture
def server() -> Iterator[XenstoreServer]:
    with XenstoreServer() as server:
        yield server.start()


@pytest.fixture
def client(server: XenstoreServer) -> Iterator[XenstoreClient]:
    with XenstoreClient.from_socket(server.connect()) as client:
        yield client


@pytest.fixture
def other(server: XenstoreServer) -> Iterator[XenstoreClient]:
    with XenstoreClient.from_socket(server.connect()) as client:
        yield client


@pytest.fixture
def daemon(tmp_path: Path) -> "Iterator[subprocess.Popen[str]]":
    daemon = start_daemon(tmp_path / "s")
    yield daemon
    daemon.kill()
    daemon.communicate(timeout=DEADLINE_S)


def test_the_tree(client: XenstoreClient) -> None:
    client.write("/a/b", "text")
    client.write("/a/c", b"\0\1\xff")
    client.mkdir("/a/d")
    assert client.read("/a/b") == b"text"
    assert client.read_text("/a/b") == "text"
    assert client.read("/a/c") == b"\0\1\xff"
    assert client.ls("/a") == ["b", "c", "d"]
    assert client.exists("/a/d")
    assert not client.exists("/a/e")
    client.set_perms("/a", ["n0", "r0"])
    assert client.get_perms("/a") == ["n0", "r0"]
    client.rm("/a")
    assert not client.exists("/a")
    assert client.get_domain_path(7) == "/local/domain/7"
    assert client.is_domain_introduced(0)
    client.write("/c", b"\xff")
    with pytest.raises(PeerError, match="/c"):
        client.read_text("/c")


def test_errors_are_typed_and_name_what_was_wrong(client: XenstoreClient) -> None:
    cases: list[tuple[Callable[[], object], str, str]] = [
        (lambda: client.read("/no/such"), "ENOENT", "/no/such"),
        (lambda: client.ls("//"), "EINVAL", "//"),
        (lambda: client.rm("/"), "EINVAL", "/"),
        (lambda: client.write("/x", b"x" * 4096), "E2BIG", "/x"),
        (lambda: client.set_perms("/tool", ["n77"]), "ENOENT", "/tool"),
        (lambda: client.introduce(5, 1, 1), "EINVAL", "domain 5"),
        (lambda: client.release(5), "ENOENT", "domain 5"),
    ]
    for call, name, what in cases:
        with pytest.raises(XenstoreError) as caught:
            call()
        assert caught.value.name == name
        assert what in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InvalidRequest):
        client.read("/a\0b")
    with pytest.raises(NotFound):
        XenstoreClient.connect("/nonexistent/socket")


def test_a_listing_longer_than_a_reply(client: XenstoreClient) -> None:
    names = [f"child-number-{i}" for i in range(1200)]
    for name in names:
        client.mkdir(f"/many/{name}")
    assert client.ls("/many") == names
    with client.transaction() as transaction:
        assert transaction.ls("/many") == names


def test_a_transaction_is_all_or_nothing(client: XenstoreClient, other: XenstoreClient) -> None:
    with client.transaction() as transaction:
        transaction.write("/a", "1")
        transaction.write("/b", "2")
        assert not other.exists("/a")
    assert other.ls("/") == ["tool", "a", "b"]

    def fail() -> None:
        with client.transaction() as transaction:
            transaction.write("/c", "1")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail()
    assert not other.exists("/c")
    with pytest.raises(InvalidRequest, match="over"):
        transaction.read("/a")


def test_a_conflict_is_typed_and_can_be_tried_again(client: XenstoreClient, other: XenstoreClient) -> None:
    client.write("/n", "0")
    transaction = client.transaction()
    transaction.write("/n", transaction.read("/n") + b"1")
    other.write("/n", "5")
    with pytest.raises(TransactionConflict) as caught:
        transaction.commit()
    assert caught.value.name == "EAGAIN"
    n_attempts = 0

    def count_up(transaction: Transaction) -> int:
        nonlocal n_attempts
        n_attempts += 1
        value = int(transaction.read("/n")) + 1
        if n_attempts < 3:
            other.write("/n", "5")
        transaction.write("/n", str(value))
        return value

    assert client.transact(count_up) == 6
    assert (n_attempts, client.read("/n")) == (3, b"6")

    def never(transaction: Transaction) -> None:
        transaction.read("/n")
        other.write("/n", "7")

    with pytest.raises(TransactionConflict):
        client.transact(never, attempts=4)


def test_threads_count_without_losing_one(server: XenstoreServer, client: XenstoreClient) -> None:
    client.write("/n", "0")

    def add(transaction: Transaction) -> None:
        transaction.write("/n", str(int(transaction.read("/n")) + 1))

    def work() -> None:
        for _ in range(50):
            client.transact(add, attempts=10_000)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.read("/n") == b"200"
    assert server.hub.domains[0].n_transactions == 0


def test_watches(client: XenstoreClient, other: XenstoreClient) -> None:
    with client.watch_queue() as queue:
        queue.add("/a", "token")
        assert queue.get(DEADLINE_S) == WatchEvent("/a", "token")
        other.write("/a/x", "1")
        assert queue.get(DEADLINE_S) == WatchEvent("/a/x", "token")
        queue.add("relative")
        assert queue.get(DEADLINE_S) == WatchEvent("relative", "relative")
        other.write("relative/1", "1")
        assert queue.get(DEADLINE_S) == WatchEvent("relative/1", "relative")
        assert queue.get_nowait() is None
        assert queue.get(0.001) is None
        with pytest.raises(InvalidRequest):
            queue.add("/a", "token")
        with pytest.raises(InvalidRequest):
            queue.remove("/a", "other")
        queue.remove("/a", "token")
        other.write("/a/x", "2")
        other.write("relative/2", "1")
        assert queue.get(DEADLINE_S) == WatchEvent("relative/2", "relative")
    with pytest.raises(Closed):
        queue.get()


def test_a_watch_with_a_depth(client: XenstoreClient, other: XenstoreClient) -> None:
    with client.watch_queue() as queue:
        queue.add("/a", depth=1)
        assert queue.get(DEADLINE_S) == WatchEvent("/a", "/a")
        other.write("/a/b/c", "1")
        other.write("/a/b", "1")
        assert queue.get(DEADLINE_S) == WatchEvent("/a/b", "/a")


def test_two_queues_may_use_the_same_watch(client: XenstoreClient, other: XenstoreClient) -> None:
    with client.watch_queue() as first, client.watch_queue() as second:
        for queue in (first, second):
            queue.add("/a", "same")
            assert queue.get(DEADLINE_S) == WatchEvent("/a", "same")
        first.remove("/a", "same")
        other.write("/a", "1")
        assert second.get(DEADLINE_S) == WatchEvent("/a", "same")
        assert len(first) == 0


def test_a_kick_ends_one_wait(client: XenstoreClient) -> None:
    with client.watch_queue() as queue:
        queue.kick()
        assert queue.get() is None
        got: list[WatchEvent | None] = []
        thread = threading.Thread(target=lambda: got.append(queue.get()))
        thread.start()
        queue.kick()
        thread.join(DEADLINE_S)
        assert got == [None]


def test_equal_events_are_merged_and_too_many_are_summed_up(client: XenstoreClient, other: XenstoreClient) -> None:
    with client.watch_queue(pending_max=10) as queue:
        queue.add("/a")
        queue.add("/b")
        while queue.get(DEADLINE_S) != WatchEvent("/b", "/b"):
            pass
        for _ in range(100):
            other.write("/a/same", "1")
        client.read("/tool")  # its reply comes after all events
        assert len(queue) <= 1
        assert queue.n_merged >= 98
        queue.get(0)
        for i in range(11):
            other.write(f"/a/{i}", "1")
        client.read("/tool")
        assert queue.n_overflows == 1
        assert [queue.get(0), queue.get(0), queue.get(0)] == [WatchEvent("/a", "/a"), WatchEvent("/b", "/b"), None]


def test_reset_forgets_watches(client: XenstoreClient, other: XenstoreClient) -> None:
    queue = client.watch_queue()
    queue.add("/a")
    client.reset_watches()
    other.write("/a", "1")
    client.read("/tool")
    assert queue.get(0) is None
    queue.add("/a")
    assert queue.get(DEADLINE_S) == WatchEvent("/a", "/a")


def test_a_queue_that_is_closed_leaves_nothing_behind(server: XenstoreServer, client: XenstoreClient) -> None:
    for _ in range(100):
        with client.watch_queue() as queue:
            queue.add("/a")
    assert server.hub.domains[0].n_watches == 0
    assert client._protocol.sinks == set()
    assert client._protocol.subscriptions == {}


def test_a_killed_daemon_is_an_error_for_whoever_waits(daemon: "subprocess.Popen[str]", tmp_path: Path) -> None:
    client = XenstoreClient.connect(tmp_path / "s")
    queue = client.watch_queue()
    queue.add("/a")
    queue.get(DEADLINE_S)
    daemon.send_signal(19)  # SIGSTOP: requests stay without an answer
    caught: list[BaseException] = []

    def catch(call: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            try:
                call()
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    threads = [catch(lambda: client.read("/tool")), catch(lambda: client.write("/x", "1")), catch(queue.get)]
    daemon.kill()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert [type(error) for error in caught] == [StoreGone] * 3
    for call in (lambda: client.read("/tool"), client.transaction, lambda: queue.add("/b"), queue.get):
        with pytest.raises(StoreGone):
            call()
    with pytest.raises(StoreGone):
        client.watch_queue()
    queue.close()
    assert client.closed
    client.close()
    client.close()


def test_closing_ends_calls_and_queues(server: XenstoreServer) -> None:
    client = XenstoreClient.from_socket(server.connect())
    queue = client.watch_queue()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            queue.get()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    client.close()
    thread.join(DEADLINE_S)
    assert [type(error) for error in caught] == [Closed]
    with pytest.raises(Closed):
        client.read("/tool")
    queue.close()


def test_a_forked_child_gets_closed(client: XenstoreClient) -> None:
    queue = client.watch_queue()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            n_refused = 0
            for call in (lambda: client.read("/tool"), queue.get, lambda: queue.add("/a")):
                try:
                    call()
                except Closed:
                    n_refused += 1
            client.close()
            status = 0 if n_refused == 3 else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert client.read("/tool") == b""


def test_a_pipelining_client_does_not_choke_on_its_own_replies(server: XenstoreServer, client: XenstoreClient) -> None:
    client.write("/big", b"x" * 4000)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                assert len(client.read("/big")) == 4000
                client.write("/big", b"y" * 4000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
