# SPDX-License-Identifier: MIT
"""Locked ports of the switch: what may pass, by XenServer's rules; what is not seen does not."""

import pytest

from paravirt.errors import InvalidRequest
from paravirt.ring._core import ffi, lib
from paravirt.ring.switch import MAX_LOCKED_ADDRESSES, Kind, Switch

from .switch_frames import (
    ARP,
    BROADCAST,
    GROUP,
    ICMPV6,
    IPV4,
    IPV6,
    TCP,
    UDP,
    arp,
    dropped,
    ethernet,
    extension,
    fragment,
    icmpv6,
    ipv4,
    ipv6,
    reached,
    say,
    station,
    switch_of,
)

MAC, OTHER = station(1), station(2)
OWN4, OWN4_TOO, OTHER4, NONE4 = "192.0.2.1", "198.51.100.7", "192.0.2.2", "0.0.0.0"
OWN6, OWN6_TOO, OTHER6 = "2001:db8::1", "fe80::216:3eff:fe00:1", "2001:db8::2"
HOP, ROUTING, FRAGMENT, OPTIONS = 0, 43, 44, 60
ADVERTISEMENT = 136


def from_own(kind: int, payload: bytes) -> bytes:
    return ethernet(BROADCAST, MAC, kind=kind, payload=payload)


def icmp(kind: int, target: str = OWN6) -> bytes:
    return from_own(IPV6, ipv6(OWN6, icmpv6(kind, target), following=ICMPV6))


def chain(*headers: bytes, following: int) -> bytes:
    return from_own(IPV6, ipv6(OWN6, b"".join(headers), following=following))


