# SPDX-License-Identifier: MIT
"""What the backend makes of each kind of chain and of each state of the guest's buffers: Linux' netback's rules.

Source: drivers/net/xen-netback (limits, what is fatal and what is dropped); XSA numbers where one stands behind it.
"""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from paravirt.errors import PeerError
from paravirt.protocol.netif import Extra, Fatal, RxFlag, Status, TxFlag
from paravirt.ring.netif import Burst, Feature, FrameFlag

from .net_stage import ALL, NetStage, make_net_stage

MORE, EXTRA = TxFlag.MORE_DATA, TxFlag.EXTRA_INFO
GSO = bytes((0xA0, 0x05, 1))  # 1440 bytes, TCPv4


@pytest.fixture
def stage() -> Iterator[NetStage]:
    with make_net_stage() as stage:
        yield stage


def content(n: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(n)


def chain(stage: NetStage, sizes: list[int], *, total: int | None = None) -> list[np.ndarray]:
    """Requests of one packet, a page each, whose pages hold pieces of `content`."""
    n_bytes = sum(sizes)
    data, at, requests = content(n_bytes), 0, []
    for i, size in enumerate(sizes):
        stage.put(i, data[at : at + size], 7)
        at += size
        flags = MORE if i < len(sizes) - 1 else 0
        requests.append(stage.request(i, size if i else (total or n_bytes), offset=7, flags=flags, id=100 + i))
    return requests


def fatal(stage: NetStage, *requests: np.ndarray) -> Fatal:
    back, burst = stage.back(), Burst()
    stage.send(*requests)
    with pytest.raises(PeerError):
        back.take(burst)
    with pytest.raises(PeerError):
        back.take(burst)
    assert len(burst) == 0
    return Fatal(back.fatal)


@pytest.mark.parametrize("n_slots", range(1, 20))
def test_a_packet_of_up_to_nineteen_slots_is_taken(stage: NetStage, n_slots: int) -> None:
    back, burst = stage.back(), Burst()
    sizes = [100 + i for i in range(n_slots)]
    stage.send(*chain(stage, sizes))
    assert back.take(burst) == 1
    assert burst[0] == content(sum(sizes))
    assert stage.answers() == [(100 + i, Status.OKAY) for i in range(n_slots)]


@pytest.mark.parametrize("n_slots", [20, 21])
def test_a_packet_of_more_is_dropped_with_an_error(stage: NetStage, n_slots: int) -> None:
    back, burst = stage.back(), Burst()
    stage.send(*chain(stage, [100] * n_slots))
    assert back.take(burst) == 0
    assert stage.answers() == [(100 + i, Status.ERROR) for i in range(n_slots)]
    assert back.counters().tx_errors == 1


def test_a_packet_of_still_more_is_fatal(stage: NetStage) -> None:
    assert fatal(stage, *chain(stage, [100] * 22)) is Fatal.SLOTS


def test_more_data_without_another_request_is_fatal(stage: NetStage) -> None:
    assert fatal(stage, *chain(stage, [100, 100, 100])[:2]) is Fatal.SHORT


def test_packets_before_a_fatal_one_are_delivered(stage: NetStage) -> None:
    back, burst = stage.back(), Burst()
    stage.put(0, content(60))
    stage.send(stage.request(0, 60, id=1), stage.request(0, 60, offset=4090, id=2))
    with pytest.raises(PeerError):
        back.take(burst)
    assert list(burst) == [content(60)]
    assert stage.answers() == [(1, Status.OKAY)]


@pytest.mark.parametrize("slot", [0, 1])
def test_a_slot_that_crosses_its_page_is_fatal(stage: NetStage, slot: int) -> None:
    requests = chain(stage, [100, 100])
    requests[slot]["offset"] = 4000
    assert fatal(stage, *requests) is Fatal.PAGE


def test_a_slot_that_is_larger_than_the_rest_is_dropped_and_no_more(stage: NetStage) -> None:
    """Frames of 64 KiB and more, whose size has wrapped."""
    back, burst = stage.back(), Burst()
    stage.send(*chain(stage, [100, 200, 300], total=150))
    stage.send(stage.request(0, 60, id=9))
    assert back.take(burst) == 1
    assert stage.answers() == [*((100 + i, Status.ERROR) for i in range(3)), (9, Status.OKAY)]


@pytest.mark.parametrize("n", range(14))
def test_a_packet_shorter_than_a_header_is_an_error(stage: NetStage, n: int) -> None:
    back = stage.back()
    stage.grant(0)
    stage.send(stage.request(0, n, id=3))
    assert back.take(Burst()) == 0
    assert stage.answers() == [(3, Status.ERROR)]


def test_extra_information_that_is_missing_is_fatal(stage: NetStage) -> None:
    assert fatal(stage, stage.request(0, 60, flags=EXTRA)) is Fatal.NO_EXTRA


def test_extra_information_that_goes_on_without_end_is_fatal(stage: NetStage) -> None:
    extras = [stage.extra(Extra.XDP, more=True)] * 240
    assert fatal(stage, stage.request(0, 60, flags=EXTRA), *extras) is Fatal.EXTRA


def test_a_hash_that_a_guest_made_comes_with_its_frame_and_many_slots_are_answered(stage: NetStage) -> None:
    back, burst = stage.back(), Burst()
    stage.put(0, bytes(60))
    hashed = stage.extra(Extra.HASH, b"\x01\x01\x78\x56\x34\x12")
    stage.send(stage.request(0, 60, flags=EXTRA, id=5), *[stage.extra(Extra.XDP, more=True)] * 200, hashed)
    stage.send(stage.request(0, 60, id=6))
    while len(burst) < 2:
        back.take(burst)
    assert [int(one) for one in burst.frames["hash"]] == [0x12345678, 0]
    assert [int(one) for one in burst.frames["hash_type"]] == [1, 0]
    assert [bool(one & FrameFlag.HASH) for one in burst.frames["flags"]] == [True, False]
    assert stage.answers() == [(5, Status.OKAY), *[(0, Status.NULL)] * 201, (6, Status.OKAY)]


@pytest.mark.parametrize("kind", [0, 6, 255])
def test_extra_information_of_an_unknown_type_is_fatal(stage: NetStage, kind: int) -> None:
    assert fatal(stage, stage.request(0, 60, flags=EXTRA), stage.extra(kind)) is Fatal.EXTRA


@pytest.mark.parametrize(("gso", "reason"), [(bytes((0, 0, 1)), Fatal.GSO_SIZE), (bytes((9, 0, 3)), Fatal.GSO_TYPE)])
def test_segments_of_no_size_or_kind_are_fatal(stage: NetStage, gso: bytes, reason: Fatal) -> None:
    assert fatal(stage, stage.request(0, 60, flags=EXTRA), stage.extra(Extra.GSO, gso)) is reason


def test_extra_information_is_answered_null(stage: NetStage) -> None:
    back = stage.back()
    stage.put(0, content(60))
    stage.send(stage.request(0, 60, flags=EXTRA, id=5), stage.extra(Extra.HASH, more=True), stage.extra(Extra.XDP))
    assert back.take(Burst()) == 1
    assert stage.answers() == [(5, Status.OKAY), (0, Status.NULL), (0, Status.NULL)]


def test_what_is_no_tcp_is_not_cut_and_costs_nothing_else(stage: NetStage) -> None:
    back, burst = stage.back(), Burst()
    stage.put(0, content(200))
    stage.send(stage.request(0, 200, flags=EXTRA, id=1), stage.extra(Extra.GSO, GSO))
    stage.send(stage.request(0, 200, flags=TxFlag.CSUM_BLANK, id=2), stage.request(0, 200, id=3))
    assert back.take(burst) == 1
    assert back.counters().tx_checksums == 2
    assert [status for _, status in stage.answers() if status != Status.NULL] == [Status.OKAY] * 3


@pytest.mark.parametrize("at", range(3))
def test_xsa_448_fragments_of_no_bytes_are_answered_and_not_looked_at(stage: NetStage, at: int) -> None:
    back, burst = stage.back(), Burst()
    sizes = [60, 60, 60]
    sizes[at] = 0
    requests = chain(stage, sizes)
    requests[at]["gref"] = 0xFFFFFFFF
    stage.send(*requests)
    assert back.take(burst) == 1
    assert burst[0] == content(120)
    assert stage.answers() == [(100 + i, Status.OKAY) for i in range(3)]


def test_xsa_432_every_split_of_a_packet_keeps_its_bytes(stage: NetStage) -> None:
    """Headers that are spread over slots in every way: 14 to 200 bytes in 1 to 18 slots."""
    back, burst = stage.back(), Burst()
    chance = random.Random(432)
    for n_bytes in range(14, 201):
        for n_slots in (1, 2, 3, 17, 18):
            cuts = sorted(chance.randrange(n_bytes + 1) for _ in range(n_slots - 1))
            sizes = [b - a for a, b in zip([0, *cuts], [*cuts, n_bytes], strict=True)]
            burst.clear()
            stage.send(*chain(stage, sizes))
            assert back.take(burst) == 1, sizes
            assert burst[0] == content(n_bytes), sizes
            assert all(status == Status.OKAY for _, status in stage.answers())


@pytest.mark.parametrize("gref", [0, 7, 8 + 255, 8 + 511, 8 + 512, 0xFFFFFFFF])
def test_xsa_361_pages_that_cannot_be_copied_are_an_error_of_that_packet(stage: NetStage, gref: int) -> None:
    back, burst = stage.back(), Burst()
    stage.put(0, content(60))
    bad = stage.request(0, 60, id=2)
    bad["gref"] = gref
    stage.send(stage.request(0, 60, id=1), bad, stage.request(0, 60, id=3))
    assert back.take(burst) == 2
    assert sorted(stage.answers()) == [(1, Status.OKAY), (2, Status.ERROR), (3, Status.OKAY)]
    assert back.counters().tx_copy_errors == 1


def test_a_rate_is_a_burst_and_then_a_share_of_each_window(stage: NetStage) -> None:
    back, burst = stage.back(), Burst(64, 1 << 20)
    back.set_rate(3000, 1000)
    stage.put(0, content(4000))
    now = 10**9
    took = 0
    for _ in range(60):
        stage.send(stage.request(0, 3000))
        burst.clear()
        took += back.take(burst, now_ns=now)
        stage.answers()
    assert took == 1  # the credit of one window; a burst adds up while nothing is sent
    burst.clear()
    assert back.take(burst, now_ns=now + 1_000_000) == 1
    assert back.take(burst, now_ns=now + 1_000_001) == 0
    assert back.counters().tx_delayed > 0


def test_multicast_lists_hold_64_addresses_and_filter_what_is_sent(stage: NetStage) -> None:
    back = stage.back(ALL | Feature.MCAST_CONTROL)
    groups = [bytes((1, 0, 0x5E, 0, 0, i)) for i in range(65)]
    for group in groups:
        stage.send(stage.request(0, 0, flags=EXTRA, id=group[5]), stage.extra(Extra.MCAST_ADD, group))
        back.take(Burst())
    status = dict(answer for answer in stage.answers() if answer[1] != Status.NULL)
    assert [status[i] for i in range(65)] == [Status.OKAY] * 64 + [Status.ERROR]
    stage.send(stage.request(0, 0, flags=EXTRA, id=1), stage.extra(Extra.MCAST_DEL, groups[1]))
    back.take(Burst())
    stage.post(8)
    back.send(Burst.of([group + bytes(54) for group in (groups[0], groups[1], groups[64], b"\xff" * 6)]))
    assert back.counters().rx_filtered == 2
    assert len(stage.received()) == 2


# -- to the guest


def test_a_frame_takes_a_slot_a_page_and_one_for_what_is_said_of_it(stage: NetStage) -> None:
    back = stage.back()
    stage.post(20)
    back.send(Burst.of([content(9000)]))
    first, second, third = stage.received()
    assert [int(slot["status"]) for slot in (first, second, third)] == [4096, 4096, 808]
    assert [int(slot["flags"]) for slot in (first, second, third)] == [RxFlag.MORE_DATA, RxFlag.MORE_DATA, 0]
    assert [int(slot["id"]) for slot in (first, second, third)] == [0, 1, 2]
    got = b"".join(
        stage.page(256 + i)[: int(slot["status"])].tobytes() for i, slot in enumerate((first, second, third))
    )
    assert got == content(9000)


def test_validated_frames_say_so_with_the_flags_of_responses(stage: NetStage) -> None:
    back, burst = stage.back(), Burst()
    stage.post(2)
    burst.add(content(60), flags=FrameFlag.VALIDATED)
    back.send(burst)
    assert int(stage.received()[0]["flags"]) == RxFlag.DATA_VALIDATED


def test_a_guest_without_scatter_gets_no_frame_larger_than_a_page(stage: NetStage) -> None:
    back = stage.back(Feature.RX_NOTIFY)
    stage.post(8)
    back.send(Burst.of([content(4097), content(4096)]))
    assert [int(slot["status"]) for slot in stage.received()] == [4096]
    assert back.counters().rx_too_large == 1


def test_xsa_392_what_waits_for_buffers_is_bounded_in_bytes_and_time(stage: NetStage) -> None:
    back, now = stage.back(), 10**9
    for _ in range(20):
        back.send(Burst.of([content(60000)] * 1), now_ns=now)
    frames, n_bytes = back.waiting
    assert n_bytes <= 512 * 1024
    assert frames == 8
    assert back.counters().rx_full == 12
    back.deliver(now_ns=now + 9_999_999_999)
    assert back.waiting[0] == 8
    back.deliver(now_ns=now + 10_000_000_000)
    assert back.waiting == (0, 0)
    assert back.counters().rx_expired == 8


def test_what_waits_is_delivered_in_order_when_buffers_come(stage: NetStage) -> None:
    back = stage.back()
    for i in range(4):
        back.send(Burst.of([content(100, i)]))
    assert len(stage.received()) == 0
    stage.post(3)
    back.send(Burst.of([content(100, 4)]))  # behind those that wait
    back.deliver()
    stage.post(2)
    back.deliver()
    assert [stage.page(256 + i)[:100].tobytes() for i in range(5)] == [content(100, i) for i in range(5)]
    assert back.waiting == (0, 0)


def test_a_guest_that_takes_nothing_for_a_minute_is_stalled_until_it_does(stage: NetStage) -> None:
    back, now = stage.back(), 10**9
    back.send(Burst.of([content(60)]), now_ns=now)
    back.deliver(now_ns=now + 60 * 10**9)
    assert back.stalled
    back.send(Burst.of([content(60)]), now_ns=now + 61 * 10**9)
    assert back.counters().rx_stalled == 1
    stage.post(4)
    back.deliver(now_ns=now + 62 * 10**9)
    assert not back.stalled
    back.send(Burst.of([content(60)]), now_ns=now + 63 * 10**9)
    assert len(stage.received()) == 1


def test_a_guest_that_does_not_say_when_it_has_buffers_is_not_waited_for(stage: NetStage) -> None:
    back, now = stage.back(Feature.SG), 10**9
    back.send(Burst.of([content(60)]), now_ns=now)
    back.deliver(now_ns=now + 30_000_000)
    assert back.waiting == (0, 0)
    back.deliver(now_ns=now + 100 * 10**9)
    assert not back.stalled


def test_buffers_that_cannot_be_written_are_an_error_of_their_slot(stage: NetStage) -> None:
    back = stage.back()
    stage.grant(256, read_only=True)
    stage.post(2)
    back.send(Burst.of([content(60), content(60)]))
    assert [int(slot["status"]) for slot in stage.received()] == [Status.ERROR, 60]
    assert back.counters().rx_copy_errors == 1
