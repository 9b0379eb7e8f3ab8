# SPDX-License-Identifier: MIT
"""Barriers, discards, indirect requests and the x86_32 ABI in the blkif batch in C."""

import os
from pathlib import Path

import numpy as np
import pytest

from paravirt.errors import ResourceLimit
from paravirt.protocol.blkif import (
    DISCARD_REQUEST,
    INDIRECT_REQUEST,
    REQUEST,
    RESPONSE,
    SEGMENT,
    X86_32_REQUEST,
    Operation,
    Status,
)
from paravirt.ring.blkif import Limits, RequestBatch

from ..faults import failing
from .blkif_pair import (
    BASE,
    PAGES,
    SECTORS,
    Pair,
    in_use,
    indirect,
    make_pair,
    request,
    ring_of_answers,
    together,
    write_segments,
)

ALL = Limits(SECTORS, barrier=True, discard=True, max_indirect_segments=256)


def discard(sector: int, sectors: int, flag: int = 0) -> np.ndarray:
    made = np.zeros(1, DISCARD_REQUEST)
    made["operation"], made["id"], made["sector"], made["nr_sectors"] = Operation.DISCARD, 1, sector, sectors
    made["flag"] = flag
    return np.frombuffer(made.tobytes(), REQUEST)


def grant(pair: Pair, *pages: int) -> None:
    for page in pages:
        pair.granter.access(page)


def test_a_barrier_writes(pair: Pair) -> None:
    pair.batch.set_limits(ALL)
    grant(pair, 0)
    pair.data.view[:4096] = b"b" * 4096
    disk = bytearray(SECTORS * 512)
    assert pair.run(request(Operation.WRITE_BARRIER, 16), disk)["status"][0] == Status.OKAY
    assert disk[16 * 512 : 24 * 512] == b"b" * 4096
    assert in_use(pair) == 0
    counters = pair.batch.counters
    assert (counters.writes, counters.barriers, counters.written_bytes, counters.copied_bytes) == (1, 1, 4096, 4096)


def test_an_empty_barrier_is_a_flush(pair: Pair) -> None:
    pair.batch.set_limits(ALL)
    asked = request(Operation.WRITE_BARRIER, (1 << 64) - 1, segments=[])
    assert pair.run(asked, bytearray(SECTORS * 512))["status"][0] == Status.OKAY
    pair.batch.set_limits(Limits(SECTORS))
    assert pair.run(asked, bytearray(SECTORS * 512))["status"][0] == Status.EOPNOTSUPP


def test_a_barrier_needs_a_writable_disk(pair: Pair) -> None:
    pair.batch.set_limits(Limits(SECTORS, barrier=True, discard=True, read_only=True))
    grant(pair, 0)
    answers = pair.run(together([request(Operation.WRITE_BARRIER), discard(0, 8)]), bytearray(SECTORS * 512))
    assert answers["status"].tolist() == [Status.ERROR, Status.ERROR]


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (discard(0, 0), Status.ERROR),
        (discard(SECTORS, 1), Status.ERROR),
        (discard(1, SECTORS), Status.ERROR),
        (discard((1 << 64) - 1, 2), Status.ERROR),
        (discard(8, (1 << 64) - 8), Status.ERROR),
        (discard(0, 8, flag=1), Status.EOPNOTSUPP),
        (discard(0, 8, flag=255), Status.EOPNOTSUPP),
    ],
)
def test_discards_that_are_refused(pair: Pair, asked: np.ndarray, status: Status) -> None:
    pair.batch.set_limits(ALL)
    assert pair.run(asked)["status"][0] == status
    assert pair.batch.counters.refused == 1


