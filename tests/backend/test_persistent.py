# SPDX-License-Identifier: MIT
"""Grants that a backend keeps mapped: what is in its cache, who is driven out, and what a frontend cannot do to it."""

import os
import random
import time
from collections.abc import Iterator

import numpy as np
import pytest

from paravirt.errors import InvalidRequest, ResourceLimit
from paravirt.protocol.blkif import Operation, Status
from paravirt.ring._core import lib
from paravirt.ring.blkif import Limits, RequestBatch
from paravirt.ring.blkif_grants import PersistentStatistics

from ..faults import each_call_fails
from .blkif_pair import BASE, PAGES, SECTORS, Pair, indirect, make_pair, request, together

FEW = 8
LIMITS = Limits(SECTORS, max_indirect_segments=256)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """With room for `FEW` grants that stay, all pages granted for writing."""
    with make_pair() as made:
        made.batch.set_limits(LIMITS)
        made.persist(FEW)
        for page in range(PAGES):
            made.granter.access(page)
        yield made


def counted(pair: Pair) -> PersistentStatistics:
    assert pair.kept is not None
    return pair.kept.statistics()


def of(*pages: int, operation: int = Operation.READ, sector: int = 0, id: int = 1) -> np.ndarray:
    return request(operation, sector, [(BASE + page, 0, 7) for page in pages], id)


def ask(pair: Pair, *requests: np.ndarray) -> list[int]:
    """Statuses of requests that come together."""
    statuses: list[int] = pair.run(together(list(requests)), bytearray(SECTORS * 512))["status"].tolist()
    return statuses


def mapped(pair: Pair) -> int:
    return pair.mapper.statistics().pinned_pages


def flags(pair: Pair, page: int) -> int:
    """What of its use stands in the entry."""
    return int(lib.pv_grant_in_use(pair.granter.core, BASE + page))


def test_what_was_mapped_stays_mapped_and_is_found(pair: Pair) -> None:
    disk = bytearray(os.urandom(SECTORS * 512))
    for turn in range(3):
        assert pair.run(of(0, 1, 2, sector=turn), disk)["status"].tolist() == [Status.OKAY]
        assert pair.data.view[: 3 * 4096] == disk[turn * 512 : turn * 512 + 3 * 4096]
    assert counted(pair) == PersistentStatistics(cached=3, in_use=0, hits=6, misses=3, purged=0, aged=0, transient=0)
    assert pair.mapper.statistics().maps == 3
    assert mapped(pair) == 3
    assert not pair.granter.revoke(BASE)


def test_all_is_let_go_at_the_end(pair: Pair) -> None:
    ask(pair, of(*range(5)), indirect(pair, [(BASE + 5, 0, 7)]))
    assert mapped(pair) == 7
    pair.let_go()
    pair.let_go()
    assert mapped(pair) == 0
    assert all(pair.granter.revoke(BASE + page) for page in range(PAGES))


def test_what_is_in_use_is_let_go_at_the_end_too(pair: Pair) -> None:
    """A batch that is never answered."""
    pair.batch.requests[:112] = np.frombuffer(of(1, 2).tobytes(), np.uint8)
    assert pair.batch.prepare(1) == 1
    assert counted(pair).in_use == 2
    pair.let_go()
    assert mapped(pair) == 0


def test_afterwards_grants_are_mapped_the_usual_way(pair: Pair) -> None:
    ask(pair, of(1))
    pair.let_go()
    assert ask(pair, of(1), of(1)) == [Status.OKAY] * 2
    assert mapped(pair) == 0


def test_a_grant_in_use_by_another_request_is_refused(pair: Pair) -> None:
    assert ask(pair, of(0, 1), of(1, 2), of(3)) == [Status.OKAY, Status.ERROR, Status.OKAY]
    assert pair.batch.refusal(3) == "a persistent grant that another request is using"
    # What the refused one had taken before is given back, and nobody is in use when all are answered.
    assert counted(pair).in_use == 0
    assert ask(pair, of(1, 2)) == [Status.OKAY]


def test_a_grant_twice_in_one_request_is_refused(pair: Pair) -> None:
    assert ask(pair, of(4, 4)) == [Status.ERROR]
    assert counted(pair).in_use == 0


def test_pages_with_segments_are_kept_too(pair: Pair) -> None:
    for _ in range(2):
        assert ask(pair, indirect(pair, [(BASE + page, 0, 7) for page in range(4)])) == [Status.OKAY]
    assert counted(pair).hits == 5
    assert flags(pair, PAGES - 1) == lib.PV_GTF_READING


