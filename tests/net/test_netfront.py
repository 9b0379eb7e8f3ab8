# SPDX-License-Identifier: MIT
"""The frontend's half of a queue: what it sends and takes, what it does itself for a backend that cannot, and what a
hostile backend comes to.
"""

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from paravirt.errors import PeerError
from paravirt.protocol import netif
from paravirt.protocol.netif import Extra, GsoType, RxFlag, Status, TxFlag
from paravirt.ring.netif import Burst, Feature, FrameFlag, NetFront

from .net_stage import BASE, RX_PAGE, SLOTS, NetStage, make_net_stage
from .packets import UDP, Packet, pattern, plain

SG, GSO, CSUM6 = Feature.SG, Feature.GSO4 | Feature.GSO6, Feature.CSUM6
SIZES = [14, 15, 60, 1514, 3072, 3073, 4095, 4096, 4097, 8192, 9014, 32768, 61440, 65534, 65535]
EINVAL = -22


@pytest.fixture(params=[0, 2**32 - 20], ids=["start", "end of numbers"])
def stage(request: pytest.FixtureRequest) -> Iterator[NetStage]:
    with make_net_stage(start=request.param) as made:
        yield made


@pytest.fixture
def front(stage: NetStage) -> NetFront:
    made = stage.front()
    made.post_all()
    return made


def large() -> Burst:
    return Burst(SLOTS, 1 << 22)


def full(*packets: bytes, flags: int = 0, gso_size: int = 0, gso_type: int = 0) -> Burst:
    burst = large()
    for packet in packets:
        burst.add(packet, flags=flags, gso_size=gso_size, gso_type=gso_type)
    return burst


def statuses(burst: Burst) -> list[int]:
    return [int(status) for status in burst.frames["status"]]


# -- with an honest backend


@pytest.mark.parametrize("n", SIZES)
def test_frames_of_all_sizes_to_the_backend(stage: NetStage, front: NetFront, n: int) -> None:
    back, burst = stage.back(), large()
    for round_ in range(40):
        assert front.send(full(plain(n, round_))) == 1
        burst.clear()
        assert back.take(burst) == 1
        assert burst[0] == plain(n, round_)
        front.reap()
    assert front.in_flight == 0
    counters = front.counters
    assert (counters.tx_packets, counters.tx_bytes, counters.tx_errors) == (40, 40 * n, 0)


@pytest.mark.parametrize("n", SIZES)
def test_frames_of_all_sizes_from_the_backend(stage: NetStage, front: NetFront, n: int) -> None:
    back, burst = stage.back(), large()
    for round_ in range(40):
        back.send(full(plain(n, round_)))
        burst.clear()
        assert front.take(burst) == 1
        assert burst[0] == plain(n, round_)
    assert (front.counters.rx_packets, front.counters.rx_bytes, front.counters.rx_errors) == (40, 40 * n, 0)
    assert back.waiting == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_frames_both_ways_come_in_order(stage: NetStage, front: NetFront, seed: int) -> None:
    random_ = random.Random(seed)
    back, burst = stage.back(), large()
    for round_ in range(100):
        # Together they fit into a ring.
        packets = [plain(random_.choice(SIZES), round_ + i) for i in range(random_.randrange(1, 9))]
        assert front.send(full(*packets)) == len(packets)
        burst.clear()
        assert back.take(burst) == len(packets)
        assert list(burst) == packets
        back.send(burst)
        burst.clear()
        assert front.take(burst) == len(packets)
        assert list(burst) == packets
        front.reap()
    assert front.in_flight == 0


