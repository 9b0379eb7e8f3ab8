# SPDX-License-Identifier: MIT
"""What a port of the switch can be told: its VLANs, limits, groups, the mirror."""

import errno
from collections.abc import Iterable

import pytest

from paravirt.errors import InvalidRequest, NotFound, ResourceLimit
from paravirt.ring._core import ffi, lib
from paravirt.ring.switch import MAX_GROUPS, MAX_VID, Kind, Limit, Switch, Tag, Verdict

from .switch_frames import BROADCAST, GROUP, S, dropped, ethernet, raw, reached, say, station, switch_of

# -- VLANs: (in port, tag) -> what each of the ports below gets

PORTS = {0: "all", 1: "access 5", 2: "access 6", 3: "trunk 5, 6", 4: "trunk 5, native 6", 5: "all, native 5"}


@pytest.fixture
def vlans() -> Switch:
    switch = switch_of(6)
    switch.set_access(1, 5)
    switch.set_access(2, 6)
    switch.set_trunk(3, [5, 6], native=None)
    switch.set_trunk(4, [5], native=6)
    switch.set_trunk(5, native=5)
    return switch


K, T, N, W = Tag.KEEP, Tag.STRIP, Tag.INSERT, Tag.SET
PRIORITY = 3 << 13


@pytest.mark.parametrize(
    ("port", "tag", "vid", "expected"),
    [
        (0, None, 0, {}),
        (0, 5, 5, {1: T, 3: K, 4: K, 5: T}),
        (0, 6, 6, {2: T, 3: K, 4: T, 5: K}),
        (0, 7, 7, {5: K}),
        (0, PRIORITY | 5, 5, {1: T, 3: K, 4: K, 5: T}),
        (0, 0x1000 | 5, 5, {1: T, 3: K, 4: K, 5: T}),
        (0, 4094, 4094, {5: K}),
        (0, 4095, 0, "vlan"),
        (1, None, 5, {0: N, 3: N, 4: N, 5: K}),
        (1, 0, 5, {0: W, 3: W, 4: W, 5: T}),
        (1, PRIORITY, 5, {0: W, 3: W, 4: W, 5: T}),
        (1, 5, 0, "vlan"),
        (1, 6, 0, "vlan"),
        (2, None, 6, {0: N, 3: N, 4: K, 5: N}),
        (3, None, 0, "vlan"),
        (3, PRIORITY, 0, "vlan"),
        (3, 5, 5, {0: K, 1: T, 4: K, 5: T}),
        (3, 7, 0, "vlan"),
        (4, None, 6, {0: N, 2: K, 3: N, 5: N}),
        (4, 0, 6, {0: W, 2: T, 3: W, 5: W}),
        (4, 6, 6, {0: K, 2: T, 3: K, 5: K}),
        (4, 7, 0, "vlan"),
        (5, None, 5, {0: N, 1: K, 3: N, 4: N}),
        (5, 5, 5, {0: K, 1: T, 3: K, 4: K}),
        (5, 4095, 0, "vlan"),
    ],
)
def test_vlans(vlans: Switch, port: int, tag: int | None, vid: int, expected: dict[int, Tag] | str) -> None:
    verdict = say(vlans, port, 1, tag=tag)
    assert verdict.vid == vid
    if isinstance(expected, str):
        assert dropped(verdict) == expected
        assert vlans.addresses(0) == []
        return
    assert dict(verdict.ports) == expected
    assert vlans.find(station(1), 0, vid) == port
    n = 60 if tag is None else 64
    for to, what in expected.items():
        assert vlans.statistics(to).tx_bytes == n + {K: 0, T: -4, N: 4, W: 0}[what]
    # Known stations are reached with the same change.
    for to, what in expected.items():
        for from_tag in (None, vid):
            if say(vlans, to, 100 + to, tag=from_tag).vid == vid:
                assert say(vlans, port, 1, station(100 + to), tag=tag).ports == ((to, what),)


def test_a_tag_of_no_other_kind_counts() -> None:
    switch = switch_of(2)
    switch.set_access(0, 5)
    for kind in (0x88A8, 0x9100, 0x0081):
        assert switch.forward(0, ethernet(BROADCAST, station(1), kind=kind, payload=b"\0\7" + bytes(44)), 0).vid == 5


def test_a_priority_tag_in_vlan_0_goes() -> None:
    switch = switch_of(2)
    assert say(switch, 0, 1, tag=PRIORITY).ports == ((1, Tag.STRIP),)


