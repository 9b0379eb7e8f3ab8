# SPDX-License-Identifier: MIT
"""The switch against a naive one, over thousands of random frames and changes (SWITCH_SEED, SWITCH_FRAMES)."""

import os
import random
from dataclasses import dataclass, field
from fractions import Fraction
from ipaddress import ip_address
from typing import Any

import pytest

from paravirt.ring.switch import DROPS, Kind, Limit, Switch, Tag, Verdict

from .switch_frames import (
    ARP,
    BROADCAST,
    GROUP,
    ICMPV6,
    IPV4,
    IPV6,
    TAGGED,
    TCP,
    UDP,
    S,
    arp,
    extension,
    fragment,
    icmpv6,
    ipv4,
    ipv6,
    raw,
    station,
    word,
)

SEED = int(os.environ.get("SWITCH_SEED", "1"))
FRAMES = int(os.environ.get("SWITCH_FRAMES", "6000"))
ALL_VIDS = frozenset(range(1, 4095))
GROUPS = [GROUP, "33:33:00:00:00:02", "01:00:5e:00:00:fb"]


def number(data: bytes) -> int:
    return int.from_bytes(data, "big")


@dataclass
class Bucket:
    rate: int
    burst: int
    level: Fraction
    filled: int = 0

    def take(self, now: int) -> bool:
        self.level = min(Fraction(self.burst), self.level + Fraction((now - self.filled) * self.rate, S))
        self.filled = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


@dataclass
class Port:
    untagged: int | None = 0
    """The VLAN whose frames have no tag."""
    tagged: frozenset[int] = ALL_VIDS
    mode: str = "unlocked"
    mac: str = ""
    own: list[str] = field(default_factory=list)
    """Its IP addresses, if it is locked."""
    is_filtered: bool = False
    groups: set[str] = field(default_factory=set)
    is_mirrored: bool = False
    buckets: dict[Limit, Bucket] = field(default_factory=dict)
    most: int = 0
    counted: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0) | {"drops": {}})


COUNTED = ("rx_frames", "rx_bytes", "tx_frames", "tx_bytes", "flooded", "moved")


@dataclass
class Station:
    port: int
    seen: int


