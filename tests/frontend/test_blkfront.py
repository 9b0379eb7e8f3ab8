# SPDX-License-Identifier: MIT
"""Slots, shadow and grants of a frontend, against a backend that the test plays message by message."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from paravirt.errors import InvalidRequest
from paravirt.protocol.blkif import MAX_REQUEST_BYTES, MAX_SEGMENTS, REQUEST, RESPONSE, Operation, Status
from paravirt.ring.blkfront import Slots
from paravirt.ring.grant import Granter, GrantFailed, Mapper, entries_bytes, init_maptrack, maptrack_bytes
from paravirt.ring.memory import Mapping, address_of, map_new
from paravirt.ring.shared import BackRing, FrontRing

BASE, N_SLOTS, BACKEND = 8, 32, 0
PAGES = N_SLOTS * MAX_SEGMENTS


@dataclass
class Stage:
    """A frontend's slots and the backend's ends of everything."""

    slots: Slots
    granter: Granter
    mapper: Mapper
    data: Mapping
    rings: list[Mapping] = field(default_factory=list)
    front: FrontRing = field(init=False)
    back: BackRing = field(init=False)

    def new_ring(self, start: int = 0) -> None:
        self.rings.append(shared(4096))
        self.front = FrontRing.create(self.rings[-1], REQUEST, RESPONSE, start=start)
        self.back = BackRing.attach(self.rings[-1], REQUEST, RESPONSE)

    def issue(self, *asked: tuple[Operation, int, int]) -> list[int]:
        for i, (operation, offset, length) in enumerate(asked):
            self.slots.ask(i, operation, offset, length)
        return list(self.slots.issue(self.front, len(asked))[0 : len(asked)])

    def answer(self, requests: np.ndarray, **forged: int) -> tuple[list[tuple[int, int]], object]:
        """Answer requests, as they are or with fields forged; what the frontend makes of it."""
        answers = np.zeros(len(requests), RESPONSE)
        answers["id"], answers["operation"] = requests["id"], requests["operation"]
        for name, value in forged.items():
            answers[name][-1] = value
        self.back.push(answers)
        self.slots.watch(self.front, 0, 0)
        return self.slots.complete()


def shared(n_bytes: int) -> Mapping:
    fd, mapping = map_new("memfd", n_bytes)
    os.close(fd)
    return mapping


@pytest.fixture
def stage() -> Iterator[Stage]:
    entries, data = shared(entries_bytes(PAGES)), shared(PAGES * 4096)
    maptrack = shared(maptrack_bytes(PAGES))
    init_maptrack(maptrack, BASE, PAGES)
    granter = Granter(entries, base=BASE, n_pages=PAGES, peer=BACKEND)
    mapper = Mapper(entries, data, maptrack, base=BASE, n_pages=PAGES, domid=BACKEND)
    made = Stage(Slots(granter, data.pointer(), BASE, N_SLOTS, BACKEND), granter, mapper, data)
    made.new_ring()
    yield made
    made.front.close()
    made.back.close()
    mapper.close()
    granter.close()
    for mapping in (entries, data, maptrack, *made.rings):
        mapping.close()


def test_what_is_on_the_wire(stage: Stage) -> None:
    slots = stage.issue(
        (Operation.READ, 1024, 4096 + 512), (Operation.WRITE, 0, 512), (Operation.FLUSH_DISKCACHE, 0, 0)
    )
    read, write, flush = stage.back.take_batch()
    assert [int(request["id"]) for request in (read, write, flush)] == slots
    assert (read["operation"], read["nr_segments"], read["sector"]) == (Operation.READ, 2, 2)
    first = BASE + slots[0] * MAX_SEGMENTS
    assert read["seg"][:2].tolist() == [(first, 0, 7), (first + 1, 0, 0)]
    assert (write["operation"], write["nr_segments"], write["sector"]) == (Operation.WRITE, 1, 0)
    assert (flush["operation"], flush["nr_segments"]) == (Operation.FLUSH_DISKCACHE, 0)
    # A read's pages may be written by the backend, a write's only read.
    stage.mapper.map(first)
    with pytest.raises(GrantFailed, match="GENERAL_ERROR"):
        stage.mapper.map(int(write["seg"][0]["gref"]))
    stage.mapper.map(int(write["seg"][0]["gref"]), read_only=True)


def test_data_of_a_write_is_in_the_granted_pages(stage: Stage) -> None:
    payload = os.urandom(MAX_REQUEST_BYTES)
    kept, address = address_of(payload)
    stage.slots.ask(0, Operation.WRITE, 0, len(payload), address)
    slot = stage.slots.issue(stage.front, 1)[0]
    del kept
    request = stage.back.take_batch()[0]
    pages = [stage.mapper.map(int(segment["gref"]), read_only=True) for segment in request["seg"]]
    assert b"".join(bytes(stage.data.view[page : page + 4096]) for page in pages) == payload
    assert slot == request["id"]


def test_counts(stage: Stage) -> None:
    stage.issue((Operation.READ, 0, 4096 * 3), (Operation.WRITE, 0, 1536), (Operation.FLUSH_DISKCACHE, 0, 0))
    assert (stage.slots.in_flight, stage.slots.free) == (3, N_SLOTS - 3)
    done, error = stage.answer(stage.back.take_batch())
    assert [status for _, status in done] == [Status.OKAY] * 3
    assert error is None
    stage.issue((Operation.READ, 0, 512))
    stage.answer(stage.back.take_batch(), status=Status.ERROR)
    core = stage.slots.core
    assert (core.reads, core.writes, core.flushes, core.errors, core.issued) == (1, 1, 1, 1, 4)
    assert (core.read_bytes, core.written_bytes) == (3 * 4096, 1536)
    assert (stage.slots.in_flight, stage.slots.free, stage.slots.held) == (0, N_SLOTS, 0)
    assert stage.granter.statistics().granted == 0


def test_all_slots_and_no_more(stage: Stage) -> None:
    reads = [(Operation.READ, i * 512, 512) for i in range(N_SLOTS)]
    stage.issue(*reads)
    assert stage.slots.free == 0
    with pytest.raises(InvalidRequest, match="ENOSPC"):
        stage.issue((Operation.READ, 0, 512))
    done, _ = stage.answer(stage.back.take_batch())
    assert len(done) == N_SLOTS
    stage.issue(*reads)


def test_a_page_the_backend_keeps_is_not_used_again(stage: Stage) -> None:
    stage.issue((Operation.READ, 0, 512))
    request = stage.back.take_batch()
    gref = int(request["seg"]["gref"][0, 0])
    stage.mapper.map(gref)
    stage.answer(request)
    assert (stage.slots.held, stage.slots.free) == (1, N_SLOTS - 1)
    for _ in range(2 * N_SLOTS):
        stage.issue((Operation.READ, 0, 512))
        other = stage.back.take_batch()
        assert other["id"][0] != request["id"][0]
        stage.answer(other)
    stage.mapper.unmap(gref)
    stage.issue((Operation.READ, 0, 512))
    stage.answer(stage.back.take_batch())
    assert (stage.slots.held, stage.slots.free) == (0, N_SLOTS)


def test_reissue_on_a_new_ring_is_in_the_order_of_issue(stage: Stage) -> None:
    for i in range(12):
        stage.issue((Operation.WRITE, i * 512, 512))
    taken = stage.back.take_batch()
    stage.answer(taken[[3, 0, 7]])
    for i in range(12, 15):
        stage.issue((Operation.WRITE, i * 512, 512))
    stage.front.close()
    stage.back.close()
    stage.new_ring(start=(1 << 32) - 4)
    assert stage.slots.reissue(stage.front) == 12
    again = stage.back.take_batch()
    assert again["sector"].tolist() == [i for i in range(15) if i not in (0, 3, 7)]
    done, error = stage.answer(again)
    assert error is None
    assert len(done) == 12
    assert (stage.slots.in_flight, stage.slots.free) == (0, N_SLOTS)


@pytest.mark.parametrize(
    ("forged", "complaint"),
    [
        ({"id": 31}, "request 31, which is not in flight"),
        ({"id": N_SLOTS}, "not in flight"),
        ({"id": (1 << 64) - 1}, "not in flight"),
        ({"operation": Operation.WRITE}, "operation 1, which is not what was asked"),
        ({"operation": 255}, "operation 255"),
        ({"status": 1}, "with status 1"),
        ({"status": -3}, "with status -3"),
        ({"status": -32768}, "with status -32768"),
    ],
)
def test_forged_responses(stage: Stage, forged: dict[str, int], complaint: str) -> None:
    """What came before the forged one is finished; it and its request are not."""
    stage.issue((Operation.READ, 0, 512), (Operation.READ, 512, 512))
    done, error = stage.answer(stage.back.take_batch(), **forged)
    assert len(done) == 1
    assert complaint in str(error)
    assert stage.slots.in_flight == 1


def test_the_same_answer_twice(stage: Stage) -> None:
    stage.issue((Operation.READ, 0, 512), (Operation.READ, 512, 512))
    first = stage.back.take_batch()[:1]
    assert stage.answer(first)[1] is None
    done, error = stage.answer(first)
    assert done == []
    assert "not in flight" in str(error)