def test_a_discard_is_left_to_the_caller(pair: Pair) -> None:
    pair.batch.set_limits(Limits(SECTORS, discard=True, discard_secure=True))
    pair.batch.requests[:112] = np.frombuffer(discard(8, 100, flag=1).tobytes(), np.uint8)
    assert pair.batch.prepare(1) == 1
    assert pair.batch.operation(0) == Operation.DISCARD
    assert pair.batch.is_secure(0)
    assert pair.batch.place(0) == (8 * 512, 100 * 512)
    with ring_of_answers() as ring:
        assert not pair.batch.serve(ring, 1)
    assert pair.batch.is_pending(0)
    pair.batch.complete(0, Status.OKAY)
    pair.batch.finish(1)
    assert (pair.batch.counters.discards, pair.batch.counters.discarded_bytes) == (1, 100 * 512)


def test_discards_of_large_sectors_are_aligned(pair: Pair) -> None:
    pair.batch.set_limits(Limits(SECTORS, sector_size=4096, discard=True))
    batch = together([discard(8, 8), discard(4, 8), discard(8, 4)])
    pair.batch.requests[: 3 * 112] = np.frombuffer(batch.tobytes(), np.uint8)
    assert pair.batch.prepare(3) == 1
    assert pair.batch.is_pending(0)


def test_an_indirect_request_moves_the_right_bytes(pair: Pair) -> None:
    pair.batch.set_limits(ALL)
    grant(pair, *range(PAGES))
    disk = bytearray(np.random.default_rng(1).bytes(SECTORS * 512))
    order = [5, 3, 4, *range(6, 20)]
    answer = pair.run(indirect(pair, [(BASE + page, 0, 7) for page in order], sector=8), disk)
    assert (answer["status"][0], answer["operation"][0]) == (Status.OKAY, Operation.READ)
    for i, page in enumerate(order):
        assert pair.data.view[page * 4096 : (page + 1) * 4096] == disk[(i + 1) * 4096 : (i + 2) * 4096]
    written = [(BASE + page, 1, 3) for page in range(20)]
    answer = pair.run(indirect(pair, written, Operation.WRITE, sector=100), disk)
    assert (answer["status"][0], answer["operation"][0]) == (Status.OKAY, Operation.WRITE)
    wanted = b"".join(bytes(pair.data.view[page * 4096 + 512 : page * 4096 + 2048]) for page in range(20))
    assert disk[100 * 512 : 100 * 512 + len(wanted)] == wanted
    assert in_use(pair) == 0


def test_the_segments_of_an_indirect_request_are_read_once(pair: Pair) -> None:
    """XSA-155: a frontend that rewrites them while it is served changes nothing."""
    pair.batch.set_limits(ALL)
    grant(pair, 0, 1, PAGES - 1)
    asked = indirect(pair, [(BASE, 0, 7), (BASE + 1, 0, 7)])
    pair.batch.requests[:112] = np.frombuffer(asked.tobytes(), np.uint8)
    assert pair.batch.prepare(1) == 1
    write_segments(pair, PAGES - 1, [(BASE + PAGES, 0, 255), (0xFFFFFFFF, 7, 0)])
    assert [len(buffer) for buffer in pair.batch.buffers(0)] == [8192]
    assert in_use(pair) == 2  # the page of segments is not needed any more
    pair.batch.finish(1)
    assert in_use(pair) == 0
    assert all(pair.granter.revoke(BASE + page) for page in (0, 1, PAGES - 1))


