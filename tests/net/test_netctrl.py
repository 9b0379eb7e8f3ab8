# SPDX-License-Identifier: MIT
"""The control ring: what each request is answered, by a naive model too; hostile ones; hashes that steer frames."""

import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paravirt
from paravirt.errors import Closed, InvalidRequest, PeerError
from paravirt.frontend.domain import Domain
from paravirt.frontend.vif import Vif
from paravirt.protocol.netif import CTRL_REQUEST, CTRL_RESPONSE, CtrlStatus, CtrlType, HashAlgorithm, HashFlag, Mac
from paravirt.ring.netif import Burst, FrameFlag

from ..eventually import eventually
from .frames import frame

S, T = CtrlStatus, CtrlType
KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)  # of the vectors that Microsoft publishes for receive side scaling
ALL = HashFlag.IPV4 | HashFlag.IPV4_TCP | HashFlag.IPV6 | HashFlag.IPV6_TCP
STATION = Mac(bytes.fromhex("020000000001"))


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host(max_queues=4) as host:
        yield host


def join(host: paravirt.Host, name: str, **options: Any) -> tuple[Domain, Vif]:
    domain = host.create_domain(name)
    host.attach_vif(domain)
    return domain, domain.open_vif(**options)


def ipv4(to: Vif, source: str, target: str, ports: tuple[int, int] | None, protocol: int = 6) -> bytes:
    content = struct.pack(">HH", *ports) + bytes(16) if ports else bytes(20)
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(content), 0, 0, 64, protocol, 0)
    addresses = IPv4Address(source).packed + IPv4Address(target).packed
    return (to.mac + STATION + b"\x08\x00" + header + addresses + content).ljust(60, b"\0")


def ipv6(to: Vif, source: str, target: str, ports: tuple[int, int] | None) -> bytes:
    content = struct.pack(">HH", *ports) + bytes(16) if ports else bytes(20)
    header = struct.pack(">IHBB", 6 << 28, len(content), 6 if ports else 59, 64)
    return to.mac + STATION + b"\x86\xdd" + header + IPv6Address(source).packed + IPv6Address(target).packed + content


VECTORS = [  # source, its port, destination, its port; hash with ports, hash without
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x51CCC178, 0x323E8FC2),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xC626B0EA, 0xD718262A),
    ("24.19.198.95", 12898, "12.22.207.184", 38024, 0x5C2B394A, 0xD2D0A5DE),
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x40207D3D, 0x2CC18CD5),
    ("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739, 0xDDE51BBF, 0x0F0C461C),
]


def test_the_calls_of_a_guest(host: paravirt.Host) -> None:
    _, vif = join(host, "guest", queues=2)
    control = vif.control
    with pytest.raises(InvalidRequest, match="GET_HASH_FLAGS with NOT_SUPPORTED"):
        control.hash_flags()
    control.set_hash(HashAlgorithm.TOEPLITZ, ALL, KEY)
    assert control.hash_flags() == ALL
    assert control.mapping_size() == 128
    control.set_mapping([0, 1, 1, 0])
    with pytest.raises(InvalidRequest, match="SET_MAPPING with INVALID_PARAMETER"):
        control.set_mapping([0, 2])
    control.set_mapping([])
    assert control.gref_mapping_size() == 512
    with pytest.raises(InvalidRequest):
        control.gref_mapping_size(2)
    with pytest.raises(InvalidRequest, match="41 bytes"):
        control.set_hash(HashAlgorithm.TOEPLITZ, ALL, bytes(41))
    with pytest.raises(InvalidRequest, match="129 entries"):
        control.set_mapping([0] * 129)
    control.set_hash(HashAlgorithm.NONE)
    vif.close()
    with pytest.raises(Closed):
        control.mapping_size()


@pytest.mark.parametrize(("source", "port", "target", "its_port", "with_ports", "without"), VECTORS)
def test_hashes_are_microsofts_all_the_way(
    host: paravirt.Host, source: str, port: int, target: str, its_port: int, with_ports: int, without: int
) -> None:
    _, vif = join(host, "guest")
    vif.control.set_hash(HashAlgorithm.TOEPLITZ, ALL, KEY)
    make = ipv6 if ":" in source else ipv4
    with host.bridge() as bridge:
        _, leg = bridge.add_user("program")
        leg.give(Burst.of([make(vif, source, target, (port, its_port)), make(vif, source, target, None)]))
        burst = Burst()
        while len(burst) < 2:
            assert vif.receive_burst(burst, timeout_s=10.0)
    # Without TCP the addresses alone are hashed: of IPv4 it is what the protocol says, of IPv6 the next header.
    assert int(burst.frames["hash"][0]) == with_ports
    assert burst.frames["flags"][0] & FrameFlag.HASH
    assert burst.frames["hash_type"][0] == (3 if ":" in source else 1)
    if ":" in source:
        assert int(burst.frames["hash"][1]) == without
        assert burst.frames["hash_type"][1] == 2


