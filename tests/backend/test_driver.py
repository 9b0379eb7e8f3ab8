# SPDX-License-Identifier: MIT
"""A declared device from its backend's side: what drivers do wrong, late answers, and frontends that lie."""

import errno
import os
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import paravirt
from paravirt.backend.driver import DeviceBackend, Request
from paravirt.backend.driver_service import DriverService, load_driver
from paravirt.errors import AlreadyExists, Closed, InvalidRequest, IoError, NotFound, PeerGone
from paravirt.host import device as devices
from paravirt.protocol.device import DeviceProtocol, DeviceRequest
from paravirt.protocol.xenbus import DevicePath, XenbusState
from paravirt.ring.shared import FrontRing
from paravirt.xenstore import xenbus
from tests.echo_device import (
    ADD,
    DEFECT,
    ECHO,
    FILL,
    HOLD,
    LIE,
    NO_SPACE,
    SUM,
    Answer,
    Ask,
    ColumnBack,
    ColumnFront,
    EchoBack,
    EchoFront,
)
from tests.eventually import eventually

DEADLINE_S = 20.0


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    EchoBack.held.clear()
    with paravirt.Host() as running:
        yield running


@pytest.fixture
def honest(host: paravirt.Host) -> Iterator[EchoFront]:
    """A device of another domain that must not notice anything."""
    domain = host.create_domain("honest")
    host.attach(domain, EchoBack)
    with domain.open(EchoFront) as device:
        yield device
        assert device.call(operation=ADD, value=1, timeout_s=DEADLINE_S).value == 2
        assert device.statistics().reconnects == 0


def error_of(host: paravirt.Host, path: DevicePath) -> str:
    """What the backend says of a device it has given up."""
    node = path.backend.removeprefix("/local/domain/0/")
    return xenbus.read_key(host.store, f"/local/domain/0/error/{node}/error") or ""


class RogueFront:
    """A frontend with a raw ring to a real backend."""

    def __init__(self, host: paravirt.Host, **changes: str) -> None:
        self.host = host
        self.domain = host.create_domain(f"rogue-{len(host.domains)}")
        self.path = host.attach(self.domain, EchoBack)
        hypervisor = self.domain.hypervisor
        self.arena = hypervisor.create_arena(0, 32)
        self.pages = self.arena.allocate(1)
        self.data = self.arena.allocate(8)
        channel = hypervisor.alloc_unbound(hypervisor.waiter(), 0)
        self.ring = FrontRing.create(self.pages.view, ECHO.request, ECHO.response, port=channel)
        self.channel = channel
        keys = DeviceRequest((self.arena.grant(self.pages.gref),), channel.port).to_keys(ECHO)
        eventually(lambda: self.backend() is XenbusState.INIT_WAIT)
        xenbus.switch_state(self.domain.store, self.path.frontend, XenbusState.INITIALISED, {**keys, **changes})

    def connect(self) -> "RogueFront":
        eventually(lambda: self.backend() is XenbusState.CONNECTED)
        xenbus.switch_state(self.domain.store, self.path.frontend, XenbusState.CONNECTED)
        return self

    def backend(self) -> XenbusState:
        return xenbus.read_state(self.host.store, self.path.backend)

    def ask(self, **fields: Any) -> np.ndarray:
        """Send one request and wait for its answer."""
        request = np.zeros(1, ECHO.request)
        for name, value in fields.items():
            request[name] = value
        assert self.ring.push(request) == 1
        return self.answer()

    def answer(self) -> np.ndarray:
        deadline = time.monotonic() + DEADLINE_S
        while not len(answer := self.ring.take_batch()):
            assert time.monotonic() < deadline
            self.ring.wait(timeout_s=DEADLINE_S)
        return answer


# -- frontends that lie


@pytest.mark.parametrize("lead", [65, 1000, 1 << 31, (1 << 32) - 1])
def test_a_producer_index_too_far(host: paravirt.Host, honest: EchoFront, lead: int) -> None:
    rogue = RogueFront(host).connect()
    rogue.pages.view[0:4] = struct.pack("<I", lead)
    rogue.channel.notify()
    eventually(lambda: rogue.backend() is XenbusState.CLOSING)
    assert "producer index" in error_of(host, rogue.path)


