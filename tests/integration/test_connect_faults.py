# SPDX-License-Identifier: MIT
"""Whatever fails on the way to a connection, in either half, at whichever call: nothing stays behind, the other side
hears of it or it is tried again, and the next attempt succeeds."""

import gc
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import paravirt
from paravirt.errors import ParavirtError, QuotaReached, ResourceLimit
from paravirt.host import device as devices
from paravirt.hypervisor.arena import Arena
from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.link import Link
from paravirt.hypervisor.messages import Op
from paravirt.protocol.blkif import Status
from paravirt.ring.memory import Mapping
from paravirt.xenstore.client import XenstoreClient
from tests.backend.queue_front import QueueFront, S
from tests.held import Held, settled

DEADLINE_S = 20.0
ROUNDS = int(os.environ.get("DEVICE_ROUNDS", "40"))
"""Disks that come and go, one after the other."""

_UNDOES = ("CLOSE", "DESTROY", "UNMAP", "NOTIFY_RUN")
"""Calls of the broker that give something back. They fail when it is gone, and then there is nothing to give back."""


class Fault:
    """Fails one call of those that are counted while it is armed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0
        self.struck = False
        self.only_in: str | None = None
        """A thread, or any."""

    def arm(self, k: int) -> None:
        """For the `k`th call from now on, from 1; 0: for none."""
        with self._lock:
            self._left = k
            if k:
                self.struck = False

    def due(self) -> bool:
        """One more call; whether it is the one."""
        with self._lock:
            if not self._left or self.only_in not in (None, threading.current_thread().name):
                return False
            self._left -= 1
            self.struck = not self._left
            return self.struck


Breaker = Callable[[pytest.MonkeyPatch, Fault, Hypervisor, XenstoreClient], None]


def broker(monkeypatch: pytest.MonkeyPatch, fault: Fault, hypervisor: Hypervisor, store: XenstoreClient) -> None:
    """The broker refuses."""
    call = Link.call

    def failing(self: Link, op: Op, *arguments: Any, **options: Any) -> Any:
        if self is hypervisor.link and not any(word in op.name for word in _UNDOES) and fault.due():
            raise ResourceLimit("the broker has no more of it")
        return call(self, op, *arguments, **options)

    monkeypatch.setattr(Link, "call", failing)


def xenstore(monkeypatch: pytest.MonkeyPatch, fault: Fault, hypervisor: Hypervisor, store: XenstoreClient) -> None:
    """Xenstored refuses."""
    exchange = XenstoreClient.exchange

    def failing(self: XenstoreClient, *arguments: Any, **options: Any) -> Any:
        if self is store and fault.due():
            raise QuotaReached("xenstored takes no more", "EQUOTA")
        return exchange(self, *arguments, **options)

    monkeypatch.setattr(XenstoreClient, "exchange", failing)


def mapping(monkeypatch: pytest.MonkeyPatch, fault: Fault, hypervisor: Hypervisor, store: XenstoreClient) -> None:
    """Memory cannot be mapped, in whichever half comes next."""
    adopt = Mapping.__init__

    def failing(self: Mapping, *arguments: Any, **options: Any) -> None:
        if threading.current_thread().name != "hypervisor" and fault.due():
            raise ResourceLimit("no more memory can be mapped")
        adopt(self, *arguments, **options)

    monkeypatch.setattr(Mapping, "__init__", failing)


def allocation(monkeypatch: pytest.MonkeyPatch, fault: Fault, hypervisor: Hypervisor, store: XenstoreClient) -> None:
    """An arena has no more pages."""
    allocate = Arena.allocate

    def failing(self: Arena, *arguments: Any, **options: Any) -> Any:
        if fault.due():
            raise ResourceLimit("the arena is full")
        return allocate(self, *arguments, **options)

    monkeypatch.setattr(Arena, "allocate", failing)


def thread(monkeypatch: pytest.MonkeyPatch, fault: Fault, hypervisor: Hypervisor, store: XenstoreClient) -> None:
    """No thread can be started."""
    start = threading.Thread.start

    def failing(self: threading.Thread) -> None:
        if fault.due():
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", failing)


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host(max_queues=2) as running:
        yield running


@pytest.mark.parametrize("breaker", [broker, xenstore, mapping, allocation, thread])
def test_each_call_of_the_frontend_fails_once(
    host: paravirt.Host, monkeypatch: pytest.MonkeyPatch, breaker: Breaker
) -> None:
    domain, fault = host.create_domain("guest"), Fault()
    host.attach_disk(domain, "1M", driver="memory")
    for _ in range(2):
        domain.open_disk().close()
    before, k = Held.now(host), 0
    breaker(monkeypatch, fault, domain.hypervisor, domain.store)
    while k == 0 or fault.struck:
        k += 1
        fault.arm(k)
        try:
            disk = domain.open_disk(timeout_s=DEADLINE_S)
        except (ParavirtError, RuntimeError):
            assert fault.struck
        else:
            fault.arm(0)
            assert disk.pread(512, 0) == bytes(512)
            disk.close()
        fault.arm(0)
        assert settled(lambda: Held.now(host) == before), f"call {k}: {Held.now(host)}, not {before}"
        assert list(domain.hypervisor.list_ports()) == []
        with domain.open_disk() as again:
            assert again.pread(512, 0) == bytes(512)
    assert k > 1


@pytest.mark.parametrize("breaker", [broker, xenstore, mapping, thread])
def test_each_call_of_the_backend_fails_once(
    host: paravirt.Host, monkeypatch: pytest.MonkeyPatch, breaker: Breaker
) -> None:
    """While it connects two queues of a frontend made by hand, which hears of it, or is connected later."""
    fault = Fault()
    monkeypatch.setattr("paravirt.backend.service.STORE_RETRY_S", 0.01)
    with QueueFront(host, arenas=2) as front:
        for _ in range(2):
            front.connect(2)
            front.start_over()
        front.drop()
        fault.only_in = "vbd-backend"
        before, k = Held.now(host), 0
        breaker(monkeypatch, fault, host.hypervisor, host.store)
        while k == 0 or fault.struck:
            k += 1
            keys = front.make(2).to_keys()
            fault.arm(k)
            front.write(S.INITIALISED, keys)
            assert settled(lambda: front.backend() in (S.CONNECTED, S.CLOSING)), f"call {k}: {front.backend()}"
            fault.arm(0)
            if front.backend() is S.CONNECTED:
                front.write(S.CONNECTED)
                assert [queue.write(b"x", 0) for queue in front.queues] == [Status.OKAY] * 2
            else:
                assert fault.struck
                assert front.error() != ""
            front.start_over()
            front.drop()
            assert settled(lambda: Held.now(host) == before), f"call {k}: {Held.now(host)}, not {before}"
    assert k > 1


@pytest.mark.timeout(60 + ROUNDS)
def test_devices_that_come_and_go(host: paravirt.Host) -> None:
    """Descriptors, threads, mappings, the broker's memory and nodes are as before, exactly; Python's memory nearly."""
    domain = host.create_domain("guest")

    def life(n: int) -> None:
        host.attach_disk(domain, "1M", driver="memory")
        with domain.open_disk(ring_page_order=n % 3) as disk:
            disk.pwrite(b"x" * 4096, 0)
            assert disk.pread(4096, 0) == b"x" * 4096
        host.detach_disk(domain)

    for n in range(20):
        life(n)
    before = Held.now(host), host.store.ls("/local/domain/0"), len(host.store.ls(f"/local/domain/{domain.domid}"))
    tracemalloc.start()
    try:
        life(0)
        allocated = tracemalloc.get_traced_memory()[0]
        for n in range(ROUNDS):
            life(n)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - allocated
    finally:
        tracemalloc.stop()
    assert grown < (256 << 10) + 200 * ROUNDS  # buffers of sockets are larger now and then
    assert settled(lambda: Held.now(host) == before[0])
    assert host.store.ls("/local/domain/0") == before[1]
    assert len(host.store.ls(f"/local/domain/{domain.domid}")) == before[2]
    assert devices.list_devices(host.store) == []
    assert list(domain.hypervisor.list_ports()) == []
