# SPDX-License-Identifier: MIT
"""A declared device from its frontend's side: batches, single calls, buffers, event loops."""

import asyncio
import errno
import threading
from typing import Any

import numpy as np
import pytest

import paravirt
from paravirt.backend.driver import Batch, DeviceBackend
from paravirt.errors import (
    Closed,
    InvalidRequest,
    IoError,
)
from paravirt.frontend.driver import DeviceFrontend
from paravirt.protocol.device import DeviceProtocol
from paravirt.ring.shared import FrontRing
from tests.echo_device import (
    ADD,
    FILL,
    HOLD,
    SUM,
    Answer,
    Ask,
    ColumnBack,
    ColumnFront,
    EchoBack,
    EchoFront,
    granted,
)

DEADLINE_S = 20.0
PAGE = 4096


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