def test_bad_references_are_answered_with_errors(host: paravirt.Host, honest: EchoFront) -> None:
    rogue = RogueFront(host).connect()
    first = rogue.data.gref
    good = rogue.arena.grant(first)
    read_only = rogue.arena.grant(first + 1, read_only=True)
    malformed = ([0, good, 0, 0], [good, 0, read_only, 0], [good, good, 0, 0])
    for grefs in malformed:
        assert rogue.ask(operation=FILL, gref=grefs)["status"][0] == -errno.EINVAL
    for gref in (first + 2, 1, 7, 0xFFFFFFFF, rogue.arena.base + 40, read_only):
        assert rogue.ask(operation=FILL, gref=[gref, 0, 0, 0])["status"][0] == -errno.EFAULT
        assert rogue.ask(operation=FILL, gref=[good, gref, 0, 0])["status"][0] == -errno.EFAULT
    assert rogue.ask(operation=FILL)["status"][0] == -errno.EINVAL  # no pages at all
    answer = rogue.ask(id=1 << 63, operation=SUM, gref=[read_only, good, 0, 0])
    assert (answer["status"][0], answer["id"][0]) == (0, 1 << 63)
    counters = host.driver_statistics(EchoBack)[rogue.path]
    assert (counters.refused, counters.pinned_pages) == (3, 1)  # the ring's page alone
    assert rogue.backend() is XenbusState.CONNECTED


def test_a_grant_that_is_revoked(host: paravirt.Host, honest: EchoFront) -> None:
    """While it is pinned it cannot be taken back; afterwards the reference is worth nothing."""
    rogue = RogueFront(host).connect()
    gref = rogue.arena.grant(rogue.data.gref)
    request = np.zeros(1, ECHO.request)
    request["operation"], request["gref"] = HOLD, [gref, 0, 0, 0]
    rogue.ring.push(request)
    held = EchoBack.take_held()[0]
    assert not rogue.arena.revoke(gref)
    held.pages()[:1] = b"x"
    held.answer(value=1)
    assert rogue.answer()["status"][0] == 0
    assert rogue.arena.revoke(gref)
    assert rogue.ask(operation=FILL, gref=[gref, 0, 0, 0])["status"][0] == -errno.EFAULT


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"paravirt-layout": "1-1-00000000"}, "the other half of vecho"),
        ({"ring-ref": "x"}, "ring-ref"),
        ({"ring-page-order": "5"}, "ring-page-order"),
        ({"event-channel": "0"}, "event-channel"),
        ({"event-channel": "4000"}, ""),
    ],
)
def test_bad_keys(host: paravirt.Host, honest: EchoFront, changes: dict[str, str], complaint: str) -> None:
    rogue = RogueFront(host, **changes)
    eventually(lambda: rogue.backend() is XenbusState.CLOSING)
    assert complaint in error_of(host, rogue.path)


def test_a_storm_of_events_without_requests(host: paravirt.Host, honest: EchoFront) -> None:
    rogue = RogueFront(host).connect()
    for _ in range(20_000):
        rogue.channel.notify()
    assert rogue.ask(operation=ADD, value=4)["value"][0] == 5


# -- what drivers do


