# SPDX-License-Identifier: MIT
"""Requests that are more than eleven segments, and those that have none, as a backend sees them."""

import os

import numpy as np
import pytest

from paravirt.errors import InvalidRequest
from paravirt.protocol.blkif import (
    DISCARD_REQUEST,
    INDIRECT_REQUEST,
    MAX_REQUEST_BYTES,
    MAX_SEGMENTS,
    SEGMENT,
    Operation,
    Status,
)
from paravirt.ring.blkfront import slots_of
from paravirt.ring.memory import address_of

from .blkfront_stage import BASE, N_SLOTS, Stage

LARGE = 30 * 4096 + 1536


def indirect_of(request: np.ndarray) -> np.ndarray:
    return np.frombuffer(request.tobytes(), INDIRECT_REQUEST)


def segments_of(stage: Stage, request: np.ndarray) -> np.ndarray:
    """As the backend reads them from the pages of an indirect request."""
    asked, found = indirect_of(request), []
    left = int(asked["nr_segments"][0])
    for gref in asked["indirect_grefs"][0]:
        if left <= 0:
            break
        n = min(left, 512)
        page = stage.mapper.map(int(gref), read_only=True)
        found.append(np.frombuffer(bytes(stage.data.view[page : page + 8 * n]), SEGMENT))
        stage.mapper.unmap(int(gref), read_only=True)
        left -= n
    return np.concatenate(found)


def write(stage: Stage, payload: bytes, operation: Operation = Operation.WRITE) -> np.ndarray:
    kept, address = address_of(payload)
    stage.slots.ask(0, operation, 4096, len(payload), address)
    stage.slots.issue(stage.front, 1)
    del kept
    return stage.back.take_batch()


@pytest.mark.parametrize(
    ("n_bytes", "slots"),
    [
        (0, 1),
        (512, 1),
        (MAX_REQUEST_BYTES, 1),
        (MAX_REQUEST_BYTES + 512, 2),
        (32 * 4096, 3),
        (33 * 4096, 4),
        (1 << 20, 24),
        (4096 * 4096, 374),
    ],
)
def test_slots_of_a_request(n_bytes: int, slots: int) -> None:
    assert slots_of(n_bytes) == slots


def test_a_large_write_is_indirect(stage: Stage) -> None:
    payload = os.urandom(LARGE)
    request = write(stage, payload)
    asked = indirect_of(request)
    assert (asked["operation"][0], asked["indirect_op"][0]) == (Operation.INDIRECT, Operation.WRITE)
    assert (asked["nr_segments"][0], asked["sector"][0]) == (31, 8)
    segments = segments_of(stage, request)
    assert segments["first_sect"].tolist() == [0] * 31
    assert segments["last_sect"].tolist() == [7] * 30 + [2]
    assert len(set(segments["gref"].tolist())) == 31
    data = bytearray()
    for gref, _, last in segments.tolist():
        page = stage.mapper.map(gref, read_only=True)
        data += stage.data.view[page : page + (last + 1) * 512]
        stage.mapper.unmap(gref, read_only=True)
    assert data == payload
    assert (stage.slots.in_flight, stage.slots.free) == (1, N_SLOTS - 3)
    done, error = stage.answer(request, operation=Operation.WRITE)
    assert (done, error) == ([(int(request["id"][0]), 0)], None)
    assert (stage.slots.in_flight, stage.slots.free) == (0, N_SLOTS)
    assert stage.granter.statistics().granted == 0
    assert stage.slots.counters.written_bytes == LARGE


def test_a_large_read_comes_back_in_order(stage: Stage) -> None:
    content = os.urandom(LARGE)
    stage.issue((Operation.READ, 0, 512))  # so that the slots are not side by side
    (slot,) = stage.issue((Operation.READ, 0, LARGE))
    request = stage.back.take_batch()[1:]
    left = memoryview(content)
    for gref, _, last in segments_of(stage, request).tolist():
        page = stage.mapper.map(gref)
        stage.data.view[page : page + (last + 1) * 512] = left[: (last + 1) * 512]
        left = left[(last + 1) * 512 :]
        stage.mapper.unmap(gref)
    stage.answer(request, operation=Operation.READ)
    out = bytearray(LARGE)
    stage.slots.gather(slot, address_of(out)[0], LARGE)
    assert out == content