def test_a_page_with_segments_that_another_request_is_using_is_refused(pair: Pair) -> None:
    """One of a batch before, which is under way."""
    pair.batch.requests[:112] = np.frombuffer(of(PAGES - 1).tobytes(), np.uint8)
    assert pair.batch.prepare(1) == 1
    assert ask(pair, indirect(pair, [(BASE, 0, 7)])) == [Status.ERROR]
    assert counted(pair).in_use == 1


def test_segments_are_read_before_anything_of_their_batch_is_mapped(pair: Pair) -> None:
    assert ask(pair, of(PAGES - 1), indirect(pair, [(BASE, 0, 7)])) == [Status.OKAY] * 2
    assert counted(pair).in_use == 0


def test_a_page_is_pinned_for_reading_until_it_has_to_be_written(pair: Pair) -> None:
    ask(pair, of(0, operation=Operation.WRITE))
    assert flags(pair, 0) == lib.PV_GTF_READING
    ask(pair, of(0))
    assert flags(pair, 0) == lib.PV_GTF_READING | lib.PV_GTF_WRITING
    ask(pair, of(0, operation=Operation.WRITE))
    assert counted(pair).hits == 2
    assert pair.mapper.statistics().pinned_pages == 1
    pair.let_go()
    assert flags(pair, 0) == 0


def test_a_read_only_grant_is_kept_for_writes_and_refused_for_reads(pair: Pair) -> None:
    pair.granter.revoke(BASE)
    pair.granter.access(0, read_only=True)
    assert ask(pair, of(0, operation=Operation.WRITE)) == [Status.OKAY]
    assert ask(pair, of(0)) == [Status.ERROR]
    assert pair.batch.refusal(1) == "a grant could not be mapped"
    assert ask(pair, of(0, operation=Operation.WRITE)) == [Status.OKAY]
    pair.let_go()
    assert mapped(pair) == 0


def test_the_least_recently_used_make_room(pair: Pair) -> None:
    ask(pair, of(*range(FEW)))
    ask(pair, of(0))
    ask(pair, of(FEW))  # one place is 5 % and one more
    assert flags(pair, 1) == 0
    assert all(flags(pair, page) for page in (0, *range(2, FEW + 1)))
    assert counted(pair).purged == 1


def test_five_per_cent_are_let_go_at_once() -> None:
    with make_pair() as pair:
        pair.persist(20)
        for page in range(PAGES):
            pair.granter.access(page)
        ask(pair, of(*range(10)), of(*range(10, 20)))
        ask(pair, of(20))
        assert counted(pair).purged == 2
        assert counted(pair).cached == 19
        pair.let_go()


def test_more_at_once_than_there_is_room_for_are_mapped_for_their_request(pair: Pair) -> None:
    disk = bytearray(os.urandom(SECTORS * 512))
    asked = together([of(*range(11)), of(*range(11, 22), sector=88)])
    for _ in range(3):
        assert pair.run(asked, disk)["status"].tolist() == [Status.OKAY] * 2
        assert pair.data.view[: 22 * 4096] == disk[: 22 * 4096]
        assert mapped(pair) == counted(pair).cached <= FEW
    assert counted(pair).transient >= 3 * (22 - FEW)


def test_a_page_mapped_for_one_request_and_kept_for_the_next_is_given_back_by_each() -> None:
    """When the first maps it there is no place; when the second does there is one. Both are in flight then."""
    with make_pair() as pair:
        pair.persist(1)
        batches = [pair.batch, *(RequestBatch(pair.mapper, pair.data.view, 1) for _ in range(2))]
        for batch in batches:
            batch.persist(pair.kept)
            batch.set_limits(LIMITS)

        def prepare(batch: RequestBatch, page: int) -> None:
            batch.requests[:112] = np.frombuffer(of(page).tobytes(), np.uint8)
            assert batch.prepare(1) == 1

        pair.granter.access(0)
        pair.granter.access(1)
        prepare(batches[0], 0)
        prepare(batches[1], 1)
        assert counted(pair).transient == 1
        batches[0].finish(1)
        prepare(batches[2], 1)
        assert counted(pair).purged == 1
        batches[1].finish(1)
        assert flags(pair, 1)
        batches[2].finish(1)
        assert flags(pair, 1)
        assert counted(pair).cached == mapped(pair) == 1
        pair.let_go()
        assert mapped(pair) == 0


def test_references_that_cannot_be_mapped_drive_nothing_out(pair: Pair) -> None:
    ask(pair, of(*range(FEW)))
    pair.granter.revoke(BASE + 20)
    bad = request(segments=[(BASE + PAGES + 1000, 0, 7)]), of(20), request(segments=[(0, 0, 7)])
    for _ in range(5):
        assert ask(pair, *bad) == [Status.ERROR] * 3
    assert counted(pair).cached == FEW
    assert counted(pair).purged == 0


