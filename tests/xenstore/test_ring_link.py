# SPDX-License-Identifier: MIT
"""The ring transport, end to end: a client of the ring page and a loop that serves it, without a hypervisor."""

import asyncio
import os
import struct
import threading
from collections.abc import Iterator

import pytest

from paravirt.errors import StoreGone, TransactionConflict, XenstoreError
from paravirt.ring._core import lib
from paravirt.ring.event import EventPort, EventWaiter, from_half, make_pair
from paravirt.ring.memory import PAGE_BYTES, Mapping, create_object
from paravirt.xenstore.async_client import AsyncXenstoreClient
from paravirt.xenstore.client import WatchEvent, XenstoreClient
from paravirt.xenstore.core import CoreHub
from paravirt.xenstore.domains import FEATURES
from paravirt.xenstore.loop import Loop
from paravirt.xenstore.ring_page import RingError, RingPage, State
from paravirt.xenstore.ring_transport import RingTransport
from paravirt.xenstore.wire import Op, encode

DEADLINE_S = 30.0


class Served:
    """A store in a thread of its own, serving one ring page as domain 5; the guest's end is left to the test."""

    def __init__(self) -> None:
        fd = create_object("memfd", PAGE_BYTES)
        self.memory = Mapping(fd, PAGE_BYTES)
        self.guest_memory = Mapping(fd, PAGE_BYTES)
        os.close(fd)
        server_half, guest_half = make_pair()
        self.server_waiter, self.link_port = from_half(server_half)
        self.waiter: EventWaiter
        self.port: EventPort
        self.waiter, self.port = from_half(guest_half)
        self.page = RingPage(self.guest_memory)
        self.hub = CoreHub()
        self.loop = Loop(self.hub)
        dom0 = self.hub.connect(0)
        dom0.feed(encode(Op.WRITE, 0, 0, b"/local/domain/5\0"))
        self.hub.connect(5)
        dom0.feed(encode(Op.SET_PERMS, 0, 0, b"/local/domain/5\0n5\0"))
        self.server_waiter.fileno()  # always armed
        self.hub.hear(self.server_waiter.core, spin_ns=0)
        self.hub.serve_ring(5, self.memory.view, self.link_port.core, lib.PV_XS_RING_FRESH)
        self.connection = self.hub.ring_connection(5)
        self.thread = threading.Thread(target=self.loop.run, args=(lambda: None,))
        self.thread.start()

    def client(self) -> XenstoreClient:
        return XenstoreClient(RingTransport(self.guest_memory, self.waiter, self.port))

    def wait_for_error(self, error: RingError) -> None:
        while self.page.error != error:
            self.waiter.wait(self.port, timeout_s=DEADLINE_S)

    def fail(self, error: RingError) -> None:
        """As a daemon does that has lost the stream."""
        self.page.error = error
        self.link_port.notify()

    def stop(self) -> None:
        self.loop.stop()
        self.thread.join()
        self.hub.stop_ring(5)
        self.loop.close()
        self.hub.close()
        self.link_port.close()
        self.server_waiter.close()
        self.waiter.close()
        self.memory.close()
        self.guest_memory.close()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


def test_requests_replies_and_watches_go_through_the_page(served: Served) -> None:
    assert served.page.features == FEATURES
    with served.client() as client:
        client.write("data", "x" * 2000)  # more than the ring holds at once
        assert client.read("data") == b"x" * 2000
        with pytest.raises(XenstoreError) as refused:
            client.read("/tool")
        assert refused.value.name == "EACCES"
        with client.watch_queue() as queue:
            queue.add("data", "t")
            assert queue.get(DEADLINE_S) is not None
            client.write("data/x", "1")
            event = queue.get(DEADLINE_S)
            assert event is not None
            assert (event.path, event.token) == ("data/x", "t")
        for i in range(500):
            client.write(f"many/{i % 50}", str(i))
        assert len(client.ls("many")) == 50


def test_many_threads_share_the_ring(served: Served) -> None:
    with served.client() as client:
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for i in range(50):
                    client.write(f"t{number}", b"v" * (i * 40))
                    assert client.read(f"t{number}") == b"v" * (i * 40)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


@pytest.mark.parametrize("steps", [(0, 1025, 0, 0), (0, 0xFFFFFFFF, 0, 0), (0, 0, 1, 0), (0, 16, 2000, 0)])
def test_nonsense_indexes_are_told_and_the_guest_is_ignored(served: Served, steps: tuple[int, ...]) -> None:
    with served.client() as client:
        client.watch_queue().add("w")
        assert served.hub.domains[5].n_watches == 1
    indexes = struct.unpack_from("<4I", served.guest_memory.view, 2048)
    nonsense = [(index + step) % 2**32 for index, step in zip(indexes, steps, strict=True)]
    struct.pack_into("<4I", served.guest_memory.view, 2048, *nonsense)
    served.port.notify()
    served.wait_for_error(RingError.INDEX)
    assert served.hub.domains[5].n_watches == 0
    assert not served.connection.closed


