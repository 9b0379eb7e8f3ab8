# SPDX-License-Identifier: MIT
"""The learning switch: what it learns, what it forgets, what is no frame.

What ports are told: test_switch_ports.py; locked ports: test_switch_guard.py; all at once: test_switch_model.py.
"""

import errno
import random
from collections import Counter

import pytest

from paravirt.errors import InvalidRequest, NotFound, ResourceLimit
from paravirt.ring._core import ffi, lib
from paravirt.ring.switch import DROPS, MAX_PORTS, Kind, Limit, Switch, Tag, Verdict, mac_bytes, mac_text
from tests.faults import failing

from .switch_frames import BROADCAST, GROUP, S, dropped, ethernet, reached, say, station, switch_of

# -- learning


def test_it_floods_until_it_has_heard_of_a_station() -> None:
    switch = switch_of(4)
    verdict = say(switch, 0, 1, station(2))
    assert verdict == Verdict(Kind.FLOOD, "none", tuple((port, Tag.KEEP) for port in (1, 2, 3)), None, 0)
    assert say(switch, 2, 2, station(1)) == Verdict(Kind.UNICAST, "none", ((0, Tag.KEEP),), None, 0)
    assert say(switch, 0, 1, station(2)).kind is Kind.UNICAST
    assert reached(say(switch, 0, 1)) == [1, 2, 3], "broadcast goes to all"
    assert reached(say(switch, 0, 1, GROUP)) == [1, 2, 3]
    assert [(a.mac, a.vid, a.port, a.seen_ns) for a in switch.addresses(0)] == [
        (station(1), 0, 0, 0),
        (station(2), 0, 2, 0),
    ]
    assert repr(switch) == "<Switch of 4 ports, 2 addresses>"


def test_statistics() -> None:
    switch = switch_of(3)
    say(switch, 0, 1)
    say(switch, 1, 2, station(1))
    say(switch, 1, 2, station(2))
    first, second, third = (switch.statistics(port) for port in range(3))
    assert (first.rx_frames, first.rx_bytes, first.tx_frames, first.tx_bytes) == (1, 60, 1, 60)
    assert (first.flooded, first.addresses, first.drops) == (1, 1, {})
    assert (second.rx_frames, second.tx_frames, second.flooded, second.drops) == (2, 1, 0, {"same_port": 1})
    assert (third.rx_frames, third.tx_frames, third.tx_bytes) == (0, 1, 60)
    switch.forward(0, ethernet(BROADCAST, station(1)), 0, frame_bytes=9000)
    assert switch.statistics(0).rx_bytes == 9060
    assert switch.statistics(2).tx_bytes == 9060


def test_a_station_moves() -> None:
    switch = switch_of(3)
    say(switch, 0, 1)
    say(switch, 1, 1)
    assert switch.find(station(1), 0) == 1
    assert [switch.statistics(port).addresses for port in range(3)] == [0, 1, 0]
    assert [switch.statistics(port).moved for port in range(3)] == [0, 1, 0]
    assert reached(say(switch, 2, 2, station(1))) == [1]
    assert switch.find(station(9), 0) is None


def test_frames_to_the_own_port() -> None:
    switch = switch_of(2)
    say(switch, 0, 1)
    assert dropped(say(switch, 0, 2, station(1))) == "same_port"
    assert dropped(say(switch, 0, 3, station(3))) == "same_port", "to itself"
    assert switch.find(station(2), 0) == 0


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        ethernet(BROADCAST, station(1))[:13],
        ethernet(BROADCAST, "00:00:00:00:00:00"),
        ethernet(BROADCAST, GROUP),
        ethernet(BROADCAST, BROADCAST),
        ethernet(BROADCAST, station(1), tag=5)[:17],
    ],
    ids=["empty", "short", "zero", "group", "broadcast", "short tag"],
)
def test_bad_frames(frame: bytes) -> None:
    switch = switch_of(2)
    assert dropped(switch.forward(0, frame, 0)) == "bad_frame"
    padded = frame + bytes(64)
    assert dropped(switch.forward(0, padded, 0, header_bytes=len(frame))) == "bad_frame"
    assert dropped(switch.forward(0, padded, 0, frame_bytes=len(frame))) == "bad_frame"
    assert switch.statistics(0).drops == {"bad_frame": 3}
    assert switch.addresses(0) == []