@pytest.mark.parametrize("gso", [0, 1448])
@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("n", [1, 6000, 60_000])
def test_what_is_known_of_a_frame_goes_with_it(stage: NetStage, front: NetFront, n: int, v6: bool, gso: int) -> None:
    """Both ways; the field of a blank checksum holds the pseudo header's sum."""
    packet = Packet(pattern(n), v6=v6)
    prepared = Packet(pattern(n), v6=v6, checksum=packet.pseudo_sum).frame()
    kind = (GsoType.TCPV6 if v6 else GsoType.TCPV4) if gso else 0
    sent = full(Packet(pattern(n), v6=v6, checksum=9).frame(), flags=FrameFlag.CSUM_BLANK, gso_size=gso, gso_type=kind)
    assert front.send(sent) == 1
    back, burst, got = stage.back(), large(), large()
    assert back.take(burst) == 1
    back.send(burst)
    assert front.take(got) == 1
    for one in (burst, got):
        assert one[0] == prepared
        (frame,) = one.frames
        assert frame["flags"] == FrameFlag.CSUM_BLANK | FrameFlag.VALIDATED
        assert (frame["gso_size"], frame["gso_type"]) == (gso, kind)
    front.reap()
    assert (front.in_flight, int(front.core.extras_out)) == (0, 0)


def test_hashes_come_through(stage: NetStage, front: NetFront) -> None:
    burst = full(plain(60), flags=FrameFlag.HASH | FrameFlag.VALIDATED)
    burst.frames["hash"], burst.frames["hash_type"] = 0xDEADBEEF, 3
    stage.back().send(burst)
    got = large()
    assert front.take(got) == 1
    assert (got.frames["hash"][0], got.frames["hash_type"][0]) == (0xDEADBEEF, 3)
    assert got.frames["flags"][0] == FrameFlag.HASH | FrameFlag.VALIDATED


def test_a_full_ring_takes_the_rest_after_answers(stage: NetStage, front: NetFront) -> None:
    burst = Burst.of([plain(60, i) for i in range(SLOTS + 20)])
    assert front.send(burst) == SLOTS
    assert front.in_flight == SLOTS
    assert front.send(burst, SLOTS) == 0
    back, got = stage.back(), Burst(64, 1 << 20)
    assert back.take(got) == 64
    assert front.send(burst, SLOTS) == 20, "answers are taken when there is no room"
    assert front.in_flight == SLOTS - 64 + 20
    while back.take(got := Burst(64, 1 << 20)):
        pass
    front.reap()
    assert front.in_flight == 0
    assert front.counters.tx_packets == SLOTS + 20


def test_a_large_frame_is_sent_whole_or_not(stage: NetStage, front: NetFront) -> None:
    assert front.send(Burst.of([plain(60)] * (SLOTS - 15))) == SLOTS - 15
    burst = full(plain(65535))
    assert front.send(burst) == 0
    assert front.in_flight == SLOTS - 15
    back, got = stage.back(), large()
    back.take(got)
    assert front.send(burst) == 1


@pytest.mark.parametrize("n", [0, 1, 13, 65536])
def test_frames_that_are_none_are_refused(front: NetFront, n: int) -> None:
    burst = full(plain(60), b"x" * n, plain(61))
    assert front.send(burst) == 3
    assert statuses(burst) == [0, EINVAL, 0]
    assert front.counters.tx_refused == 1


@pytest.mark.parametrize(
    ("packet", "how"),
    [
        (plain(60), {"flags": FrameFlag.CSUM_BLANK}),
        (plain(60), {"gso_size": 100, "gso_type": GsoType.TCPV4}),
        (Packet(b"x", protocol=UDP).frame(), {"gso_size": 100, "gso_type": GsoType.TCPV4}),
        (Packet(b"x").frame(), {"gso_size": 100, "gso_type": GsoType.TCPV6}),
        (Packet(b"x").frame(), {"gso_size": 0, "gso_type": GsoType.TCPV4}),
        (Packet(b"x").frame(), {"gso_size": 100, "gso_type": 3}),
    ],
)
def test_frames_that_are_not_what_is_said_of_them_are_refused(
    front: NetFront, packet: bytes, how: dict[str, int]
) -> None:
    burst = full(packet, **how)
    assert front.send(burst) == 1
    assert statuses(burst) == [EINVAL]
    assert front.in_flight == 0


