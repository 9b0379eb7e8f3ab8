# SPDX-License-Identifier: MIT
"""The backend's negotiation against scripted frontends: every edge of connecting and closing, with an engine that only
remembers."""

import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import paravirt
from paravirt.backend.disks import Disk
from paravirt.backend.engine import Connection, EngineStatistics, Terms
from paravirt.backend.service import BackendService
from paravirt.backend.vbd import VbdBackend
from paravirt.errors import ParavirtError
from paravirt.host import vbd
from paravirt.hypervisor.client import Arena, EventChannel, PageRun
from paravirt.protocol import blkif
from paravirt.protocol.blkif import Operation
from paravirt.protocol.vbd import VbdRequest
from paravirt.protocol.xenbus import DevicePath, XenbusState
from paravirt.ring.shared import FrontRing
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import Transaction

S = XenbusState
DEADLINE_S = 20.0


class FakeEngine:
    """Remembers that it was started and stopped."""

    made: list["FakeEngine"] = []

    def __init__(self, connection: Connection, disk: Disk, terms: Terms) -> None:
        self.connection, self.on_failure, self.terms = connection, terms.on_failure, terms
        self.sectors = terms.offer.sectors
        self.started = self.stopped = 0
        FakeEngine.made.append(self)

    def start(self) -> None:
        self.started += 1

    def stop(self) -> None:
        self.stopped += 1

    def resize(self, sectors: int) -> None:
        self.sectors = sectors

    def withdraw(self, operation: Operation) -> None:
        raise AssertionError("no disk here lacks an operation")

    def statistics(self) -> EngineStatistics:
        raise AssertionError("nobody asks")


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    FakeEngine.made = []
    with paravirt.Host(engine=FakeEngine, max_queues=3) as running:
        yield running


class Front:
    """A frontend that does what the test says."""

    def __init__(self, host: paravirt.Host) -> None:
        self.host = host
        self.domain = host.create_domain(f"guest-{len(host.domains)}")
        self.path: DevicePath = host.attach_disk(self.domain, "1M", driver="memory")
        self.store = self.domain.store
        self.arena: Arena = self.domain.hypervisor.create_arena(0, 16)
        self.waiter = self.domain.hypervisor.waiter()
        self.channel: EventChannel | None = None
        self.pages: PageRun | None = None

    def offer(self, n_pages: int = 1) -> VbdRequest:
        """A fresh ring and port."""
        self.pages = self.arena.allocate(n_pages)
        FrontRing.create(self.pages.view, blkif.REQUEST, blkif.RESPONSE).close()
        refs = tuple(self.arena.grant(self.pages.gref + i) for i in range(n_pages))
        self.channel = self.domain.hypervisor.alloc_unbound(self.waiter, 0)
        return VbdRequest.single(refs, self.channel.port)

    def write(self, state: XenbusState, keys: dict[str, str] | None = None, *, without: tuple[str, ...] = ()) -> None:
        def change(transaction: Transaction) -> None:
            for name in without:
                xenbus.remove(self.store, f"{self.path.frontend}/{name}")
            for name, value in (keys or {}).items():
                transaction.write(f"{self.path.frontend}/{name}", value)
            transaction.write(f"{self.path.frontend}/state", str(int(state)))

        self.store.transact(change)

    def backend(self) -> XenbusState:
        return xenbus.read_state(self.host.store, self.path.backend)

    def error(self) -> str:
        return (
            xenbus.read_key(self.host.store, f"/local/domain/0/error/{self.path.backend.split('/', 4)[4]}/error") or ""
        )

    def expect(self, state: XenbusState) -> None:
        queue = self.host.store.watch_queue()
        queue.add(f"{self.path.backend}/state")
        deadline = time.monotonic() + DEADLINE_S
        while (now := self.backend()) is not state:
            assert time.monotonic() < deadline, f"backend stays {now.name}, not {state.name}; {self.error()}"
            queue.get(timeout_s=0.2)
        queue.close()

    def connect(self, *, skip: bool = False) -> FakeEngine:
        self.write(S.CONNECTED if skip else S.INITIALISED, self.offer().to_keys())
        self.expect(S.CONNECTED)
        if not skip:
            self.write(S.CONNECTED)
        return FakeEngine.made[-1]


@pytest.fixture
def front(host: paravirt.Host) -> Front:
    made = Front(host)
    made.expect(S.INIT_WAIT)
    return made


