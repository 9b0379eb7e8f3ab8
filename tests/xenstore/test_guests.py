# SPDX-License-Identifier: MIT
"""xenstored beside a real broker: labelled sockets, ring pages, domains that die."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from paravirt.errors import AlreadyExists, StoreGone, XenstoreError
from paravirt.hypervisor.client import XENSTORE_GREF, Hypervisor
from paravirt.hypervisor.server import BrokerServer
from paravirt.xenstore.client import WatchQueue, XenstoreClient
from paravirt.xenstore.ring_page import State
from paravirt.xenstore.ring_transport import RingTransport
from paravirt.xenstore.server import XenstoreServer

DEADLINE_S = 30.0


class Machine:
    """A broker, a xenstored and Dom0's connections to both."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.broker = BrokerServer()
        self.broker.start()
        stack.callback(self.broker.stop)
        self.store_hypervisor = self.hypervisor(0)
        self.dom0 = self.hypervisor(0)
        self.server = XenstoreServer(hypervisor=self.store_hypervisor)
        stack.callback(self.server.stop)
        self.server.start()
        self.store = stack.enter_context(XenstoreClient.from_socket(self.server.connect()))

    def hypervisor(self, domid: int) -> Hypervisor:
        return self._stack.enter_context(Hypervisor.from_fd(self.broker.connect(domid)))

    def domain(self, name: str) -> int:
        """A new domain with a home of its own."""
        domid = self.dom0.create_domain(name, isolated=False).domid
        home = f"/local/domain/{domid}"
        self.store.mkdir(home)
        self.store.set_perms(home, [f"n{domid}"])
        return domid

    def socket_client(self, domid: int) -> XenstoreClient:
        client = XenstoreClient.from_socket(self.hypervisor(domid).store_connection())
        return self._stack.enter_context(client)


class Ring:
    """A guest's xenstore page and event channel, introduced to xenstored."""

    def __init__(self, machine: Machine, domid: int, *, introduce: bool = True) -> None:
        self.guest = machine.hypervisor(domid)
        self.memory = self.guest.reserved_page(XENSTORE_GREF).memory
        self.waiter = self.guest.waiter()
        self.channel = self.guest.alloc_unbound(self.waiter, 0)
        if introduce:
            machine.store.introduce(domid, XENSTORE_GREF, self.channel.port)

    def client(self, *, reconnect: bool = False) -> XenstoreClient:
        return XenstoreClient(RingTransport(self.memory, self.waiter, self.channel, reconnect=reconnect))


@pytest.fixture
def machine() -> Iterator[Machine]:
    with ExitStack() as stack:
        yield Machine(stack)


def await_event(queue: WatchQueue, path: str) -> None:
    while True:
        event = queue.get(DEADLINE_S)
        assert event is not None, f"no event for {path}"
        if event.path == path:
            return


def read_for_ever(client: XenstoreClient, path: str) -> None:
    while True:
        client.read(path)


def test_a_process_speaks_for_its_domain_only(machine: Machine) -> None:
    first, second = machine.domain("first"), machine.domain("second")
    guest = machine.socket_client(first)
    guest.write("data", "mine")
    assert machine.store.read(f"/local/domain/{first}/data") == b"mine"
    for call in (
        lambda: guest.read(f"/local/domain/{second}"),
        lambda: guest.write(f"/local/domain/{second}/data", "theirs"),
        lambda: guest.introduce(second, 1, 1),
        lambda: guest.release(second),
    ):
        with pytest.raises(XenstoreError) as refused:
            call()
        assert refused.value.name == "EACCES"
    with pytest.raises(XenstoreError) as refused:
        guest.set_perms("data", [f"n{second}"])
    assert refused.value.name == "EPERM"


def test_a_domain_has_the_rights_of_its_target(machine: Machine) -> None:
    helper, helped = machine.domain("helper"), machine.domain("helped")
    store = machine.socket_client(helper)
    with Ring(machine, helped).client() as guest:
        guest.write("data", "theirs")
        with pytest.raises(XenstoreError):
            store.read(f"/local/domain/{helped}/data")
        Ring(machine, helper)
        machine.store.set_target(helper, helped)
        assert store.read(f"/local/domain/{helped}/data") == b"theirs"


def test_permissions_are_for_domains_that_exist(machine: Machine) -> None:
    machine.store.write("/x", "1")
    with pytest.raises(XenstoreError) as refused:
        machine.store.set_perms("/x", ["n77"])
    assert refused.value.name == "ENOENT"


def test_there_is_one_xenstored(machine: Machine) -> None:
    with pytest.raises(AlreadyExists):
        XenstoreServer(hypervisor=machine.dom0)