def test_a_header_is_enough() -> None:
    switch = switch_of(2)
    assert switch.forward(0, ethernet(BROADCAST, station(1))[:14], 0).kind is Kind.FLOOD
    assert switch.forward(0, ethernet(BROADCAST, station(1), tag=5)[:18], 0).vid == 5


def test_a_port_that_there_is_not() -> None:
    switch = switch_of(2)
    for port in (2, 15, 16, MAX_PORTS, -1, 2**32 - 1):
        assert dropped(say(switch, port, 1)) == "no_port"
    assert dropped(say(Switch(), 0, 1)) == "no_port"


@pytest.mark.parametrize("last", range(16))
def test_link_local_groups_are_blocked(last: int) -> None:
    switch = switch_of(2)
    assert dropped(say(switch, 0, 1, f"01:80:c2:00:00:{last:02x}")) == "blocked"
    assert switch.find(station(1), 0) is None
    for passed in ("01:80:c2:00:00:10", "01:80:c2:00:01:00", "01:80:c3:00:00:00"):
        assert say(switch, 0, 1, passed).kind is Kind.FLOOD


# -- age, number, limits of addresses


def test_ageing() -> None:
    switch = switch_of(2)
    say(switch, 0, 1)
    say(switch, 0, 2, now=100 * S)
    assert say(switch, 1, 3, station(1), now=300 * S - 1).kind is Kind.UNICAST
    assert say(switch, 1, 3, station(1), now=300 * S).kind is Kind.FLOOD, "nobody has to call age"
    assert [address.mac for address in switch.addresses(300 * S)] == [station(2), station(3)]
    assert switch.find(station(1), 300 * S) is None
    assert switch.statistics(0).addresses == 2
    assert switch.age(300 * S) == 1
    assert switch.age(300 * S) == 0
    assert switch.statistics(0).addresses == 1
    assert switch.age(1000 * S) == 2
    assert switch.addresses(0) == []


def test_who_speaks_does_not_age() -> None:
    switch = switch_of(2)
    for now in range(0, 2000, 50):
        say(switch, 0, 1, now=now * S)
    assert switch.find(station(1), 2200 * S) == 0
    (address,) = switch.addresses(2200 * S)
    assert address.seen_ns == 1950 * S
    say(switch, 0, 1, now=1951 * S)
    assert switch.addresses(1951 * S) == [address], "within a 256th of the ageing time it is not looked at"
    say(switch, 0, 1, now=1952 * S)
    assert switch.addresses(1952 * S)[0].seen_ns == 1952 * S