PASS = {
    "arp": from_own(ARP, arp(MAC, OWN4)),
    "arp answer": from_own(ARP, arp(MAC, OWN4_TOO, operation=2)),
    "arp probe": from_own(ARP, arp(MAC, NONE4)),
    "ipv4": from_own(IPV4, ipv4(OWN4)),
    "ipv4, second address": from_own(IPV4, ipv4(OWN4_TOO, protocol=47)),
    "ipv4 fragment": from_own(IPV4, ipv4(OWN4, offset=100)),
    "dhcp": from_own(IPV4, ipv4(NONE4, protocol=UDP, ports=(68, 67))),
    "dhcp, options": from_own(IPV4, ipv4(NONE4, protocol=UDP, ports=(68, 67), options=10)),
    "dhcp, first fragment": from_own(IPV4, ipv4(NONE4, protocol=UDP, ports=(68, 67), offset=0x2000)),
    "ipv6": from_own(IPV6, ipv6(OWN6)),
    "ipv6, second address": from_own(IPV6, ipv6(OWN6_TOO, following=UDP)),
    "ipv6, nothing follows": from_own(IPV6, ipv6(OWN6, b"", following=59)),
    "ping": icmp(128),
    "router solicitation": icmp(133),
    "neighbour solicitation": icmp(135, OTHER6),
    "advertisement": icmp(ADVERTISEMENT),
    "advertisement, second address": icmp(ADVERTISEMENT, OWN6_TOO),
    "listener report": chain(extension(ICMPV6), icmpv6(143), following=HOP),
    "headers": chain(extension(ROUTING), extension(OPTIONS), extension(TCP), bytes(20), following=HOP),
    "long header": chain(extension(TCP, 1), bytes(20), following=OPTIONS),
    "ping, first fragment": chain(fragment(ICMPV6), icmpv6(128), following=FRAGMENT),
    "later fragment": chain(fragment(ICMPV6, 3), icmpv6(134), following=FRAGMENT),
    "advertisement behind a header": chain(extension(ICMPV6), icmpv6(ADVERTISEMENT, OWN6), following=OPTIONS),
}
REFUSED = {
    "other mac": ethernet(BROADCAST, OTHER, kind=IPV4, payload=ipv4(OWN4)),
    "other mac, dhcp": ethernet(BROADCAST, OTHER, kind=IPV4, payload=ipv4(NONE4, protocol=UDP, ports=(68, 67))),
    "arp, other address": from_own(ARP, arp(MAC, OTHER4)),
    "arp, other hardware": from_own(ARP, arp(OTHER, OWN4)),
    "arp probe, other hardware": from_own(ARP, arp(OTHER, NONE4)),
    "arp of token ring": from_own(ARP, b"\0\6" + arp(MAC, OWN4)[2:]),
    "arp for ipx": from_own(ARP, b"\0\1\x81\x37" + arp(MAC, OWN4)[4:]),
    "arp of another length": from_own(ARP, arp(MAC, OWN4)[:4] + b"\x08\x04" + arp(MAC, OWN4)[6:]),
    "short arp": from_own(ARP, arp(MAC, OWN4)[:17]),
    "ipv4, other address": from_own(IPV4, ipv4(OTHER4)),
    "ipv4, no address": from_own(IPV4, ipv4(NONE4, ports=(68, 67))),
    "udp, no address": from_own(IPV4, ipv4(NONE4, protocol=UDP, ports=(67, 68))),
    "dhcp, other address": from_own(IPV4, ipv4(OTHER4, protocol=UDP, ports=(68, 67))),
    "dhcp, later fragment": from_own(IPV4, ipv4(NONE4, protocol=UDP, ports=(68, 67), offset=1)),
    "dhcp, ports behind the end": from_own(IPV4, ipv4(NONE4, protocol=UDP, ports=(68, 67), options=5)[:43]),
    "ipv4 of version 5": from_own(IPV4, b"\x55" + ipv4(OWN4)[1:]),
    "ipv4 without a header": from_own(IPV4, b"\x44" + ipv4(OWN4)[1:]),
    "short ipv4": from_own(IPV4, ipv4(OWN4)[:19]),
    "ipv6, other address": from_own(IPV6, ipv6(OTHER6)),
    "ipv6, no address": from_own(IPV6, ipv6("::", icmpv6(135, OWN6), following=ICMPV6)),
    "ipv6 of version 4": from_own(IPV6, b"\x40" + ipv6(OWN6)[1:]),
    "short ipv6": from_own(IPV6, ipv6(OWN6)[:39]),
    **{f"icmpv6 {kind}": icmp(kind) for kind in (134, 137, 146, 147, 151, 152, 153)},
    "icmpv6 without a type": from_own(IPV6, ipv6(OWN6, b"", following=ICMPV6)),
    "router advertisement behind headers": chain(extension(OPTIONS), extension(ICMPV6), icmpv6(134), following=HOP),
    "router advertisement behind a long header": chain(extension(ICMPV6, 2), icmpv6(134), following=HOP),
    "a header that does not end": chain(extension(ICMPV6, 255), following=HOP)[:200],
    "a header behind one that does not end": chain(extension(OPTIONS, 255), following=HOP)[:200],
    "many headers": chain(*[extension(OPTIONS)] * 9, following=OPTIONS),
    "advertisement in a fragment": chain(fragment(ICMPV6), icmpv6(ADVERTISEMENT, OWN6), following=FRAGMENT),
    "solicitation in a fragment": chain(fragment(ICMPV6, more=0), icmpv6(135, OWN6), following=FRAGMENT),
    "a fragment behind a header that does not end": chain(extension(FRAGMENT, 255), following=HOP)[:200],
    "router solicitation in a fragment": chain(fragment(ICMPV6), icmpv6(133), following=FRAGMENT),
    "half a fragment header": chain(fragment(ICMPV6)[:7], following=FRAGMENT),
    "half a header": chain(extension(TCP)[:1], following=HOP),
    "other type": from_own(0x8035, arp(MAC, OWN4)),
    "length": from_own(46, bytes(46)),
    "two tags": ethernet(BROADCAST, MAC, tag=0, kind=0x8100, payload=b"\0\0\x08\0" + ipv4(OWN4)),
    "service tag": from_own(0x88A8, b"\0\0\x08\0" + ipv4(OWN4)),
}
OTHER_TARGET = {
    "advertisement of another": icmp(ADVERTISEMENT, OTHER6),
    "advertisement of another behind a header": chain(extension(ICMPV6), icmpv6(136, OTHER6), following=OPTIONS),
}


def locked() -> Switch:
    switch = switch_of(2)
    switch.lock(0, MAC, [OWN4, OWN4_TOO], [OWN6, OWN6_TOO])
    return switch


@pytest.mark.parametrize("frame", PASS.values(), ids=PASS)
def test_what_passes(frame: bytes) -> None:
    for tagged in (frame, frame[:12] + b"\x81\0\x60\0" + frame[12:]):
        switch = locked()
        assert switch.forward(0, tagged, 0).kind is Kind.FLOOD
        assert switch.find(MAC, 0) == 0


@pytest.mark.parametrize("frame", [*REFUSED.values(), *OTHER_TARGET.values()], ids=[*REFUSED, *OTHER_TARGET])
def test_what_is_refused(frame: bytes) -> None:
    for tagged in (frame, frame[:12] + b"\x81\0\x60\0" + frame[12:]):
        switch = locked()
        assert dropped(switch.forward(0, tagged, 0)) == "spoof"
        assert switch.addresses(0) == []
        assert switch.statistics(0).drops == {"spoof": 1}
        assert switch.forward(1, frame, 0).kind is Kind.FLOOD, "other ports are not locked"


@pytest.mark.parametrize("frame", REFUSED.values(), ids=REFUSED)
def test_nothing_passes_by_being_seen_less(frame: bytes) -> None:
    switch = locked()
    for n in range(len(frame)):
        assert dropped(switch.forward(0, frame, 0, header_bytes=n)) in ("spoof", "bad_frame")


