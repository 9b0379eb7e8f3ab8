# SPDX-License-Identifier: MIT
"""Pipelines, transactions that try again, watches as iterators, waiting for a value, calls about domains."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paravirt.errors import (
    AccessRefused,
    AlreadyThere,
    Closed,
    InvalidRequest,
    MalformedRequest,
    NoSuchNode,
    PeerError,
    QuotaReached,
    StoreBusy,
    StoreGone,
    TimedOut,
    TooLarge,
    TransactionConflict,
    XenstoreError,
)
from paravirt.xenstore.client import WatchEvent, XenstoreClient
from paravirt.xenstore.pipeline import UNDER_WAY_MAX
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.wire import Op
from tests.xenstore.fake_store import DEADLINE_S, Background, FakeStore


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


# -- errors


def test_errors_have_classes(server: XenstoreServer, client: XenstoreClient) -> None:
    client.write("/dom0", "1")
    client.set_perms("/dom0", ["n0"])
    with XenstoreClient.from_socket(server.connect(7)) as guest:
        client.mkdir("/local/domain/7")
        client.set_perms("/local/domain/7", ["n0", "b7"])
        transaction = client.transaction()
        cases: list[tuple[type[XenstoreError], str, Callable[[], object]]] = [
            (NoSuchNode, "ENOENT", lambda: client.read("/none")),
            (AccessRefused, "EACCES", lambda: guest.read("/dom0")),
            (MalformedRequest, "EINVAL", lambda: client.read("//")),
            (TooLarge, "E2BIG", lambda: client.write("/a", "x" * 4095)),
            (QuotaReached, "ENOSPC", lambda: guest.write("big", "x" * 4000)),
            (StoreBusy, "EBUSY", lambda: transaction.request(Op.TRANSACTION_START, b"\0")),
            (AlreadyThere, "EEXIST", lambda: [client.request(Op.WATCH, b"/a\0t\0") for _ in range(2)]),
        ]
        for kind, name, call in cases:
            with pytest.raises(kind) as caught:
                call()
            assert type(caught.value) is kind
            assert caught.value.name == name


# -- pipelines


def test_a_pipeline(client: XenstoreClient) -> None:
    client.write("/a", "before")
    with client.pipeline() as pipeline:
        before = pipeline.read("/a")
        written = pipeline.write("/a", b"after")
        after = pipeline.read_text("/a")
        missing = pipeline.read("/none")
        pipeline.mkdir("/d")
        there, not_there = pipeline.exists("/d"), pipeline.exists("/e")
        names = pipeline.ls("/")
        pipeline.set_perms("/d", ["r0"])
        permissions = pipeline.get_perms("/d")
        pipeline.rm("/d")
        gone = pipeline.exists("/d")
        assert before.value == b"before"  # may be asked for in the middle too
    assert written.done
    assert written.value is None
    assert after.value == "after"
    assert (there.value, not_there.value, gone.value) == (True, False, False)
    assert names.value == ["tool", "a", "d"]
    assert permissions.value == ["r0"]
    for _ in range(2):
        with pytest.raises(NoSuchNode, match="/none"):
            _ = missing.value
    with pytest.raises(InvalidRequest):
        pipeline.read("/a")


def test_an_error_that_nobody_has_kept_is_raised_at_the_end(client: XenstoreClient) -> None:
    def use() -> None:
        with client.pipeline() as pipeline:
            pipeline.write("//", "1")
            pipeline.write("/a", "1")

    with pytest.raises(MalformedRequest):
        use()
    assert client.read("/a") == b"1"


def test_an_error_of_the_block_counts_more(client: XenstoreClient) -> None:
    def use() -> None:
        with client.pipeline() as pipeline:
            pipeline.write("//", "1")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        use()
    assert client.read("/tool") == b""


def test_results_of_a_pipeline_that_failed_never_wait_for_ever(tmp_path: Path) -> None:
    with FakeStore(tmp_path / "s") as fake:
        client = XenstoreClient.connect(fake.path)
        peer = fake.accept()
        pipeline = client.pipeline()
        sent = pipeline.read("/a")
        pipeline.flush()
        not_sent = pipeline.read("/b")
        pipeline.__exit__(KeyError, KeyError("mine"), None)
        peer.answer(peer.next(Op.READ), b"1")
        assert sent.value == b"1"
        with pytest.raises(InvalidRequest, match="/b"):
            _ = not_sent.value
        pipeline = client.pipeline()
        late = pipeline.read("/c")
        client.close()
        for _ in range(2):
            with pytest.raises(Closed):
                _ = late.value
        with pytest.raises(Closed):
            pipeline.close()


def test_a_pipeline_sends_together(tmp_path: Path) -> None:
    with FakeStore(tmp_path / "s") as fake, XenstoreClient.connect(fake.path) as client:
        peer = fake.accept()
        with client.pipeline() as pipeline:
            results = [pipeline.read(f"/{i}") for i in range(20)]
            assert not any(result.done for result in results)
            pipeline.flush()
            data = peer.socket.recv(65536)
            assert data.count(b"/") == 20  # one write
            peer.socket.setblocking(False)
            with pytest.raises(BlockingIOError):
                peer.socket.recv(1)
            peer.socket.settimeout(DEADLINE_S)
            for number in range(20):
                peer.raw(b"".join(part.to_bytes(4, "little") for part in (Op.READ, number + 1, 0, 1)) + b"v")
        assert [result.value for result in results] == [b"v"] * 20


def test_a_pipeline_of_any_length_neither_blocks_nor_grows(client: XenstoreClient, server: XenstoreServer) -> None:
    client.write("/big", "x" * 4000)
    most = 0
    with client.pipeline() as pipeline:
        for number in range(3 * UNDER_WAY_MAX):
            pipeline.read("/big")
            pipeline.write("/big", str(number).ljust(4000))
            most = max(most, client._protocol.n_under_way)
    assert most <= UNDER_WAY_MAX
    assert client.read("/big").strip() == b"%d" % (3 * UNDER_WAY_MAX - 1)


def test_a_long_listing_in_a_pipeline(client: XenstoreClient) -> None:
    names = [f"child-number-{i}" for i in range(1000)]
    with client.pipeline() as pipeline:
        for name in names:
            pipeline.mkdir(f"/many/{name}")
        listing = pipeline.ls("/many")
    assert listing.value == names
    with client.transaction() as transaction, transaction.pipeline() as pipeline:
        assert pipeline.ls("/many").value == names


def test_a_pipeline_in_a_transaction(client: XenstoreClient, other: XenstoreClient) -> None:
    client.write("/n", "1")
    with client.transaction() as transaction:
        with transaction.pipeline() as pipeline:
            before = pipeline.read("/n")
            for i in range(100):
                pipeline.write(f"/d/{i}", str(i))
        assert before.value == b"1"
        assert not other.exists("/d")
    assert len(other.ls("/d")) == 100
    with pytest.raises(InvalidRequest, match="over"):
        transaction.pipeline().read("/n")


def test_a_pipeline_whose_daemon_dies(tmp_path: Path) -> None:
    with FakeStore(tmp_path / "s") as fake, XenstoreClient.connect(fake.path) as client:
        peer = fake.accept()
        with client.pipeline() as pipeline:
            results = [pipeline.read("/a") for _ in range(3)]
            pipeline.flush()
            peer.answer(peer.next(Op.READ), b"1")
            peer.close()
        assert results[0].value == b"1"
        for result in results[1:]:
            with pytest.raises(StoreGone):
                _ = result.value


# -- transactions


def test_the_same_answers_after_a_conflict_are_as_good(client: XenstoreClient, other: XenstoreClient) -> None:
    """A write conflicts with another change of the node's generation, though the block has seen no value of it."""
    client.write("/n", "0")
    with client.transaction(attempts=5) as transaction:
        transaction.write("/n", "mine")
        assert transaction.read("/n") == b"mine"
        with transaction.pipeline() as pipeline:
            pipeline.write("/m", "mine")
        other.write("/n", "theirs")
    assert (client.read("/n"), client.read("/m")) == (b"mine", b"mine")