def test_another_ageing_time() -> None:
    switch = switch_of(2)
    say(switch, 0, 1)
    switch.set_ageing(2.5)
    assert switch.find(station(1), 5 * S // 2 - 1) == 0
    assert switch.find(station(1), 5 * S // 2) is None
    switch.set_ageing(0)
    assert switch.find(station(1), 10**18) == 0
    assert switch.age(10**18) == 0
    for wrong in (-1, 1e9):
        with pytest.raises(InvalidRequest, match="age"):
            switch.set_ageing(wrong)
    assert lib.pv_switch_set_ageing(switch.core, -1) == -errno.EINVAL


def test_an_aged_station_does_not_move_it_comes_anew() -> None:
    switch = switch_of(2)
    say(switch, 0, 1)
    say(switch, 1, 1, now=300 * S)
    assert switch.find(station(1), 300 * S) == 1
    assert switch.statistics(1).moved == 0


@pytest.mark.parametrize("most", [1, 2, 100])
def test_the_oldest_goes_when_the_table_is_full(most: int) -> None:
    switch = switch_of(2, most)
    for number in range(most):
        say(switch, 0, number, now=number * S)
    say(switch, 0, 0, now=150 * S)
    assert switch.evicted == 0
    for number in range(most, 2 * most - 1):
        say(switch, 1, number, now=200 * S)
    left = [*range(most, 2 * most - 1)]
    assert [a.mac for a in switch.addresses(200 * S)] == [station(number) for number in [0, *left]]
    assert switch.evicted == most - 1
    say(switch, 1, 9999, now=200 * S)
    assert switch.find(station(0), 200 * S) is None
    assert len(switch.addresses(200 * S)) == most


def buckets(switch: Switch, number: int) -> set[int]:
    """Of a station in VLAN 0: as pv_switch_table.c finds them."""
    mixed = ((1 << 63 | int(station(number).replace(":", ""), 16)) * switch.core.seeds[0]) % 2**64
    mixed = (mixed ^ mixed >> 32) * switch.core.seeds[1] % 2**64
    bits = switch.core.bucket_bits
    return {mixed >> 64 - bits, (mixed << bits) % 2**64 >> 64 - bits}


def test_the_oldest_of_a_bucket_goes_when_the_bucket_is_full() -> None:
    switch = switch_of(2, 32)
    other = next(number for number in range(4096) if 0 not in buckets(switch, number))
    together = [number for number in range(4096) if buckets(switch, number) == {0}][:10]
    say(switch, 0, other)
    for now, number in enumerate(together[:8], 1):
        say(switch, 0, number, now=now * 2 * S)
    assert (switch.core.n_addresses, switch.evicted) == (9, 0)
    for number in together[:3]:
        say(switch, 0, number, now=30 * S)
    for number in together[8:]:
        say(switch, 1, number, now=31 * S)
    gone = [number for number in [other, *together] if switch.find(station(number), 31 * S) is None]
    assert gone == together[3:5]
    assert (switch.core.n_addresses, switch.evicted) == (9, 2)


def test_ten_thousand_addresses() -> None:
    switch = switch_of(101)
    numbers = random.Random(1).sample(range(1, 2**24), 10_000)
    for number in numbers:
        say(switch, number % 100, number, station(numbers[0]))
    assert switch.evicted == 0
    assert len(switch.addresses(0)) == 10_000
    for number in numbers:
        assert reached(say(switch, 100, 0, station(number))) == [number % 100]
    found = Counter(address.port for address in switch.addresses(0))
    assert [switch.statistics(port).addresses for port in range(101)] == [found[port] for port in range(101)]


@pytest.mark.parametrize("step", [1, 256, 65537, 2**32 + 1])
def test_the_table_holds_what_it_promises(step: int) -> None:
    """However regular the addresses are."""
    switch = switch_of(1)
    verdict = ffi.new("struct pv_switch_verdict *")
    for number in range(1, 16385):
        # A station's address has an even first byte.
        frame = bytes(6) + b"\2" + (number * step % 2**40).to_bytes(5, "big") + b"\x88\xb5"
        assert lib.pv_switch_forward(switch.core, 0, frame, 14, 60, 0, verdict) == Kind.FLOOD
    assert (switch.core.n_addresses, switch.evicted) == (16384, 0)


def test_seeds() -> None:
    assert list(Switch(seed=5).core.seeds) == list(Switch(seed=5).core.seeds) != list(Switch(seed=6).core.seeds)
    assert list(Switch().core.seeds) != list(Switch().core.seeds)


def test_a_port_has_so_many_addresses() -> None:
    switch = switch_of(2)
    switch.set_address_limit(0, 2)
    for number in (1, 2):
        assert say(switch, 0, number, now=number * 100 * S).kind is Kind.FLOOD
    assert dropped(say(switch, 0, 3, now=200 * S)) == "table"
    assert say(switch, 0, 1, now=200 * S).kind is Kind.FLOOD
    assert say(switch, 1, 3, now=201 * S).kind is Kind.FLOOD
    assert dropped(say(switch, 0, 3, now=202 * S)) == "table", "nor does it move there"
    assert switch.find(station(3), 202 * S) == 1
    assert say(switch, 0, 4, now=500 * S).kind is Kind.FLOOD, "what is old does not count"
    switch.set_address_limit(0, 0)
    assert say(switch, 0, 5, now=500 * S).kind is Kind.FLOOD
    assert switch.find(station(4), 500 * S) == 0


def test_a_lower_limit_forgets_the_oldest() -> None:
    switch = switch_of(2)
    for number in range(10):
        say(switch, 0, number, now=number * S)
    switch.set_address_limit(0, 3)
    assert [address.mac for address in switch.addresses(9 * S)] == [station(7), station(8), station(9)]
    with pytest.raises(InvalidRequest):
        switch.set_address_limit(0, -1)


# -- ports


def test_removed_ports() -> None:
    switch = switch_of(3)
    for port in range(3):
        say(switch, port, port)
        say(switch, port, 10 + port)
    switch.remove_port(1)
    assert switch.ports == [0, 2]
    assert {address.port for address in switch.addresses(0)} == {0, 2}
    assert reached(say(switch, 0, 0, station(1))) == [2], "unknown now"
    assert dropped(say(switch, 1, 1)) == "no_port"
    assert switch.add_port() == 1
    assert switch.statistics(1).rx_frames == 0
    assert switch.statistics(1).addresses == 0
    assert reached(say(switch, 0, 0)) == [1, 2]
    switch.forget(0)
    assert switch.find(station(0), 0) is None


def test_all_ports() -> None:
    switch = switch_of(MAX_PORTS)
    with pytest.raises(ResourceLimit, match="4096"):
        switch.add_port()
    assert reached(say(switch, 7, 1)) == [port for port in range(MAX_PORTS) if port != 7]
    assert reached(say(switch, 4095, 2, station(1))) == [7]
    switch.remove_port(100)
    switch.remove_port(50)
    assert (switch.add_port(), switch.add_port()) == (50, 100)


def test_calls_for_a_port_that_there_is_not() -> None:
    switch = switch_of(1)
    for port in (-1, 1, MAX_PORTS, 2**40):
        for call in (
            switch.remove_port,
            lambda port: switch.set_access(port, 1),
            switch.set_trunk,
            lambda port: switch.set_limit(port, Limit.UNKNOWN, 1),
            lambda port: switch.set_address_limit(port, 1),
            lambda port: switch.lock(port, station(1)),
            lambda port: switch.set_multicast_filter(port, True),
            lambda port: switch.add_group(port, GROUP),
            lambda port: switch.remove_group(port, GROUP),
            switch.set_mirror,
            lambda port: switch.set_mirrored(port, True),
            switch.forget,
            switch.statistics,
        ):
            with pytest.raises(NotFound):
                call(port)
    assert lib.pv_switch_set_mirror(switch.core, -2) == -errno.ENOENT
    assert lib.pv_switch_set_mirror(switch.core, -(2**31)) == -errno.ENOENT


# -- the rest


@pytest.mark.parametrize(("function", "result"), [("aligned_alloc", 0), ("calloc", 0), ("getrandom", -1)], ids=str)
def test_no_memory_for_a_switch(function: str, result: int) -> None:
    with failing(function, errno.ENOMEM, result=result), pytest.raises(ResourceLimit, match="switch"):
        Switch()


def test_no_memory_for_a_port() -> None:
    switch = switch_of(16)
    with failing("realloc"), pytest.raises(ResourceLimit, match="memory"):
        switch.add_port()
    assert switch.add_port() == 16
    with failing("calloc"), pytest.raises(ResourceLimit, match="memory"):
        switch.add_port()
    assert reached(say(switch, 0, 1)) == list(range(1, 17))


def test_how_many_addresses() -> None:
    for wrong in (0, -1, 2**20 + 1):
        with pytest.raises(InvalidRequest):
            Switch(wrong)
    core = ffi.new("struct pv_switch *")
    assert lib.pv_switch_init(core, 2**20 + 1, 1) == -errno.EINVAL
    assert lib.pv_switch_init(core, 0, 1) == 0
    assert core.max_addresses == 16384
    lib.pv_switch_destroy(core)
    lib.pv_switch_destroy(core)


def test_names_of_reasons() -> None:
    assert DROPS == (
        "none", "no_port", "bad_frame", "vlan", "spoof", "limit", "same_port", "blocked", "table", "disabled", "mirror",
    )  # fmt: skip
    known = {name: getattr(lib, name) for name in dir(lib) if name.startswith("PV_SWITCH_DROP_")}
    assert {name.removeprefix("PV_SWITCH_DROP_").lower(): value for name, value in known.items()} == {
        name: value for value, name in enumerate(DROPS)
    }
    assert ffi.string(lib.pv_switch_drop_name(len(DROPS))) == b"?"


def test_addresses_as_text() -> None:
    assert mac_bytes("00:16:3E:0a:ff:01") == bytes([0, 0x16, 0x3E, 0x0A, 0xFF, 1])
    assert mac_text(mac_bytes("00:16:3e:0a:ff:01")) == "00:16:3e:0a:ff:01"
    for wrong in (
        "",
        "00:16:3e:0a:ff",
        "00:16:3e:0a:ff:1",
        "00-16-3e-0a-ff-01",
        "00:16:3e:0a:ff:gg",
        "00:16:3e:0a:ff:+1",
    ):
        with pytest.raises(InvalidRequest, match="MAC"):
            mac_bytes(wrong)