# -- with a backend that can do less


def passed(stage: NetStage, front: NetFront, burst: Burst) -> list[bytes]:
    """What comes to a backend of it, which understands everything."""
    got = large()
    assert front.send(burst) == len(burst)
    back = stage.back()
    while back.take(got):
        pass
    assert back.fatal == 0
    front.reap()
    return list(got)


def test_without_sg_a_frame_has_one_page(stage: NetStage) -> None:
    front = stage.front(Feature(0))
    burst = full(plain(4096), plain(4097), plain(60))
    assert passed(stage, front, burst) == [plain(4096), plain(60)]
    assert statuses(burst) == [0, EINVAL, 0]


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("features", [Feature(0), SG, GSO], ids=["nothing", "sg", "gso without sg"])
@pytest.mark.parametrize(
    ("n", "size"), [(10, 1448), (1448, 1448), (1449, 1448), (60_000, 1448), (2000, 10), (100, 9000)]
)
def test_without_gso_large_packets_are_cut(stage: NetStage, features: Feature, v6: bool, n: int, size: int) -> None:
    front = stage.front(features)
    packet = Packet(pattern(n), v6=v6, checksum=0)
    kind = GsoType.TCPV6 if v6 else GsoType.TCPV4
    burst = full(packet.frame(), flags=FrameFlag.CSUM_BLANK, gso_size=size, gso_type=kind)
    assert passed(stage, front, burst) == Packet(pattern(n), v6=v6).segments(size)
    assert (front.counters.tx_segmented, front.in_flight) == (1, 0)


@pytest.mark.parametrize("features", [Feature(0), SG])
def test_segments_larger_than_a_page_need_sg(stage: NetStage, features: Feature) -> None:
    front = stage.front(features)
    packet = Packet(pattern(30_000))
    burst = full(packet.frame(), gso_size=8948, gso_type=GsoType.TCPV4)
    assert passed(stage, front, burst) == (packet.segments(8948) if features else [])
    assert statuses(burst) == [0 if features else EINVAL]


def test_more_segments_than_the_ring_has_slots_are_refused(stage: NetStage) -> None:
    front = stage.front(Feature(0))
    burst = full(Packet(pattern(257)).frame(), gso_size=1, gso_type=GsoType.TCPV4)
    assert passed(stage, front, burst) == []
    assert statuses(burst) == [EINVAL]
    assert front.in_flight == 0


@pytest.mark.parametrize("protocol", [6, UDP])
@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("features", [SG | GSO, SG | GSO | CSUM6], ids=["no csum6", "csum6"])
def test_without_csum6_checksums_of_ipv6_are_filled_in(
    stage: NetStage, features: Feature, v6: bool, protocol: int
) -> None:
    front = stage.front(features)
    packet = Packet(pattern(99), v6=v6, protocol=protocol)
    blank = Packet(pattern(99), v6=v6, protocol=protocol, checksum=packet.pseudo_sum).frame()
    filled = v6 and CSUM6 not in features
    sent = full(blank, flags=FrameFlag.CSUM_BLANK)
    assert front.send(sent) == 1
    request = stage.tx_back.take_batch()
    flags = TxFlag.DATA_VALIDATED | (0 if filled else TxFlag.CSUM_BLANK)
    assert request["flags"].tolist() == [flags]
    start = (int(request["gref"][0]) - BASE) * 4096 + int(request["offset"][0])
    content = bytes(stage.data.view[start : start + len(blank)])
    assert content == (packet.frame() if filled else blank)
    assert front.counters.tx_checksums == filled


# -- with a hostile backend


Response = tuple[int, int, int, int]


def offered(stage: NetStage) -> list[int]:
    """Ids of the buffers that the frontend has posted, in order."""
    return [int(id) for id in stage.rx_back.take_batch()["id"]]


def answer(stage: NetStage, *responses: Response | bytes) -> None:
    rows = np.zeros(len(responses), netif.RX_RESPONSE)
    for i, response in enumerate(responses):
        rows[i] = np.frombuffer(response, netif.RX_RESPONSE)[0] if isinstance(response, bytes) else response
    stage.rx_back.push(rows)