class NaiveSwitch:
    """As the header says it, in the order that is easiest to read."""

    def __init__(self, max_addresses: int) -> None:
        self.max_addresses = max_addresses
        self.ports: dict[int, Port] = {}
        self.stations: dict[tuple[str, int], Station] = {}
        """By MAC and VLAN, from the oldest on."""
        self.mirror: int | None = None
        self.ageing = 300 * S
        self.evicted = 0

    def age(self, now: int) -> None:
        if self.ageing:
            self.stations = {key: one for key, one in self.stations.items() if now - one.seen < self.ageing}

    def forget(self, port: int, keep: int = 0) -> None:
        mine = [key for key, one in self.stations.items() if one.port == port]
        for key in mine[: len(mine) - keep]:
            del self.stations[key]

    def add_port(self) -> int:
        port = min(set(range(len(self.ports) + 1)) - set(self.ports))
        self.ports[port] = Port()
        return port

    def remove_port(self, port: int) -> None:
        self.forget(port)
        del self.ports[port]
        if self.mirror == port:
            self.mirror = None

    # -- one frame

    def forward(self, number_: int, header: bytes, n_bytes: int, now: int) -> Verdict:
        self.age(now)
        if number_ not in self.ports:
            return Verdict(Kind.DROP, "no_port", (), None, 0)
        port = self.ports[number_]
        port.counted["rx_frames"] += 1
        port.counted["rx_bytes"] += n_bytes
        header = header[:n_bytes]
        is_frame = len(header) >= 14 and header[6:12] != bytes(6) and not header[6] & 1
        tag = number(header[14:16]) & 0xFFF if header[12:14] == word(TAGGED) else None
        if port.mode == "disabled" or self.mirror == number_ or not is_frame or (tag is not None and len(header) < 18):
            reason = "disabled" if port.mode == "disabled" else "mirror" if self.mirror == number_ else "bad_frame"
            port.counted["drops"][reason] = port.counted["drops"].get(reason, 0) + 1
            return Verdict(Kind.DROP, reason, (), None, 0)
        vid = self.vlan(port, tag)
        reason, outs = ("vlan", []) if vid is None else self.decide(number_, header, tag, vid, now)
        kind = Kind.DROP if reason in DROPS[1:] else Kind.UNICAST if reason == "unicast" else Kind.FLOOD
        ports = tuple((out, self.tag_for(out, tag, vid or 0)) for out in outs)
        for out, what in ports:
            self.sent(out, n_bytes + {Tag.STRIP: -4, Tag.INSERT: 4}.get(what, 0))
        mirror = None
        if port.is_mirrored or any(self.ports[out].is_mirrored for out in outs):
            mirror = self.mirror
        if mirror is not None and self.ports[mirror].mode == "disabled":
            mirror = None
        if mirror is not None:
            self.sent(mirror, n_bytes)
        if kind is Kind.DROP:
            port.counted["drops"][reason] = port.counted["drops"].get(reason, 0) + 1
        port.counted["flooded"] += kind is Kind.FLOOD
        return Verdict(kind, reason if kind is Kind.DROP else "none", ports, mirror, vid or 0)

    def sent(self, port: int, n_bytes: int) -> None:
        self.ports[port].counted["tx_frames"] += 1
        self.ports[port].counted["tx_bytes"] += n_bytes

    def vlan(self, port: Port, tag: int | None) -> int | None:
        if not tag:
            return port.untagged
        is_trunk = bool(port.tagged)
        return tag if tag in port.tagged or (is_trunk and tag == port.untagged) else None

    def tag_for(self, out: int, tag: int | None, vid: int) -> Tag:
        if self.ports[out].untagged == vid:
            return Tag.KEEP if tag is None else Tag.STRIP
        return Tag.INSERT if tag is None else Tag.KEEP if tag else Tag.SET

    def decide(self, number_: int, header: bytes, tag: int | None, vid: int, now: int) -> tuple[str, list[int]]:
        """What becomes of it, and the ports it goes to."""
        port = self.ports[number_]
        to, source = header[:6].hex(":"), header[6:12].hex(":")
        if port.mode == "locked" and not (source == port.mac and is_own(port, header[12 if tag is None else 16 :])):
            return "spoof", []
        if to.startswith("01:80:c2:00:00:0"):
            return "blocked", []
        if not self.learn(number_, (source, vid), now):
            return "table", []
        kind = Limit.UNKNOWN
        if to == BROADCAST:
            kind = Limit.BROADCAST
        elif header[0] & 1:
            kind = Limit.MULTICAST
        elif known := self.stations.get((to, vid)):
            return ("same_port", []) if known.port == number_ else ("unicast", [known.port])
        if kind in port.buckets and not port.buckets[kind].take(now):
            return "limit", []
        return "flood", [
            other
            for other, there in sorted(self.ports.items())
            if other not in (number_, self.mirror)
            and there.mode != "disabled"
            and (vid in there.tagged or vid == there.untagged)
            and not (kind is Limit.MULTICAST and there.is_filtered and to not in there.groups)
        ]

    def learn(self, port: int, key: tuple[str, int], now: int) -> bool:
        known = self.stations.get(key)
        if known and known.port == port:
            if now - known.seen >= (self.ageing or 300 * S) // 256:
                del self.stations[key]
                self.stations[key] = Station(port, now)
            return True
        most = self.ports[port].most
        if most and sum(one.port == port for one in self.stations.values()) >= most:
            return False
        if known:
            self.ports[port].counted["moved"] += 1
            del self.stations[key]
        elif len(self.stations) == self.max_addresses:
            del self.stations[next(iter(self.stations))]
        self.stations[key] = Station(port, now)
        return True