def test_addresses_alone_where_ports_are_not_asked_for_or_not_there(host: paravirt.Host) -> None:
    _, vif = join(host, "guest")
    source, port, target, its_port, with_ports, without = VECTORS[0]
    fragment = bytearray(ipv4(vif, source, target, (port, its_port)))
    fragment[20:22] = b"\x20\x00"  # more fragments follow
    packets = [
        ipv4(vif, source, target, (port, its_port)),
        ipv4(vif, source, target, (port, its_port), protocol=17),
        bytes(fragment),
        frame(vif.mac, STATION),
    ]
    with host.bridge() as bridge:
        _, leg = bridge.add_user("program")
        for flags, expected in (
            (ALL, [with_ports, without, without, 0]),
            (HashFlag.IPV4, [without] * 3 + [0]),
            (HashFlag.IPV6 | HashFlag.IPV6_TCP, [0] * 4),
        ):
            vif.control.set_hash(HashAlgorithm.TOEPLITZ, flags, KEY)
            leg.give(Burst.of(packets))
            burst = Burst()
            while len(burst) < len(packets):
                assert vif.receive_burst(burst, timeout_s=10.0)
            assert [int(one) for one in burst.frames["hash"]] == expected
            assert [bool(flag & FrameFlag.HASH) for flag in burst.frames["flags"]] == [bool(one) for one in expected]


def test_a_mapping_steers_flows_to_queues_and_counts_again_after_suspension(host: paravirt.Host) -> None:
    _, vif = join(host, "guest", queues=4)
    vif.control.set_hash(HashAlgorithm.TOEPLITZ, ALL, KEY)
    flows = [(f"10.0.0.{i}", 1000 + i, "10.0.1.1", 80) for i in range(40)]

    def arrived(leg: Any) -> list[int]:
        leg.give(Burst.of([ipv4(vif, source, target, (port, its)) for source, port, target, its in flows]))
        found = [0] * 4

        def all_came() -> bool:
            for queue in range(4):
                found[queue] += len(vif.receive(queue=queue, timeout_s=0.01))
            return sum(found) == len(flows)

        eventually(all_came)
        return found

    with host.bridge() as bridge:
        _, leg = bridge.add_user("program")
        spread = arrived(leg)
        assert sum(n > 0 for n in spread) > 1
        vif.control.set_mapping([3])
        assert arrived(leg) == [0, 0, 0, 40]
        vif.control.set_mapping([1, 2] * 64)
        steered = arrived(leg)
        assert steered[0] == steered[3] == 0
        assert min(steered[1:3]) > 0
        vif.suspend()
        vif.resume()
        assert arrived(leg) == steered
        vif.control.set_hash(HashAlgorithm.NONE)
        assert sum(arrived(leg)) == len(flows)


class Model:
    """What a backend answers, said once more: (status, data)."""

    def __init__(self, n_queues: int) -> None:
        self.n_queues, self.algorithm, self.size = n_queues, 0, 0

    def answer(self, kind: int, data: tuple[int, int, int], table: list[int] | None) -> tuple[CtrlStatus, int]:
        match kind:
            case T.SET_HASH_ALGORITHM:
                if data[0] > 1:
                    return S.INVALID_PARAMETER, 0
                self.algorithm = data[0]
            case T.GET_HASH_FLAGS:
                return (S.SUCCESS, 15) if self.algorithm else (S.NOT_SUPPORTED, 0)
            case T.SET_HASH_FLAGS:
                return (S.INVALID_PARAMETER if data[0] > 15 or not self.algorithm else S.SUCCESS), 0
            case T.SET_HASH_KEY:
                if data[1] > 40:
                    return S.BUFFER_OVERFLOW, 0
                return (S.SUCCESS if table is not None or not data[1] else S.INVALID_PARAMETER), 0
            case T.GET_MAPPING_SIZE:
                return S.SUCCESS, 128
            case T.SET_MAPPING_SIZE:
                if data[0] > 128:
                    return S.INVALID_PARAMETER, 0
                self.size = data[0]
            case T.SET_MAPPING:
                if data[1] > 128:
                    return S.BUFFER_OVERFLOW, 0
                if data[2] + data[1] > self.size:
                    return S.INVALID_PARAMETER, 0
                if data[1] and (table is None or max(table[: data[1]]) >= self.n_queues):
                    return S.INVALID_PARAMETER, 0
            case T.GET_GREF_MAPPING_SIZE:
                return (S.SUCCESS, 512) if data[0] < self.n_queues else (S.INVALID_PARAMETER, 0)
            case T.ADD_GREF_MAPPING | T.DEL_GREF_MAPPING:
                # The list is none that was granted.
                return (S.INVALID_PARAMETER if data[0] >= self.n_queues or data[2] else S.SUCCESS), 0
            case _:
                return S.NOT_SUPPORTED, 0
        return S.SUCCESS, 0


