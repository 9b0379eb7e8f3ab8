# SPDX-License-Identifier: MIT
"""Peers that lie, on a live ring: their device is closed with an error, everything else goes on."""

import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import paravirt
from paravirt.backend.c_engine import EngineName
from paravirt.backend.engine import PythonEngine
from paravirt.errors import PeerError, PeerGone
from paravirt.frontend.vbd import Disk
from paravirt.protocol import blkif
from paravirt.protocol.blkif import Operation, Status
from paravirt.protocol.vbd import VbdRequest
from paravirt.protocol.xenbus import XenbusState
from paravirt.ring.shared import FrontRing
from paravirt.xenstore import xenbus
from tests.eventually import eventually

DEADLINE_S = 20.0


class RogueFront:
    """A frontend with a raw ring to a real backend."""

    def __init__(self, host: paravirt.Host) -> None:
        self.host = host
        self.domain = host.create_domain(f"rogue-{len(host.domains)}")
        self.path = host.attach_disk(self.domain, "1M", driver="memory")
        hypervisor = self.domain.hypervisor
        self.arena = hypervisor.create_arena(0, 16)
        self.pages = self.arena.allocate(1)
        self.data = self.arena.allocate(4)
        waiter = hypervisor.waiter()
        channel = hypervisor.alloc_unbound(waiter, 0)
        self.ring = FrontRing.create(self.pages.view, blkif.REQUEST, blkif.RESPONSE, port=channel)
        keys = VbdRequest.single((self.arena.grant(self.pages.gref),), channel.port).to_keys()
        eventually(lambda: self.backend() is XenbusState.INIT_WAIT)
        xenbus.switch_state(self.domain.store, self.path.frontend, XenbusState.INITIALISED, keys)
        eventually(lambda: self.backend() is XenbusState.CONNECTED)
        xenbus.switch_state(self.domain.store, self.path.frontend, XenbusState.CONNECTED)
        self.channel = channel

    def backend(self) -> XenbusState:
        return xenbus.read_state(self.host.store, self.path.backend)

    def ask(self, requests: np.ndarray) -> np.ndarray:
        """Send requests and collect as many answers."""
        assert self.ring.push(requests) == len(requests)
        answers = []
        while len(answers) < len(requests):
            self.ring.wait(timeout_s=DEADLINE_S)
            answers += self.ring.take_batch().tolist()
        return np.array(answers, blkif.RESPONSE)


@pytest.fixture
def host(vbd_engine: EngineName) -> Iterator[paravirt.Host]:
    with paravirt.Host(engine=vbd_engine) as running:
        yield running


@pytest.fixture
def honest(host: paravirt.Host) -> Iterator[Disk]:
    """A disk of another domain that must not notice anything."""
    domain = host.create_domain("honest")
    host.attach_disk(domain, "1M", driver="memory")
    with domain.open_disk() as disk:
        disk.pwrite(b"h" * 4096, 0)
        yield disk
        assert disk.pread(4096, 0, timeout_s=DEADLINE_S) == b"h" * 4096


def requests(n: int, **fields: object) -> np.ndarray:
    made = np.zeros(n, blkif.REQUEST)
    made["id"] = np.arange(n)
    for name, value in fields.items():
        made[name] = value
    return made


@pytest.mark.parametrize("lead", [33, 1000, 1 << 31, (1 << 32) - 1])
def test_a_producer_index_too_far(host: paravirt.Host, honest: Disk, lead: int) -> None:
    rogue = RogueFront(host)
    rogue.pages.view[0:4] = struct.pack("<I", lead)
    rogue.channel.notify()
    eventually(lambda: rogue.backend() is XenbusState.CLOSING)
    assert honest.pread(512, 0, timeout_s=DEADLINE_S) == b"h" * 512


def test_absurd_requests_are_answered_with_errors(host: paravirt.Host, honest: Disk) -> None:
    rogue = RogueFront(host)
    gref = rogue.arena.grant(rogue.data.gref)
    wrong = [
        requests(1, operation=250),
        requests(1, operation=Operation.READ, nr_segments=0),
        requests(1, operation=Operation.READ, nr_segments=12),
        requests(1, operation=Operation.READ, nr_segments=255),
        requests(1, operation=Operation.READ, nr_segments=1, sector=1 << 63),
        requests(1, operation=Operation.WRITE, nr_segments=11, seg=(0xFFFFFFFF, 0, 7)),
        requests(1, operation=Operation.WRITE, nr_segments=1, seg=(gref, 7, 0)),
        requests(1, operation=Operation.WRITE, nr_segments=1, seg=(gref, 0, 255)),
    ]
    for asked in wrong:
        answer = rogue.ask(asked)
        assert answer["status"][0] in (Status.ERROR, Status.EOPNOTSUPP)
        assert answer["operation"][0] == asked["operation"][0]
    good = rogue.ask(requests(1, operation=Operation.READ, nr_segments=1, seg=(gref, 0, 7)))
    assert good["status"][0] == Status.OKAY
    assert rogue.backend() is XenbusState.CONNECTED


