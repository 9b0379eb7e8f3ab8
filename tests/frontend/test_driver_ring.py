# SPDX-License-Identifier: MIT
"""How a declared device uses its ring: in place, with which fence, how it waits, what a storm of its peer costs."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import paravirt
from paravirt.backend.driver import Batch, DeviceBackend, Request
from paravirt.backend.driver_engine import DriverEngine
from paravirt.errors import Closed, InvalidRequest, IoError, PeerGone, TimedOut
from paravirt.frontend.driver import DeviceFrontend
from paravirt.protocol.device import DeviceProtocol
from paravirt.protocol.keys import FENCE_KEY
from paravirt.ring import waiting
from paravirt.ring.event import EventPort
from paravirt.ring.waiting import Fence, Wait
from tests.echo_device import ADD, FILL, HOLD, NO_SPACE, SUM, Answer, Ask, ColumnBack, EchoBack, EchoFront, granted

DEADLINE_S = 20.0
PAGE = 4096
STORM = 20_000


class InPlaceBack(DeviceBackend):
    """Answers in the ring itself."""

    protocol = DeviceProtocol("vplace", request=Ask, response=Answer)
    in_place = True

    def handle(self, batch: Batch) -> None:
        operation = int(batch.requests["operation"].max(initial=0))
        if operation == NO_SPACE:
            raise OSError(28, "no space")
        if operation == HOLD:
            batch[0].defer()
        batch.responses["value"] = batch.requests["value"] + 1


class InPlaceFront(DeviceFrontend):
    protocol = InPlaceBack.protocol


@pytest.fixture
def in_place(host: paravirt.Host, domain: paravirt.Domain) -> Iterator[InPlaceFront]:
    host.attach(domain, InPlaceBack)
    with domain.open(InPlaceFront, ring_page_order=0) as device:
        yield device


def engine_of(host: paravirt.Host, driver: type[DeviceBackend]) -> DriverEngine:
    (device,) = host._services[driver.protocol.name]._devices.values()
    (engine,) = device._engines
    assert isinstance(engine, DriverEngine)
    return engine


def numbered(first: int) -> Callable[[np.ndarray], None]:
    def fill(slots: np.ndarray) -> None:
        slots["value"] = np.arange(first, first + len(slots))

    return fill


# -- written in place


def test_requests_written_in_the_ring(device: EchoFront) -> None:
    asked: list[np.ndarray] = []

    def fill(slots: np.ndarray) -> None:
        assert not slots.flags.owndata
        assert slots.strides == (device._end.ring.entry_bytes,)  # type: ignore[union-attr]
        assert slots.tobytes() == bytes(slots.nbytes), "nothing of what stood there before"
        numbered(10)(slots)
        asked.append(slots["value"].copy())

    for n in (1, 7, 40):
        answers = device.write(n, fill).result(DEADLINE_S)
        assert 1 <= len(answers) <= n
        assert answers["value"].tolist() == (asked.pop() + 1).tolist()
    assert device.statistics().in_flight == 0


def test_more_than_fits_is_written_piece_by_piece(in_place: InPlaceFront) -> None:
    """Both ends in place, round and round a ring of one page; and the answers wait in it."""
    sent, pending = 0, []
    while sent < 3000:
        pending.append(in_place.write(3000 - sent, numbered(sent), timeout_s=DEADLINE_S))
        sent += pending[-1].n
    answers = np.concatenate([each.result(DEADLINE_S) for each in pending])
    assert answers["value"].tolist() == list(range(1, 3001))
    statistics = in_place.statistics()
    assert (statistics.requests, statistics.responses, statistics.errors) == (3000, 3000, 0)


def test_in_place_and_copied_together(in_place: InPlaceFront) -> None:
    for i in range(50):
        written = in_place.write(5, numbered(i))
        sent = in_place.submit([{"value": i}] * 300)
        again = in_place.write(3, numbered(7), timeout_s=DEADLINE_S)
        assert written.result(DEADLINE_S)["value"].tolist() == [i + 1 + k for k in range(written.n)]
        assert sent.result(DEADLINE_S)["value"].tolist() == [i + 1] * 300
        assert again.result(DEADLINE_S)["value"].tolist() == [8 + k for k in range(again.n)]
    assert in_place.statistics().in_flight == 0


def test_a_loop_waits_for_what_was_written_in_place(in_place: InPlaceFront) -> None:
    async def main() -> None:
        for i in range(20):
            answers = await in_place.write(4, numbered(i))
            assert answers["value"].tolist() == [i + 1 + k for k in range(len(answers))]

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_buffers_go_with_what_is_written_in_place(device: EchoFront) -> None:
    buffers = [device.buffer(PAGE) for _ in range(3)]

    def fill(slots: np.ndarray) -> None:
        slots["operation"], slots["value"] = FILL, 9

    with pytest.raises(InvalidRequest, match="do not fit"):
        device.write(2, fill, buffers)
    pending = device.write(3, fill, buffers)
    assert pending.result(DEADLINE_S)["value"].tolist() == [1] * pending.n
    for buffer in buffers[: pending.n]:
        assert buffer.read() == bytes([9]) * PAGE
    assert granted(device) == 0


def test_errors_of_what_is_written_in_place(in_place: InPlaceFront) -> None:
    def defect(slots: np.ndarray) -> None:
        slots["value"] = 5
        raise ZeroDivisionError

    def refused(slots: np.ndarray) -> None:
        slots["operation"] = NO_SPACE

    with pytest.raises(InvalidRequest, match="cannot be written"):
        in_place.write(0, numbered(0))
    with pytest.raises(ZeroDivisionError):
        in_place.write(4, defect)
    assert in_place.statistics().requests == 0, "nothing was sent"
    assert in_place.write(1, refused).result(DEADLINE_S)["status"].tolist() == [-28]
    with pytest.raises(IoError, match="-22"):
        in_place.call(operation=HOLD)  # what answers in place cannot defer
    assert in_place.call(value=1).value == 2
    in_place.close()
    with pytest.raises(Closed):
        in_place.write(1, numbered(0))


def hold(slots: np.ndarray) -> None:
    slots["operation"] = HOLD


def test_no_room(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach(domain, EchoBack)
    with domain.open(EchoFront, ring_page_order=0) as device:
        pending = device.write(1, hold)
        (held,) = EchoBack.take_held()
        size = device._end.ring.size  # type: ignore[union-attr]
        others = device.submit([{"operation": HOLD}] * (size - 1))
        EchoBack.take_held(size - 1)
        with pytest.raises(TimedOut):
            device.write(1, numbered(0), timeout_s=0.05)
        threading.Timer(0.05, held.answer, kwargs={"value": 3}).start()
        assert device.write(5, numbered(1), timeout_s=DEADLINE_S).result(DEADLINE_S)["value"].tolist() == [2]
        assert pending.result(DEADLINE_S)["value"].tolist() == [3]
        assert not others.done()


def test_what_was_written_in_place_ends_with_its_backend(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """Nobody could send it again; what was copied is sent again, and all ids and pages are there afterwards."""
    host.attach(domain, EchoBack)
    with domain.open(EchoFront) as device, device.buffer(PAGE) as buffer:
        lost = device.write(1, hold, [buffer])
        kept = device.send(operation=HOLD)
        EchoBack.take_held(2)
        service = host._services["vecho"]
        service.stop()
        again = type(service)(host.hypervisor, host.store, EchoBack)
        again.start()
        host._services["vecho"] = again
        with pytest.raises(PeerGone, match="in place"):
            lost.result(DEADLINE_S)
        (request,) = EchoBack.take_held()
        request.answer(value=4)
        assert kept.result(DEADLINE_S).value == 4
        assert (device.statistics().reissued, device.statistics().in_flight) == (1, 0)
        assert device.call(operation=FILL, value=2, buffer=buffer, timeout_s=DEADLINE_S).value == 1
        assert device.exchange([{"value": 1}] * 600)["value"].tolist() == [2] * 600


# -- answered in an event loop


class AsyncBack(DeviceBackend):
    """Answers a request when the next one has come."""

    protocol = DeviceProtocol("vasync", request=Ask, response=Answer, pages=1)
    next_one: asyncio.Event | None = None
    cancelled = 0

    async def answer(self, request: Request) -> Answer | None:
        before, self.next_one = self.next_one, asyncio.Event()
        if before is not None:
            before.set()
        ask, event = request.message, self.next_one
        if ask.operation == NO_SPACE:
            raise OSError(28, "no space")
        if ask.operation == SUM:
            raise ZeroDivisionError("a defect")
        if ask.operation == FILL:
            request.array()[:] = ask.value
            return None
        if ask.operation == HOLD:
            try:
                await event.wait()
            except asyncio.CancelledError:
                type(self).cancelled += 1
                raise
        return Answer(ask.value + 1)


class AsyncFront(DeviceFrontend):
    protocol = AsyncBack.protocol


def test_answers_of_coroutines(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach(domain, AsyncBack)
    with domain.open(AsyncFront) as device, device.buffer(PAGE) as buffer:
        first = device.send(operation=HOLD, value=1)
        assert not first.done()
        assert device.call(operation=ADD, value=5, timeout_s=DEADLINE_S).value == 6
        assert first.result(DEADLINE_S).value == 2
        assert device.call(operation=FILL, value=3, buffer=buffer, timeout_s=DEADLINE_S).value == 0
        assert buffer.read() == bytes([3]) * PAGE
        for operation, status in (NO_SPACE, -28), (SUM, -5):
            with pytest.raises(IoError) as failure:
                device.call(operation=operation, timeout_s=DEADLINE_S)
            assert failure.value.status == status
        values = [{"operation": ADD, "value": i} for i in range(500)]
        assert device.exchange(values, timeout_s=DEADLINE_S)["value"].tolist() == list(range(1, 501))


def test_coroutines_are_cancelled_when_their_frontend_goes(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach(domain, AsyncBack)
    before = AsyncBack.cancelled
    with domain.open(AsyncFront) as device:
        device.submit([{"operation": HOLD}])
        assert device.statistics().in_flight == 1
        while not engine_of(host, AsyncBack).statistics().deferred:
            time.sleep(0.001)
    deadline = time.monotonic() + DEADLINE_S
    while AsyncBack.cancelled == before:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with domain.open(AsyncFront) as device:
        assert device.call(operation=ADD, value=1, timeout_s=DEADLINE_S).value == 2


# -- who pays for the order of pushing and sleeping


@pytest.mark.skipif(
    not (waiting.offer_fence("process") and waiting.offer_fence("host")), reason="this kernel has no membarrier(2)"
)
@pytest.mark.parametrize("fence", ["full", "process", "host"])
def test_both_ends_have_the_fence_that_was_offered(fence: Fence) -> None:
    with paravirt.Host(fence=fence) as host:
        domain = host.create_domain("guest")
        host.attach(domain, EchoBack)
        for _ in range(2):
            with domain.open(EchoFront) as device:
                assert device._end.ring is not None
                assert device._end.ring.fence == engine_of(host, EchoBack)._ring.fence == fence
                assert device.exchange([{"value": 1}] * 600)["value"].tolist() == [2] * 600
                for path in device._path.frontend, device._path.backend:
                    assert FENCE_KEY not in host.store.ls(path)


def test_a_class_cannot_have_the_key_of_the_fence() -> None:
    from dataclasses import make_dataclass

    with pytest.raises(InvalidRequest, match="meaning for every device"):
        DeviceProtocol("vx", request=Ask, response=Answer, config=make_dataclass("C", [("paravirt_fence", str, "")]))


# -- ways of waiting


@pytest.mark.parametrize("wait", ["adaptive", "spin", "sleep"])
def test_each_way_of_waiting(wait: Wait) -> None:
    with paravirt.Host(wait=wait) as host:
        domain = host.create_domain("guest")
        host.attach(domain, EchoBack)
        with domain.open(EchoFront, wait=wait) as device:
            for i in range(50):
                assert device.call(operation=ADD, value=i, timeout_s=DEADLINE_S).value == i + 1
            pending = device.send(operation=HOLD)
            (held,) = EchoBack.take_held()
            threading.Timer(0.1, held.answer, kwargs={"value": 1}).start()
            assert pending.result(DEADLINE_S).value == 1
            with pytest.raises(TimedOut):
                device.send(operation=HOLD).result(0.02)
            EchoBack.take_held()
            ours, theirs = device.statistics().ring, engine_of(host, EchoBack).statistics().ring
            assert ours is not None
            if wait == "spin":
                assert ours.sleeps == theirs.sleeps == 0
            else:
                assert ours.sleeps > 0
                assert theirs.sleeps > 0
            if wait == "sleep":
                assert ours.spun_ns == theirs.spun_ns == 0


def test_a_budget_for_all_rings_of_a_domain(host: paravirt.Host, domain: paravirt.Domain) -> None:
    other = host.create_domain("other")
    for guest, number in (domain, 0), (domain, 1), (other, 0):
        host.attach(guest, EchoBack, number)
    devices = [domain.open(EchoFront, 0), domain.open(EchoFront, 1), other.open(EchoFront, 0)]
    of = {
        (path.frontend_domid, path.device_id): device._engines[0]._ring._budget  # type: ignore[attr-defined]
        for path, device in ((device.path, device) for device in host._services["vecho"]._devices.values())
    }
    assert of[domain.domid, 0] is of[domain.domid, 1]
    assert of[domain.domid, 0] is not of[other.domid, 0]
    for device in devices:
        device.close()


def test_what_is_no_way_of_waiting(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach(domain, EchoBack)
    for wrong in ({"wait": "never"}, {"spin_ns": -1}):
        with pytest.raises(InvalidRequest):
            domain.open(EchoFront, **wrong)
        with pytest.raises(InvalidRequest):
            paravirt.Host(**wrong)  # type: ignore[arg-type]


# -- storms


@pytest.mark.parametrize("sender", ["frontend", "backend"])
def test_a_storm_of_one_side_wakes_the_other_a_few_times(host: paravirt.Host, device: EchoFront, sender: str) -> None:
    assert device._end.channel is not None
    ports: dict[str, EventPort] = {"frontend": device._end.channel, "backend": engine_of(host, EchoBack)._ring.port}  # type: ignore[dict-item]
    (receiver,) = (port for name, port in ports.items() if name != sender)
    device.call(operation=ADD, value=1, timeout_s=DEADLINE_S)
    before = receiver.statistics().received
    for _ in range(STORM):
        ports[sender].notify()
    assert receiver.statistics().received - before < 50
    assert device.call(operation=ADD, value=1, timeout_s=DEADLINE_S).value == 2


def test_a_storm_wakes_an_event_loop_a_few_times(host: paravirt.Host, device: EchoFront) -> None:
    """Every event that the loop takes is ended; without work later and later."""
    assert device._end.channel is not None
    channel, backend = device._end.channel, engine_of(host, EchoBack)._ring.port
    assert backend is not None

    def storm() -> None:
        for _ in range(STORM):
            backend.notify()
        EchoBack.take_held()[0].answer(value=1)

    async def main() -> None:
        pending = device.send(operation=HOLD)
        thread = threading.Thread(target=storm)
        thread.start()
        assert (await pending).value == 1
        thread.join()
        for i in range(20):
            assert (await device.send(operation=ADD, value=i)).value == i + 1

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    statistics = channel.statistics()
    assert 0 < statistics.spurious < 50
    assert statistics.received < 100


def test_honest_ends_are_never_late(host: paravirt.Host, device: EchoFront) -> None:
    async def main() -> None:
        for i in range(200):
            assert (await device.send(operation=ADD, value=i)).value == i + 1

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    for i in range(200):
        device.call(operation=ADD, value=i, timeout_s=DEADLINE_S)
    assert device._end.channel is not None
    backend = engine_of(host, EchoBack)._ring.port
    assert backend is not None
    for port in (device._end.channel, backend):
        assert port.statistics().eoi_delayed_ns == 0


def test_a_doorbell_that_is_rung_without_end(host: paravirt.Host, device: EchoFront) -> None:
    """By a guest that writes to its descriptor: its backend wakes a few times, and others are served."""
    assert device._end.channel is not None
    other = host.create_domain("other")
    host.attach(other, ColumnBack)
    engine, stop = engine_of(host, EchoBack), threading.Event()
    device.call(operation=ADD, value=1, timeout_s=DEADLINE_S)
    bell_fd = device._end.channel._peer[1]  # type: ignore[index]

    def ring() -> None:
        while not stop.is_set():
            paravirt.ring._core.lib.pv_bell_ring(bell_fd)

    before = engine._waiter.statistics().wakeups
    thread = threading.Thread(target=ring)
    thread.start()
    try:
        time.sleep(0.5)
        assert engine._waiter.statistics().wakeups - before < 100
        assert device.call(operation=ADD, value=1, timeout_s=DEADLINE_S).value == 2
    finally:
        stop.set()
        thread.join()
    assert engine._waiter.statistics().unheard > 0


def test_a_driver_that_answers_in_place_has_no_copy(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """What stands in `batch.responses` stands in the page that the frontend reads."""
    seen: list[bool] = []

    class Looking(InPlaceBack):
        protocol = DeviceProtocol("vlook", request=Ask, response=Answer)

        def handle(self, batch: Batch) -> None:
            responses = batch.responses
            seen.append(responses.flags.owndata or responses.base is engine_of(host, Looking)._responses)
            super().handle(batch)

    class Front(DeviceFrontend):
        protocol = Looking.protocol

    host.attach(domain, Looking)
    with domain.open(Front) as device:
        assert device.exchange([{"value": 1}] * 5)["value"].tolist() == [2] * 5
    assert seen == [False] * len(seen)
    assert seen


def test_requests_that_are_kept_do_not_hinder_the_end(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """A driver that keeps what it may not keep costs memory, not the device."""
    kept: list[Request] = []

    class Keeping(InPlaceBack):
        protocol = DeviceProtocol("vkeep", request=Ask, response=Answer)

        def handle(self, batch: Batch) -> None:
            kept.append(batch[0])
            super().handle(batch)

    class Front(DeviceFrontend):
        protocol = Keeping.protocol

    host.attach(domain, Keeping)
    for _ in range(2):
        with domain.open(Front) as device:
            assert device.call(value=1, timeout_s=DEADLINE_S).value == 2
    assert kept