def test_a_guest_on_its_ring(machine: Machine) -> None:
    domid = machine.domain("ringer")
    introduced = machine.store.watch_queue()
    introduced.add("@introduceDomain")
    ring = Ring(machine, domid)
    await_event(introduced, "@introduceDomain")
    assert machine.store.is_domain_introduced(domid)
    with ring.client() as guest:
        guest.write("data", b"x" * 1900)
        assert machine.store.read(f"/local/domain/{domid}/data") == b"x" * 1900
        with guest.watch_queue() as queue:
            queue.add("data", "t")
            machine.store.write(f"/local/domain/{domid}/data/sub", "1")
            await_event(queue, "data/sub")
        with pytest.raises(XenstoreError) as refused:
            guest.read("/tool")
        assert refused.value.name == "EACCES"


def test_a_ring_and_sockets_of_one_domain_side_by_side(machine: Machine) -> None:
    domid = machine.domain("both")
    socket_client = machine.socket_client(domid)
    with Ring(machine, domid).client() as ring_client:
        ring_client.write("a", "1")
        socket_client.write("b", "2")
        assert ring_client.read("b") == b"2"
        assert socket_client.read("a") == b"1"


def test_a_guest_starts_its_ring_anew(machine: Machine) -> None:
    domid = machine.domain("again")
    ring = Ring(machine, domid)
    with ring.client() as guest:
        guest.watch_queue().add("x")
        guest.write("kept", "1")
    with ring.client(reconnect=True) as guest:
        assert guest.read("kept") == b"1"
        assert machine.server.hub.domains[domid].n_watches == 0
    assert ring.memory.view[2068] == State.CONNECTED


def test_introducing_again_binds_another_event_channel(machine: Machine) -> None:
    domid = machine.domain("rebound")
    ring = Ring(machine, domid)
    with ring.client() as guest:
        guest.write("x", "1")
    ring.channel.close()
    ring.channel = ring.guest.alloc_unbound(ring.waiter, 0)
    machine.store.introduce(domid, XENSTORE_GREF, ring.channel.port)
    with ring.client() as guest:
        assert guest.read("x") == b"1"


@pytest.mark.parametrize("port", [1, 4000, 0x7FFFFFFF])
def test_a_channel_or_page_that_is_not_there(machine: Machine, port: int) -> None:
    domid = machine.domain("nothing")
    with pytest.raises(XenstoreError) as refused:
        machine.store.introduce(domid, XENSTORE_GREF, port)
    assert refused.value.name == "EINVAL"
    assert not machine.store.is_domain_introduced(domid)
    Ring(machine, domid, introduce=False)  # a page, but still no such channel
    with pytest.raises(XenstoreError):
        machine.store.introduce(domid, XENSTORE_GREF, port + 7)


def test_shutdown_and_death_are_told(machine: Machine) -> None:
    domid = machine.domain("mortal")
    with machine.store.watch_queue() as queue:
        queue.add("@releaseDomain")
        await_event(queue, "@releaseDomain")
        ring = Ring(machine, domid)
        client = ring.client()
        client.write("data", "1")
        machine.store.write("/elsewhere", "1")
        machine.store.set_perms("/elsewhere", ["n0", f"r{domid}"])
        ring.guest.shutdown()
        await_event(queue, "@releaseDomain")
        assert machine.store.exists(f"/local/domain/{domid}/data")
        machine.dom0.destroy_domain(domid)
        await_event(queue, "@releaseDomain")
    assert not machine.store.exists(f"/local/domain/{domid}/data")
    assert machine.store.get_perms("/elsewhere") == ["n0"]
    assert domid not in machine.server.hub.domains
    client.close()


def test_a_domain_that_only_has_sockets_is_introduced_and_released_too(machine: Machine) -> None:
    domid = machine.domain("sockets")
    with machine.store.watch_queue() as queue:
        for special in ("@introduceDomain", "@releaseDomain"):
            queue.add(special)
            await_event(queue, special)
        machine.socket_client(domid).write("x", "1")
        await_event(queue, "@introduceDomain")
        assert machine.store.is_domain_introduced(domid)
        machine.dom0.destroy_domain(domid)
        await_event(queue, "@releaseDomain")


def test_a_guest_on_its_ring_sees_the_daemon_go(machine: Machine) -> None:
    domid = machine.domain("left")
    with Ring(machine, domid).client() as guest:
        queue = guest.watch_queue()
        queue.add("x")
        assert queue.get(DEADLINE_S) is not None
        machine.server.stop()
        with pytest.raises(StoreGone):
            queue.get(DEADLINE_S)


def test_a_guest_on_its_ring_outlives_the_daemon(machine: Machine) -> None:
    domid = machine.domain("stays")
    ring = Ring(machine, domid)
    with XenstoreClient.over_ring(ring.memory, ring.waiter, ring.channel, reconnect=True) as guest:
        with guest.watch("x") as events:
            assert next(events).path == "x"
            machine.server.stop()
            with XenstoreServer(hypervisor=machine.hypervisor(0)).start() as server:
                with XenstoreClient.from_socket(server.connect()) as store:
                    store.mkdir(f"/local/domain/{domid}")
                    store.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
                    store.introduce(domid, XENSTORE_GREF, ring.channel.port)
                assert next(events).path == "x"
                guest.write("x", "1")
                assert guest.read("x") == b"1"