def test_forged_grant_flags(host: paravirt.Host, honest: Disk) -> None:
    """Bits set in an entry that was never granted, and a read-only grant opened up: the page decides for its owner."""
    rogue = RogueFront(host)
    page = rogue.data.gref + 1
    entry = page - rogue.arena.base
    forged = rogue.arena._entries.view[entry * 8 : entry * 8 + 8]
    for flags, domid, frame in ((1, 5, page), (2, 0, page), (1, 0, 0), (1, 0, 0xFFFFFFFF), (0xFFFF, 0, page)):
        forged[:] = struct.pack("<HHI", flags, domid, frame)
        answer = rogue.ask(requests(1, operation=Operation.READ, nr_segments=1, seg=(page, 0, 7)))
        assert answer["status"][0] == Status.ERROR
    assert rogue.backend() is XenbusState.CONNECTED


def test_a_storm_of_events_without_requests(host: paravirt.Host, honest: Disk) -> None:
    rogue = RogueFront(host)
    for _ in range(20_000):
        rogue.channel.notify()
    assert honest.pread(512, 0, timeout_s=DEADLINE_S) == b"h" * 512
    gref = rogue.arena.grant(rogue.data.gref)
    answer = rogue.ask(requests(1, operation=Operation.READ, nr_segments=1, seg=(gref, 0, 7)))
    assert answer["status"][0] == Status.OKAY


class RogueEngine(PythonEngine):
    """A backend that answers what nobody asked, as `forge` says."""

    forge: Callable[[np.ndarray], np.ndarray]

    def _answer(self, n: int) -> None:
        batch = self._batch
        batch.prepare(n)
        batch.finish(n)
        honest = np.frombuffer(bytes(batch.responses[: n * 16]), blkif.RESPONSE).copy()
        honest["status"] = Status.OKAY
        self._ring.push(np.frombuffer(type(self).forge(honest).tobytes(), np.uint8))


def changed(**fields: int) -> Callable[[np.ndarray], np.ndarray]:
    def forge(answers: np.ndarray) -> np.ndarray:
        for name, value in fields.items():
            answers[name] = value
        return answers

    return forge


@pytest.mark.parametrize(
    "forge",
    [changed(id=77), changed(id=1 << 63), changed(operation=Operation.WRITE), changed(status=5), changed(status=-3)],
    ids=["free id", "absurd id", "other operation", "positive status", "unknown status"],
)
def test_a_backend_that_lies(forge: Callable[[np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RogueEngine, "forge", staticmethod(forge), raising=False)
    with paravirt.Host(engine=RogueEngine) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "1M", driver="memory")
        disk = domain.open_disk()
        with pytest.raises(PeerError, match="backend answered"):
            disk.pread(512, 0, timeout_s=DEADLINE_S)
        with pytest.raises((PeerError, PeerGone)):
            disk.pread(512, 0, timeout_s=DEADLINE_S)
        disk.close()


class OverreachingEngine(PythonEngine):
    """A backend that answers by moving its index only, as far as `lead` says."""

    lead = 0

    def _answer(self, n: int) -> None:
        core = self._ring.core
        core.own_prod[0] = (core.prod + type(self).lead) & 0xFFFFFFFF
        assert self._ring.port is not None
        self._ring.port.notify()


@pytest.mark.parametrize("lead", [2, 33, 129, 1 << 31, (1 << 32) - 1])
def test_a_backend_index_too_far(lead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More responses than requests are outstanding, up to more than the ring holds."""
    monkeypatch.setattr(OverreachingEngine, "lead", lead)
    with paravirt.Host(engine=OverreachingEngine) as host:
        domain = host.create_domain("guest")
        host.attach_disk(domain, "1M", driver="memory")
        disk = domain.open_disk()
        with pytest.raises(PeerError, match="producer index"):
            disk.pread(512, 0, timeout_s=DEADLINE_S)
        with pytest.raises((PeerError, PeerGone)):
            disk.pread(512, 0, timeout_s=DEADLINE_S)
        disk.close()