@pytest.mark.parametrize(
    ("segments", "n", "operation", "limit", "status"),
    [
        ([], 0, Operation.READ, 256, Status.ERROR),
        ([(BASE, 0, 7)], 257, Operation.READ, 256, Status.ERROR),
        ([(BASE, 0, 7)], 4097, Operation.READ, 4096, Status.ERROR),
        ([(BASE, 0, 7)], 65535, Operation.READ, 65536, Status.ERROR),
        ([(BASE, 0, 7)], 513, Operation.READ, 4096, Status.ERROR),  # its second page is no grant
        ([(BASE, 0, 7)], 1, Operation.FLUSH_DISKCACHE, 256, Status.ERROR),
        ([(BASE, 0, 7)], 1, Operation.WRITE_BARRIER, 256, Status.ERROR),
        ([(BASE, 0, 7)], 1, Operation.INDIRECT, 256, Status.ERROR),
        ([(BASE, 0, 7)], 1, Operation.READ, 0, Status.EOPNOTSUPP),
        ([(BASE, 0, 8)], 1, Operation.READ, 256, Status.ERROR),
        ([(BASE, 3, 2)], 1, Operation.READ, 256, Status.ERROR),
        ([(BASE, 0, 7), (BASE + 1, 0, 7)], 2, Operation.READ, 256, Status.ERROR),  # one is not granted
    ],
)
def test_indirect_requests_that_are_refused(
    pair: Pair, segments: list[tuple[int, int, int]], n: int, operation: int, limit: int, status: Status
) -> None:
    pair.batch.set_limits(Limits(SECTORS, barrier=True, max_indirect_segments=limit))
    grant(pair, 0, PAGES - 1)
    asked = indirect(pair, segments, operation, n=n)
    answer = pair.run(together([asked, request(id=7)]), bytearray(SECTORS * 512))
    assert answer["status"].tolist() == [status, Status.OKAY]
    assert in_use(pair) == 0
    assert pair.granter.revoke(BASE)
    assert pair.granter.revoke(BASE + PAGES - 1)


def test_an_indirect_page_that_is_not_granted(pair: Pair) -> None:
    pair.batch.set_limits(ALL)
    grant(pair, 0)
    assert pair.run(indirect(pair, [(BASE, 0, 7)]), bytearray(SECTORS * 512))["status"][0] == Status.ERROR
    beyond = np.frombuffer(indirect(pair, [(BASE, 0, 7)]).tobytes(), INDIRECT_REQUEST).copy()
    beyond["indirect_grefs"][0, 0] = BASE + PAGES
    assert pair.run(np.frombuffer(beyond.tobytes(), REQUEST))["status"][0] == Status.ERROR
    assert in_use(pair) == 0


def test_4096_segments_in_eight_pages(pair: Pair) -> None:
    pair.batch.set_limits(Limits(1 << 20, max_indirect_segments=4096))
    grant(pair, *range(PAGES))
    made = np.zeros(1, INDIRECT_REQUEST)
    made["operation"], made["id"], made["nr_segments"] = Operation.INDIRECT, 1, 4096
    # No two neighbours: each segment is an extent of its own.
    segments = [(BASE + 8 + i % 2 * 2, 0, 0) for i in range(4096)]
    for page in range(8):
        made["indirect_grefs"][0, page] = BASE + page
        write_segments(pair, page, segments[page * 512 : page * 512 + 512])
    asked = together([request(segments=[(BASE + 20, 0, 7)]), np.frombuffer(made.tobytes(), REQUEST)] * 2)
    pair.batch.requests[: len(asked) * 112] = np.frombuffer(asked.tobytes(), np.uint8)
    assert pair.batch.prepare(4) == 4
    for i in (1, 3):
        assert len(pair.batch.buffers(i)) == 4096
        assert pair.batch.place(i) == (0, 4096 * 512)
    assert len(pair.batch.buffers(2)) == 1
    pair.batch.finish(4)
    assert in_use(pair) == 0


def test_many_extents_reach_a_file(pair: Pair, tmp_path: Path) -> None:
    """More of them than one system call takes."""
    path = tmp_path / "disk.img"
    content = os.urandom(SECTORS * 512)
    path.write_bytes(content)
    pair.batch.set_limits(Limits(SECTORS, max_indirect_segments=4096))
    grant(pair, *range(PAGES))
    segments = [(BASE + page, sector, sector) for sector in range(7, -1, -1) for page in range(20)]
    asked = indirect(pair, segments, sector=3)
    pair.batch.requests[:112] = np.frombuffer(asked.tobytes(), np.uint8)
    assert pair.batch.prepare(1) == 1
    with path.open("rb") as file:
        pair.batch.set_disk(fd=file.fileno())
        pair.batch.do(1)
    pair.batch.finish(1)
    assert pair.batch.error == 0
    read = b"".join(bytes(pair.data.view[(gref - BASE) * 4096 + first * 512 :][:512]) for gref, first, _ in segments)
    assert read == content[3 * 512 : 3 * 512 + len(read)]


