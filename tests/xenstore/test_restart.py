# SPDX-License-Identifier: MIT
"""xenstored is killed and started again with its journal, beside a real broker: what is there again, and for whom."""

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from paravirt.errors import NotFound, StoreGone
from paravirt.hypervisor.client import XENSTORE_GREF
from paravirt.ring.event import WaitResult
from paravirt.xenstore.client import TransactionConflict, XenstoreClient
from tests.xenstore.durable import Durable, Ring, await_event, drain
from tests.xenstore.history import DEADLINE_S

FEATURES_AT, CONNECTION_AT, ERROR_AT = 2064, 2068, 2072
COMM = 1

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def durable(tmp_path: Path) -> Iterator[Durable]:
    with ExitStack() as stack:
        made = Durable(stack, tmp_path, "--journal", str(tmp_path / "journal"))
        made.start()
        yield made


def kill_and_start(durable: Durable) -> None:
    durable.kill()
    durable.start()


def word(page: memoryview, offset: int) -> int:
    return int(struct.unpack_from("<I", page, offset)[0])


def test_all_is_there_again(durable: Durable) -> None:
    domid = durable.domain("guest")
    Ring(durable, domid)
    with durable.client() as store:
        store.write("/a/b", b"\0\xff" * 100)
        store.set_perms("/a", ["n0", f"r{domid}"])
        store.set_perms("@releaseDomain", ["n0", f"r{domid}"])
        store.control("quota", "set", "nodes", "1234")
        for name in ("z", "y", "x"):
            store.write(f"/order/{name}", "1")
    kill_and_start(durable)
    with durable.client() as store:
        assert store.read("/a/b") == b"\0\xff" * 100
        assert store.get_perms("/a") == ["n0", f"r{domid}"]
        assert store.get_perms("@releaseDomain") == ["n0", f"r{domid}"]
        assert store.ls("/order") == ["z", "y", "x"]
        assert store.is_domain_introduced(domid)
        assert "nodes            :     1234" in store.control("quota")
        assert store.control("check") == "OK"
    assert durable.said() == ""


def test_a_clean_stop_keeps_it_too(durable: Durable) -> None:
    with durable.client() as store:
        store.write("/a", "1")
    durable.terminate()
    durable.start()
    with durable.client() as store:
        assert store.read("/a") == b"1"


def test_clients_of_dom0_that_reconnect_go_on(durable: Durable) -> None:
    store = durable.client(reconnect=True)
    store.write("/a", "1")
    with store.watch_queue() as queue:
        for path in ("/a", "/missing"):
            queue.add(path)
            await_event(queue, path)
        transaction = store.transaction()
        transaction.write("/a", "in a transaction")
        kill_and_start(durable)
        assert store.read("/a") == b"1"
        assert sorted(drain(queue, store)) == ["/a", "/missing"], "each fires once"
        with pytest.raises(TransactionConflict):
            transaction.commit()
        store.write("/a", "2")
        await_event(queue, "/a")


def test_one_that_does_not_is_told(durable: Durable) -> None:
    store = durable.client()
    store.write("/a", "1")
    kill_and_start(durable)
    with pytest.raises(StoreGone):
        store.read("/a")


def test_a_guest_on_its_ring_reconnects(durable: Durable) -> None:
    domid = durable.domain("ringer")
    ring = Ring(durable, domid)
    with ring.client(reconnect=True) as guest:
        guest.write("x", "1")
        with guest.watch("x") as events:
            await_event(events, "x")
            for value in ("2", "3"):
                kill_and_start(durable)
                await_event(events, "x")
                assert guest.read("x") in (b"1", b"2")
                with durable.client() as store:
                    assert store.is_domain_introduced(domid)
                    store.write(f"/local/domain/{domid}/x", value)
                await_event(events, "x")


def test_a_guest_on_a_socket_reconnects(durable: Durable) -> None:
    domid = durable.domain("socket")
    connection = durable.hypervisor(domid)
    with XenstoreClient.from_socket(connection.store_connection(), again=connection.store_connection) as guest:
        guest.write("x", "1")
        with guest.watch("x") as events:
            await_event(events, "x")
            kill_and_start(durable)
            await_event(events, "x")
            assert guest.read("x") == b"1"
    with durable.client() as store:
        assert store.is_domain_introduced(domid)