def settled(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def test_the_backend_publishes_before_it_waits(front: Front) -> None:
    keys = xenbus.read_keys(front.store, front.path.backend, ("sectors", "sector-size", "info", "feature-flush-cache"))
    assert keys == {"sectors": "2048", "sector-size": "512", "info": "0", "feature-flush-cache": "1"}
    assert xenbus.read_key(front.store, f"{front.path.backend}/hotplug-status") == "connected"


@pytest.mark.parametrize("skip", [False, True], ids=["by INITIALISED", "straight to CONNECTED"])
def test_connect_and_unplug(front: Front, skip: bool) -> None:
    engine = front.connect(skip=skip)
    assert (engine.started, engine.stopped) == (1, 0)
    detach = threading.Thread(target=front.host.detach_disk, args=(front.domain,))
    detach.start()
    front.expect(S.CLOSING)
    assert engine.stopped == 0
    front.write(S.CLOSED)
    detach.join(DEADLINE_S)
    assert (engine.started, engine.stopped) == (1, 1)
    assert vbd.list_vbds(front.host.store) == []


def test_the_same_state_twice_changes_nothing(front: Front) -> None:
    engine = front.connect()
    for _ in range(20):
        front.write(S.CONNECTED)
    front.write(S.CLOSING)
    front.expect(S.CLOSING)
    assert (engine.started, engine.stopped, len(FakeEngine.made)) == (1, 0, 1)


def test_four_ring_pages(front: Front) -> None:
    front.write(S.INITIALISED, front.offer(4).to_keys())
    front.expect(S.CONNECTED)
    assert FakeEngine.made[0].connection.ring.size == 128


def test_page_order_zero(front: Front) -> None:
    (place,) = front.offer().queues
    keys = {"ring-page-order": "0", "ring-ref0": str(place.ring_refs[0]), "event-channel": str(place.event_channel)}
    front.write(S.INITIALISED, keys)
    front.expect(S.CONNECTED)


def test_crash_and_reboot_of_the_guest(front: Front) -> None:
    first = front.connect()
    front.write(S.INITIALISING)
    front.expect(S.INIT_WAIT)
    assert first.stopped == 1
    second = front.connect()
    assert second is not first
    assert (second.started, second.stopped) == (1, 0)


def test_frontend_directory_deleted_while_connected(front: Front) -> None:
    engine = front.connect()
    front.host.store.rm(front.path.frontend)
    front.expect(S.UNKNOWN)
    assert engine.stopped == 1


def test_offline_before_connecting(front: Front) -> None:
    front.host.detach_disk(front.domain)
    assert front.backend() is S.UNKNOWN
    assert FakeEngine.made == []


def test_both_sides_close_at_once(front: Front) -> None:
    engine = front.connect()
    detach = threading.Thread(target=front.host.detach_disk, args=(front.domain,))
    detach.start()
    front.write(S.CLOSING)
    front.expect(S.CLOSING)
    front.write(S.CLOSED)
    detach.join(DEADLINE_S)
    assert engine.stopped == 1


def test_disconnecting_twice_is_harmless(front: Front) -> None:
    """Closed by its frontend, and then stopped twice."""
    engine = front.connect()
    front.write(S.CLOSED)
    front.expect(S.CLOSED)
    (device,) = front.host._backend._devices.values()
    front.host._backend.stop()
    for _ in range(2):
        device._disconnect()
        device.close()
    assert (engine.started, engine.stopped) == (1, 1)
    assert device.statistics() is None


def test_guest_closes_and_comes_back(front: Front) -> None:
    for _ in range(3):
        engine = front.connect()
        front.write(S.CLOSING)
        front.expect(S.CLOSING)
        front.write(S.CLOSED)
        front.expect(S.CLOSED)
        assert engine.stopped == 1
        front.write(S.INITIALISING)
        front.expect(S.INIT_WAIT)


BAD = {
    "no ring-ref": ({"ring-ref": None}, "ring-ref is missing"),
    "ring-ref no number": ({"ring-ref": "eight"}, "ring-ref is 'eight'"),
    "ring-ref not UTF-8": ({"ring-ref": "\udcff"}, "not UTF-8"),
    "ring-ref of nobody": ({"ring-ref": "4000000"}, ""),
    "ring-ref not granted": ({"ring-ref": "+1"}, ""),
    "no event-channel": ({"event-channel": None}, "event-channel is missing"),
    "event-channel of nobody": ({"event-channel": "4000"}, ""),
    "zero queues": ({"multi-queue-num-queues": "0"}, "multi-queue"),
    "two queues of which nothing is there": ({"multi-queue-num-queues": "2"}, "queue 0: ring-ref is missing"),
    "more queues than offered": ({"multi-queue-num-queues": "4"}, "multi-queue-num-queues is 4, not from 1 to the 3"),
    "unknown protocol": ({"protocol": "x86_128-abi"}, "protocol"),
    "too many pages": ({"ring-page-order": "5"}, "ring-page-order"),
    "pages without references": ({"ring-page-order": "1"}, "ring-ref0 is missing"),
}


@pytest.mark.parametrize(("change", "complaint"), BAD.values(), ids=BAD)
def test_a_bad_frontend_is_refused_and_others_go_on(
    host: paravirt.Host, front: Front, change: dict[str, str | None], complaint: str
) -> None:
    good = Front(host)
    good.expect(S.INIT_WAIT)
    engine = good.connect()
    request = front.offer()
    keys: dict[str, str | None] = {**request.to_keys(), **change}
    if keys.get("ring-ref") == "+1":
        keys["ring-ref"] = str(request.queues[0].ring_refs[0] + 1)
    for name, value in keys.items():
        if value is not None:
            front.store.write(f"{front.path.frontend}/{name}", value.encode("utf-8", "surrogateescape"))
    front.write(S.INITIALISED)
    front.expect(S.CLOSING)
    assert complaint in front.error()
    assert front.error().startswith("22 ")
    assert FakeEngine.made == [engine]
    assert engine.stopped == 0
    # It may try again after it has closed.
    front.write(S.CLOSED)
    front.expect(S.CLOSED)
    for name in ("ring-page-order", "multi-queue-num-queues"):
        xenbus.remove(front.store, f"{front.path.frontend}/{name}")
    front.write(S.INITIALISING)
    front.expect(S.INIT_WAIT)
    front.connect()


def test_a_bad_image_is_looked_at_once(host: paravirt.Host, caplog: pytest.LogCaptureFixture) -> None:
    """What the backend writes about it must not make it look again."""
    domain = host.create_domain("guest")
    path = DevicePath("vbd", domain.domid, 51712)
    directory = path.backend
    keys = {
        f"{path.frontend}/state": "1",
        f"{directory}/params": "file:/nowhere.img",
        f"{directory}/frontend": path.frontend,
        f"{directory}/frontend-id": str(domain.domid),
        f"{directory}/online": "1",
        f"{directory}/state": "1",
    }

    def create(transaction: Transaction) -> None:
        for name, value in keys.items():
            transaction.write(name, value)

    host.store.transact(create)
    settled(lambda: xenbus.read_key(host.store, f"{directory}/hotplug-status") == "error")
    for _ in range(5):
        host.store.write(f"{directory}/nudge", "x")
    threading.Event().wait(0.2)
    assert len([record for record in caplog.records if "nowhere.img does not exist" in record.message]) == 1


def test_event_channel_already_bound(front: Front) -> None:
    request = front.offer()
    other = front.host.hypervisor.waiter()
    front.host.hypervisor.bind_interdomain(other, front.domain.domid, request.queues[0].event_channel)
    front.write(S.INITIALISED, request.to_keys())
    front.expect(S.CLOSING)
    other.close()


def test_a_ring_with_requests_outstanding_is_refused(front: Front) -> None:
    request = front.offer()
    assert front.pages is not None
    front.pages.view[0:4] = (3).to_bytes(4, "little")
    front.write(S.INITIALISED, request.to_keys())
    front.expect(S.CLOSING)
    assert "idle" in front.error()


@pytest.mark.parametrize("state", ["9", "x", "", "44"])
def test_garbage_for_a_state(front: Front, state: str) -> None:
    engine = front.connect()
    front.store.write(f"{front.path.frontend}/state", state)
    front.expect(S.CLOSING)
    assert "state is" in front.error()
    assert engine.stopped == 1


@pytest.mark.parametrize("state", [S.INIT_WAIT, S.RECONFIGURING, S.RECONFIGURED])
def test_a_state_no_frontend_has(front: Front, state: XenbusState) -> None:
    engine = front.connect()
    front.write(state)
    front.expect(S.CLOSING)
    assert engine.stopped == 1


def test_an_engine_that_fails_closes_its_device_only(host: paravirt.Host, front: Front) -> None:
    other = Front(host)
    other.expect(S.INIT_WAIT)
    first, second = front.connect(), other.connect()
    first.on_failure(ParavirtError("the ring is dead"))
    front.expect(S.CLOSING)
    assert "the ring is dead" in front.error()
    assert (first.stopped, second.stopped) == (1, 0)
    assert other.backend() is S.CONNECTED


def test_a_defect_closes_its_device_only(host: paravirt.Host, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Front(host)
    other.expect(S.INIT_WAIT)
    other.connect()

    def fail(self: VbdBackend, *place: object) -> Connection:
        raise RuntimeError("never thought of")

    monkeypatch.setattr(VbdBackend, "_map", fail)
    front.write(S.INITIALISED, front.offer().to_keys())
    front.expect(S.CLOSING)
    assert "never thought of" in front.error()
    assert other.backend() is S.CONNECTED


def test_states_that_flicker_do_no_harm(front: Front) -> None:
    request = front.offer()
    for round_number in range(200):
        front.write(S(round_number % 7), request.to_keys())
    front.write(S.CLOSED)
    settled(lambda: front.backend() in (S.CLOSED, S.CLOSING, S.INIT_WAIT))
    settled(lambda: all(engine.started == 1 for engine in FakeEngine.made))
    front.host.destroy_domain(front.domain)
    front.expect(S.UNKNOWN)
    assert all(engine.stopped >= 1 for engine in FakeEngine.made)


def test_failed_and_repeated_connects_leak_nothing(front: Front) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def life(keys: dict[str, str], then: XenbusState) -> None:
        front.write(S.INITIALISED, keys)
        front.expect(then)
        front.write(S.CLOSED)
        front.expect(S.CLOSED)
        front.write(S.INITIALISING)
        front.expect(S.INIT_WAIT)

    request = front.offer()
    good = request.to_keys()
    life(good, S.CONNECTED)
    for keys in ({**good, "event-channel": "4000"}, {**good, "ring-ref": "4000000"}, {**good, "protocol": "x"}):
        life(keys, S.CLOSING)
    before = descriptors()
    for _ in range(20):
        life(good, S.CONNECTED)
        for keys in ({**good, "event-channel": "4000"}, {**good, "ring-ref": "4000000"}, {**good, "protocol": "x"}):
            life(keys, S.CLOSING)
    assert descriptors() == before
    front.write(S.CLOSED)
    front.expect(S.CLOSED)
    assert front.arena.revoke(request.queues[0].ring_refs[0]), "the backend kept the ring page"


def test_a_backend_dies_just_after_it_connected(host: paravirt.Host, front: Front) -> None:
    """Its frontend acts on that later and uses the ring: the next backend waits for it and asks for another ring."""
    front.write(S.INITIALISED, front.offer().to_keys())
    front.expect(S.CONNECTED)
    assert front.pages is not None
    front.pages.view[0:4] = (3).to_bytes(4, "little")
    later = Front(host)
    later.expect(S.INIT_WAIT)
    later.connect()
    host._backend.stop()  # without a word to xenstore
    with BackendService(host.hypervisor, host.store, engine=FakeEngine):
        later.expect(S.INIT_WAIT)  # so it has looked at the first one too
        front.write(S.CONNECTED)
        front.expect(S.INIT_WAIT)
        front.write(S.INITIALISING)
        front.connect()
    assert front.error() == ""


def test_a_guest_does_not_fill_the_log(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    for code in range(100, 120):
        front.write(S.CLOSED)
        front.expect(S.CLOSED)
        front.write(S.INITIALISING)
        front.expect(S.INIT_WAIT)
        front.store.write(f"{front.path.frontend}/state", str(code))
        front.expect(S.CLOSING)
    assert len([record for record in caplog.records if "state is" in record.message]) == 1
    assert front.error() == "22 state is '119', not a number from 0 to 8"


def test_a_guest_with_an_invalid_state_is_listed(front: Front) -> None:
    for garbage in (b"x", b"\xff"):
        front.store.write(f"{front.path.frontend}/state", garbage)
        assert [info.frontend_state for info in vbd.list_vbds(front.host.store)] == ["invalid"]