def test_a_guest_on_a_socket_outlives_the_daemon(machine: Machine) -> None:
    domid = machine.domain("stays")
    connection = machine.hypervisor(domid)
    with XenstoreClient.from_socket(connection.store_connection(), again=connection.store_connection) as guest:
        with guest.watch("x") as events:
            assert next(events).path == "x"
            machine.server.stop()
            with XenstoreServer(hypervisor=machine.hypervisor(0)).start():
                assert next(events).path == "x"
                assert guest.get_domain_path(domid) == f"/local/domain/{domid}"


def test_sockets_of_a_dead_domain_are_closed(machine: Machine) -> None:
    domid = machine.domain("gone")
    with machine.store.watch_queue() as queue:
        home = f"/local/domain/{domid}"
        queue.add(home)
        await_event(queue, home)
        guest = machine.socket_client(domid)
        guest.write("x", "1")
        await_event(queue, f"{home}/x")
        machine.dom0.destroy_domain(domid)
        await_event(queue, home)
    with pytest.raises(StoreGone):
        read_for_ever(guest, "x")


def test_a_dead_domid_can_be_used_again_and_inherits_nothing(machine: Machine) -> None:
    domid = machine.domain("one")
    machine.store.write("/mine", "1")
    machine.store.set_perms("/mine", ["n0", f"b{domid}"])
    with machine.store.watch_queue() as queue:
        home = f"/local/domain/{domid}"
        queue.add(home)
        await_event(queue, home)
        machine.dom0.destroy_domain(domid)
        await_event(queue, home)
    assert machine.store.get_perms("/mine") == ["n0"]
    assert machine.server.hub.domain_of(domid).n_nodes == 0


def test_without_the_broker_connections_go_on(machine: Machine) -> None:
    domid = machine.domain("orphan")
    guest = machine.socket_client(domid)
    with Ring(machine, domid).client() as on_ring:
        on_ring.write("a", "1")
        guest.write("b", "1")
        machine.broker.stop()
        assert on_ring.read("b") == b"1"
        assert guest.read("a") == b"1"
        assert machine.store.read(f"/local/domain/{domid}/a") == b"1"
        with pytest.raises(XenstoreError):
            machine.store.introduce(domid + 1, 1, 1)


DAEMON = """
import sys
from paravirt.hypervisor.client import Hypervisor
from paravirt.xenstore.server import XenstoreServer
with Hypervisor.connect(sys.argv[1]) as hypervisor:
    server = XenstoreServer(sys.argv[2], hypervisor)
    print("ready", flush=True)
    server.serve_forever()
"""


def start_daemon(run: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", DAEMON, str(run / "hypervisor.sock"), str(run / "xenstored.sock")]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == "ready\n"
    return daemon


def test_a_killed_daemon_is_noticed_on_socket_and_ring_and_replaced(tmp_path: Path) -> None:
    with ExitStack() as stack:
        broker = BrokerServer(tmp_path)
        broker.start()
        stack.callback(broker.stop)
        dom0 = stack.enter_context(Hypervisor.from_fd(broker.connect(0)))
        domid = dom0.create_domain("survivor", isolated=False).domid
        guest = stack.enter_context(Hypervisor.from_fd(broker.connect(domid)))
        page, waiter = guest.reserved_page(XENSTORE_GREF).memory, guest.waiter()
        for attempt in range(2):
            daemon = start_daemon(tmp_path)
            store = stack.enter_context(XenstoreClient.connect(tmp_path / "xenstored.sock"))
            assert not store.exists("/local"), "it remembers nothing"
            store.mkdir(f"/local/domain/{domid}")
            store.set_perms(f"/local/domain/{domid}", [f"n{domid}"])
            channel = guest.alloc_unbound(waiter, 0)
            store.introduce(domid, XENSTORE_GREF, channel.port)
            on_ring = stack.enter_context(XenstoreClient(RingTransport(page, waiter, channel)))
            on_socket = stack.enter_context(XenstoreClient.from_socket(guest.store_connection()))
            on_ring.write("x", str(attempt))
            assert on_socket.read("x") == b"%d" % attempt
            queue = on_ring.watch_queue()
            queue.add("x")
            queue.get(DEADLINE_S)
            daemon.kill()
            daemon.communicate(timeout=DEADLINE_S)
            with pytest.raises(StoreGone):
                queue.get(DEADLINE_S)
            for client in (on_socket, on_ring, store):
                with pytest.raises(StoreGone):
                    client.read("x")
            on_ring.close()
            channel.close()


def test_stopping_leaves_no_descriptor_and_no_thread() -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with ExitStack() as stack:
        Machine(stack)
    before = count()
    for i in range(3):
        with ExitStack() as stack:
            machine = Machine(stack)
            domid = machine.domain(f"d{i}")
            with Ring(machine, domid).client() as guest:
                guest.write("x", "1")
            machine.socket_client(domid).write("y", "1")
    assert count() == before