def is_own(port: Port, packet: bytes) -> bool:
    """What XenServer lets a locked port send; `packet` begins with its type."""
    kind, rest = number(packet[:2]), packet[2:]
    if kind == ARP:
        return (
            rest[:6] == bytes.fromhex("000108000604")
            and rest[8:14] == raw(port.mac)
            and len(rest) >= 18
            and str(ip_address(rest[14:18])) in ["0.0.0.0", *port.own]
        )
    if kind == IPV4:
        if len(rest) < 20 or rest[0] >> 4 != 4 or rest[0] & 15 < 5:
            return False
        source, udp = str(ip_address(rest[12:16])), rest[4 * (rest[0] & 15) :]
        is_dhcp = rest[9] == UDP and not number(rest[6:8]) & 0x1FFF and udp[2:4] == word(67)
        return source in port.own or (source == "0.0.0.0" and is_dhcp)
    if kind == IPV6:
        is_known = len(rest) >= 40 and rest[0] >> 4 == 6 and str(ip_address(rest[8:24])) in port.own
        return is_known and is_own_payload(port, rest[6], rest[40:])
    return False


def is_own_payload(port: Port, following: int, rest: bytes) -> bool:
    is_fragment = False
    for _ in range(8):
        if following in (0, 43, 60):
            if len(rest) < 2:
                return False
            following, rest = rest[0], rest[8 * (rest[1] + 1) :]
        elif following == 44:
            if len(rest) < 8:
                return False
            if number(rest[2:4]) & 0xFFF8:
                return True
            is_fragment, following, rest = True, rest[0], rest[8:]
        elif following == ICMPV6:
            if not rest or rest[0] in (134, 137, 146, 147, 151, 152, 153):
                return False
            if is_fragment and 133 <= rest[0] <= 137:
                return False
            target = rest[8:24]
            own = [ip_address(address).packed for address in port.own if ":" in address]
            return rest[0] != 136 or any(address.startswith(target) for address in own)
        else:
            return True
    return False


