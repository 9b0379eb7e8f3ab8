# SPDX-License-Identifier: MIT
"""The asyncio client: against real daemons, and against fake ones whose connections break."""

import asyncio
import contextlib
import functools
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from paravirt.errors import (
    Closed,
    InvalidRequest,
    MalformedRequest,
    NoSuchNode,
    NotFound,
    OutcomeUnknown,
    PeerError,
    QuotaReached,
    StoreGone,
    TimedOut,
    TooLarge,
    TransactionConflict,
)
from paravirt.xenstore.async_client import AsyncTransaction, AsyncXenstoreClient
from paravirt.xenstore.client import WatchEvent, XenstoreClient
from paravirt.xenstore.server import XenstoreServer
from paravirt.xenstore.wire import Op, encode
from tests.xenstore.fake_store import DEADLINE_S, Background, FakeStore

Story = Callable[[AsyncXenstoreClient, XenstoreServer], Coroutine[Any, Any, None]]


def on_a_server(story: Story) -> Callable[[], None]:
    """Run a coroutine with a client of a server of its own."""

    @functools.wraps(story)
    def run() -> None:
        async def use(server: XenstoreServer) -> None:
            async with AsyncXenstoreClient.from_socket(server.connect()) as client:
                await story(client, server)

        with XenstoreServer().start() as server:
            asyncio.run(asyncio.wait_for(use(server), DEADLINE_S))

    del run.__wrapped__  # type: ignore[attr-defined]  # pytest must see no arguments
    return run