def test_other_answers_after_a_conflict_are_a_conflict(server: XenstoreServer, client: XenstoreClient) -> None:
    client.write("/n", "0")
    with XenstoreClient.from_socket(server.connect()) as other:
        transaction = client.transaction(attempts=5)
        transaction.write("/n", transaction.read("/n") + b"1")
        other.write("/n", "5")
        with pytest.raises(TransactionConflict, match="transact"):
            transaction.commit()
    assert client.read("/n") == b"5"
    assert server.hub.domains[0].n_transactions == 0
    with pytest.raises(InvalidRequest):
        transaction.read("/n")


def test_attempts_come_to_an_end(tmp_path: Path) -> None:
    with FakeStore(tmp_path / "s") as fake, XenstoreClient.connect(fake.path) as client:
        peer = fake.accept()

        def use() -> None:
            with client.transaction(attempts=3) as transaction:
                transaction.write("/a", "1")

        used = Background(use)
        for number in (b"1\0", b"2\0", b"3\0"):
            peer.answer(peer.next(Op.TRANSACTION_START), number)
            peer.answer(peer.next(Op.WRITE))
            peer.refuse(peer.next(Op.TRANSACTION_END), "EAGAIN")
        with pytest.raises(TransactionConflict):
            used.result()


def test_a_store_that_goes_while_it_is_tried_again(tmp_path: Path) -> None:
    with FakeStore(tmp_path / "s") as fake, XenstoreClient.connect(fake.path) as client:
        peer = fake.accept()

        def use() -> None:
            with client.transaction(attempts=3) as transaction:
                transaction.write("/a", "1")

        used = Background(use)
        peer.answer(peer.next(Op.TRANSACTION_START), b"1\0")
        peer.answer(peer.next(Op.WRITE))
        peer.refuse(peer.next(Op.TRANSACTION_END), "EAGAIN")
        peer.answer(peer.next(Op.TRANSACTION_START), b"2\0")
        peer.next(Op.WRITE)
        peer.close()
        with pytest.raises(StoreGone):
            used.result()


