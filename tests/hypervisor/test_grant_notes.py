# SPDX-License-Identifier: MIT
"""Notes of grants: when a page was granted, and since when its owner wants it back."""

import os
import struct
import time
from collections.abc import Iterator

import pytest

from paravirt.ring.grant import ENTRY_BYTES, Granter, Mapper, entries_bytes, init_maptrack, maptrack_bytes
from paravirt.ring.memory import PAGE_BYTES, Mapping, map_new

PAGES, BASE, PEER = 300, 8, 3
TICK_MS = 20  # of the coarse clock, with room


@pytest.fixture
def objects() -> Iterator[list[Mapping]]:
    made = []
    for n_bytes in (entries_bytes(PAGES), PAGES * PAGE_BYTES, maptrack_bytes(PAGES)):
        fd, mapping = map_new("memfd", n_bytes)
        os.close(fd)
        made.append(mapping)
    init_maptrack(made[2], BASE, PAGES)
    yield made
    for mapping in made:
        mapping.close()


def note(entries: Mapping, page: int) -> tuple[int, int]:
    granted, recalled = struct.unpack_from("<II", entries.view, (PAGES + page) * ENTRY_BYTES)
    return granted, recalled


def age_ms(then: int) -> int:
    return (time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000 - then) % 2**32


def test_a_grant_has_its_time_and_a_new_one_another(objects: list[Mapping]) -> None:
    granter = Granter(objects[0], base=BASE, n_pages=PAGES, peer=PEER)
    granter.access(PAGES - 1)
    first, recalled = note(objects[0], PAGES - 1)
    assert recalled == 0
    assert age_ms(first) < 30_000
    time.sleep(2 * TICK_MS / 1000)
    assert granter.revoke(BASE + PAGES - 1)
    granter.access(PAGES - 1)
    second, _ = note(objects[0], PAGES - 1)
    assert 0 < (second - first) % 2**32 < 30_000
    assert note(objects[0], 0) == (0, 0)


def test_a_page_that_the_peer_keeps_says_since_when_it_is_wanted_back(objects: list[Mapping]) -> None:
    granter = Granter(objects[0], base=BASE, n_pages=PAGES, peer=PEER)
    mapper = Mapper(*objects, base=BASE, n_pages=PAGES, domid=PEER)
    gref = granter.access(7)
    mapper.map(gref)
    assert not granter.revoke(gref)
    _, recalled = note(objects[0], 7)
    assert age_ms(recalled) < 30_000
    time.sleep(2 * TICK_MS / 1000)
    assert not granter.revoke(gref)
    assert note(objects[0], 7)[1] == recalled, "the first time counts"
    mapper.unmap(gref)
    assert granter.revoke(gref)
    granter.access(7)
    assert note(objects[0], 7)[1] == 0


def test_without_room_there_are_no_notes() -> None:
    fd, entries = map_new("memfd", PAGE_BYTES)
    os.close(fd)
    with entries:
        granter = Granter(entries, base=BASE, n_pages=PAGES, peer=PEER)
        granter.access(0)
        assert entries.view[PAGES * ENTRY_BYTES :].tobytes().count(0) == PAGE_BYTES - PAGES * ENTRY_BYTES


def test_the_object_has_room_for_entries_and_notes() -> None:
    assert entries_bytes(1) == PAGE_BYTES
    assert entries_bytes(256) == PAGE_BYTES
    assert entries_bytes(257) == 2 * PAGE_BYTES
