# SPDX-License-Identifier: MIT
"""Frames with TCP and UDP in them, and what a network card does to them, told naively: the tests' model.

Source: RFC 791, 8200, 9293, 768, 1071; IEEE 802.1Q.
"""

from dataclasses import dataclass, replace

TCP, UDP, ICMP = 6, 17, 1
FIN, SYN, PSH, ACK, CWR = 0x01, 0x02, 0x08, 0x10, 0x80
MACS = bytes.fromhex("00163e000002") + bytes.fromhex("00163e000001")


def word(value: int) -> bytes:
    return (value & 0xFFFF).to_bytes(2, "big")


def internet_sum(*parts: bytes) -> int:
    """Ones' complement sum of 16-bit words of all of them, one behind the other."""
    every = b"".join(parts)
    every += bytes(len(every) % 2)
    total = 0
    for i in range(0, len(every), 2):
        total += every[i] << 8 | every[i + 1]
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True)
class Packet:
    """A TCP or UDP packet in an Ethernet frame."""

    payload: bytes = b""
    protocol: int = TCP
    v6: bool = False
    tags: tuple[int, ...] = ()
    """VLAN ids, the outer one first."""
    ip_options: bytes = b""
    """Of IPv4: a multiple of 4 bytes."""
    extensions: tuple[tuple[int, int], ...] = ()
    """Of IPv6: (number, words of 8 bytes behind the first) of each extension header."""
    tcp_options: bytes = b""
    ident: int = 0x1234
    sequence: int = 0xFFFFFF00
    tcp_flags: int = ACK
    ports: tuple[int, int] = (49152, 80)
    checksum: int | None = None
    """None: the right one."""
    padding: bytes = b""
    """Behind the packet."""

    @property
    def l4_bytes(self) -> bytes:
        """TCP or UDP header and payload, with 0 for a checksum."""
        ports = word(self.ports[0]) + word(self.ports[1])
        if self.protocol == UDP:
            return ports + word(8 + len(self.payload)) + word(0) + self.payload
        offset = (20 + len(self.tcp_options)) // 4 << 4
        header = ports + self.sequence.to_bytes(4, "big") + bytes(4) + bytes([offset, self.tcp_flags])
        return header + word(0xFFFF) + word(0) + word(0) + self.tcp_options + self.payload

    @property
    def addresses(self) -> bytes:
        return bytes.fromhex("20010db8") + bytes(range(28)) if self.v6 else bytes([192, 0, 2, 1, 192, 0, 2, 99])

    @property
    def pseudo_sum(self) -> int:
        n = len(self.l4_bytes)
        return internet_sum(self.addresses, n.to_bytes(4, "big"), word(self.protocol))

    @property
    def right_checksum(self) -> int:
        found = ~internet_sum(self.addresses, len(self.l4_bytes).to_bytes(4, "big"), word(self.protocol), self.l4_bytes)
        found &= 0xFFFF
        return 0xFFFF if self.protocol == UDP and not found else found

    @property
    def l4_at(self) -> int:
        """Bytes of the frame before the TCP or UDP header."""
        return 14 + 4 * len(self.tags) + len(self._ip(0)) + len(self._between()[1])

    @property
    def checksum_at(self) -> int:
        return self.l4_at + (6 if self.protocol == UDP else 16)

    def _between(self) -> tuple[int, bytes]:
        """(number of the first header behind IPv6's, the extension headers)."""
        following, every = self.protocol, b""
        for number, words in reversed(self.extensions):
            every = bytes([following, words]) + bytes(6 + 8 * words) + every
            following = number
        return following, every

    def _ip(self, l4_bytes: int) -> bytes:
        if self.v6:
            following, between = self._between()
            return b"\x60\0\0\0" + word(len(between) + l4_bytes) + bytes([following, 64]) + self.addresses
        header = bytes([0x45 + len(self.ip_options) // 4, 0]) + word(20 + len(self.ip_options) + l4_bytes)
        header += word(self.ident) + word(0x4000) + bytes([64, self.protocol])
        rest = self.addresses + self.ip_options
        return header + word(~internet_sum(header, rest)) + rest

    def frame(self) -> bytes:
        kind = 0x86DD if self.v6 else 0x0800
        tags = b"".join(
            word(0x88A8 if i == 0 and len(self.tags) > 1 else 0x8100) + word(t) for i, t in enumerate(self.tags)
        )
        l4 = bytearray(self.l4_bytes)
        at = self.checksum_at - self.l4_at
        l4[at : at + 2] = word(self.right_checksum if self.checksum is None else self.checksum)
        between = self._between()[1] if self.v6 else b""
        return MACS + tags + word(kind) + self._ip(len(l4)) + between + bytes(l4) + self.padding

    def segments(self, size: int) -> list[bytes]:
        """The frames that a card makes of it, each with `size` bytes of payload or the rest."""
        parts = [self.payload[i : i + size] for i in range(0, len(self.payload), size)] or [b""]
        made = []
        for i, part in enumerate(parts):
            flags = self.tcp_flags
            if i < len(parts) - 1:
                flags &= ~(FIN | PSH)
            if i:
                flags &= ~CWR
            own = replace(
                self,
                payload=part,
                ident=self.ident + i,
                sequence=(self.sequence + i * size) & 0xFFFFFFFF,
                tcp_flags=flags,
                padding=b"",
            )
            made.append(own.frame())
        return made


def pattern(n: int, seed: int = 1) -> bytes:
    """Bytes that say where they stand."""
    return bytes((seed * 151 + i * 7 + (i >> 8) * 13) & 0xFF for i in range(n))


def plain(n: int, seed: int = 1) -> bytes:
    """A frame of n bytes, at least 14, of a local protocol."""
    return (MACS + word(0x88B5) + pattern(n, seed))[:n]