def test_a_listing_in_parts_may_have_another_generation(client: XenstoreClient, other: XenstoreClient) -> None:
    for i in range(600):
        client.mkdir(f"/many/child-number-{i}")
    with client.transaction(attempts=2) as transaction:
        assert len(transaction.ls("/many")) == 600
        other.write("/many", "another generation, the same children")
    with pytest.raises(InvalidRequest):
        client.transaction(attempts=0)


def test_a_daemon_whose_transaction_has_no_number(tmp_path: Path) -> None:
    with FakeStore(tmp_path / "s") as fake, XenstoreClient.connect(fake.path) as client:
        peer = fake.accept()
        for number in (b"", b"0\0", b"seven\0"):
            start = Background(client.transaction)
            peer.answer(peer.next(Op.TRANSACTION_START), number)
            with pytest.raises(PeerError):
                start.result()


# -- watches


def test_a_watch_is_an_iterator(client: XenstoreClient, other: XenstoreClient) -> None:
    seen = []
    with client.watch("/a", "token", depth=1) as events:
        for event in events:
            seen.append(event)
            if len(seen) == 3:
                break
            other.write(f"/a/{len(seen)}/deep", "1")
            other.write(f"/a/{len(seen)}", "1")
    assert seen == [WatchEvent("/a", "token"), WatchEvent("/a/1", "token"), WatchEvent("/a/2", "token")]
    with pytest.raises(StopIteration):
        next(events)


def test_closing_the_client_ends_the_loop(server: XenstoreServer) -> None:
    client = XenstoreClient.from_socket(server.connect())
    events = client.watch("/a")
    rest = Background(lambda: list(events))
    while len(events):
        threading.Event().wait(0.001)
    client.close()
    assert rest.result() == [WatchEvent("/a", "/a")]


def test_a_watch_that_is_refused_leaves_nothing(client: XenstoreClient) -> None:
    with pytest.raises(MalformedRequest):
        client.watch("//")
    assert client._protocol.subscriptions == {}
    assert client._protocol.sinks == set()


def test_waiting_for_a_value(client: XenstoreClient, other: XenstoreClient) -> None:
    assert client.wait_for("/state", lambda value: value is None) is None
    ready = Background(lambda: client.wait_for("/state", lambda value: value == b"4", DEADLINE_S))
    for state in range(5):
        other.write("/state", str(state))
    assert ready.result() == b"4"
    gone = Background(lambda: client.wait_for("/state", lambda value: value is None, DEADLINE_S))
    other.rm("/state")
    assert gone.result() is None
    other.write("/state", "5")
    for error in (TimedOut, TimeoutError):
        with pytest.raises(error, match=r"/state .* b'5'"):
            client.wait_for("/state", lambda value: value == b"6", 0.01)
    with pytest.raises(TimedOut, match="does not exist"):
        client.wait_for("/none", lambda value: value is not None, 0)
    with pytest.raises(KeyError):
        client.wait_for("/state", lambda value: {}[value])
    assert client._protocol.subscriptions == {}