def extra(kind: int, content: bytes = b"", *, more: bool = False) -> bytes:
    return bytes([kind, int(more)]) + content.ljust(6, b"\0")


def goes_on(stage: NetStage, front: NetFront, ids: Sequence[int], n_errors: int) -> None:
    """What came was dropped and counted; its buffers are offered again; a good packet behind it is taken."""
    stage.page(RX_PAGE + ids[0])[:60] = np.frombuffer(plain(60), np.uint8)
    answer(stage, (ids[0], 0, 0, 60))
    burst = large()
    assert front.take(burst, 64) == 1
    assert burst[0] == plain(60)
    assert (front.counters.rx_errors, front.counters.rx_packets) == (n_errors, 1)
    assert len(stage.rx_back.take_batch()) == SLOTS - len(ids) + 1


@pytest.mark.parametrize("status", [-1, -2, -32768])
def test_a_negative_status_drops_the_packet(stage: NetStage, front: NetFront, status: int) -> None:
    ids = offered(stage)
    answer(stage, (ids[0], 0, 0, status))
    goes_on(stage, front, ids[1:], 1)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_an_error_in_one_slot_drops_the_whole_packet(stage: NetStage, front: NetFront, where: int) -> None:
    ids = offered(stage)
    more = RxFlag.MORE_DATA
    answer(stage, *((ids[i], 0, more if i < 2 else 0, -1 if i == where else 4096) for i in range(3)))
    goes_on(stage, front, ids[3:], 1)


@pytest.mark.parametrize(("offset", "status"), [(0, 4097), (1, 4096), (4095, 2), (4096, 14), (65535, 14), (0, 32767)])
def test_what_is_not_within_the_page_is_dropped(stage: NetStage, front: NetFront, offset: int, status: int) -> None:
    ids = offered(stage)
    answer(stage, (ids[0], offset, 0, status))
    goes_on(stage, front, ids[1:], 1)


@pytest.mark.parametrize("status", [0, 1, 13])
def test_less_than_an_ethernet_header_is_dropped(stage: NetStage, front: NetFront, status: int) -> None:
    ids = offered(stage)
    answer(stage, (ids[0], 0, 0, status))
    goes_on(stage, front, ids[1:], 1)


def test_more_bytes_than_a_frame_may_have_are_dropped(stage: NetStage, front: NetFront) -> None:
    ids = offered(stage)
    answer(stage, *((id, 0, RxFlag.MORE_DATA if i < 16 else 0, 4096 if i < 16 else 0) for i, id in enumerate(ids[:17])))
    goes_on(stage, front, ids[17:], 1)
    assert front.counters.rx_too_long == 1


@pytest.mark.parametrize("n", [1, 2, 100])
def test_chains_that_do_not_end_are_dropped(stage: NetStage, front: NetFront, n: int) -> None:
    ids = offered(stage)
    answer(stage, *((id, 0, RxFlag.MORE_DATA, 100) for id in ids[:n]))
    assert front.take(large()) == 0
    goes_on(stage, front, ids[n:], 1)


def test_a_whole_ring_without_an_end_is_dropped(stage: NetStage, front: NetFront) -> None:
    for round_ in range(3):
        ids = offered(stage)
        assert len(ids) == SLOTS
        answer(stage, *((id, 0, RxFlag.MORE_DATA, 4096) for id in ids))
        assert front.take(large()) == 0
        assert front.counters.rx_errors == round_ + 1


@pytest.mark.parametrize("n", [1, 5, 200])
def test_endless_extras_are_dropped(stage: NetStage, front: NetFront, n: int) -> None:
    ids = offered(stage)
    answer(stage, (ids[0], 0, RxFlag.EXTRA_INFO, 60), *[extra(Extra.HASH, more=True)] * n)
    assert front.take(large()) == 0
    goes_on(stage, front, ids[n + 1 :], 1)