async def in_thread(call: Callable[[], object]) -> Any:
    """A blocking step of a fake daemon, beside the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, call)


@on_a_server
async def test_the_tree(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    await client.write("/a/b", "text")
    await client.write("/a/c", b"\0\1\xff")
    await client.mkdir("/a/d")
    assert await client.read("/a/b") == b"text"
    assert await client.read_text("/a/b") == "text"
    assert await client.ls("/a") == ["b", "c", "d"]
    assert await client.exists("/a/d")
    assert not await client.exists("/a/e")
    await client.set_perms("/a", ["n0", "r0"])
    assert await client.get_perms("/a") == ["n0", "r0"]
    await client.rm("/a")
    assert not await client.exists("/a")
    assert await client.get_domain_path(7) == "/local/domain/7"
    assert await client.is_domain_introduced(0)
    with pytest.raises(NoSuchNode, match="/none"):
        await client.read("/none")
    with pytest.raises(TooLarge):
        await client.write("/x", "x" * 4096)
    with pytest.raises(NoSuchNode):
        await client.release(5)
    with pytest.raises(NoSuchNode):
        await client.resume(5)
    with pytest.raises(NoSuchNode):
        await client.set_target(5, 6)
    with pytest.raises(MalformedRequest):
        await client.introduce(5, 1, 1)
    assert await client.get_feature() > 0
    assert "nodes" in await client.quota_names()
    await client.set_quota("nodes", 777)
    assert await client.get_quota("nodes") == 777
    assert "check" in await client.control("help")
    with pytest.raises(NoSuchNode):
        await client.set_feature(77, 0)


@on_a_server
async def test_a_listing_longer_than_a_reply(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    names = [f"child-number-{i}" for i in range(1200)]
    await asyncio.gather(*(client.mkdir(f"/many/{name}") for name in names))
    assert await client.ls("/many") == names
    async with client.transaction() as transaction:
        assert await transaction.ls("/many") == names


@on_a_server
async def test_gather_is_the_pipeline(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    await client.write("/big", "x" * 4000)
    replies = await asyncio.gather(*(client.read("/big") for _ in range(2000)))
    assert {len(reply) for reply in replies} == {4000}
    await asyncio.gather(*(client.write("/big", "y" * 4000) for _ in range(2000)))
    several = await asyncio.gather(client.read("/big"), client.read("/none"), return_exceptions=True)
    assert several[0] == b"y" * 4000
    assert isinstance(several[1], NoSuchNode)


@on_a_server
async def test_transactions(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    async with AsyncXenstoreClient.from_socket(server.connect()) as other:
        async with client.transaction() as transaction:
            await asyncio.gather(transaction.write("/a", "1"), transaction.write("/b", "1"))
            assert not await other.exists("/a")
        assert await other.ls("/") == ["tool", "a", "b"]
        with pytest.raises(InvalidRequest, match="over"):
            await transaction.read("/a")
        with contextlib.suppress(KeyError):
            async with client.transaction() as transaction:
                await transaction.write("/c", "1")
                raise KeyError("mine")
        assert not await other.exists("/c")

        async with client.transaction(attempts=3) as transaction:
            await transaction.write("/a", "mine")
            await other.write("/a", "theirs")
        assert await client.read("/a") == b"mine"
        transaction = client.transaction(attempts=3)
        await transaction.start()
        await transaction.write("/b", await transaction.read("/a"))
        await other.write("/a", "other")
        with pytest.raises(TransactionConflict, match="transact"):
            await transaction.commit()
        assert server.hub.domains[0].n_transactions == 0


@on_a_server
async def test_tasks_count_without_losing_one(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    await client.write("/n", "0")

    async def add(transaction: AsyncTransaction) -> int:
        value = int(await transaction.read("/n")) + 1
        await transaction.write("/n", str(value))
        return value

    results = await asyncio.gather(*(client.transact(add, attempts=1000) for _ in range(20)))
    assert sorted(results) == list(range(1, 21))

    async def never(transaction: AsyncTransaction) -> None:
        await transaction.read("/n")
        await client.write("/n", "7")

    with pytest.raises(TransactionConflict):
        await client.transact(never, attempts=3)


@on_a_server
async def test_a_cancelled_start_leaves_no_transaction(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    async def enter() -> None:
        async with client.transaction():
            raise AssertionError("it was cancelled")

    task = asyncio.create_task(enter())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await client.read("/tool")
    await client.read("/tool")
    assert server.hub.domains[0].n_transactions == 0


@on_a_server
async def test_watches(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    seen = []
    async with client.watch("/a", "token", depth=1) as events:
        async for event in events:
            seen.append(event)
            if len(seen) == 3:
                break
            await client.write(f"/a/{len(seen)}/deep", "1")
            await client.write(f"/a/{len(seen)}", "1")
        assert await events.get(0.001) is None
    assert seen == [WatchEvent("/a", "token"), WatchEvent("/a/1", "token"), WatchEvent("/a/2", "token")]
    with pytest.raises(StopAsyncIteration):
        await anext(events)
    assert await anext(client.watch("/b")) == WatchEvent("/b", "/b")
    async with client.watch_queue(pending_max=10) as queue:
        await queue.add("/a")
        await queue.add("/b", "t")
        with pytest.raises(InvalidRequest):
            await queue.add("/a")
        assert {await queue.get(), await queue.get()} == {WatchEvent("/a", "/a"), WatchEvent("/b", "t")}
        await queue.remove("/a")
        with pytest.raises(InvalidRequest):
            await queue.remove("/a")
        await client.write("/a", "1")
        await client.write("/b", "1")
        assert await queue.get() == WatchEvent("/b", "t")
        await client.reset_watches()
        await client.write("/b", "1")
        assert queue.get_nowait() is None
    with pytest.raises(MalformedRequest):
        async with client.watch("//"):
            raise AssertionError("it was refused")
    with pytest.raises(Closed):
        await queue.get()


@on_a_server
async def test_a_cancelled_watch_is_taken_away(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    async with client.watch_queue() as queue:
        task = asyncio.create_task(queue.add("/a"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await client.read("/tool")
        assert server.hub.domains[0].n_watches == 0
        await queue.add("/a")
        assert await queue.get() == WatchEvent("/a", "/a")


@on_a_server
async def test_waiting_for_a_value(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    waits = asyncio.create_task(client.wait_for("/state", lambda value: value == b"4", DEADLINE_S))
    for state in range(5):
        await client.write("/state", str(state))
    assert await waits == b"4"
    with pytest.raises(TimedOut, match=r"/state .* b'4'"):
        await client.wait_for("/state", lambda value: value == b"5", 0.01)
    assert server.hub.domains[0].n_watches == 0


@on_a_server
async def test_closing_ends_what_waits(client: AsyncXenstoreClient, server: XenstoreServer) -> None:
    async def collect() -> list[WatchEvent]:
        return [event async for event in client.watch("/a")]

    watching = asyncio.create_task(collect())
    waiting = asyncio.create_task(client.wait_for("/a", lambda value: value is not None))
    while server.hub.domains[0].n_watches < 2:
        await client.read("/tool")
    await client.read("/tool")
    reading = asyncio.create_task(client.read("/tool"))
    await asyncio.sleep(0)
    await client.close()
    await client.close()
    assert await watching == [WatchEvent("/a", "/a")]
    for task in (waiting, reading):
        with pytest.raises(Closed):
            await task
    with pytest.raises(Closed):
        await client.read("/tool")
    with pytest.raises(Closed):
        client.watch("/a")
    assert client.closed


def test_connecting(tmp_path: Path) -> None:
    async def use() -> None:
        with pytest.raises(NotFound):
            AsyncXenstoreClient.connect(tmp_path / "none")
        async with await AsyncXenstoreClient.connect(tmp_path / "s") as client:
            assert await client.read("/tool") == b""

    with XenstoreServer(tmp_path / "s").start():
        asyncio.run(asyncio.wait_for(use(), DEADLINE_S))


def on_a_fake(tmp_path: Path, story: Callable[[AsyncXenstoreClient, FakeStore], Awaitable[None]]) -> None:
    async def use(fake: FakeStore) -> None:
        async with AsyncXenstoreClient.connect(fake.path, reconnect=True) as client:
            await story(client, fake)

    with FakeStore(tmp_path / "s") as fake:
        asyncio.run(asyncio.wait_for(use(fake), DEADLINE_S))


def test_what_is_repeated_and_what_is_not(tmp_path: Path) -> None:
    async def story(client: AsyncXenstoreClient, fake: FakeStore) -> None:
        peer = await in_thread(fake.accept)
        reading = asyncio.create_task(client.read("/a"))
        writing = asyncio.create_task(client.write("/b", "1"))
        await in_thread(lambda: (peer.next(Op.READ), peer.next(Op.WRITE), peer.close()))
        with pytest.raises(OutcomeUnknown, match="/b"):
            await writing
        late = asyncio.create_task(client.write("/c", "1"))
        second = await in_thread(fake.accept)
        await in_thread(lambda: second.answer(second.next(Op.READ), b"value"))
        await in_thread(lambda: second.answer(second.next(Op.WRITE)))
        assert await reading == b"value"
        await late
        assert client.n_reconnects == 1

    on_a_fake(tmp_path, story)


def test_a_watch_that_is_refused_by_the_next_daemon_is_an_error(tmp_path: Path) -> None:
    async def story(client: AsyncXenstoreClient, fake: FakeStore) -> None:
        peer = await in_thread(fake.accept)
        events = client.watch("/a")
        watching = asyncio.create_task(anext(events))
        await in_thread(lambda: (peer.answer(peer.next(Op.WATCH)), peer.close()))
        second = await in_thread(fake.accept)
        await in_thread(lambda: second.refuse(second.next(Op.WATCH), "ENOSPC"))
        with pytest.raises(QuotaReached, match="/a"):
            await watching
        with pytest.raises(QuotaReached, match="/a"):
            await events.get()

    on_a_fake(tmp_path, story)


@pytest.mark.parametrize(
    "answer",
    [
        encode(Op.READ, 1000, 0, b"for nobody"),
        encode(Op.READ, 1, 0, b"")[:12] + (5000).to_bytes(4, "little") + b"x" * 5000,
        b"\xff" * 100,
    ],
    ids=["unknown request", "too long", "garbage"],
)
def test_a_daemon_that_breaks_the_protocol_is_left(tmp_path: Path, answer: bytes) -> None:
    async def story(client: AsyncXenstoreClient, fake: FakeStore) -> None:
        peer = await in_thread(fake.accept)
        reading = asyncio.create_task(client.read("/a"))
        await in_thread(lambda: (peer.next(Op.READ), peer.event(b"/x", b"nobody"), peer.raw(answer)))
        second = await in_thread(fake.accept)
        await in_thread(lambda: second.answer(second.next(Op.READ), b"value"))
        assert await reading == b"value"
        wrong = asyncio.create_task(client.read("/a"))
        await in_thread(lambda: second.answer(second.next(Op.READ), op=Op.MKDIR))
        with pytest.raises(PeerError):
            await wrong

    on_a_fake(tmp_path, story)


def test_an_open_transaction_is_a_conflict(tmp_path: Path) -> None:
    async def story(client: AsyncXenstoreClient, fake: FakeStore) -> None:
        peer = await in_thread(fake.accept)
        transaction = client.transaction()
        starting = asyncio.create_task(transaction.start())
        await in_thread(lambda: peer.answer(peer.next(Op.TRANSACTION_START), b"5\0"))
        await starting
        peer.close()
        await in_thread(fake.accept)
        for call in (lambda: transaction.read("/a"), transaction.commit):
            with pytest.raises(TransactionConflict):
                await call()

    on_a_fake(tmp_path, story)


def test_without_reconnection_and_after_the_time_limit_the_store_is_gone(tmp_path: Path) -> None:
    async def use(path: Path, fake: FakeStore) -> None:
        async with AsyncXenstoreClient.connect(path) as client:
            peer = await in_thread(fake.accept)
            writing = asyncio.create_task(client.write("/a", "1"))
            await in_thread(lambda: (peer.next(Op.WRITE), peer.close()))
            with pytest.raises(StoreGone):
                await writing
        client = AsyncXenstoreClient.connect(path, reconnect=True, reconnect_timeout_s=0.05)
        queue = client.watch_queue()
        peer = await in_thread(fake.accept)
        reading = asyncio.create_task(client.read("/a"))
        await in_thread(lambda: peer.next(Op.READ))
        path.rename(tmp_path / "elsewhere")
        peer.close()
        for call in (lambda: reading, queue.get, lambda: client.read("/a")):
            with pytest.raises(StoreGone, match=r"0\.05 s"):
                await call()
        await client.close()
        (tmp_path / "elsewhere").rename(path)

    with FakeStore(tmp_path / "s") as fake:
        asyncio.run(asyncio.wait_for(use(tmp_path / "s", fake), DEADLINE_S))


def test_watches_outlive_the_daemon_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    async def use() -> None:
        server = XenstoreServer(path).start()
        before = count()
        async with AsyncXenstoreClient.connect(path, reconnect=True) as client:
            async with client.watch("/a", "token") as events:
                assert await anext(events) == WatchEvent("/a", "token")
                for _ in range(3):
                    server.stop()
                    server = XenstoreServer(path).start()
                    assert await anext(events) == WatchEvent("/a", "token")
                    await client.write("/a/x", "1")
                    assert await anext(events) == WatchEvent("/a/x", "token")
            assert server.hub.domains[0].n_watches == 0
            server.stop()
            waits = asyncio.create_task(client.read("/tool"))
            await asyncio.sleep(0)
        with pytest.raises(Closed):
            await waits
        with XenstoreServer(path).start():
            assert count() == before

    asyncio.run(asyncio.wait_for(use(), DEADLINE_S))


def test_what_waits_for_room_when_the_connection_breaks() -> None:
    async def use(server: XenstoreServer) -> None:
        ours, theirs = socket.socketpair()
        async with AsyncXenstoreClient.from_socket(ours, again=server.connect) as client:
            writes = [asyncio.create_task(client.write(f"/n/{i}", "x" * 4000)) for i in range(500)]
            while not client._polls_for_room:
                await asyncio.sleep(0)
            theirs.close()
            ends = await asyncio.gather(*writes, return_exceptions=True)
            n_unknown = sum(isinstance(end, OutcomeUnknown) for end in ends)
            assert 0 < n_unknown < 500
            assert len(await client.ls("/n")) == 500 - n_unknown

    with XenstoreServer().start() as server:
        asyncio.run(asyncio.wait_for(use(server), DEADLINE_S))


def test_a_defect_of_whoever_makes_connections_leaves_nobody_waiting() -> None:
    async def use() -> None:
        ours, theirs = socket.socketpair()

        def again() -> socket.socket:
            raise RuntimeError("a defect")

        async with AsyncXenstoreClient.from_socket(ours, again=again) as client:
            theirs.close()
            with pytest.raises(StoreGone, match="a defect"):
                await client.read("/a")

    asyncio.run(asyncio.wait_for(use(), DEADLINE_S))


def test_both_clients_share_one_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def use(blocking: XenstoreClient) -> None:
        async with AsyncXenstoreClient.connect(path) as client:
            found = Background(lambda: blocking.wait_for("/a", lambda value: value == b"1", DEADLINE_S))
            await client.write("/a", "1")
            assert await in_thread(found.result) == b"1"

    with XenstoreServer(path).start(), XenstoreClient.connect(path) as blocking:
        asyncio.run(asyncio.wait_for(use(blocking), DEADLINE_S))


def test_a_forked_child_gets_closed() -> None:
    async def use(server: XenstoreServer) -> None:
        async with AsyncXenstoreClient.from_socket(server.connect()) as client:
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    client.read("/tool").send(None)
                except Closed:
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert await client.read("/tool") == b""

    with XenstoreServer().start() as server:
        asyncio.run(use(server))