def test_stations_are_known_for_each_vlan() -> None:
    switch = switch_of(4)
    for port, vid in ((0, 5), (1, 6), (2, 5), (3, 6)):
        switch.set_access(port, vid)
    say(switch, 0, 1)
    say(switch, 1, 1)
    assert [(a.vid, a.port) for a in switch.addresses(0)] == [(5, 0), (6, 1)]
    assert reached(say(switch, 2, 2, station(1))) == [0]
    assert reached(say(switch, 3, 3, station(1))) == [1]
    assert reached(say(switch, 3, 3, station(2))) == [1], "a station of another VLAN is unknown"
    assert switch.find(station(0), 0) is None


def test_another_vlan_forgets() -> None:
    switch = switch_of(2)
    for change in (lambda: switch.set_access(0, 5), lambda: switch.set_trunk(0, native=5)):
        say(switch, 0, 1)
        change()
        assert switch.addresses(0) == []


def test_vlans_that_there_are_not() -> None:
    switch = switch_of(1)
    switch.set_access(0, MAX_VID)
    switch.set_access(0, 0)
    for vid in (-1, 4095, 2**32):
        for call in (
            lambda vid: switch.set_access(0, vid),
            lambda vid: switch.set_trunk(0, [1, vid]),
            lambda vid: switch.set_trunk(0, native=vid),
            lambda vid: switch.find(station(1), 0, vid),
        ):
            with pytest.raises(InvalidRequest, match="VLAN"):
                call(vid)
    assert lib.pv_switch_set_access(switch.core, 0, 4095) == -errno.EINVAL
    assert lib.pv_switch_set_trunk(switch.core, 0, ffi.NULL, 4095) == -errno.EINVAL
    assert lib.pv_switch_set_trunk(switch.core, 0, ffi.NULL, -2) == -errno.EINVAL
    assert lib.pv_switch_find(switch.core, raw(station(1)), 4095, 0) == -errno.ENOENT
    # A map with bits that mean nothing.
    switch.add_port()
    assert lib.pv_switch_set_trunk(switch.core, 0, b"\xff" * 512, -1) == 0
    assert dropped(say(switch, 0, 1, tag=4095)) == dropped(say(switch, 0, 1)) == "vlan"


# -- limits

KINDS = {Limit.BROADCAST: BROADCAST, Limit.MULTICAST: GROUP, Limit.UNKNOWN: station(99)}