def test_pages_with_segments_cannot_be_written_by_the_backend(stage: Stage) -> None:
    stage.issue((Operation.READ, 0, LARGE))
    gref = int(indirect_of(stage.back.take_batch())["indirect_grefs"][0, 0])
    with pytest.raises(Exception, match="GENERAL_ERROR"):
        stage.mapper.map(gref)


@pytest.mark.parametrize("operation", [Operation.INDIRECT, Operation.READ])
def test_the_answer_names_what_an_indirect_request_was_underneath(stage: Stage, operation: Operation) -> None:
    request = write(stage, bytes(LARGE))
    done, error = stage.answer(request, operation=operation)
    assert done == []
    assert "which is not what was asked" in str(error)


def test_one_page_the_backend_keeps_holds_all_of_a_large_request(stage: Stage) -> None:
    stage.issue((Operation.READ, 0, LARGE))
    request = stage.back.take_batch()
    kept = int(segments_of(stage, request)["gref"][20])
    stage.mapper.map(kept)
    stage.answer(request, operation=Operation.READ)
    assert (stage.slots.held, stage.slots.free) == (1, N_SLOTS - 3)
    stage.mapper.unmap(kept)
    assert stage.slots.reclaim() == N_SLOTS
    assert stage.granter.statistics().granted == 0


def test_reissue_writes_the_segments_anew(stage: Stage) -> None:
    """A backend that is gone may have written into the page they stand in."""
    payload = os.urandom(LARGE)
    request = write(stage, payload)
    before = segments_of(stage, request)
    page = (int(indirect_of(request)["indirect_grefs"][0, 0]) - BASE) * 4096
    stage.data.view[page : page + 256] = b"\xff" * 256
    stage.front.close()
    stage.back.close()
    stage.new_ring()
    assert stage.slots.reissue(stage.front) == 1
    again = stage.back.take_batch()
    assert again.tobytes() == request.tobytes()
    assert segments_of(stage, again).tolist() == before.tolist()


def test_large_requests_take_what_is_free_and_no_more(stage: Stage) -> None:
    stage.issue(*[(Operation.READ, 0, LARGE)] * (N_SLOTS // 3))
    assert stage.slots.free == N_SLOTS % 3
    with pytest.raises(InvalidRequest, match="ENOSPC"):
        stage.issue((Operation.READ, 0, LARGE))
    with pytest.raises(InvalidRequest, match="EINVAL"):
        stage.issue((Operation.READ, 0, 4097 * 4096))
    with pytest.raises(InvalidRequest, match="EINVAL"):
        stage.issue((Operation.WRITE_BARRIER, 0, MAX_REQUEST_BYTES + 4096))


def test_barriers_and_discards(stage: Stage) -> None:
    request = write(stage, b"x" * 1024, Operation.WRITE_BARRIER)
    assert (request["operation"][0], request["nr_segments"][0]) == (Operation.WRITE_BARRIER, 1)
    gref = int(request["seg"]["gref"][0, 0])
    with pytest.raises(Exception, match="GENERAL_ERROR"):
        stage.mapper.map(gref)
    assert stage.answer(request)[1] is None
    stage.slots.ask(0, Operation.DISCARD, 1 << 40, 1 << 50, flag=1)
    stage.slots.ask(1, Operation.WRITE_BARRIER, 0, 0)
    stage.slots.issue(stage.front, 2)
    requests = stage.back.take_batch()
    asked = np.frombuffer(requests[:1].tobytes(), DISCARD_REQUEST)
    assert (asked["operation"][0], asked["flag"][0]) == (Operation.DISCARD, 1)
    assert (asked["sector"][0], asked["nr_sectors"][0]) == (1 << 31, 1 << 41)
    assert requests["nr_segments"][1] == 0
    done, error = stage.answer(requests)
    assert [status for _, status in done] == [Status.OKAY] * 2
    assert error is None
    assert (stage.slots.counters.writes, stage.slots.counters.discards) == (2, 1)
    assert stage.granter.statistics().granted == 0


def test_nothing_is_left_of_the_request_before(stage: Stage) -> None:
    """A slot's message is written anew each time, of whatever kind."""
    for _ in range(N_SLOTS):
        stage.answer(write(stage, bytes(LARGE)), operation=Operation.WRITE)
    stage.issue((Operation.READ, 0, 4096))
    read = stage.back.take_batch()
    assert read["handle"][0] == 0
    assert (read["seg"]["gref"][0, 0] - BASE) // MAX_SEGMENTS == read["id"][0]
