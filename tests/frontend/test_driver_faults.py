# SPDX-License-Identifier: MIT
"""A declared device from its frontend's side when something goes wrong: errors, backends that lie, signals, leaks."""

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

import numpy as np
import pytest

import paravirt
from paravirt.backend import driver_service
from paravirt.backend.driver import Request
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
from tests.echo_device import (
    ADD,
    FILL,
    HOLD,
    LIE,
    NO_SPACE,
    SUM,
    EchoBack,
    EchoFront,
    granted,
)

DEADLINE_S = 20.0
PAGE = 4096


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
