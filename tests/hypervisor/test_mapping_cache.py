# SPDX-License-Identifier: MIT
"""References that stay mapped between their uses: hits, least recently used, ageing, upgrades, and over real grants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paravirt.errors import Closed, InvalidRequest
from paravirt.hypervisor.mapping_cache import CacheStatistics, MappingCache
from paravirt.ring.grant import GrantFailed, GrantStatus

from .test_grants import chunk


class Fake:
    """A mapper that counts, and a clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pins: dict[tuple[int, bool], int] = {}
        self.bad: set[int] = set()
        self.calls = 0

    def map(self, gref: int, *, read_only: bool = False) -> int:
        if gref in self.bad:
            raise GrantFailed("map", gref, GrantStatus.GENERAL_ERROR)
        self.calls += 1
        self.pins[gref, read_only] = self.pins.get((gref, read_only), 0) + 1
        return gref * 4096

    def unmap(self, gref: int, *, read_only: bool = False) -> None:
        self.pins[gref, read_only] -= 1
        if not self.pins[gref, read_only]:
            del self.pins[gref, read_only]

    def cache(self, max_grants: int = 100, unused_s: float = 60) -> MappingCache:
        return MappingCache(self, max_grants=max_grants, unused_s=unused_s, clock=lambda: self.now_s)


def use(cache: MappingCache, *grefs: int) -> None:
    for gref in grefs:
        cache.acquire(gref)
        cache.release(gref)


def test_a_reference_is_mapped_once() -> None:
    fake = Fake()
    with fake.cache() as cache:
        for _ in range(5):
            assert cache.acquire(7) == 7 * 4096
            cache.release(7)
        assert fake.calls == 1
        assert cache.statistics() == CacheStatistics(1, 0, hits=4, misses=1, purged=0, aged=0, transient=0)
        assert fake.pins == {(7, False): 1}
    assert fake.pins == {}
    cache.close()
    with pytest.raises(Closed):
        cache.acquire(7)


def test_the_least_recently_used_go_first_and_some_at_once() -> None:
    fake = Fake()
    cache = fake.cache(max_grants=40)
    use(cache, *range(40))
    use(cache, 0, 1)
    use(cache, 100)
    assert cache.statistics().purged == 2, "5 percent"
    assert not {gref for gref, _ in fake.pins} & {2, 3}
    assert {0, 1, 100} <= {gref for gref, _ in fake.pins}
    use(cache, 101)
    assert (cache.statistics().purged, cache.statistics().cached) == (2, 40)


def test_what_is_in_use_is_not_let_go() -> None:
    fake = Fake()
    cache = fake.cache(max_grants=2)
    for gref in (1, 2):
        cache.acquire(gref)
    assert cache.acquire(3) == 3 * 4096
    assert cache.acquire(3) == 3 * 4096
    cache.release(3)
    assert (3, False) in fake.pins
    cache.release(3)
    assert (3, False) not in fake.pins, "there was no place: for these uses only"
    assert cache.statistics() == CacheStatistics(2, 2, hits=1, misses=3, purged=0, aged=0, transient=1)
    assert not cache.drop(1)
    cache.release(1)
    assert cache.drop(1)
    assert not cache.drop(1)
    with pytest.raises(InvalidRequest):
        cache.release(1)
    cache.close()
    assert fake.pins == {}


def test_what_nobody_uses_ages() -> None:
    fake = Fake()
    cache = fake.cache(unused_s=60)
    use(cache, 1, 2)
    cache.acquire(3)
    fake.now_s = 59
    assert cache.age() == 0
    use(cache, 2)
    fake.now_s = 60
    assert cache.age() == 1
    assert {gref for gref, _ in fake.pins} == {2, 3}
    fake.now_s = 1000
    assert cache.age() == 1, "3 is in use"
    cache.release(3)
    assert cache.age() == 0
    assert cache.statistics().aged == 2
    with fake.cache(unused_s=0) as timeless:
        use(timeless, 9)
        fake.now_s += 10**6
        assert timeless.age() == 0


def test_a_read_only_mapping_becomes_writable_when_it_has_to() -> None:
    fake = Fake()
    cache = fake.cache()
    cache.acquire(1, read_only=True)
    cache.acquire(1)
    cache.acquire(1, read_only=True)
    assert fake.pins == {(1, True): 1, (1, False): 1}
    for _ in range(3):
        cache.release(1)
    assert cache.drop(1)
    assert fake.pins == {}


def test_a_refused_map_leaves_nothing() -> None:
    fake = Fake()
    fake.bad = {5}
    cache = fake.cache()
    with pytest.raises(GrantFailed):
        cache.acquire(5)
    with pytest.raises(InvalidRequest):
        cache.release(5)
    assert cache.statistics().cached == 0
    for bad in ({"max_grants": 0}, {"unused_s": -1}):
        with pytest.raises(InvalidRequest):
            MappingCache(fake, **bad)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["get", "read", "put", "age", "drop"])), max_size=60))
def test_pins_are_what_the_cache_says(steps: list[tuple[int, str]]) -> None:
    fake = Fake()
    cache = fake.cache(max_grants=4, unused_s=3)
    used: dict[int, int] = {}
    for gref, what in steps:
        fake.now_s += 1
        if what in ("get", "read"):
            cache.acquire(gref, read_only=what == "read")
            used[gref] = used.get(gref, 0) + 1
        elif what == "put" and used.get(gref):
            cache.release(gref)
            used[gref] -= 1
        elif what == "age":
            cache.age()
        elif what == "drop":
            assert not (cache.drop(gref) and used.get(gref))
        mapped = {pinned for pinned, _ in fake.pins}
        assert {each for each, users in used.items() if users} <= mapped
        assert cache.statistics().cached == len(mapped)
        assert all(pins == 1 for pins in fake.pins.values())
        assert len(mapped) <= max(4, sum(users > 0 for users in used.values()))
    cache.close()
    assert fake.pins == {}


def test_over_real_grants_a_cached_page_cannot_be_revoked() -> None:
    with chunk() as c:
        gref = c.granter.access(2)
        with MappingCache(c.mapper) as cache:
            assert cache.acquire(gref) == 2 * 4096
            cache.release(gref)
            assert not c.granter.revoke(gref)
            assert cache.drop(gref)
            assert c.granter.revoke(gref)
            c.granter.access(2)
            cache.acquire(gref)
        assert c.granter.revoke(gref)