def test_waiting_ends_with_the_client(server: XenstoreServer) -> None:
    client = XenstoreClient.from_socket(server.connect())
    waits = Background(lambda: client.wait_for("/state", lambda value: value == b"4"))
    while not server.hub.domains[0].n_watches:
        threading.Event().wait(0.001)
    client.close()
    with pytest.raises(Closed):
        waits.result()


# -- domains


def test_a_daemon_is_asked_about_itself(client: XenstoreClient) -> None:
    assert client.get_feature() > 0
    assert {"nodes", "watches"} <= set(client.quota_names())
    former = client.get_quota("nodes")
    client.set_quota("nodes", former + 1)
    assert client.get_quota("nodes") == former + 1
    with pytest.raises(MalformedRequest):
        client.get_quota("no-such-quota")
    assert "check" in client.control("help")
    with pytest.raises(MalformedRequest):
        client.control("no-such-command")
    for call in (lambda: client.get_feature(77), lambda: client.set_feature(77, 0), lambda: client.set_target(77, 78)):
        with pytest.raises(XenstoreError):
            call()


def test_calls_about_domains(tmp_path: Path) -> None:
    """Each request as it is on the wire, and what its reply means."""
    with FakeStore(tmp_path / "s") as fake, XenstoreClient.connect(fake.path) as client:
        peer = fake.accept()
        dialogue: list[tuple[Callable[[], object], Op, bytes, bytes, object]] = [
            (lambda: client.introduce(3, 1, 7), Op.INTRODUCE, b"3\x001\x007\0", b"OK\0", None),
            (lambda: client.release(3), Op.RELEASE, b"3\0", b"OK\0", None),
            (lambda: client.resume(3), Op.RESUME, b"3\0", b"OK\0", None),
            (lambda: client.set_target(3, 4), Op.SET_TARGET, b"3\x004\0", b"OK\0", None),
            (lambda: client.is_domain_introduced(3), Op.IS_DOMAIN_INTRODUCED, b"3\0", b"T\0", True),
            (lambda: client.is_domain_introduced(4), Op.IS_DOMAIN_INTRODUCED, b"4\0", b"F\0", False),
            (lambda: client.get_domain_path(3), Op.GET_DOMAIN_PATH, b"3\0", b"/local/domain/3\0", "/local/domain/3"),
            (client.get_feature, Op.GET_FEATURE, b"", b"15\0", 15),
            (lambda: client.get_feature(3), Op.GET_FEATURE, b"3\0", b"6\0", 6),
            (lambda: client.set_feature(3, 6), Op.SET_FEATURE, b"3\x006\0", b"OK\0", None),
            (lambda: client.get_quota("nodes"), Op.GET_QUOTA, b"nodes\0", b"1000\0", 1000),
            (lambda: client.get_quota("nodes", 3), Op.GET_QUOTA, b"3\0nodes\0", b"500\0", 500),
            (lambda: client.set_quota("nodes", 9), Op.SET_QUOTA, b"nodes\x009\0", b"OK\0", None),
            (lambda: client.set_quota("nodes", 9, 3), Op.SET_QUOTA, b"3\0nodes\x009\0", b"OK\0", None),
            (client.quota_names, Op.GET_QUOTA, b"", b"nodes watches\0", ["nodes", "watches"]),
            (lambda: client.control("help"), Op.CONTROL, b"help\0", b"check\nhelp\n\0", "check\nhelp\n"),
            (lambda: client.control("log", "on"), Op.CONTROL, b"log\0on\0", b"OK\0", "OK"),
            (client.reset_watches, Op.RESET_WATCHES, b"", b"OK\0", None),
        ]
        for call, op, payload, reply, value in dialogue:
            running = Background(call)
            packet = peer.next(op)
            assert packet[3] == payload
            peer.answer(packet, reply)
            assert running.result() == value
        quota = Background(lambda: client.get_quota("nodes"))
        peer.answer(peer.next(), b"many\0")
        with pytest.raises(PeerError, match="many"):
            quota.result()
        listing = Background(lambda: client.ls("/a"))
        peer.refuse(peer.next(Op.DIRECTORY), "E2BIG")
        peer.answer(peer.next(Op.DIRECTORY_PART), b"1\0")
        with pytest.raises(PeerError, match="listing"):
            listing.result()
