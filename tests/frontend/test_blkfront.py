# SPDX-License-Identifier: MIT
"""Slots, shadow and grants of a frontend, against a backend that the test plays message by message."""

import errno
import os
from typing import Any

import numpy as np
import pytest

from paravirt.errors import InvalidRequest
from paravirt.protocol.blkif import MAX_REQUEST_BYTES, MAX_SEGMENTS, RESPONSE, Operation, Status
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkif_counters import BlkifCounters
from paravirt.ring.event import EventPort, EventWaiter
from paravirt.ring.grant import GrantFailed
from paravirt.ring.memory import address_of

from ..faults import failing
from .blkfront_stage import BASE, N_SLOTS, Stage


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
    counted = BlkifCounters.of(stage.slots.counters)
    assert stage.slots.core.issued == 4
    assert counted == BlkifCounters(
        reads=1, writes=1, flushes=1, errors=1, read_bytes=3 * 4096, written_bytes=1536, copied_bytes=3 * 4096 + 1536
    )
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


def ask(operation: Operation, length: int = 512) -> Any:
    return ffi.new("struct pv_blkfront_ask *", {"operation": operation, "offset": 0, "length": length})


def test_a_page_that_is_granted_already_lets_a_whole_batch_go(stage: Stage) -> None:
    """None of the batch is sent, all its grants and slots are back; what was granted by somebody else stays so."""
    slots = [N_SLOTS - 1 - i for i in range(N_SLOTS)]
    taken = stage.slots.core.free[N_SLOTS - 3]
    page = taken * MAX_SEGMENTS + 1
    gref = stage.granter.access(page)
    with pytest.raises(InvalidRequest, match="EBUSY"):
        stage.issue(*[(Operation.READ, 0, 4096 * 3)] * 5)
    assert stage.back.take_batch().size == 0
    assert (stage.slots.in_flight, stage.slots.free, stage.slots.held) == (0, N_SLOTS, 0)
    assert stage.granter.statistics().granted == 1
    assert stage.granter.revoke(gref)
    assert len(stage.issue(*[(Operation.READ, 0, 512)] * N_SLOTS)) == len(slots)


def test_what_cannot_be_sent_is_withdrawn(stage: Stage) -> None:
    """A ring that is dead takes nothing: grants and slots are back."""
    stage.rings[-1].view[8:12] = (1000).to_bytes(4, "little")
    assert lib.pv_ring_poll(stage.front.core) == -errno.EPROTO
    chosen = ffi.new("uint32_t[2]")
    asks = ffi.new("struct pv_blkfront_ask[2]", [ask(Operation.READ)[0], ask(Operation.WRITE, 8192)[0]])
    assert lib.pv_blkfront_issue(stage.slots.core, stage.front.core, asks, 2, chosen) == -errno.EPROTO
    assert (stage.slots.in_flight, stage.slots.free, stage.slots.held) == (0, N_SLOTS, 0)
    assert stage.granter.statistics().granted == 0


def test_more_than_a_ring_has_room_for(stage: Stage) -> None:
    small = ffi.new("struct pv_ring *")
    memory = ffi.new("uint64_t[]", 64)
    assert lib.pv_ring_create(small, memory, 64 + 4 * 112, 112, 112, 16, ffi.NULL, 0) == 0
    asks = ffi.new("struct pv_blkfront_ask[5]", [ask(Operation.READ)[0]] * 5)
    chosen = ffi.new("uint32_t[5]")
    assert lib.pv_blkfront_issue(stage.slots.core, small, asks, 5, chosen) == -errno.ENOSPC
    assert lib.pv_blkfront_issue(stage.slots.core, stage.front.core, asks, 5, chosen) & 0xFFFFFFFF == 5
    assert lib.pv_blkfront_reissue(stage.slots.core, small) == -errno.ENOSPC
    with failing("malloc"):
        assert lib.pv_blkfront_reissue(stage.slots.core, stage.front.core) == -errno.ENOMEM
    assert len(stage.back.take_batch()) == 5, "each once"
    assert stage.slots.in_flight == 5, "and none is forgotten"


def test_an_exchange_that_went_wrong(stage: Stage) -> None:
    chosen, answer = ffi.new("uint32_t *"), ffi.new("struct pv_blkfront_answer *")
    core = stage.slots.core

    def exchange(ring: Any) -> int:
        return int(lib.pv_blkfront_exchange(core, ring, ask(Operation.READ), 1000, chosen, answer))

    assert exchange(stage.front.core) == lib.PV_BLKFRONT_IN_FLIGHT
    asked = stage.back.take_batch()
    forged = np.zeros(1, RESPONSE)
    forged["id"], forged["operation"] = asked["id"], Operation.WRITE
    stage.back.push(forged)
    # The request before is in flight: its answer, which lies, is taken for the one that is asked now.
    assert exchange(stage.front.core) == lib.PV_BLKFRONT_WRONG
    assert core.violation == lib.PV_BLKFRONT_WRONG_OPERATION
    generation = ffi.new("uint32_t *", 1)
    with EventWaiter(generation) as waiter, EventPort(waiter, None, 0) as port:
        ring, memory = ffi.new("struct pv_ring *"), ffi.new("uint64_t[]", 512)
        assert lib.pv_ring_create(ring, memory, 4096, 112, 112, 16, port.core, 0) == 0
        generation[0] = 2
        assert exchange(ring) == lib.PV_RING_STALE << 32 | lib.PV_BLKFRONT_IN_FLIGHT
        generation[0] = 1
        memory[1] = 1000
        assert exchange(ring) == -errno.EPROTO
        assert core.n_in_flight == 4
        assert exchange(ring) == -errno.EPROTO
    assert core.n_in_flight == 4, "what a dead ring did not take is not in flight"