class Both:
    """Both switches, told the same."""

    def __init__(self, choose: random.Random, max_addresses: int) -> None:
        self.choose = choose
        self.real = Switch(max_addresses, seed=choose.randrange(1, 2**64))
        self.naive = NaiveSwitch(max_addresses)
        self.macs = [station(n) for n in range(choose.choice([4, 12, 60]))]
        self.v4 = [f"192.0.2.{n}" for n in range(1, 5)]
        self.v6 = [f"2001:db8::{n}" for n in range(1, 4)] + ["2001:db9::1"]
        self.vids = choose.sample(range(1, 4095), 3)
        self.now = choose.choice([0, 2**40])
        for _ in range(choose.randrange(2, 8)):
            self.add_port()

    def port(self) -> int:
        return self.choose.choice(sorted(self.naive.ports))

    def add_port(self) -> None:
        assert self.real.add_port() == self.naive.add_port()

    def remove_port(self) -> None:
        if len(self.naive.ports) > 2:
            port = self.port()
            self.real.remove_port(port)
            self.naive.remove_port(port)

    def vlans(self) -> None:
        port, vids = self.port(), self.choose.sample(self.vids, self.choose.randrange(1, 3))
        untagged = self.choose.choice([None, 0, 0, *self.vids])
        there = self.naive.ports[port]
        if self.choose.random() < 0.4:
            untagged = untagged or 0
            self.real.set_access(port, untagged)
            there.tagged = frozenset()
        elif self.choose.random() < 0.5:
            self.real.set_trunk(port, native=untagged)
            there.tagged = ALL_VIDS
        else:
            self.real.set_trunk(port, vids, native=untagged)
            there.tagged = frozenset(vids)
        there.untagged = untagged
        self.naive.forget(port)

    def locking(self) -> None:
        port, there = self.port(), None
        there = self.naive.ports[port]
        there.mode = self.choose.choice(["unlocked", "unlocked", "locked", "locked", "disabled"])
        if there.mode == "locked":
            there.mac = self.choose.choice(self.macs)
            v4, v6 = self.choose.sample(self.v4, 2), self.choose.sample(self.v6, 2)
            there.own = v4 + v6
            self.real.lock(port, there.mac, v4, v6)
        else:
            getattr(self.real, {"unlocked": "unlock", "disabled": "disable"}[there.mode])(port)
        if there.mode != "unlocked":
            self.naive.forget(port)

    def limits(self) -> None:
        port, kind = self.port(), self.choose.choice(list(Limit))
        rate, burst = self.choose.choice([0, 1, 3, 7, 50]), self.choose.choice([0, 1, 5])
        self.real.set_limit(port, kind, rate, burst)
        buckets = self.naive.ports[port].buckets
        buckets.pop(kind, None)
        if rate:
            burst = burst or max(1, rate // 10)
            buckets[kind] = Bucket(rate, burst, Fraction(burst))

    def filters(self) -> None:
        port, group = self.port(), self.choose.choice(GROUPS)
        there = self.naive.ports[port]
        there.is_filtered = self.choose.random() < 0.5
        self.real.set_multicast_filter(port, there.is_filtered)
        if group in there.groups:
            self.real.remove_group(port, group)
        else:
            self.real.add_group(port, group)
        there.groups ^= {group}

    def mirroring(self) -> None:
        port = self.port()
        there = self.naive.ports[port]
        there.is_mirrored = self.choose.random() < 0.5
        self.real.set_mirrored(port, there.is_mirrored)
        self.naive.mirror = self.choose.choice([None, None, self.port()])
        self.real.set_mirror(self.naive.mirror)
        if self.naive.mirror is not None:
            self.naive.forget(self.naive.mirror)

    def age(self) -> None:
        self.real.age(self.now)
        self.naive.age(self.now)

    def ages(self) -> None:
        # What is too old and not forgotten would count again with a longer time.
        self.age()
        ageing_s = self.choose.choice([0, 1, 20, 300, 300])
        self.real.set_ageing(ageing_s)
        self.naive.ageing = ageing_s * S

    def most(self) -> None:
        self.age()
        port, most = self.port(), self.choose.choice([0, 0, 1, 2, 5])
        self.real.set_address_limit(port, most)
        self.naive.ports[port].most = most
        if most:
            mine = sum(one.port == port for one in self.naive.stations.values())
            self.naive.forget(port, min(most, mine))

    def change(self) -> None:
        self.choose.choice(
            [
                self.add_port if len(self.naive.ports) < 20 else self.remove_port,
                *[self.remove_port, self.vlans, self.vlans, self.locking, self.locking, self.limits],
                *[self.filters, self.mirroring, self.ages, self.most],
            ]
        )()

    def packet(self, mac: str) -> bytes:
        """With its type."""
        pick = self.choose.choice
        v4, v6 = pick([*self.v4, "0.0.0.0"]), pick(self.v6)
        kind = pick([ARP, IPV4, IPV4, IPV6, IPV6, 0x88B5])
        if kind == ARP:
            return word(ARP) + arp(mac if pick([1, 1, 0]) else pick(self.macs), v4)
        if kind == IPV4:
            ports, options = (68, pick([67, 67, 80])), pick([0, 0, 5, 10])
            return word(IPV4) + ipv4(
                v4, protocol=pick([TCP, UDP, UDP]), ports=ports, options=options, offset=pick([0, 0, 9])
            )
        if kind == IPV6:
            following, payload = pick([(TCP, bytes(20)), *[(ICMPV6, icmpv6(self.choose.randrange(128, 155), v6))] * 3])
            if pick([0, 0, 1]):
                following, payload = ICMPV6, icmpv6(136, pick(self.v6))
            for _ in range(pick([0, 0, 1, 2, 9])):
                if pick([0, 0, 1]):
                    following, payload = 44, fragment(following, pick([0, 0, 3])) + payload
                else:
                    following, payload = pick([0, 43, 60]), extension(following, pick([0, 0, 1])) + payload
            return word(IPV6) + ipv6(v6, payload, following=following)
        return word(pick([0x88B5, 0x88A8, 46])) + bytes(46)

    def frame(self) -> bytes:
        pick = self.choose.choice
        source, to = (
            pick(self.macs),
            pick([BROADCAST, *GROUPS, *self.macs, *self.macs, "01:80:c2:00:00:0e", station(9999)]),
        )
        if there := [port for port in self.naive.ports.values() if port.mode == "locked"]:
            source = pick([source, pick(there).mac])
        if self.choose.random() < 0.03:
            source = pick([BROADCAST, GROUP, "00:00:00:00:00:00"])
        tag = pick(
            [b"", b"", word(TAGGED) + word(pick([0, *self.vids, *self.vids, 4095]) | pick([0, 3 << 13, 0x1000]))]
        )
        frame = bytearray(raw(to) + raw(source) + tag + self.packet(source))
        for _ in range(pick([0, 0, 0, 0, 1, 3])):
            frame[self.choose.randrange(len(frame))] = self.choose.randrange(256)
        return bytes(frame)

    def forward(self) -> None:
        pick = self.choose.choice
        frame = self.frame()
        n_header = pick([64, 64, 64, len(frame), self.choose.randrange(len(frame) + 1)])
        n_bytes = pick([len(frame), len(frame), len(frame) + 1400, self.choose.randrange(len(frame) + 1)])
        port = self.port() if self.choose.random() < 0.98 else self.choose.randrange(50)
        # All of the frame stands there, so the verdict tells if more than the header was looked at.
        real = self.real.forward(port, frame, self.now, header_bytes=n_header, frame_bytes=n_bytes)
        assert real == self.naive.forward(port, frame[:n_header], n_bytes, self.now), frame.hex()
        self.now += pick([0, 1, 10**6, S // 7, S, 3 * S, self.choose.randrange(40 * S)])

    def compare(self) -> None:
        self.naive.age(self.now)
        found = [(address.mac, address.vid, address.port, address.seen_ns) for address in self.real.addresses(self.now)]
        assert found == [(mac, vid, one.port, one.seen) for (mac, vid), one in self.naive.stations.items()]
        for mac, vid, port, _ in found:
            assert self.real.find(mac, self.now, vid) == port
        self.real.age(self.now)
        assert self.real.ports == sorted(self.naive.ports)
        for port, there in self.naive.ports.items():
            statistics = self.real.statistics(port)
            assert {name: getattr(statistics, name) for name in (*COUNTED, "drops")} == there.counted
            assert statistics.addresses == sum(one.port == port for one in self.naive.stations.values())


@pytest.mark.parametrize("seed", range(SEED, SEED + 5))
@pytest.mark.parametrize("max_addresses", [1, 3, 16, 100])
def test_against_a_naive_switch(seed: int, max_addresses: int) -> None:
    choose = random.Random(f"{seed} {max_addresses}")
    both = Both(choose, max_addresses)
    for _ in range(FRAMES // 5):
        if choose.random() < 0.05:
            both.change()
        both.forward()
        if choose.random() < 0.02:
            both.compare()
    both.compare()


def test_all_that_can_happen_does() -> None:
    """The random frames are such that every verdict comes, and the table is full."""
    choose = random.Random(1)
    happened: set[str] = set()
    evicted = 0
    for _ in range(6):
        both = Both(choose, 8)
        for _ in range(1000):
            if choose.random() < 0.03:
                both.change()
            both.forward()
        evicted += both.real.evicted
        for port in both.naive.ports.values():
            happened |= set(port.counted["drops"])
    assert happened == set(DROPS) - {"none", "no_port"}
    assert evicted