@pytest.mark.parametrize("frame", PASS.values(), ids=PASS)
def test_what_64_bytes_tell(frame: bytes) -> None:
    hidden = frame in (PASS["dhcp, options"], PASS["headers"])
    kind = Kind.DROP if hidden else Kind.FLOOD
    assert locked().forward(0, frame, 0, header_bytes=64, frame_bytes=1500).kind is kind


def test_the_target_of_an_advertisement_counts_as_far_as_it_is_seen() -> None:
    frame, far = icmp(ADVERTISEMENT, OTHER6), icmp(ADVERTISEMENT, "2002:db8::1")
    assert frame[62:78] == ipv6(OTHER6)[8:24]
    switch = locked()
    passed = [n for n in range(55, len(frame)) if switch.forward(0, frame, 0, header_bytes=n).kind]
    assert passed == list(range(55, 78)), "only the last byte differs"
    assert [n for n in range(55, len(far)) if switch.forward(0, far, 0, header_bytes=n).kind] == list(range(55, 64))


def test_a_port_without_ip_addresses() -> None:
    switch = switch_of(2)
    switch.lock(0, MAC)
    passed = {name for name, frame in PASS.items() if switch.forward(0, frame, 0).kind}
    assert passed == {"arp probe", "dhcp", "dhcp, options", "dhcp, first fragment"}


def test_sixteen_addresses_of_each_kind() -> None:
    switch = switch_of(2)
    v4 = [f"192.0.2.{number}" for number in range(1, MAX_LOCKED_ADDRESSES + 1)]
    v6 = [f"2001:db8::{number}" for number in range(1, MAX_LOCKED_ADDRESSES + 1)]
    switch.lock(0, MAC, v4, v6)
    for address in v4:
        assert switch.forward(0, from_own(IPV4, ipv4(address)), 0).kind is Kind.FLOOD
    for address in v6:
        assert switch.forward(0, from_own(IPV6, ipv6(address)), 0).kind is Kind.FLOOD
    assert dropped(switch.forward(0, from_own(IPV4, ipv4("192.0.2.17")), 0)) == "spoof"
    assert dropped(switch.forward(0, from_own(IPV6, ipv6("2001:db8::17")), 0)) == "spoof"
    for more in ((["192.0.2.1"] * 17, []), ([], ["::1"] * 17)):
        with pytest.raises(InvalidRequest, match="at most 16"):
            switch.lock(0, MAC, *more)


@pytest.mark.parametrize(
    ("mac", "v4", "v6"),
    [
        (BROADCAST, [], []),
        (GROUP, [], []),
        ("00:00:00:00:00:00", [], []),
        ("nothing", [], []),
        (MAC, ["192.0.2"], []),
        (MAC, [OWN6], []),
        (MAC, [], [OWN4]),
    ],
)
def test_what_cannot_be_locked(mac: str, v4: list[str], v6: list[str]) -> None:
    switch = switch_of(2)
    with pytest.raises(InvalidRequest):
        switch.lock(0, mac, v4, v6)
    assert say(switch, 0, 5).kind is Kind.FLOOD, "nothing has changed"


def test_what_c_does_not_take() -> None:
    switch = switch_of(1)
    for wrong in (
        {"mode": 3},
        {"mode": lib.PV_SWITCH_LOCKED, "mac": bytes([0, 1, 2, 3, 4, 5]), "n_ipv4": 17},
        {"mode": lib.PV_SWITCH_LOCKED, "mac": bytes([0, 1, 2, 3, 4, 5]), "n_ipv6": 2**32 - 1},
    ):
        assert lib.pv_switch_set_locking(switch.core, 0, ffi.new("struct pv_switch_locking *", wrong)) < 0
    assert say(switch, 0, 5).kind is Kind.FLOOD


def test_modes() -> None:
    switch = switch_of(3)
    say(switch, 0, 5)
    switch.lock(0, MAC, [OWN4])
    assert switch.addresses(0) == [], "what was learnt may have been a lie"
    switch.forward(0, PASS["ipv4"], 0)
    switch.unlock(0)
    assert switch.find(MAC, 0) == 0
    assert say(switch, 0, 5).kind is Kind.FLOOD
    switch.disable(0)
    assert switch.addresses(0) == []
    assert dropped(say(switch, 0, 5)) == "disabled"
    assert dropped(switch.forward(0, PASS["dhcp"], 0)) == "disabled"
    assert reached(say(switch, 1, 6)) == [2]
    assert reached(say(switch, 1, 6, station(5))) == [2]
    switch.unlock(0)
    assert reached(say(switch, 1, 6)) == [0, 2]