@pytest.mark.parametrize(
    ("operation", "reason"), [(LIE, "the frontend lied"), (DEFECT, "a defect of the driver: ZeroDivisionError")]
)
def test_a_driver_that_ends_its_device(
    host: paravirt.Host, honest: EchoFront, operation: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    domain = host.create_domain("guest")
    path = host.attach(domain, EchoBack)
    with domain.open(EchoFront) as device:
        with pytest.raises(PeerGone):
            device.call(operation=operation, timeout_s=DEADLINE_S)
        assert reason in error_of(host, path)
    with domain.open(EchoFront) as again:  # it may try again
        assert again.call(operation=ADD, value=1).value == 2


def test_errors_of_a_whole_batch(host: paravirt.Host, caplog: pytest.LogCaptureFixture) -> None:
    domain = host.create_domain("guest")
    host.attach(domain, ColumnBack)
    with domain.open(ColumnFront) as device:
        for _ in range(20):
            assert device.exchange([Ask(NO_SPACE, 1)] * 3)["status"].tolist() == [-errno.ENOSPC] * 3
        assert device.call(value=1).value == 2
        complaints = [record for record in caplog.records if "requests failed" in record.message]
        assert len([record for record in complaints if record.levelname == "WARNING"]) == 1
        with pytest.raises(PeerGone):
            device.call(operation=DEFECT, timeout_s=DEADLINE_S)


def test_late_answers(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    path = host.attach(domain, EchoBack)
    with domain.open(EchoFront) as device:
        pending = [device.send(operation=HOLD) for _ in range(5)]
        requests = EchoBack.take_held(5)
        assert host.driver_statistics(EchoBack)[path].deferred == 5
        for i, request in reversed(list(enumerate(requests))):
            assert request.answer(Answer(i))
            with pytest.raises(InvalidRequest, match="answered already"):
                request.answer(value=7)
        assert [each.result(DEADLINE_S).value for each in pending] == list(range(5))
        failing = device.send(operation=HOLD)
        EchoBack.take_held()[0].fail(errno.EBUSY)
        with pytest.raises(IoError, match=str(errno.EBUSY)):
            failing.result(DEADLINE_S)
        unknown = device.send(operation=HOLD)
        request = EchoBack.take_held()[0]
        with pytest.raises(InvalidRequest, match="no field"):
            request.answer(other=1)
        request.finish(lambda request: 1 // 0)
        with pytest.raises(IoError, match=str(errno.EIO)):
            unknown.result(DEADLINE_S)
        last = device.buffer(4096)
        device.send(operation=HOLD, buffer=last)
        request = EchoBack.take_held()[0]
    assert not request.answer(value=1)  # its frontend is gone
    with pytest.raises(Closed, match="gone"):
        request.pages()


def test_messages_of_numpy_alone(host: paravirt.Host) -> None:
    class Back(DeviceBackend):
        protocol = DeviceProtocol("vplain", request=[("n", "<u4", (2,))], response=[("sum", "<u4")])

        def answer(self, request: Request) -> Any:
            assert request.message["n"].tolist() == request["n"].tolist()
            return {"sum": int(request["n"].sum())}

    class Front(paravirt.DeviceFrontend):
        protocol = Back.protocol

    domain = host.create_domain("guest")
    host.attach(domain, Back)
    with domain.open(Front) as device:
        assert int(device.call(n=[2, 3])["sum"]) == 5


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("refuse", "this device is refused"), ("defect", "a defect of the driver"), ("type", "not Offer")],
)
def test_devices_that_are_refused(host: paravirt.Host, honest: EchoFront, fault: str, reason: str) -> None:
    domain = host.create_domain("guest")
    with pytest.raises(InvalidRequest, match=reason):
        host.attach(domain, EchoBack, fault=fault)
    assert devices.paths(host.store, domid=domain.domid) == []
    assert domain.devices("vecho") == []


def test_configurations(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    host.attach(domain, EchoBack, step=5)
    with domain.open(EchoFront) as device:
        assert (device.offer.step, device.call(operation=ADD, value=1).value) == (5, 6)
    with pytest.raises(AlreadyExists, match="has a vecho 0 already"):
        host.attach(domain, EchoBack)
    with pytest.raises(InvalidRequest, match="configuration of vecho"):
        host.attach(domain, EchoBack, 1, other=1)
    with pytest.raises(InvalidRequest, match="step is 'x'"):
        devices.attach(host.store, DevicePath("vecho", domain.domid, 1), {"step": "x"}, name="vecho 1")
    with pytest.raises(InvalidRequest, match="vecho has no configuration pets"):
        devices.attach(host.store, DevicePath("vecho", domain.domid, 1), {"pets": "1"}, name="vecho 1")

    class Another(EchoBack):
        pass

    with pytest.raises(InvalidRequest, match="served by EchoBack"):
        host.attach(domain, Another, 1)
    with pytest.raises(NotFound, match="no vecho 1"):
        host.detach(domain, EchoBack, 1)
    assert devices.list_devices(host.store) == [devices.DeviceInfo("vecho", domain.domid, 0, "closed", "closed")]


def test_what_is_in_use_is_asked_for_again(host: paravirt.Host) -> None:
    class Busy(EchoBack):
        protocol = DeviceProtocol("vbusy", request=Ask, response=Answer)
        tries, in_use = 0, True

        def open(self) -> Any:
            type(self).tries += 1
            if self.in_use:
                raise AlreadyExists("somebody has it")
            return self.protocol.offer()

    domain = host.create_domain("guest")
    path = DevicePath("vbusy", domain.domid, 0)
    with DriverService(host.hypervisor, host.store, Busy):
        with pytest.raises(InvalidRequest, match="somebody has it"):
            devices.attach(host.store, path, {}, name="vbusy 0")
        host.store.transact(lambda transaction: devices._create(transaction, path, {}, {}, "vbusy 0"))
        tries = Busy.tries
        eventually(lambda: Busy.tries > tries)
        Busy.in_use = False
        eventually(lambda: xenbus.read_key(host.store, f"{path.backend}/hotplug-status") == "connected")


def test_tidying_up_leaves_a_device_alone_that_was_attached_meanwhile(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    path = host.attach(domain, EchoBack)
    xenbus.remove_backend(host.store, path.backend, unless=f"{path.frontend}/state")
    with domain.open(EchoFront) as device:
        assert device.call(operation=ADD, value=1).value == 2


def test_loading_drivers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_driver("tests.echo_device:EchoBack") is EchoBack
    for name in ("nothing", "tests.echo_device:EchoFront", "tests.echo_device:ADD"):
        with pytest.raises(InvalidRequest):
            load_driver(name)
    for name in ("tests.no_module:Class", "tests.echo_device:Nothing"):
        with pytest.raises(NotFound, match="there is no driver"):
            load_driver(name)


# -- the ends of connections


def test_a_frontend_that_starts_over(host: paravirt.Host, honest: EchoFront) -> None:
    rogue = RogueFront(host).connect()
    xenbus.switch_state(rogue.domain.store, rogue.path.frontend, XenbusState.INITIALISING)
    eventually(lambda: rogue.backend() is XenbusState.INIT_WAIT)
    host.destroy_domain(rogue.domain)
    eventually(lambda: rogue.backend() is XenbusState.UNKNOWN)


def test_backends_that_come_and_go_at_any_moment(host: paravirt.Host) -> None:
    """Threads with requests in flight, and backends that live for some milliseconds: nobody sees more than a delay."""
    domain = host.create_domain("guest")
    path = host.attach(domain, EchoBack)
    device, done, wrong = domain.open(EchoFront), threading.Event(), []

    def work(k: int) -> None:
        buffer = device.buffer(4096)
        try:
            while not done.is_set():
                asked = [{"value": i} for i in range(50)]
                answers = device.exchange(asked, timeout_s=DEADLINE_S)
                assert answers["value"].tolist() == list(range(1, 51))
                device.call(operation=FILL, value=k, buffer=buffer, timeout_s=DEADLINE_S)
                assert buffer.read() == bytes([k]) * 4096
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for worker in workers:
        worker.start()
    service = host._services["vecho"]
    for _ in range(40):
        done.wait(0.01)
        service.stop()
        service = DriverService(host.hypervisor, host.store, EchoBack)
        service.start()
    done.set()
    for worker in workers:
        worker.join(DEADLINE_S)
    assert wrong == []
    assert device.statistics().reconnects > 0
    device.close()
    eventually(lambda: path not in service.statistics())
    service.stop()


def test_held_requests_are_sent_again_to_the_next_backend(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    host.attach(domain, EchoBack)
    with domain.open(EchoFront) as device:
        buffer = device.buffer(4096)
        pending = [
            device.send(operation=HOLD, buffer=buffer),
            *(device.send(operation=HOLD, value=i) for i in range(9)),
        ]
        before = EchoBack.take_held(10)
        host._services["vecho"].stop()
        assert not any(request.answer(value=1) for request in before)
        with DriverService(host.hypervisor, host.store, EchoBack):
            after = EchoBack.take_held(10)
            assert [request["value"] for request in after] == [request["value"] for request in before]
            after[0].pages()[:4] = b"late"
            for request in after:
                request.answer(value=request["value"] + 1)
            assert [each.result(DEADLINE_S).value for each in pending] == [1, *range(1, 10)]
            assert buffer.read(4) == b"late"
            statistics = device.statistics()
            assert (statistics.reconnects, statistics.reissued, statistics.granted_pages) == (1, 10, 4)
            device.close()


def test_connections_leak_nothing(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    host.attach(domain, EchoBack)

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def once() -> None:
        with domain.open(EchoFront) as device:
            with device.buffer(4096) as buffer:
                device.call(operation=FILL, value=1, buffer=buffer)
            device.send(operation=HOLD, buffer=device.buffer(8192))
            EchoBack.take_held()
        with domain.open(EchoFront) as device, pytest.raises(PeerGone):
            device.call(operation=DEFECT, timeout_s=DEADLINE_S)

    once()
    before = held()
    for _ in range(3):
        once()
    assert held() == before
    assert [(info.arenas, info.ports, info.maps) for info in host.hypervisor.list_domains()][-1] == (0, 0, 0)