def test_what_nobody_uses_ages(pair: Pair) -> None:
    now_ms = int(time.clock_gettime(time.CLOCK_MONOTONIC) * 1000)
    ask(pair, of(0, 1))
    assert pair.kept.age(now_ms + 30_000) == 0
    ask_at = now_ms + 30_000
    assert pair.kept.age(ask_at + 1_000_000) == 2
    assert mapped(pair) == 0
    assert counted(pair).aged == 2
    assert pair.kept.age(ask_at + 2_000_000) == 0


def test_ageing_is_done_while_requests_come() -> None:
    """By the clock, some time after 20 ms: between two looks of the cache stand 100 ms."""
    with make_pair() as pair:
        pair.persist(FEW, unused_s=0.02)
        for page in range(2):
            pair.granter.access(page)
        ask(pair, of(0))
        deadline = time.monotonic() + 20
        while flags(pair, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
            ask(pair, of(1))
        assert not flags(pair, 0)
        assert flags(pair, 1)
        pair.let_go()


def test_nothing_ages_where_no_time_is_given() -> None:
    with make_pair() as pair:
        pair.persist(FEW, unused_s=0)
        pair.granter.access(0)
        ask(pair, of(0))
        assert pair.kept.age(2**31) == 0
        pair.let_go()


@pytest.mark.parametrize(
    "entry", [(0, 0, 0), (1, 5, BASE), (1, 0, BASE + 7), (2, 0, BASE), (0xFFFF, 0xFFFF, 2**32 - 1)]
)
def test_whatever_becomes_of_the_entry_the_page_stays_the_one_that_was_pinned(
    pair: Pair, entry: tuple[int, int, int]
) -> None:
    """A frontend that revokes, rewrites or redirects an entry of a grant that is mapped (XSA-155, 500)."""
    disk = bytearray(os.urandom(SECTORS * 512))
    pair.run(of(0), disk)
    flag, domid, frame = entry
    core = pair.granter.core.entries[0]
    core.flags, core.domid, core.frame = flag, domid, frame
    others = bytes(pair.data.view[4096:])
    assert pair.run(of(0, sector=8), disk)["status"].tolist() == [Status.OKAY]
    assert pair.data.view[:4096] == disk[8 * 512 : 16 * 512]
    assert bytes(pair.data.view[4096:]) == others
    pair.let_go()
    assert mapped(pair) == 0


def test_a_cache_has_a_size_that_can_be() -> None:
    with make_pair() as pair:
        for wrong in (0, 65535, 2**31):
            with pytest.raises(InvalidRequest):
                pair.persist(wrong)
        pair.persist(65534)
        pair.let_go()


def test_a_cache_that_finds_no_memory() -> None:
    with make_pair() as pair:

        def scenario() -> None:
            try:
                pair.persist(FEW)
            except ResourceLimit:
                pair.let_go()

        assert each_call_fails("calloc", scenario) == 2


@pytest.mark.parametrize("seed", range(4))
def test_any_requests_are_answered_as_without_a_cache(seed: int) -> None:
    """The same stream, right and wrong requests mixed, to a backend with a cache and to one without."""
    chance = random.Random(seed)
    disks = [bytearray(os.urandom(SECTORS * 512))]
    disks.append(bytearray(disks[0]))
    with make_pair() as usual, make_pair() as kept:
        kept.persist(FEW)
        for pair in (usual, kept):
            pair.batch.set_limits(LIMITS)
            for page in range(PAGES - 2):
                pair.granter.access(page, read_only=page % 7 == 6)
        for _ in range(150):
            asked = together(list(_some(chance)))
            for pair in (usual, kept):
                pair.data.view[:] = (
                    bytes([chance.randrange(256)]) * (PAGES * 4096) if pair is usual else usual.data.view
                )
            answers = [pair.run(asked, disk) for pair, disk in zip((usual, kept), disks, strict=True)]
            assert answers[0].tolist() == answers[1].tolist()
            assert bytes(usual.data.view) == bytes(kept.data.view)
        assert disks[0] == disks[1]
        assert mapped(usual) == 0
        assert mapped(kept) == counted(kept).cached <= FEW
        kept.let_go()


def _some(chance: random.Random) -> Iterator[np.ndarray]:
    """Requests that come together, no page in two of them."""
    pages = chance.sample(range(PAGES), 24)
    while len(pages) > 6:
        mine = [pages.pop() for _ in range(chance.randint(1, 6))]
        segments = [(BASE + page, chance.randint(0, 4), chance.randint(3, 8)) for page in mine]
        yield request(chance.choice([0, 0, 1, 1, 2, 9]), chance.randrange(SECTORS), segments, id=chance.randrange(99))
