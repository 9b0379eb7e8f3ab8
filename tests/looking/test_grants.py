# SPDX-License-Identifier: MIT
"""Grants as Dom0 sees them: whose, for what, since when, and which the peer keeps."""

import struct
import time
from collections.abc import Iterator

import pytest

from paravirt.looking import grants
from paravirt.looking.grants import Grant, all_grants
from tests.looking.live import NAME, Live


@pytest.fixture
def live() -> Iterator[Live]:
    with Live() as made:
        yield made


def seen(live: Live) -> dict[int, Grant]:
    return {grant.gref: grant for grant in all_grants(live.looker, [live.guest.domid])}


def test_grants_of_a_device(live: Live) -> None:
    data = live.arena.allocate(2)
    live.arena.grant(data.gref, read_only=True)
    found = seen(live)
    ring, page = found[live.pages.gref], found[data.gref]
    assert sorted(found) == [live.pages.gref, data.gref]
    assert (ring.device, ring.is_ring, ring.writing, ring.peer, ring.read_only) == (NAME, True, True, 0, False)
    assert (page.device, page.is_ring, page.reading, page.read_only) == (NAME, False, False, True)
    assert page.age_s is not None
    assert 0 <= page.age_s < 60
    assert page.use == "read-only"
    assert live.arena.revoke(data.gref)
    assert sorted(seen(live)) == [live.pages.gref]


def test_a_page_that_the_peer_keeps(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    data = live.arena.allocate(1)
    live.arena.grant(data.gref)
    mapped = live.foreign.map_pages([data.gref], read_only=True)
    assert not live.arena.revoke(data.gref)
    grant = seen(live)[data.gref]
    assert grant.recalled_s is not None
    assert (grant.leaked, grant.use) == (False, "read-write reading recalled")
    monkeypatch.setattr(grants, "LEAK_AFTER_S", 0.0)
    grant = seen(live)[data.gref]
    assert (grant.leaked, grant.use) == (True, "read-write reading leaked")
    mapped.close()
    assert live.arena.revoke(data.gref)
    assert data.gref not in seen(live)


def test_an_arena_whose_owner_is_through_with_it(live: Live) -> None:
    live.front.close()
    live.arena.close()
    assert [grant.use for grant in seen(live).values()] == ["read-write writing ended"]


def test_no_such_domain_has_no_grants(live: Live) -> None:
    assert all_grants(live.looker, [77]) == []


def test_notes_that_lie_are_taken_as_they_are(live: Live) -> None:
    """A domain may write what it likes about its own grants: an age in the future is none."""
    now_ms = time.monotonic_ns() // 1_000_000
    notes = live.arena.n_pages * 8
    view = live.arena._entries.view
    struct.pack_into("<II", view, notes, (now_ms + 100_000) % 2**32, 0)
    assert seen(live)[live.pages.gref].age_s == 0.0
    struct.pack_into("<II", view, notes, 0, 0xFFFFFFFF)
    grant = seen(live)[live.pages.gref]
    assert grant.age_s is None
    assert grant.recalled_s is not None
    struct.pack_into("<HHI", view, 0, 0xFFFD, 0xFFFF, 0xFFFFFFFF)
    assert seen(live)[live.pages.gref].peer == 0xFFFF