def test_segments_of_large_sectors_are_whole_sectors(pair: Pair) -> None:
    pair.batch.set_limits(Limits(SECTORS, sector_size=4096))
    grant(pair, 0, 1)
    halves = request(segments=[(BASE, 0, 3), (BASE + 1, 4, 7)])
    assert pair.run(halves, bytearray(SECTORS * 512))["status"][0] == Status.ERROR


@pytest.fixture
def narrow():
    with make_pair(x86_32=True) as made:
        made.batch.set_limits(ALL)
        yield made


def test_requests_of_x86_32(narrow: Pair) -> None:
    grant(narrow, 0, 1, 2, PAGES - 1)
    direct = np.zeros(1, X86_32_REQUEST)
    direct["operation"], direct["nr_segments"], direct["id"], direct["sector"] = Operation.READ, 2, (1 << 63) + 5, 9
    direct["seg"][0, 0], direct["seg"][0, 1] = (BASE, 0, 7), (BASE + 1, 2, 5)
    write_segments(narrow, PAGES - 1, [(BASE + 2, 0, 7)])
    wide = [discard(17, 3), indirect(narrow, [(BASE + 2, 0, 7)], sector=40)]
    # Byte by byte as a compiler for 32 bits lays them out: no gap before the id.
    raw = direct.tobytes() + b"".join(one.tobytes()[:4] + one.tobytes()[8:] for one in wide)
    narrow.batch.requests[: len(raw)] = np.frombuffer(raw, np.uint8)
    assert narrow.batch.prepare(3) == 3
    assert [narrow.batch.place(i) for i in range(3)] == [(9 * 512, 12 * 512), (17 * 512, 3 * 512), (40 * 512, 4096)]
    assert [narrow.batch.operation(i) for i in range(3)] == [Operation.READ, Operation.DISCARD, Operation.READ]
    assert [len(buffer) for buffer in narrow.batch.buffers(0)] == [4096, 2048]
    narrow.batch.finish(3)
    answers = np.frombuffer(bytes(narrow.batch.responses[:48]), RESPONSE)
    assert answers["id"].tolist() == [(1 << 63) + 5, 1, 1]
    assert in_use(narrow) == 0


def test_message_sizes() -> None:
    assert (DISCARD_REQUEST.itemsize, INDIRECT_REQUEST.itemsize, X86_32_REQUEST.itemsize) == (112, 112, 108)
    assert SEGMENT.itemsize == 8


@pytest.mark.parametrize("call", [1, 2])
def test_segments_that_find_no_memory_are_refused(pair: Pair, call: int) -> None:
    """Those that fit into what there is are served; so is everything once there is memory again."""
    pair.batch.set_limits(ALL)
    grant(pair, 0, PAGES - 1)
    many, few = indirect(pair, [(BASE, 0, 7)] * 256), request(segments=[(BASE, 0, 7)] * 11)
    disk = bytearray(os.urandom(SECTORS * 512))
    with failing("realloc", at=call) as fault:
        answers = pair.run(together([many, many, *[few] * 9, request()]), disk)
    assert fault.happened
    assert answers["status"].tolist() == [Status.OKAY, Status.ERROR, *[Status.OKAY] * 8, Status.ERROR, Status.OKAY]
    assert pair.batch.refusal(2) == "no memory for its segments"
    assert (pair.batch.counters.refused, pair.batch.counters.no_memory) == (2, 2)
    assert in_use(pair) == 0
    assert pair.run(together([many, many]), disk)["status"].tolist() == [Status.OKAY] * 2
    assert bytes(pair.data.view[:4096]) == disk[255 * 4096 : 256 * 4096]


@pytest.mark.parametrize("call", [1, 2])
def test_a_batch_that_finds_no_memory(pair: Pair, call: int) -> None:
    with failing("calloc", at=call) as fault, pytest.raises(ResourceLimit, match="32 requests"):
        RequestBatch(pair.mapper, pair.data.view, 32)
    assert fault.happened
