# SPDX-License-Identifier: MIT
"""The blkif batch in C: what a backend must refuse, and that grants are taken and given back exactly."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravirt.protocol.blkif import REQUEST, RESPONSE, Operation, Status
from paravirt.ring import blkif
from paravirt.ring.blkif import Limits
from paravirt.ring.grant import Granter, Mapper, entries_bytes, init_maptrack, maptrack_bytes
from paravirt.ring.memory import address_of

from ..faults import failing
from .blkif_pair import BASE, PAGES, SECTORS, Pair, in_use, request, ring_of_answers, shared, together


def test_read_and_write_move_the_right_bytes(pair: Pair) -> None:
    disk = bytearray(np.random.default_rng(1).bytes(SECTORS * 512))
    for page in range(3):
        pair.granter.access(page)
    answer = pair.run(request(sector=8, segments=[(BASE, 1, 7), (BASE + 1, 0, 7), (BASE + 2, 0, 3)]), disk)
    assert answer["status"][0] == Status.OKAY
    assert bytes(pair.data.view[512 : 512 + 19 * 512]) == disk[8 * 512 : 27 * 512]
    pair.data.view[0:4096] = b"w" * 4096
    assert pair.run(request(Operation.WRITE, 100, [(BASE, 0, 7)]), disk)["status"][0] == Status.OKAY
    assert disk[100 * 512 : 108 * 512] == b"w" * 4096
    assert in_use(pair) == 0


def test_pieces_that_lie_together_are_one_extent(pair: Pair) -> None:
    for page in range(4):
        pair.granter.access(page)
    asked = request(segments=[(BASE, 0, 7), (BASE + 1, 0, 7), (BASE + 3, 0, 7)])
    pair.batch.requests[:112] = np.frombuffer(asked.tobytes(), np.uint8)
    assert pair.batch.prepare(1) == 1
    assert [len(buffer) for buffer in pair.batch.buffers(0)] == [8192, 4096]
    assert pair.batch.place(0) == (0, 12288)
    assert in_use(pair) == 3
    pair.batch.finish(1)
    assert in_use(pair) == 0


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (request(segments=[]), Status.ERROR),
        (request(segments=[(BASE, 0, 0)] * 12), Status.ERROR),
        (request(segments=[(BASE, 0, 0)] * 255), Status.ERROR),
        (request(segments=[(BASE, 5, 4)]), Status.ERROR),
        (request(segments=[(BASE, 0, 8)]), Status.ERROR),
        (request(segments=[(BASE, 0, 255)]), Status.ERROR),
        (request(sector=SECTORS), Status.ERROR),
        (request(sector=SECTORS - 7), Status.ERROR),
        (request(sector=(1 << 64) - 1), Status.ERROR),
        (request(sector=(1 << 64) - 8), Status.ERROR),
        (request(segments=[(BASE + 5, 0, 7)]), Status.ERROR),  # not granted
        (request(segments=[(BASE - 1, 0, 7)]), Status.ERROR),  # not of this chunk
        (request(segments=[(BASE + PAGES, 0, 7)]), Status.ERROR),
        (request(segments=[(0xFFFFFFFF, 0, 7)]), Status.ERROR),
        (request(segments=[(BASE, 0, 7), (BASE + 5, 0, 7)]), Status.ERROR),  # the second fails: the first is let go
        (request(Operation.WRITE_BARRIER), Status.EOPNOTSUPP),
        (request(Operation.DISCARD), Status.EOPNOTSUPP),
        (request(Operation.INDIRECT), Status.EOPNOTSUPP),
        (request(Operation.RESERVED), Status.EOPNOTSUPP),
        (request(255), Status.EOPNOTSUPP),
    ],
)
def test_refused(pair: Pair, asked: np.ndarray, status: Status) -> None:
    pair.granter.access(0)
    answer = pair.run(asked, bytearray(SECTORS * 512))
    assert answer["status"][0] == status
    assert answer["id"][0] == 1
    assert in_use(pair) == 0
    assert pair.batch.refusal(1)
    assert pair.batch.counters.refused == 1
    assert pair.granter.revoke(BASE)


def test_a_refused_request_takes_no_other_with_it(pair: Pair) -> None:
    pair.granter.access(0)
    batch = together([request(id=1), request(255, id=2), request(sector=SECTORS, id=3), request(id=4)])
    answers = pair.run(batch, bytearray(SECTORS * 512))
    assert answers["id"].tolist() == [1, 2, 3, 4]
    assert answers["status"].tolist() == [Status.OKAY, Status.EOPNOTSUPP, Status.ERROR, Status.OKAY]


def test_read_only_disk_refuses_writes_only(pair: Pair) -> None:
    pair.granter.access(0)
    pair.batch.set_limits(Limits(SECTORS, read_only=True))
    disk = bytearray(SECTORS * 512)
    answers = pair.run(together([request(Operation.WRITE), request(), request(Operation.FLUSH_DISKCACHE)]), disk)
    assert answers["status"].tolist() == [Status.ERROR, Status.OKAY, Status.OKAY]
    assert disk == bytes(SECTORS * 512)


def test_a_page_granted_read_only_cannot_be_read_into(pair: Pair) -> None:
    pair.granter.access(0, read_only=True)
    disk = bytearray(b"d" * SECTORS * 512)
    answers = pair.run(together([request(), request(Operation.WRITE)]), disk)
    assert answers["status"].tolist() == [Status.ERROR, Status.OKAY]
    assert bytes(pair.data.view[:4096]) == bytes(4096)


def test_sectors_of_4096_bytes(pair: Pair) -> None:
    pair.granter.access(0)
    pair.batch.set_limits(Limits(SECTORS, sector_size=4096))
    batch = together(
        [request(sector=8), request(sector=1), request(segments=[(BASE, 0, 0)]), request(segments=[(BASE, 0, 7)])]
    )
    assert pair.run(batch, bytearray(SECTORS * 512))["status"].tolist() == [
        Status.OKAY,
        Status.ERROR,
        Status.ERROR,
        Status.OKAY,
    ]


def test_flush_ignores_its_segments(pair: Pair) -> None:
    asked = request(Operation.FLUSH_DISKCACHE, sector=SECTORS * 9, segments=[(77, 9, 9)])
    assert pair.run(asked, bytearray(SECTORS * 512))["status"][0] == Status.OKAY


def test_flush_that_was_not_offered(pair: Pair) -> None:
    pair.batch.set_limits(Limits(SECTORS, flush=False))
    assert pair.run(request(Operation.FLUSH_DISKCACHE))["status"][0] == Status.EOPNOTSUPP


def test_what_the_disk_did_not_answer_is_an_error(pair: Pair) -> None:
    pair.granter.access(0)
    assert pair.run(request())["status"][0] == Status.ERROR
    assert pair.batch.counters.errors == 1


def test_all_bytes_of_a_response_are_defined(pair: Pair) -> None:
    pair.batch.responses[:16] = 255
    pair.granter.access(0)
    pair.run(request(id=0x1122334455667788), bytearray(SECTORS * 512))
    assert bytes(pair.batch.responses[:16]).hex() == "8877665544332211" + "00" * 8


def test_counters(pair: Pair) -> None:
    pair.granter.access(0)
    disk = bytearray(SECTORS * 512)
    for _ in range(3):
        pair.run(request(), disk)
    pair.run(together([request(Operation.WRITE), request(Operation.FLUSH_DISKCACHE), request(99)]), disk)
    counters = pair.batch.counters
    assert (counters.reads, counters.writes, counters.flushes, counters.refused) == (3, 1, 1, 1)
    assert (counters.read_bytes, counters.written_bytes, counters.errors) == (3 * 4096, 4096, 0)
    assert (counters.copied_bytes, counters.barriers, counters.no_memory) == (4 * 4096, 0, 0)


@given(st.binary(min_size=112, max_size=112 * 8))
def test_no_bytes_of_a_peer_do_harm(raw: bytes) -> None:
    objects = [shared(n) for n in (entries_bytes(PAGES), PAGES * 4096, maptrack_bytes(PAGES))]
    entries, data, maptrack = objects
    init_maptrack(maptrack, BASE, PAGES)
    mapper = Mapper(entries, data, maptrack, base=BASE, n_pages=PAGES, domid=0)
    granter = Granter(entries, base=BASE, n_pages=PAGES, peer=0)
    for page in range(PAGES):
        granter.access(page)
    batch = blkif.RequestBatch(mapper, data.view, 8)
    batch.set_limits(Limits(64, barrier=True, discard=True, max_indirect_segments=600))
    n = len(raw) // 112
    # Few grefs and sectors, so that many requests are good.
    requests = np.frombuffer(raw[: n * 112], REQUEST).copy()
    requests["operation"] %= 8
    requests["nr_segments"] %= 13
    requests["sector"] %= 80
    requests["seg"]["gref"] %= 48
    batch.requests[: n * 112] = np.frombuffer(requests.tobytes(), np.uint8)
    disk = bytearray(64 * 512)
    batch.prepare(n)
    batch.set_disk(memory=address_of(disk)[0], n_bytes=len(disk))
    batch.do(n)
    batch.finish(n)
    answers = np.frombuffer(bytes(batch.responses[: n * 16]), RESPONSE)
    assert answers["id"].tolist() == requests["id"].tolist()
    assert set(answers["status"].tolist()) <= {0, -1, -2}
    assert mapper.statistics().pinned_pages == 0
    for page in range(PAGES):
        assert granter.revoke(BASE + page)
    mapper.close()
    granter.close()
    for mapping in objects:
        mapping.close()


def run_file(pair: Pair, requests: np.ndarray, fd: int) -> tuple[list[int], int]:
    """The statuses of requests on a file, and the first error as an errno."""
    n = len(requests)
    with ring_of_answers() as ring:
        pair.batch.requests[: n * 112] = np.frombuffer(requests.tobytes(), np.uint8)
        pair.batch.set_disk(fd=fd)
        assert pair.batch.serve(ring, n)
    return np.frombuffer(bytes(pair.batch.responses[: n * 16]), RESPONSE)["status"].tolist(), pair.batch.error


@pytest.fixture
def disk_fd(tmp_path: Path) -> Iterator[int]:
    image = tmp_path / "disk"
    image.write_bytes(np.random.default_rng(3).bytes(SECTORS * 512))
    fd = os.open(image, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("done", [512, 4096, 4608, 8192])
def test_a_transfer_that_was_cut_short_goes_on(pair: Pair, disk_fd: int, done: int) -> None:
    """The rest, from where it stopped: within a page, at its end. What the call said it had moved is believed."""
    for page in (0, 2, 4):
        pair.granter.access(page)
    pair.data.view[: 5 * 4096] = bytes(5 * 4096)
    segments = [(BASE, 0, 7), (BASE + 2, 0, 7), (BASE + 4, 0, 7)]
    with failing("preadv", errno.EINTR, times=1) as read:
        assert run_file(pair, request(sector=16, segments=segments), disk_fd) == ([Status.OKAY], 0)
    assert read.calls == 2
    pair.data.view[: 5 * 4096] = bytes(5 * 4096)
    with failing("preadv", 0, times=1, result=done) as read:
        assert run_file(pair, request(sector=16, segments=segments), disk_fd) == ([Status.OKAY], 0)
    assert read.calls == 2
    expected = os.pread(disk_fd, 3 * 4096, 16 * 512)
    got = b"".join(bytes(pair.data.view[page * 4096 : page * 4096 + 4096]) for page in (0, 2, 4))
    assert got == bytes(done) + expected[done:]
    with failing("pwritev", 0, times=1, result=done) as written:
        assert run_file(pair, request(Operation.WRITE, 100, segments), disk_fd) == ([Status.OKAY], 0)
    assert written.calls == 2
    assert os.pread(disk_fd, 3 * 4096 - done, 100 * 512 + done) == got[done:]


def test_a_disk_that_fails(pair: Pair, disk_fd: int) -> None:
    """Each request has its own end; the batch tells the first error."""
    pair.granter.access(0)
    mixed = together([request(99), request(), request(Operation.WRITE), request(Operation.FLUSH_DISKCACHE), request()])
    with (
        failing("preadv", errno.EMEDIUMTYPE, times=1),
        failing("pwritev", errno.ENOSPC),
        failing("fdatasync", errno.EIO),
    ):
        statuses, error = run_file(pair, mixed, disk_fd)
    assert statuses == [Status.EOPNOTSUPP, Status.ERROR, Status.ERROR, Status.ERROR, Status.OKAY]
    assert error == errno.EMEDIUMTYPE
    counters = pair.batch.counters
    assert (counters.refused, counters.errors, counters.read_bytes, counters.written_bytes) == (1, 3, 4096, 0)
    with failing("preadv", 0, result=0):
        assert run_file(pair, request(), disk_fd) == ([Status.ERROR], errno.EIO), "the image is shorter than it was"
    assert in_use(pair) == 0


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_that_cannot_be_flushed(pair: Pair, disk_fd: int, error: int) -> None:
    """Which is no failure of the disk: the operation is not there, and the caller is told which."""
    pair.granter.access(0)
    pair.batch.set_limits(Limits(SECTORS, barrier=True))
    before = os.pread(disk_fd, 4096, 0)
    pair.data.view[:4096] = b"b" * 4096
    mixed = together([request(Operation.FLUSH_DISKCACHE), request(Operation.WRITE_BARRIER), request(sector=8)])
    with failing("fdatasync", error):
        assert run_file(pair, mixed, disk_fd) == ([Status.EOPNOTSUPP, Status.EOPNOTSUPP, Status.OKAY], 0)
    assert pair.batch.unsupported == 1 << Operation.FLUSH_DISKCACHE | 1 << Operation.WRITE_BARRIER
    assert os.pread(disk_fd, 4096, 0) == before, "what cannot be ordered is not written"
    assert run_file(pair, request(Operation.FLUSH_DISKCACHE), disk_fd) == ([Status.OKAY], 0)
    assert pair.batch.unsupported == 0


@pytest.mark.parametrize(("call", "written"), [(1, False), (2, True)])
def test_a_barrier_whose_flush_fails(pair: Pair, disk_fd: int, call: int, written: bool) -> None:
    pair.granter.access(0)
    pair.batch.set_limits(Limits(SECTORS, barrier=True))
    pair.data.view[:4096] = b"b" * 4096
    with failing("fdatasync", errno.EIO, at=call):
        assert run_file(pair, request(Operation.WRITE_BARRIER), disk_fd) == ([Status.ERROR], errno.EIO)
    assert (os.pread(disk_fd, 4096, 0) == b"b" * 4096) is written
    with failing("fdatasync", errno.EIO) as flushes:
        assert run_file(pair, request(Operation.WRITE_BARRIER, segments=[]), disk_fd) == ([Status.ERROR], errno.EIO)
    assert flushes.calls == 1


def test_a_batch_with_nothing_to_do_does_not_touch_the_disk(pair: Pair) -> None:
    assert run_file(pair, together([request(99), request(sector=SECTORS)]), -1) == (
        [Status.EOPNOTSUPP, Status.ERROR],
        0,
    )


@pytest.mark.parametrize("sector", [8, 20])
def test_memory_that_ends_before_its_disk(pair: Pair, sector: int) -> None:
    pair.granter.access(0)
    disk = bytearray(12 * 512)
    assert pair.run(request(sector=sector), disk)["status"][0] == Status.ERROR
    assert pair.run(request(sector=4), disk)["status"][0] == Status.OKAY