@pytest.mark.parametrize(
    "slot",
    [
        extra(0),
        extra(6),
        extra(255),
        extra(Extra.GSO, bytes([0, 0, GsoType.TCPV4])),
        extra(Extra.GSO, bytes([100, 0, 0])),
        extra(Extra.GSO, bytes([100, 0, 3])),
    ],
    ids=["type 0", "type 6", "type 255", "no bytes", "no protocol", "unknown protocol"],
)
def test_extra_information_that_is_wrong_drops_the_packet(stage: NetStage, front: NetFront, slot: bytes) -> None:
    ids = offered(stage)
    answer(stage, (ids[0], 0, RxFlag.EXTRA_INFO, 60), slot)
    goes_on(stage, front, ids[2:], 1)


@pytest.mark.parametrize("gso", [False, True])
def test_blank_checksums_of_what_has_none_are_dropped(stage: NetStage, front: NetFront, gso: bool) -> None:
    ids = offered(stage)
    stage.page(RX_PAGE + ids[0])[:60] = np.frombuffer(plain(60), np.uint8)
    flags = RxFlag.CSUM_BLANK | (RxFlag.EXTRA_INFO if gso else 0)
    answer(stage, (ids[0], 0, flags, 60), *([extra(Extra.GSO, bytes([100, 0, 1]))] if gso else []))
    goes_on(stage, front, ids[2 if gso else 1 :], 1)
    assert front.counters.rx_checksums == 1


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("wrong", [255, 256, 65535])
def test_wrong_ids_are_the_end_of_the_queue(stage: NetStage, front: NetFront, where: int, wrong: int) -> None:
    ids = offered(stage)
    used = [ids[0], ids[1]]
    used[where] = wrong
    answer(stage, (used[0], 0, RxFlag.MORE_DATA, 60), (used[1], 0, 0, 60))
    for _ in range(3):
        with pytest.raises(PeerError):
            front.take(large())
    assert front.counters.rx_packets == 0


def test_spurious_null_answers_are_the_end_of_the_queue(stage: NetStage, front: NetFront) -> None:
    """There is no extra information that they could be of."""
    front.send(full(plain(60)))
    stage.tx_back.take_batch()
    stage.tx_back.push(np.array([(0, Status.NULL)], netif.TX_RESPONSE))
    for _ in range(2):
        with pytest.raises(PeerError):
            front.reap()


@pytest.mark.parametrize("status", [Status.ERROR, Status.DROPPED, -32768, 2])
def test_errors_in_answers_are_counted(stage: NetStage, front: NetFront, status: int) -> None:
    front.send(full(plain(60), plain(5000)))
    ids = stage.tx_back.take_batch()["id"]
    stage.tx_back.push(np.array([(id, status) for id in ids], netif.TX_RESPONSE))
    front.reap()
    assert (front.in_flight, front.counters.tx_errors) == (0, 3)


@pytest.mark.parametrize("seed", range(6))
def test_random_responses_never_do_harm(stage: NetStage, front: NetFront, seed: int) -> None:
    """With the right ids and anything else: packets of allowed lengths, or errors that are counted."""
    random_ = random.Random(seed)
    for _ in range(200):
        rows = []
        for id in offered(stage)[:SLOTS]:
            flags = random_.choice([0, 0, 0, 4, 8, 12, 2, 1, 16, random_.randrange(1 << 16)])
            rows.append(
                (
                    id,
                    random_.choice([0, 0, 4000, random_.randrange(1 << 16)]),
                    flags,
                    random_.choice([60, 60, 1514, 4096, 0, -1, random_.randrange(-(1 << 15), 1 << 15)]),
                )
            )
        answer(stage, *rows)
        burst = large()
        while front.take(burst, 64):
            assert all(14 <= n <= 65535 for n in burst.frames["length"].tolist())
            burst.clear()
    assert front.counters.rx_errors > 0
    assert front.counters.rx_packets > 0