NUMBERS = st.one_of(st.integers(0, 5), st.sampled_from([15, 16, 40, 41, 127, 128, 129, 1024, 2**31, 2**32 - 1]))


@pytest.fixture(scope="module")
def guest() -> Iterator[Vif]:
    with paravirt.Host(max_queues=4) as host:
        yield join(host, "guest", queues=3)[1]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.sampled_from(list(CtrlType)), st.integers(0, 65535)),
            st.booleans(),
            NUMBERS,
            NUMBERS,
            NUMBERS,
            st.integers(1, 5),
        ),
        max_size=12,
    )
)
def test_requests_of_any_kind_beside_the_model(guest: Vif, script: list[tuple[int, bool, int, int, int, int]]) -> None:
    model, control = Model(3), guest.control
    control.ask(T.SET_HASH_ALGORITHM)
    control.ask(T.SET_MAPPING_SIZE)
    for kind, has_table, *data, n in script:
        table = [i % n for i in range(128)]
        first = data[0]
        if kind in (T.SET_HASH_KEY, T.SET_MAPPING):
            first = -1 if has_table else 1 << 31 | data[0]  # which nothing was granted as
        if kind in (T.ADD_GREF_MAPPING, T.DEL_GREF_MAPPING):
            first, data[1] = data[0], 1 << 31 | data[1]
        found = control.ask(kind, (first, data[1], data[2]), struct.pack("<128I", *table))
        expected = model.answer(kind, (data[0], data[1], data[2]), table if first == -1 else None)
        assert found == expected, (kind, first, data)


def test_a_flood_is_answered_and_costs_nobody_else(host: paravirt.Host) -> None:
    _, vif = join(host, "flood")
    _, one = join(host, "one")
    _, other = join(host, "other")
    ring = vif.control._end.ring
    assert ring is not None
    requests = np.zeros(ring.size, CTRL_REQUEST)
    requests["type"] = np.arange(ring.size) % 12
    answers = np.zeros(ring.size, CTRL_RESPONSE)
    sent = 0
    for _ in range(200):
        sent += ring.push(requests)
        ring.wait(timeout_s=0.01)
        ring.take(answers)
    assert sent > ring.size
    one.send([frame(other.mac, one.mac, b"still")])
    assert b"still" in other.receive(1, timeout_s=10.0)[0]


def test_an_index_out_of_range_ends_the_device_and_no_other(host: paravirt.Host) -> None:
    _, bad = join(host, "bad")
    _, good = join(host, "good")
    ring = bad.control._end.ring
    assert ring is not None
    pages = bad.control._end._pages
    assert pages is not None
    pages.view[0:4] = (1 << 20).to_bytes(4, "little")
    channel = bad.control._end.channel
    assert channel is not None
    channel.notify()
    eventually(lambda: bad.is_closed or _ended(bad))
    good.announce()


def _ended(vif: Vif) -> bool:
    try:
        vif.send([frame(STATION, vif.mac)], timeout_s=0.1)
    except (PeerError, ConnectionError, Closed):
        return True
    return False


def test_headroom_is_left_free_in_every_page_and_told(host: paravirt.Host) -> None:
    _, vif = join(host, "guest", xdp_headroom=256)
    packets = [frame(vif.mac, STATION, bytes([i]) * 8, n_bytes=size) for i, size in enumerate((60, 3840, 3841, 9000))]
    front = vif.queue_end().front
    assert front is not None
    with host.bridge() as bridge:
        _, leg = bridge.add_user("program")
        leg.give(Burst.of(packets))
        found: list[bytes] = []
        while len(found) < len(packets):
            came = vif.receive(timeout_s=10.0)
            assert came
            found += came
    assert found == packets
    with pytest.raises(InvalidRequest):
        join(host, "other", xdp_headroom=2049)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"ctrl-ring-ref": "9"}, "event-channel-ctrl"),
        ({"ctrl-ring-ref": "x", "event-channel-ctrl": "3"}, "ctrl-ring-ref"),
        ({"ctrl-ring-ref": "9", "event-channel-ctrl": "0"}, "no port"),
        ({"ctrl-ring-ref": "8", "event-channel-ctrl": "3"}, "of another ring"),
        ({"ctrl-ring-ref": "10", "event-channel-ctrl": "1"}, "of another ring"),
        ({"xdp-headroom": "2049"}, "xdp-headroom"),
        ({"xdp-headroom": "-1"}, "xdp-headroom"),
    ],
)
def test_keys_that_no_backend_serves(keys: dict[str, str], reason: str) -> None:
    from paravirt.protocol.vif import VifRequest

    good = {"request-rx-copy": "1", "tx-ring-ref": "8", "rx-ring-ref": "9", "event-channel": "1"}
    with pytest.raises(PeerError, match=reason):
        VifRequest.from_keys(good | {"rx-ring-ref": "11"} | keys, max_queues=1)
