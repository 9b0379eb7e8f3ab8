# SPDX-License-Identifier: MIT
"""A declared device from its frontend's side: batches, single calls, buffers, event loops, and backends that lie."""

import asyncio
import contextlib
import errno
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import paravirt
from paravirt.backend import driver_service
from paravirt.backend.driver import Batch, DeviceBackend, Request
from paravirt.backend.driver_engine import DriverEngine
from paravirt.errors import (
    AlreadyExists,
    Closed,
    InvalidRequest,
    IoError,
    NotFound,
    ParavirtError,
    PeerError,
    PeerGone,
    TimedOut,
)
from paravirt.frontend.driver import DeviceFrontend
from paravirt.protocol.device import DeviceProtocol
from paravirt.ring.shared import FrontRing
from tests.echo_device import (
    ADD,
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

DEADLINE_S = 20.0
PAGE = 4096


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    EchoBack.held.clear()
    with paravirt.Host() as running:
        yield running


@pytest.fixture
def domain(host: paravirt.Host) -> paravirt.Domain:
    return host.create_domain("guest")


@pytest.fixture
def device(host: paravirt.Host, domain: paravirt.Domain) -> Iterator[EchoFront]:
    host.attach(domain, EchoBack)
    with domain.open(EchoFront) as opened:
        yield opened


def granted(device: DeviceFrontend) -> int:
    """Pages granted beside the ring's."""
    return device.statistics().granted_pages - 4


def test_one_message(device: EchoFront) -> None:
    assert device.call(operation=ADD, value=41) == Answer(42)
    assert device.call(Ask(ADD, 1)) == Answer(2)
    assert device.call({"operation": ADD, "value": 5}).value == 6
    assert device.offer.step == 1


@pytest.mark.parametrize("n", [0, 1, 31, 170, 171, 1000])
def test_batches_of_any_length(host: paravirt.Host, domain: paravirt.Domain, n: int) -> None:
    host.attach(domain, ColumnBack)
    with domain.open(ColumnFront) as device:
        requests = device.requests(n)
        requests["value"] = np.arange(n)
        assert device.exchange(requests)["value"].tolist() == list(range(1, n + 1))
        requests["operation"] = FILL  # answered by an array that the handler returned
        assert device.exchange(requests)["value"].tolist() == list(range(1, n + 1))
        plain = np.zeros(n, [("value", "<u8")])
        plain["value"] = 7
        assert device.exchange(plain)["value"].tolist() == [8] * n
        assert device.exchange([Ask(ADD, i) for i in range(n)])["value"].tolist() == list(range(1, n + 1))
        statistics = device.statistics()
        assert (statistics.requests, statistics.responses, statistics.in_flight) == (4 * n, 4 * n, 0)


def test_every_ring_size_and_more_requests_than_a_ring_holds(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach(domain, EchoBack)
    for order in range(5):
        with domain.open(EchoFront, ring_page_order=order) as device:
            pending = [device.submit([{"value": i}] * 700) for i in range(3)]
            for i, each in reversed(list(enumerate(pending))):
                assert each.result(DEADLINE_S)["value"].tolist() == [i + 1] * 700


def test_ring_indexes_wrap(host: paravirt.Host, domain: paravirt.Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    create = FrontRing.create
    monkeypatch.setattr(FrontRing, "create", lambda *args, **options: create(*args, **options, start=(1 << 32) - 100))
    host.attach(domain, EchoBack)
    with domain.open(EchoFront) as device:
        for i in range(20):
            assert device.exchange([{"value": i}] * 33, timeout_s=DEADLINE_S)["value"].tolist() == [i + 1] * 33


def test_ids_of_one_byte(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """Fewer ids than entries, and each used many times."""

    class Back(DeviceBackend):
        protocol = DeviceProtocol(
            "vsmall", request=[("id", "u1"), ("n", "u2")], response=[("id", "u1"), ("n", "u2")], max_ring_page_order=1
        )

        def handle(self, batch: Batch) -> None:
            batch.responses["n"] = batch.requests["n"] + 1

    class Front(DeviceFrontend):
        protocol = Back.protocol

    host.attach(domain, Back)
    with domain.open(Front) as device:
        ring = device.statistics().ring
        assert ring is not None
        requests = device.requests(3000)
        requests["n"] = np.arange(3000)
        assert device.exchange(requests, timeout_s=DEADLINE_S)["n"].tolist() == list(range(1, 3001))


def test_many_threads(device: EchoFront) -> None:
    wrong: list[object] = []

    def work(k: int) -> None:
        try:
            for i in range(100):
                if device.call(operation=ADD, value=k * 1000 + i, timeout_s=DEADLINE_S).value != k * 1000 + i + 1:
                    wrong.append((k, i))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)


# -- event loops


def test_event_loop(device: EchoFront) -> None:
    async def main() -> None:
        assert (await device.send(operation=ADD, value=1)).value == 2
        answers = await asyncio.gather(*(device.send(operation=ADD, value=i) for i in range(500)))
        assert [answer.value for answer in answers] == list(range(1, 501))
        assert (await device.submit([{"value": 3}] * 5))["value"].tolist() == [4] * 5
        finished = device.send(operation=ADD, value=8)
        assert finished.result(DEADLINE_S) == await finished

    for _ in range(2):  # a second loop after the first
        asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    assert device.call(operation=ADD, value=1).value == 2


def test_event_loop_and_threads_together(device: EchoFront) -> None:
    stop, wrong = threading.Event(), []

    def work() -> None:
        try:
            while not stop.is_set():
                assert device.call(operation=ADD, value=7, timeout_s=DEADLINE_S).value == 8
        except BaseException as error:
            wrong.append(error)

    async def main() -> None:
        for i in range(200):
            assert (await device.send(operation=ADD, value=i)).value == i + 1

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    finally:
        stop.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert wrong == []


def test_the_loop_runs_while_a_request_waits(device: EchoFront) -> None:
    async def main() -> None:
        held = asyncio.ensure_future(_wait(device.send(operation=HOLD)))
        while not EchoBack.held:
            await asyncio.sleep(0)
        for _ in range(100):
            await asyncio.sleep(0)
        assert not held.done()
        EchoBack.take_held()[0].answer(value=9)
        assert (await held).value == 9

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


async def _wait(pending: Any) -> Any:
    return await pending


def test_a_cancelled_wait_leaves_the_request_under_way(device: EchoFront) -> None:
    async def main() -> None:
        pending = device.send(operation=HOLD)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_wait(pending), 0.01)
        assert not pending.done()
        EchoBack.take_held()[0].answer(value=5)
        assert (await pending).value == 5

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_closing_ends_what_a_loop_waits_for(device: EchoFront) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(_wait(device.send(operation=HOLD)))
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, device.close)
        with pytest.raises(Closed):
            await waiting

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_two_loops_at_once(device: EchoFront) -> None:
    async def outer() -> None:
        waiting = asyncio.ensure_future(_wait(device.send(operation=HOLD)))
        await asyncio.sleep(0)

        def inner() -> None:
            asyncio.run(asyncio.wait_for(_wait(device.send(operation=HOLD)), DEADLINE_S))

        with pytest.raises(InvalidRequest, match="another event loop"):
            await asyncio.get_running_loop().run_in_executor(None, inner)
        for request in EchoBack.take_held(2):
            request.answer(value=1)
        await waiting

    asyncio.run(asyncio.wait_for(outer(), DEADLINE_S))


# -- buffers


@pytest.mark.parametrize("n_bytes", [1, PAGE, PAGE + 1, 4 * PAGE])
def test_the_backend_works_in_the_frontends_pages(device: EchoFront, n_bytes: int) -> None:
    with device.buffer(n_bytes) as buffer:
        assert device.call(operation=FILL, value=7, buffer=buffer).value == -(-n_bytes // PAGE)
        assert buffer.read() == b"\7" * n_bytes
        assert granted(device) == 0
        buffer.array("u1")[:] = 3
        buffer.write(b"\5")
        whole_pages = -(-n_bytes // PAGE) * PAGE
        assert device.call(operation=SUM, buffer=buffer).value == 3 * (n_bytes - 1) + 5 + 7 * (whole_pages - n_bytes)
    with device.buffer(n_bytes) as again:
        assert again.read() == bytes(n_bytes)
        again.view[0] = 1


def test_a_batch_with_buffers(device: EchoFront) -> None:
    buffers = [device.buffer(PAGE) for _ in range(40)]
    asks = [{"operation": FILL, "value": i} for i in range(40)]
    assert device.exchange(asks, buffers)["value"].tolist() == [1] * 40
    assert [buffer.read(2) for buffer in buffers] == [bytes([i, i]) for i in range(40)]
    mixed = device.exchange([{"operation": SUM}, {"operation": ADD}], [buffers[1], None])
    assert mixed["value"].tolist() == [PAGE, 1]
    assert granted(device) == 0
    with pytest.raises(InvalidRequest, match="do not fit"):
        device.exchange(asks, buffers[:3])


def test_read_only_for_the_backend(device: EchoFront) -> None:
    with device.buffer(PAGE, read_only=True) as buffer:
        buffer.view[:] = b"\1" * PAGE
        with pytest.raises(IoError) as failure:
            device.call(operation=FILL, value=9, buffer=buffer)
        assert failure.value.status == -errno.EFAULT
        assert buffer.read() == b"\1" * PAGE
        assert device.call(operation=SUM, buffer=buffer).value == PAGE


def test_a_buffer_goes_with_one_request_at_a_time(device: EchoFront) -> None:
    buffer = device.buffer(PAGE)
    pending = device.send(operation=HOLD, buffer=buffer)
    request = EchoBack.take_held()[0]
    assert (buffer.in_flight, granted(device)) == (True, 1)
    with pytest.raises(InvalidRequest, match="not answered yet"):
        device.send(operation=SUM, buffer=buffer)
    with pytest.raises(InvalidRequest, match="one request"):
        device.submit([{}, {}], [buffer, buffer])
    buffer.close()  # takes effect with the answer: the backend still has it
    assert granted(device) == 1
    request.pages()[:4] = b"done"
    request.answer(value=1)
    pending.result(DEADLINE_S)
    assert granted(device) == 0
    with pytest.raises(Closed):
        buffer.read()


def test_no_more_buffers_than_there_is_room_for(host: paravirt.Host, domain: paravirt.Domain) -> None:
    host.attach(domain, EchoBack)
    with domain.open(EchoFront, buffer_bytes=2 * PAGE, ring_page_order=0) as device:
        with pytest.raises(InvalidRequest, match="4 pages at most"):
            device.buffer(5 * PAGE)
        for _ in range(50):
            with device.buffer(2 * PAGE) as buffer:
                device.call(operation=FILL, value=1, buffer=buffer)


# -- what goes wrong


def test_errors_of_requests(device: EchoFront) -> None:
    with pytest.raises(IoError, match=str(errno.ENOSPC)) as failure:
        device.call(operation=NO_SPACE)
    assert failure.value.status == -errno.ENOSPC
    answers = device.exchange([{"value": 1}, {"operation": NO_SPACE}, {"operation": SUM}, {"value": 2}])
    assert answers["status"].tolist() == [0, -errno.ENOSPC, -errno.EINVAL, 0]
    assert answers["value"].tolist() == [2, 0, 0, 3]
    assert device.statistics().errors == 3
    with pytest.raises(InvalidRequest, match="no field"):
        device.call(nothing=1)
    with pytest.raises(InvalidRequest, match="has no other"):
        device.exchange(np.zeros(1, [("other", "u1")]))


def test_a_timeout_changes_nothing(device: EchoFront) -> None:
    pending = device.send(operation=HOLD)
    with pytest.raises(TimedOut):
        pending.result(0.01)
    request = EchoBack.take_held()[0]
    assert device.call(operation=ADD, value=1, timeout_s=DEADLINE_S).value == 2
    request.answer(value=3)
    assert pending.result(DEADLINE_S).value == 3


def test_done_looks_by_itself(device: EchoFront) -> None:
    pending = device.send(operation=ADD, value=1)
    deadline = time.monotonic() + DEADLINE_S
    while not pending.done():
        assert time.monotonic() < deadline
    assert pending.result(0).value == 2


def test_open_and_closed(host: paravirt.Host, domain: paravirt.Domain) -> None:
    with pytest.raises(NotFound, match="no vecho 0"):
        domain.open(EchoFront)
    host.attach(domain, EchoBack, 3)
    assert domain.devices("vecho") == [3]
    with pytest.raises(InvalidRequest, match="ring_page_order"):
        domain.open(EchoFront, 3, ring_page_order=9)
    device = domain.open(EchoFront, 3)
    with pytest.raises(AlreadyExists):
        domain.open(EchoFront, 3)
    pending = device.send(operation=HOLD)
    device.close()
    for use in (pending.result, device.call, device.statistics, lambda: device.buffer(1)):
        with pytest.raises(Closed):
            use()
    with domain.open(EchoFront, 3) as again:
        assert again.call(operation=ADD, value=1).value == 2


def test_detach_while_open(host: paravirt.Host, domain: paravirt.Domain, device: EchoFront) -> None:
    pending = device.send(operation=HOLD)
    EchoBack.take_held()
    host.detach(domain, EchoBack)
    with pytest.raises(PeerGone):
        pending.result(DEADLINE_S)
    with pytest.raises(PeerGone):
        device.call(operation=ADD)


def test_a_backend_that_ends_the_device(device: EchoFront) -> None:
    with pytest.raises(PeerGone, match="has closed"):
        device.call(operation=LIE, timeout_s=DEADLINE_S)


class RogueEngine(DriverEngine):
    """Sends what `forge` makes of the honest responses."""

    forge: Callable[[np.ndarray], np.ndarray]

    def _push(self, responses: np.ndarray) -> None:
        super()._push(type(self).forge(responses.copy()))


def changed(**fields: int) -> Callable[[np.ndarray], np.ndarray]:
    def forge(answers: np.ndarray) -> np.ndarray:
        for name, value in fields.items():
            answers[name] = value
        return answers

    return forge


FORGERIES = {
    "free id": changed(id=100),
    "absurd id": changed(id=(1 << 64) - 1),
    "positive status": changed(status=5),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_backend_that_lies(
    forge: Callable[[np.ndarray], np.ndarray],
    domain: paravirt.Domain,
    host: paravirt.Host,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RogueEngine, "forge", staticmethod(forge), raising=False)
    monkeypatch.setattr(driver_service, "DriverEngine", RogueEngine)
    host.attach(domain, EchoBack)
    device = domain.open(EchoFront)
    with pytest.raises(PeerError, match="backend answered"):
        device.call(operation=ADD, timeout_s=DEADLINE_S)
    with pytest.raises(PeerError, match="backend answered"):
        device.call(operation=ADD, timeout_s=DEADLINE_S)
    device.close()


class TwiceEngine(DriverEngine):
    """Answers the second of two requests with the answer of the first."""

    first: np.ndarray | None = None

    def _push(self, responses: np.ndarray) -> None:
        if self.first is None:
            self.first = responses.copy()
        super()._push(self.first)


def test_a_doubled_response(host: paravirt.Host, domain: paravirt.Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_service, "DriverEngine", TwiceEngine)
    host.attach(domain, EchoBack)
    device = domain.open(EchoFront)
    assert device.call(operation=ADD, value=1).value == 2
    with pytest.raises(PeerError, match="request 0, which is not in flight"):
        device.call(operation=ADD, value=5, timeout_s=DEADLINE_S)
    device.close()


class OverreachingEngine(DriverEngine):
    """Answers by moving its index only."""

    lead = 0

    def _push(self, responses: np.ndarray) -> None:
        core = self._ring.core
        core.own_prod[0] = (core.prod + type(self).lead) & 0xFFFFFFFF
        assert self._ring.port is not None
        self._ring.port.notify()


@pytest.mark.parametrize("lead", [2, 257, 1 << 31, (1 << 32) - 1])
def test_a_backend_index_too_far(
    lead: int, host: paravirt.Host, domain: paravirt.Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OverreachingEngine, "lead", lead)
    monkeypatch.setattr(driver_service, "DriverEngine", OverreachingEngine)
    host.attach(domain, EchoBack)
    device = domain.open(EchoFront)
    with pytest.raises(PeerError, match="producer index"):
        device.call(operation=ADD, timeout_s=DEADLINE_S)

    async def main() -> None:
        with pytest.raises(PeerError, match="producer index"):
            await device.send(operation=ADD)

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    device.close()


def test_a_backend_that_keeps_a_page(
    host: paravirt.Host, domain: paravirt.Domain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Request, "unmap", lambda self: None)
    host.attach(domain, EchoBack)
    with domain.open(EchoFront) as device:
        buffer = device.buffer(PAGE)
        assert device.call(operation=FILL, value=1, buffer=buffer).value == 1
        assert device.statistics().kept_pages == 1
        with pytest.raises(PeerError, match="keeps a page"):
            device.call(operation=FILL, value=2, buffer=buffer)
        assert device.call(operation=ADD, value=1).value == 2
        buffer.close()
        with device.buffer(PAGE) as other:  # never the page that is kept
            other.write(b"private")
            assert granted(device) == 1


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupting() -> Iterator[None]:
    """SIGALRM raises `Interrupted` in the main thread."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("interrupting")
def test_a_signal_handler_that_raises_while_a_call_waits(device: EchoFront) -> None:
    for i in range(20):
        pending = device.send(operation=HOLD)
        request = EchoBack.take_held()[0]
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            pending.result(DEADLINE_S)
        assert device.call(operation=ADD, value=i, timeout_s=DEADLINE_S).value == i + 1
        request.answer(value=i)
        assert pending.result(DEADLINE_S).value == i
    assert device.statistics().in_flight == 0


@pytest.mark.usefixtures("interrupting")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # some are raised in a callback of gc
def test_signal_handlers_that_raise_anywhere(host: paravirt.Host, domain: paravirt.Domain) -> None:
    """The device goes on, or says that it cannot; it never hangs, and never says anything wrong."""
    host.attach(domain, EchoBack)
    chance, device = random.Random(5), domain.open(EchoFront)
    complaints = set()
    for _ in range(400):
        try:
            with contextlib.suppress(Interrupted):
                signal.setitimer(signal.ITIMER_REAL, chance.random() * 0.001 + 0.0001)
                until = time.monotonic() + 0.2
                while time.monotonic() < until:
                    answers = device.exchange([{"value": 3}] * 4, timeout_s=DEADLINE_S)
                    assert answers["value"].tolist() == [4] * 4
            device.call(operation=ADD, value=1, timeout_s=DEADLINE_S)
        except ParavirtError as error:
            complaints.add(str(error))
            signal.setitimer(signal.ITIMER_REAL, 0)
            device.close()
            device = domain.open(EchoFront)
    assert all("interrupted half-way" in complaint for complaint in complaints)
    assert device.exchange([{"value": 1}] * 600, timeout_s=DEADLINE_S)["value"].tolist() == [2] * 600
    assert device.statistics().in_flight == 0
    device.close()


def test_nothing_leaks() -> None:
    def held() -> tuple[int, int, list[str]]:
        gc.collect()
        shared = [name for name in os.listdir("/dev/shm") if name.startswith("paravirt")]
        return len(os.listdir("/proc/self/fd")), threading.active_count(), shared

    async def use(device: EchoFront) -> None:
        assert (await device.send(operation=ADD, value=1)).value == 2

    before = held()
    for _ in range(3):
        with paravirt.Host() as host:
            domain = host.create_domain("guest")
            host.attach(domain, EchoBack)
            for _ in range(3):
                with domain.open(EchoFront) as device, device.buffer(PAGE) as buffer:
                    device.call(operation=FILL, value=1, buffer=buffer)
                    asyncio.run(use(device))
            mine = {info.domid: (info.arenas, info.ports) for info in host.hypervisor.list_domains()}
            assert mine[domain.domid] == (0, 0)
            host.detach(domain, EchoBack)
        assert held() == before
