# SPDX-License-Identifier: MIT
"""A frame like the one before goes where that went, unless something has changed in between, at the same moment."""

from collections.abc import Callable

import pytest

from paravirt.ring.switch import Kind, Switch, Tag, Verdict

A, B, C = (bytes((2, 0, 0, 0, 0, i)) for i in (1, 2, 3))
NOW = 10**9


def frame(to: bytes, source: bytes, rest: bytes = b"\x08\x00") -> bytes:
    return (to + source + rest).ljust(60, b"\0")


@pytest.fixture
def switch() -> Switch:
    """Port 0 has A, port 1 has B, port 2 is another."""
    switch = Switch()
    for _ in range(3):
        switch.add_port()
    switch.forward(1, frame(A, B), NOW)
    switch.forward(0, frame(B, A), NOW)
    return switch


def ports(verdict: Verdict) -> list[int]:
    return [port for port, _ in verdict.ports]


def test_repeats_are_counted_as_others_are(switch: Switch) -> None:
    before = switch.statistics(0).rx_frames, switch.statistics(1).tx_bytes
    for n_bytes in (60, 61, 1500):
        assert ports(switch.forward(0, frame(B, A), NOW, frame_bytes=n_bytes)) == [1]
    assert switch.statistics(0).rx_frames == before[0] + 3
    assert switch.statistics(1).tx_bytes == before[1] + 60 + 61 + 1500


CHANGES: dict[str, tuple[Callable[[Switch], object], list[int]]] = {
    "the station is at another port": (lambda switch: switch.forward(2, frame(A, B), NOW), [2]),
    "its port is gone": (lambda switch: switch.remove_port(1), [2]),
    "its port is in another VLAN": (lambda switch: switch.set_access(1, 5), [2]),
    "its port carries other VLANs": (lambda switch: switch.set_trunk(1, [7], native=None), [2]),
    "ours is in another VLAN": (lambda switch: switch.set_access(0, 5), [1, 2]),
    "its port is disabled": (lambda switch: switch.disable(1), [2]),
    "ours is disabled": (lambda switch: switch.disable(0), []),
    "ours is locked to another": (lambda switch: switch.lock(0, C.hex(":")), []),
    "its port is the mirror": (lambda switch: switch.set_mirror(1), [2]),
    "ours is the mirror": (lambda switch: switch.set_mirror(0), []),
    "it was forgotten": (lambda switch: switch.forget(1), [1, 2]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_counts_at_once(switch: Switch, what: str) -> None:
    change, expected = CHANGES[what]
    assert ports(switch.forward(0, frame(B, A), NOW)) == [1]
    change(switch)
    assert ports(switch.forward(0, frame(B, A), NOW)) == expected


def test_a_port_that_is_mirrored_from_now_on(switch: Switch) -> None:
    switch.forward(0, frame(B, A), NOW)
    switch.set_mirror(2)
    switch.forward(0, frame(B, A), NOW)
    switch.set_mirrored(1, True)
    assert switch.forward(0, frame(B, A), NOW).mirror == 2
    switch.set_mirrored(1, False)
    assert switch.forward(0, frame(B, A), NOW).mirror is None


def test_it_is_old_later(switch: Switch) -> None:
    switch.set_ageing(1.0)
    assert ports(switch.forward(0, frame(B, A), NOW)) == [1]
    assert ports(switch.forward(0, frame(B, A), NOW + 2 * 10**9)) == [1, 2]


def test_tags_are_part_of_what_is_alike(switch: Switch) -> None:
    switch.set_trunk(1, None, native=None)
    switch.set_access(0, 5)
    switch.set_access(2, 5)
    switch.forward(1, frame(A, B, b"\x81\x00\x00\x05\x08\x00"), NOW)
    first = switch.forward(0, frame(B, A), NOW)
    assert first.ports == switch.forward(0, frame(B, A), NOW).ports == ((1, Tag.INSERT),)
    assert switch.forward(0, frame(B, A, b"\x81\x00\x00\x06\x08\x00"), NOW).kind is Kind.DROP
    assert ports(switch.forward(0, frame(B, A, b"\x81\x00\x00\x00\x08\x00"), NOW)) == [1]


def test_another_port_with_the_same_header_moves_its_station(switch: Switch) -> None:
    switch.forward(0, frame(B, A), NOW)
    assert ports(switch.forward(2, frame(B, A), NOW)) == [1]
    assert ports(switch.forward(1, frame(A, B), NOW)) == [2]
    assert switch.statistics(2).moved == 1


def test_a_short_header_is_no_repeat(switch: Switch) -> None:
    switch.forward(0, frame(B, A), NOW)
    assert switch.forward(0, frame(B, A)[:13], NOW).reason == "bad_frame"
