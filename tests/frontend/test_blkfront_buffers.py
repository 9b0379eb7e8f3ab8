# SPDX-License-Identifier: MIT
"""Requests whose data is in the caller's own granted pages: what is on the wire, and what the core does to them."""

import errno

import numpy as np
import pytest

from paravirt.protocol.blkif import INDIRECT_REQUEST, MAX_SEGMENTS, Operation
from paravirt.ring._core import ffi, lib

from .blkfront_stage import BASE, N_SLOTS, PAGES, Stage, make_stage
from .test_blkfront_large import segments_of

BUFFER = BASE + PAGES  # its first reference


@pytest.fixture
def stage():
    with make_stage(buffer_pages=64) as made:
        yield made


def issue(stage: Stage, operation: Operation, length: int, *, gref: int = BUFFER, first_sector: int = 0) -> int:
    ask = {"operation": operation, "offset": 8192, "length": length, "gref": gref, "first_sector": first_sector}
    slot = ffi.new("uint32_t *")
    asks = ffi.new("struct pv_blkfront_ask *", ask)
    status: int = lib.pv_blkfront_issue(stage.slots.core, stage.front.core, asks, 1, slot)
    return status


@pytest.mark.parametrize(
    ("first_sector", "length", "segments"),
    [
        (0, 512, [(0, 0, 0)]),
        (7, 512, [(0, 7, 7)]),
        (3, 4096, [(0, 3, 7), (1, 0, 2)]),
        (1, 3584, [(0, 1, 7)]),
        (0, 8192 + 512, [(0, 0, 7), (1, 0, 7), (2, 0, 0)]),
    ],
)
def test_segments_name_the_callers_pages(
    stage: Stage, first_sector: int, length: int, segments: list[tuple[int, int, int]]
) -> None:
    granted = stage.granter.statistics().granted
    assert issue(stage, Operation.WRITE, length, first_sector=first_sector) == 1
    request = stage.back.take_batch()[0]
    n = int(request["nr_segments"])
    assert [(int(gref) - BUFFER, first, last) for gref, first, last in request["seg"][:n].tolist()] == segments
    assert stage.granter.statistics().granted == granted, "those pages are granted, and no others are"
    assert (stage.slots.in_flight, stage.slots.free) == (1, N_SLOTS - 1)


def test_a_large_request_takes_one_slot_for_its_segments(stage: Stage) -> None:
    """Also when a backend has written into the page of the segments before it died."""
    granted = stage.granter.statistics().granted
    assert issue(stage, Operation.READ, 40 * 4096, first_sector=5) == 1
    assert stage.slots.free == N_SLOTS - 1
    assert stage.granter.statistics().granted == granted + 1
    request = stage.back.take_batch()
    asked = np.frombuffer(request.tobytes(), INDIRECT_REQUEST)
    assert (asked["nr_segments"][0], asked["sector"][0]) == (41, 16)
    segments = segments_of(stage, request)
    assert segments["gref"].tolist() == [BUFFER + i for i in range(41)]
    assert segments["first_sect"].tolist() == [5] + [0] * 40
    assert segments["last_sect"].tolist() == [7] * 40 + [4]
    page = (int(asked["indirect_grefs"][0, 0]) - BASE) * 4096
    stage.data.view[page : page + 328] = b"\xff" * 328
    stage.front.close()
    stage.back.close()
    stage.new_ring()
    assert stage.slots.reissue(stage.front) == 1
    again = stage.back.take_batch()
    assert again.tobytes() == request.tobytes()
    assert segments_of(stage, again).tolist() == segments.tolist()
    stage.answer(again, operation=Operation.READ)
    assert stage.granter.statistics().granted == granted
    counters = stage.slots.counters
    assert (counters.reads, counters.read_bytes, counters.copied_bytes) == (1, 40 * 4096, 0)


def test_what_cannot_be_a_request(stage: Stage) -> None:
    """One more page than a request has, because it begins in the middle of one; a sector that no page has."""
    whole = MAX_SEGMENTS * 4096
    assert issue(stage, Operation.WRITE_BARRIER, whole) == 1
    assert issue(stage, Operation.WRITE_BARRIER, whole, first_sector=1) == -errno.EINVAL
    assert issue(stage, Operation.READ, 4096 * 4096, first_sector=1) == -errno.EINVAL
    assert issue(stage, Operation.READ, 512, first_sector=8) == -errno.EINVAL
    assert stage.slots.in_flight == 1


def test_in_steps(stage: Stage) -> None:
    """Stage, copy in pieces, send; and what is staged when the ring has no room is withdrawn as a whole."""
    core, slot = stage.slots.core, ffi.new("uint32_t *")
    ask = ffi.new("struct pv_blkfront_ask *", {"operation": Operation.WRITE, "offset": 0, "length": 30 * 4096})
    assert lib.pv_blkfront_stage(core, ask, slot) == 0
    payload = np.random.default_rng(1).integers(0, 256, 30 * 4096, np.uint8).tobytes()
    for start in range(0, len(payload), 7 * 512):
        part = payload[start : start + 7 * 512]
        lib.pv_blkfront_copy_in(core, slot[0], start, part, len(part))
    back = bytearray(5000)
    lib.pv_blkfront_copy_out(core, slot[0], 43 * 1024, ffi.from_buffer("uint8_t[]", back), 5000)
    assert back == payload[43 * 1024 : 43 * 1024 + 5000]
    assert lib.pv_blkfront_send(core, stage.front.core) == 1
    request = stage.back.take_batch()
    data = b""
    for gref in segments_of(stage, request)["gref"].tolist():
        page = stage.mapper.map(gref, read_only=True)
        data += bytes(stage.data.view[page : page + 4096])
        stage.mapper.unmap(gref, read_only=True)
    assert data == payload
    small, memory = ffi.new("struct pv_ring *"), ffi.new("uint64_t[]", 64)
    assert lib.pv_ring_create(small, memory, 64 + 2 * 112, 112, 112, 16, ffi.NULL, 0) == 0
    for _ in range(3):
        assert lib.pv_blkfront_stage(core, ask, slot) == 0
    assert lib.pv_blkfront_stage(core, ffi.new("struct pv_blkfront_ask *", {"length": 1 << 23}), slot) == -errno.ENOSPC
    assert lib.pv_blkfront_send(core, small) == -errno.ENOSPC
    assert (stage.slots.in_flight, core.n_staged, stage.slots.free) == (1, 0, N_SLOTS - 3)