@pytest.mark.parametrize("kind", Limit)
def test_limits(kind: Limit) -> None:
    switch = switch_of(2)
    switch.set_limit(0, kind, 10, 3)

    def sent(now: int, count: int = 20) -> int:
        return [say(switch, 0, 1, KINDS[kind], now=now).reason for _ in range(count)].count("none")

    start = 5 * S
    assert sent(start) == 3
    assert sent(start + S // 10 - 1) == 0
    assert sent(start + S // 10) == 1
    assert sent(start + S // 4) == 1
    assert sent(start + S // 4 + S // 20) == 1, "what was earned is not lost"
    assert sent(start + 1000 * S) == 3, "no more than the burst is saved"
    assert sent(start) == 0, "a clock that goes back earns nothing"
    assert switch.statistics(0).drops["limit"] == 131
    assert say(switch, 1, 2, KINDS[kind], now=start).kind is Kind.FLOOD, "other ports have their own"
    for other, to in KINDS.items():
        if other is not kind:
            assert sum(say(switch, 0, 1, to, now=start).kind is Kind.FLOOD for _ in range(50)) == 50
    assert say(switch, 0, 1, station(2), now=start).kind is Kind.UNICAST, "known stations are not limited"
    switch.set_limit(0, kind, 0)
    assert sent(start) == 20


@pytest.mark.parametrize(("rate", "burst"), [(1, 1), (9, 1), (10, 1), (2000, 200)])
def test_a_burst_that_nobody_named(rate: int, burst: int) -> None:
    switch = switch_of(2)
    switch.set_limit(0, Limit.BROADCAST, rate)
    assert sum(say(switch, 0, 1, now=S).kind is Kind.FLOOD for _ in range(300)) == burst


def test_limits_of_any_size() -> None:
    switch = switch_of(2)
    most = 2**32 - 1
    switch.set_limit(0, Limit.BROADCAST, most, most)
    for now in (0, 1, 2**62, 2**63 - 1):
        assert say(switch, 0, 1, now=now).kind is Kind.FLOOD
    switch.set_limit(0, Limit.BROADCAST, 3, 1)
    passed = [now for now in range(0, 10 * S, S // 100) if say(switch, 0, 1, now=now).kind is Kind.FLOOD]
    assert len(passed) == 30
    for wrong in (-1, 2**32):
        with pytest.raises(InvalidRequest):
            switch.set_limit(0, Limit.BROADCAST, wrong)
    assert lib.pv_switch_set_limit(switch.core, 0, 3, 1, 1) == -errno.EINVAL


# -- multicast filter


def test_multicast_filter() -> None:
    switch = switch_of(3)
    switch.set_multicast_filter(1, True)
    assert reached(say(switch, 0, 1, GROUP)) == [2]
    assert reached(say(switch, 0, 1)) == [1, 2], "broadcast is none of it"
    assert reached(say(switch, 0, 1, station(9))) == [1, 2], "nor are unknown stations"
    switch.add_group(1, GROUP)
    switch.add_group(1, GROUP)
    assert reached(say(switch, 0, 1, GROUP)) == [1, 2]
    assert reached(say(switch, 0, 1, "33:33:00:00:00:02")) == [2]
    switch.remove_group(1, GROUP)
    assert reached(say(switch, 0, 1, GROUP)) == [2]
    with pytest.raises(NotFound, match="group"):
        switch.remove_group(1, GROUP)
    switch.set_multicast_filter(1, False)
    assert reached(say(switch, 0, 1, GROUP)) == [1, 2]
    assert reached(say(switch, 1, 2, GROUP)) == [0, 2]


def test_groups_of_a_port() -> None:
    switch = switch_of(2)
    switch.set_multicast_filter(1, True)
    groups = [f"33:33:00:00:00:{number:02x}" for number in range(MAX_GROUPS + 1)]
    for group in groups[:-1]:
        switch.add_group(1, group)
    with pytest.raises(ResourceLimit, match="64"):
        switch.add_group(1, groups[-1])
    switch.add_group(1, groups[5])
    assert [bool(reached(say(switch, 0, 1, group))) for group in groups] == [True] * MAX_GROUPS + [False]
    switch.remove_group(1, groups[0])
    switch.add_group(1, groups[-1])
    assert [bool(reached(say(switch, 0, 1, group))) for group in groups] == [False] + [True] * MAX_GROUPS
    for wrong in (station(1), BROADCAST, "00:00:00:00:00:00"):
        with pytest.raises(InvalidRequest, match="group"):
            switch.add_group(1, wrong)


# -- the mirror


def mirrored(verdicts: Iterable[Verdict]) -> list[int | None]:
    return [verdict.mirror for verdict in verdicts]


def test_the_mirror_hears_what_mirrored_ports_do() -> None:
    switch = switch_of(4)
    say(switch, 0, 1)
    say(switch, 1, 2)
    say(switch, 3, 4)
    switch.set_mirror(3)
    switch.set_mirrored(1, True)
    assert switch.find(station(4), 0) is None
    received = say(switch, 1, 2, station(1))
    assert (received.kind, reached(received), received.mirror) == (Kind.UNICAST, [0], 3)
    sent = say(switch, 0, 1, station(2))
    assert (sent.kind, reached(sent), sent.mirror) == (Kind.UNICAST, [1], 3)
    flooded = say(switch, 0, 1)
    assert (reached(flooded), flooded.mirror) == ([1, 2], 3), "one copy, and no other"
    assert say(switch, 2, 3, station(1)).mirror is None
    assert say(switch, 2, 3, station(4)).mirror == 3, "flooded to port 1, too"
    assert switch.statistics(3).tx_frames == 2 + 4
    assert dropped(say(switch, 3, 4)) == "mirror"
    assert switch.statistics(3).drops == {"mirror": 1}
    switch.set_mirrored(1, False)
    assert say(switch, 1, 2, station(1)).mirror is None


def test_the_mirror_hears_what_is_dropped() -> None:
    switch = switch_of(3)
    switch.set_mirror(2)
    switch.set_mirrored(0, True)
    switch.set_limit(0, Limit.BROADCAST, 1)
    say(switch, 0, 1)
    switch.set_address_limit(0, 1)
    assert (
        mirrored(
            [
                say(switch, 0, 1),
                say(switch, 0, 1, station(1)),
                say(switch, 0, 2),
                say(switch, 0, 1, tag=4095),
                say(switch, 0, 1, "01:80:c2:00:00:00"),
            ]
        )
        == [2] * 5
    )
    assert switch.statistics(0).drops == dict.fromkeys(["limit", "same_port", "table", "vlan", "blocked"], 1)
    assert switch.forward(0, b"short", 0).mirror is None
    switch.disable(0)
    assert say(switch, 0, 1).mirror is None


def test_the_mirror_is_no_port_that_is_gone_or_closed() -> None:
    switch = switch_of(3)
    switch.set_mirror(2)
    switch.set_mirrored(0, True)
    switch.disable(2)
    assert say(switch, 0, 1).mirror is None
    switch.unlock(2)
    assert say(switch, 0, 1).mirror == 2
    switch.remove_port(2)
    assert say(switch, 0, 1).mirror is None
    assert switch.add_port() == 2
    assert reached(say(switch, 0, 1)) == [1, 2]
    switch.set_mirror(2)
    switch.set_mirror(None)
    assert (reached(say(switch, 0, 1)), say(switch, 0, 1).mirror) == ([1, 2], None)