def test_a_client_is_told_that_its_ring_is_not_served_any_more(served: Served) -> None:
    client = served.client()
    served.page.error = RingError.COMMUNICATION
    with pytest.raises(StoreGone, match="communication"):
        client.mkdir("data")
    client.close()


def test_a_payload_that_is_too_long_is_told(served: Served) -> None:
    client = served.client()
    stream_bytes = encode(Op.READ, 1, 0, b"")[:12] + (0x80000000).to_bytes(4, "little")
    client._transport.send(stream_bytes, [])
    with pytest.raises(StoreGone):
        client.read("data")
    client.close()
    served.wait_for_error(RingError.PROTOCOL)


def test_a_guest_may_start_anew_also_after_an_error(served: Served) -> None:
    with served.client() as client:
        client.write("kept", "1")
        queue = client.watch_queue()
        queue.add("kept")
    struct.pack_into("<4I", served.guest_memory.view, 2048, 7, 9999, 3, 3)
    served.port.notify()
    served.wait_for_error(RingError.INDEX)
    transport = RingTransport(served.guest_memory, served.waiter, served.port, reconnect=True)
    assert served.page.state == State.CONNECTED
    assert served.page.error == RingError.NONE
    with XenstoreClient(transport) as client:
        assert client.read("kept") == b"1"
        assert served.hub.domains[5].n_watches == 0


def test_closing_the_client_does_not_wait_for_the_daemon(served: Served) -> None:
    client = served.client()
    served.loop.stop()
    served.thread.join()
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            client.read("data")
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    client.close()
    thread.join(DEADLINE_S)
    assert [type(error).__name__ for error in caught] == ["Closed"]


def test_a_client_on_the_ring_starts_anew_by_itself(served: Served) -> None:
    with XenstoreClient.over_ring(served.guest_memory, served.waiter, served.port, reconnect=True) as client:
        with client.watch("data") as events:
            assert next(events) == WatchEvent("data", "data")
            for error in (RingError.COMMUNICATION, RingError.PROTOCOL):
                served.fail(error)
                assert next(events) == WatchEvent("data", "data")
                client.write("data/x", "1" * 1500)
                assert next(events) == WatchEvent("data/x", "data")
                assert served.hub.domains[5].n_watches == 1
        assert client.n_reconnects == 2
        struct.pack_into("<I", served.guest_memory.view, 2060, 9999)  # the index of replies
        served.link_port.notify()
        assert client.read("data/x") == b"1" * 1500


def test_a_transaction_on_the_ring_ends_with_the_connection(served: Served) -> None:
    with XenstoreClient.over_ring(served.guest_memory, served.waiter, served.port, reconnect=True) as client:
        transaction = client.transaction()
        transaction.write("data", "1")
        served.fail(RingError.COMMUNICATION)
        while not client.n_reconnects:
            threading.Event().wait(0.001)
        with pytest.raises(TransactionConflict):
            transaction.commit()
        assert not client.exists("data")


def test_a_daemon_that_cannot_start_anew_is_gone(served: Served) -> None:
    served.page.features = 0
    client = XenstoreClient.over_ring(
        served.guest_memory, served.waiter, served.port, reconnect=True, reconnect_timeout_s=0.05
    )
    served.fail(RingError.COMMUNICATION)
    with pytest.raises(StoreGone, match="anew"):
        client.read("data")
    client.close()


def test_the_asyncio_client_on_the_ring(served: Served) -> None:
    async def use() -> None:
        ring = AsyncXenstoreClient.over_ring(served.guest_memory, served.waiter, served.port, reconnect=True)
        async with ring as client:
            await client.write("data", "x" * 2000)
            assert await client.read("data") == b"x" * 2000
            async with client.watch("data") as events:
                assert await anext(events) == WatchEvent("data", "data")
                await asyncio.gather(*(client.write(f"many/{i % 50}", str(i) * 50) for i in range(500)))
                assert len(await client.ls("many")) == 50
                served.fail(RingError.COMMUNICATION)
                assert await anext(events) == WatchEvent("data", "data")
                await client.write("data/x", "1")
                assert await anext(events) == WatchEvent("data/x", "data")
            assert client.n_reconnects == 1

    asyncio.run(asyncio.wait_for(use(), DEADLINE_S))
    with served.client() as client:  # the waiter can be used by a thread again
        assert client.read("data/x") == b"1"
