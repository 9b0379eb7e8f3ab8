# SPDX-License-Identifier: MIT
"""Recording live rings: everything in order, nothing of others, losses counted, nothing left switched on."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import paravirt
from paravirt.errors import AlreadyExists
from paravirt.hypervisor.looking import Looker
from paravirt.looking import recorder as recording
from paravirt.looking.recorder import Recorded, Recorder, offer_of
from paravirt.looking.show import Choice, Shown, shown
from paravirt.protocol.recording import Kind, Reader
from paravirt.ring.looking import Wish
from tests.echo_device import ADD, ColumnBack, ColumnFront, EchoBack, EchoFront
from tests.looking.live import DEADLINE_S, REQUEST, RESPONSE, Live


class Running:
    """A recorder in a thread."""

    def __init__(self, recorder: Recorder) -> None:
        self.file, self.done = io.BytesIO(), list[Recorded]()
        self._recorder, self._stop, self._asked = recorder, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.done.append(self._recorder.run(self.file, seconds=None, stop=self._look))

    def _look(self) -> bool:
        self._asked.set()
        return self._stop.is_set()

    def start(self) -> None:
        """And wait until the end logs."""
        self._thread.start()
        assert self._asked.wait(DEADLINE_S)
        self._asked.clear()
        assert self._asked.wait(DEADLINE_S)  # the second look: it has been asked for

    def stop(self) -> list[Shown]:
        self._stop.set()
        self._thread.join(DEADLINE_S)
        assert self.done, "the recorder failed"
        self.file.seek(0)
        reader = Reader(self.file)
        found = list(shown(reader.header, reader))
        assert reader.torn is None
        return found


@contextmanager
def recorded(looker: Looker, name: str) -> Iterator[Running]:
    running = Running(Recorder(looker, looker.find(name)))
    running.start()
    try:
        yield running
    finally:
        running._stop.set()
        running._thread.join(DEADLINE_S)


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host() as made:
        yield made


def test_all_that_a_disk_does(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    host.attach_disk(domain, "1M", driver="memory")
    with domain.open_disk(merge=False) as disk, Looker(host.hypervisor) as looker:
        disk.pread(512, 0)
        with recorded(looker, "vbd/1/51712") as running:
            for i in range(20):
                disk.pwrite(bytes([i]) * 4096, i * 4096)
            disk.read_many([i * 4096 for i in range(20)], 4096)
            disk.flush()
            found = running.stop()
    requests = [each for each in found if each.kind is Kind.REQUEST]
    responses = [each for each in found if each.kind is Kind.RESPONSE]
    assert [each.entry.kind for each in requests] == ["write"] * 20 + ["read"] * 20 + ["flush"]
    assert [each.entry.fields.get("sector") for each in requests] == [*(i * 8 for i in range(20))] * 2 + [None]
    assert [each.index for each in requests] == list(range(1, 42))
    assert [each.index for each in responses] == list(range(1, 42))
    assert all(each.entry.status == 0 and each.latency_s is not None for each in responses)
    assert running.done == [Recorded(41, 41, 0, "asked to stop")]


def test_two_devices_of_one_process_are_told_apart(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    for number in range(2):
        host.attach(domain, EchoBack, number)
    with domain.open(EchoFront, 0) as one, domain.open(EchoFront, 1) as two, Looker(host.hypervisor) as looker:
        with recorded(looker, "vecho/1/1") as running:
            for value in range(5):
                one.call(operation=ADD, value=1000)
                two.call(operation=ADD, value=value)
            found = running.stop()
        assert [each.entry.fields["value"] for each in found] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
        with recorded(looker, "vecho/1/0") as running, pytest.raises(AlreadyExists, match="another recorder"):
            with Looker(host.hypervisor) as other:
                Recorder(other, other.find("vecho/1/1")).run(io.BytesIO(), seconds=1, stop=lambda: False)


def test_what_does_not_fit_the_log_is_counted(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    host.attach(domain, ColumnBack)
    with domain.open(ColumnFront) as device, Looker(host.hypervisor) as looker:
        gate, asked = threading.Event(), threading.Event()

        def stop() -> bool:
            asked.set()
            return gate.wait(DEADLINE_S)  # a recorder that is not given the CPU

        recorder, file = Recorder(looker, looker.find("vcolumn/1/0")), io.BytesIO()
        looker.want(recorder.end, Wish.LOG)
        thread = threading.Thread(target=recorder.run, args=(file,), kwargs={"seconds": None, "stop": stop})
        thread.start()
        assert asked.wait(DEADLINE_S)
        batch = device.requests(10_000)
        for _ in range(10):
            looker.want(recorder.end, Wish.LOG)
            device.exchange(batch)
        gate.set()
        thread.join(DEADLINE_S)
    file.seek(0)
    reader = Reader(file)
    indexes = [record.index for record in reader if record.kind is Kind.REQUEST]
    assert indexes == sorted(indexes)
    assert 0 < len(indexes) < 100_000
    assert recorder.recorded.requests == len(indexes)
    assert reader.lost <= recorder.recorded.lost


def test_a_gap_is_told_where_it_is() -> None:
    with Live() as live:
        ring = live.find()
        recorder = Recorder(live.looker, ring)
        running = Running(recorder)
        running.start()
        live.push(2)
        live.answer(2)
        live.front.take(np.zeros(2, RESPONSE))
        time.sleep(0.05)
        recorder._next = {kind: (index - 3) % 2**32 for kind, index in recorder._next.items()}
        live.push(1)
        live.back.take(np.zeros(1, REQUEST))
        found = running.stop()
        assert [(each.index, each.lost) for each in found if each.kind is Kind.REQUEST] == [(0, 0), (1, 0), (2, 3)]


def test_the_ring_s_end_ends_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "ASK_AGAIN_S", 0.02)
    with Live() as live:
        running = Running(Recorder(live.looker, live.find()))
        running.start()
        live.push(1)
        live.back.take(np.zeros(1, REQUEST))
        live.back.close()
        running._thread.join(DEADLINE_S)
        assert running.done == [Recorded(1, 0, 0, "the ring is gone")]


def test_the_time_ends_the_recording() -> None:
    with Live() as live:
        done = Recorder(live.looker, live.find()).run(io.BytesIO(), seconds=0.02, stop=lambda: False)
        assert done.ended == "the time is over"


def test_what_the_backend_published_is_kept_without_what_is_ours(host: paravirt.Host) -> None:
    domain = host.create_domain("guest")
    host.attach_disk(domain, "1M", driver="memory")
    with domain.open_disk(), Looker(host.hypervisor) as looker:
        offer = offer_of(host.store, looker.find("vbd/1/51712"))
        assert offer["sectors"] == "2048"
        assert not {"state", "params", "frontend", "online", "hotplug-status"} & offer.keys()


@pytest.mark.parametrize(
    ("choice", "takes"),
    [
        (Choice(), lambda each: True),
        (Choice(ops=frozenset(["read"])), lambda each: each.entry.kind == "read"),
        (Choice(ids=frozenset([1])), lambda each: each.entry.id == 1),
        (Choice(since_s=0.5, until_s=1.5), lambda each: 0.5 <= each.at_s <= 1.5),
        (Choice(kind=Kind.RESPONSE), lambda each: each.kind is Kind.RESPONSE),
    ],
)
def test_choosing_records(choice: Choice, takes: Callable[[Shown], bool]) -> None:
    from paravirt.protocol.decode import Entry

    every = [
        Shown(at, kind, 0, Entry(op, identity), 0)
        for at in (0.0, 1.0, 2.0)
        for kind in Kind
        for op in ("read", "write")
        for identity in (0, 1)
    ]
    assert [each for each in every if choice.takes(each)] == [each for each in every if takes(each)]
