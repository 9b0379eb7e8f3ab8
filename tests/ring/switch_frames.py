# SPDX-License-Identifier: MIT
"""What the tests of the switch share: Ethernet frames, and who says them."""

from ipaddress import IPv4Address, IPv6Address

from paravirt.ring.switch import Kind, Switch, Verdict

BROADCAST = "ff:ff:ff:ff:ff:ff"
GROUP = "33:33:00:00:00:01"
ARP, IPV4, IPV6, TAGGED = 0x0806, 0x0800, 0x86DD, 0x8100
UDP, TCP, ICMPV6 = 17, 6, 58
S = 1_000_000_000
"""A second."""


def station(number: int) -> str:
    """A MAC address in Xen's range."""
    return (0x00163E000000 + number).to_bytes(6, "big").hex(":")


def raw(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def word(value: int) -> bytes:
    return value.to_bytes(2, "big")


def ethernet(to: str, source: str, *, tag: int | None = None, kind: int = 0x88B5, payload: bytes = bytes(46)) -> bytes:
    """`tag`: priority, DEI and vid; None: no tag."""
    return raw(to) + raw(source) + (b"" if tag is None else word(TAGGED) + word(tag)) + word(kind) + payload


def arp(mac: str, ip: str, *, operation: int = 1) -> bytes:
    """ARP of a sender, without what it asks for; put behind an Ethernet header."""
    return word(1) + word(IPV4) + b"\x06\x04" + word(operation) + raw(mac) + IPv4Address(ip).packed + bytes(10 + 18)


def ipv4(
    source: str, *, protocol: int = TCP, ports: tuple[int, int] = (68, 80), options: int = 0, offset: int = 0
) -> bytes:
    """`options`: words of them; `offset`: the word with the fragment's offset."""
    header = bytes([0x45 + options, 0]) + word(28) + bytes(2) + word(offset) + bytes([64, protocol, 0, 0])
    header += IPv4Address(source).packed + IPv4Address("192.0.2.99").packed + bytes(4 * options)
    return header + word(ports[0]) + word(ports[1]) + bytes(22)


def ipv6(source: str, payload: bytes = bytes(8), *, following: int = TCP) -> bytes:
    header = b"\x60\0\0\0" + word(len(payload)) + bytes([following, 255])
    return header + IPv6Address(source).packed + IPv6Address("2001:db8::99").packed + payload


def icmpv6(kind: int, target: str = "::") -> bytes:
    return bytes([kind, 0]) + bytes(6) + IPv6Address(target).packed + bytes(8)


def extension(following: int, words: int = 0) -> bytes:
    """A header of options or routing: 8 * (words + 1) bytes."""
    return bytes([following, words]) + bytes(6 + 8 * words)


def fragment(following: int, offset: int = 0, more: int = 1) -> bytes:
    return bytes([following, 0]) + word(offset << 3 | more) + bytes(4)


def switch_of(ports: int, max_addresses: int = 16384) -> Switch:
    switch = Switch(max_addresses, seed=1)
    assert [switch.add_port() for _ in range(ports)] == list(range(ports))
    return switch


def say(
    switch: Switch, port: int, source: int, to: str = BROADCAST, *, tag: int | None = None, now: int = 0
) -> Verdict:
    return switch.forward(port, ethernet(to, station(source), tag=tag), now)


def reached(verdict: Verdict) -> list[int]:
    return [port for port, _ in verdict.ports]


def dropped(verdict: Verdict) -> str:
    """The reason."""
    assert verdict.kind is Kind.DROP
    assert verdict.ports == ()
    return verdict.reason
