# SPDX-License-Identifier: MIT
"""Grants in C where the Python classes would not have asked, and two threads at one mapper."""

import errno
import threading
import time
from typing import Any

import pytest

from paravirt.ring._core import ffi, lib
from paravirt.ring.grant import CopyOp, CopyPair, GrantStatus, init_maptrack, release_pins

from ..faults import failing
from .test_grants import MAPPER, PERMIT, READING, WRITING, Chunk, chunk

DEADLINE_S = 30


@pytest.mark.parametrize(
    ("gref", "frame", "result"),
    [(7, 8, -errno.EINVAL), (12, 8, -errno.EINVAL), (8, 7, -errno.EINVAL), (8, 12, -errno.EINVAL), (8, 11, 0)],
)
def test_a_granter_gives_only_what_it_has(gref: int, frame: int, result: int) -> None:
    with chunk() as c:
        assert lib.pv_grant_access(c.granter.core, gref, MAPPER, frame, 0) == result
        assert c.entry(0) == ((0, 0, 0) if result else (PERMIT, MAPPER, frame))
        assert lib.pv_grant_revoke(c.granter.core, gref) == result
        assert lib.pv_grant_revoke(c.granter.core, 10) == -errno.EINVAL, "never granted"
        assert (lib.pv_grant_in_use(c.granter.core, gref) < 0) == (not 8 <= gref < 12)


def test_a_second_thread_waits_for_the_mapper() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        c.mapper.core.lock = 1
        mapped: list[int] = []
        with failing("sched_yield", result=0) as yields:
            thread = threading.Thread(target=lambda: mapped.append(c.mapper.map(gref)), daemon=True)
            thread.start()
            deadline = time.monotonic() + DEADLINE_S
            while not yields.happened:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert (mapped, c.pins(0)) == ([], (0, 0))
            c.mapper.core.lock = 0
            thread.join(DEADLINE_S)
        assert (mapped, c.pins(0)) == ([0], (0, 1))
        c.mapper.unmap(gref)


@pytest.mark.parametrize(("offset", "length"), [(4000, 97), (2**16 - 1, 1), (0, 4097)])
def test_a_copy_stays_in_its_page(offset: int, length: int) -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        wrong = [CopyPair(gref, offset, gref, 0, length), CopyPair(gref, 0, gref, offset, length)]
        empty = CopyPair(77, 5000, 78, 5000, 0)
        statuses = c.mapper.copy_between([*wrong, empty, CopyPair(gref, 4000, gref, 0, 96)], c.mapper)
        assert statuses == [GrantStatus.BAD_COPY_ARG] * 2 + [GrantStatus.OKAY] * 2
        assert c.mapper.statistics().failures == 2


def test_a_copy_between_stops_at_the_end_that_fails() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        statuses = c.mapper.copy_between([CopyPair(77, 0, gref, 0, 8), CopyPair(gref, 0, 77, 0, 8)], c.mapper)
        assert statuses == [GrantStatus.BAD_GNTREF] * 2
        assert c.entry(0)[0] == PERMIT, "nothing stays pinned"


def copy(c: Chunk, gref: int, local_offset: int, length: int, local_bytes: int) -> int:
    op: Any = ffi.new("struct pv_grant_copy_op *", {"gref": gref, "length": length, "local_offset": local_offset})
    local = ffi.new("uint8_t[]", local_bytes)
    lib.pv_grant_copy(c.mapper.core, op, 1, local, local_bytes, 0)
    return int(op.status)


def test_a_copy_stays_in_its_buffer() -> None:
    with chunk() as c:
        gref = c.granter.access(0)
        assert copy(c, gref, 0, 100, 100) == GrantStatus.OKAY
        assert copy(c, gref, 90, 11, 100) == GrantStatus.BAD_COPY_ARG
        assert copy(c, gref, 101, 1, 100) == GrantStatus.BAD_COPY_ARG
        assert copy(c, gref, 2**64 - 1, 2, 100) == GrantStatus.BAD_COPY_ARG
        assert c.mapper.copy_from([CopyOp(gref, 0, 4)], bytearray(4)) == [GrantStatus.OKAY]


def test_what_the_living_hold_is_not_taken_from_them() -> None:
    """Two processes of one domain have a page mapped; one dies."""
    with chunk() as c:
        maptrack = c._new(4096)
        init_maptrack(maptrack, c.base, c.n_pages)
        other = c.new_mapper(maptrack)
        first, second = c.granter.access(0), c.granter.access(1)
        for gref in (first, second):
            c.mapper.map(gref)
        other.map(first, read_only=True)
        other.map(second)
        assert release_pins(c.entries, c.n_pages, c.maptrack, [maptrack]) == 2
        assert [c.entry(page)[0] for page in range(2)] == [PERMIT | READING, PERMIT | READING | WRITING]
        assert not c.granter.revoke(first)
        assert release_pins(c.entries, c.n_pages, maptrack, []) == 2
        assert c.granter.revoke(first)
        assert c.granter.revoke(second)
        other.close()
        maptrack.close()