def test_what_a_guest_sees_in_its_page(durable: Durable) -> None:
    """The error and a kick; then it asks for the connection to start anew, which it does with empty streams."""
    ring = Ring(durable, durable.domain("raw"))
    page = ring.memory.view
    while ring.waiter.wait(ring.channel, timeout_s=0.1) is not WaitResult.TIMEOUT:
        pass
    durable.kill()
    struct.pack_into("<I", page, 2060, word(page, 2060) + 7)  # half a request
    durable.start()
    while word(page, ERROR_AT) != COMM:
        assert ring.waiter.wait(ring.channel, timeout_s=DEADLINE_S) is not WaitResult.TIMEOUT
        ring.channel.notify()
    struct.pack_into("<I", page, CONNECTION_AT, 1)
    ring.channel.notify()
    while word(page, CONNECTION_AT):
        assert ring.waiter.wait(ring.channel, timeout_s=DEADLINE_S) is not WaitResult.TIMEOUT
    assert [word(page, at) for at in (2048, 2052, 2056, 2060)] == [0] * 4
    assert word(page, ERROR_AT) == 0
    with ring.client() as guest:
        assert guest.get_domain_path(ring.guest.domid) == f"/local/domain/{ring.guest.domid}"


def test_a_guest_without_the_feature_waits_to_be_introduced_again(durable: Durable) -> None:
    domid = durable.dom0.create_domain("old", isolated=False).domid
    with durable.client() as store:
        store.mkdir(f"/local/domain/{domid}")
        store.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
        store.set_feature(domid, 0)
    ring = Ring(durable, domid)
    kill_and_start(durable)
    assert word(ring.memory.view, FEATURES_AT) == 0
    assert word(ring.memory.view, ERROR_AT) == 0, "it does not know of errors"
    with durable.client() as store:
        assert store.is_domain_introduced(domid)
        store.introduce(domid, XENSTORE_GREF, ring.channel.port)
    with ring.client() as guest:
        guest.write("x", "1")
        assert guest.read("x") == b"1"


def test_domains_that_died_meanwhile_have_left_nothing(durable: Durable) -> None:
    dead, named, alive = durable.domain("dead"), durable.domain("named"), durable.domain("alive")
    Ring(durable, dead)
    Ring(durable, alive)
    with durable.client() as store:
        store.write("/shared", "1")
        store.set_perms("/shared", ["n0", f"b{dead}", f"r{named}", f"r{alive}"])
        store.write("/theirs/deep", "1")
        store.set_perms("/theirs", [f"n{dead}"])
        store.set_perms("@releaseDomain", ["n0", f"r{dead}", f"r{alive}"])
    watcher = durable.client(reconnect=True)
    with watcher.watch("@releaseDomain") as queue:
        await_event(queue, "@releaseDomain")
        durable.kill()
        durable.dom0.destroy_domain(dead)
        durable.dom0.destroy_domain(named)
        durable.start()
        await_event(queue, "@releaseDomain")  # it looks again, and sees who is gone
        assert not watcher.exists(f"/local/domain/{dead}")
        assert not watcher.exists("/theirs")
        assert watcher.get_perms("/shared") == ["n0", f"r{alive}"]
        assert watcher.get_perms("@releaseDomain") == ["n0", f"r{alive}"]
        assert not watcher.is_domain_introduced(dead)
        assert watcher.is_domain_introduced(alive)
        assert watcher.control("check") == "OK"
    domids = [info.domid for info in durable.dom0.list_domains(dying=True)]
    assert domids == [0, alive], "the domids are free"


def test_domains_that_come_after_a_restart_with_the_same_hypervisor_stay(durable: Durable) -> None:
    for _ in range(3):
        kill_and_start(durable)
    domid = durable.domain("stays")
    kill_and_start(durable)
    with durable.client() as store:
        assert store.get_perms(f"/local/domain/{domid}") == [f"n{domid}"]


def test_without_xenstored_there_is_no_connection(durable: Durable) -> None:
    domid = durable.domain("guest")
    durable.kill()
    with pytest.raises(NotFound):
        durable.hypervisor(domid).store_connection()


def test_restarts_leave_nothing_in_the_broker(durable: Durable) -> None:
    ring = Ring(durable, durable.domain("ringer"))

    def held() -> list[tuple[int, ...]]:
        with ring.client(reconnect=True) as guest:
            guest.get_domain_path(0)
        return [(i.domid, i.pages, i.arenas, i.ports, i.maps) for i in durable.dom0.list_domains()]

    kill_and_start(durable)
    before = held()
    for _ in range(3):
        kill_and_start(durable)
        assert held() == before
