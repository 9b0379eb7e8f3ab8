# SPDX-License-Identifier: MIT
"""What a backend does with odd packets, and with guests that take nothing: limits, numbers, what is fatal as in
Linux' netback.
"""

import time
from collections.abc import Iterator

import numpy as np
import pytest

from paravirt.errors import PeerError
from paravirt.protocol.netif import Extra, Fatal, GsoType, RxFlag, Status, TxFlag
from paravirt.ring.netif import DRAIN_WITHOUT_NOTIFY_S, Burst, Feature, FrameFlag, NetBack
from paravirt.ring.netloop import NetLoop

from .net_stage import ALL, RX_PAGE, NetStage, make_net_stage
from .packets import MACS, UDP, Packet, pattern, plain

MORE, EXTRA = TxFlag.MORE_DATA, TxFlag.EXTRA_INFO
OKAY, ERROR = Status.OKAY, Status.ERROR
S = 1_000_000_000
"""A second in ns."""
NOW = 1000 * S
WAITING_BYTES = 524_288


@pytest.fixture
def stage() -> Iterator[NetStage]:
    with make_net_stage() as made:
        for page in range(32):
            made.put(page, pattern(4096, page))
        yield made


def chain(stage: NetStage, following: int, *, size: int = 100, announced: int | None = None) -> list[np.ndarray]:
    """A packet of so many requests after the first, each with `size` bytes."""
    n_bytes = size * (following + 1) if announced is None else announced
    parts = [stage.request(0, n_bytes, flags=MORE if following else 0, id=0)]
    for i in range(following):
        parts.append(stage.request(1 + i, size, flags=MORE if i < following - 1 else 0, id=1 + i))
    return parts


def good(stage: NetStage, *, id: int = 99) -> np.ndarray:
    return stage.request(31, 60, id=id)


def ends(back: NetBack, reason: Fatal) -> None:
    """The device is given up, for that reason, and stays so."""
    burst = Burst()
    for _ in range(2):
        with pytest.raises(PeerError):
            back.take(burst)
        assert back.fatal == reason
    assert len(burst) == 0


def drops(stage: NetStage, ids: list[int], n_extras: int = 0) -> None:
    """What stands in the ring is dropped with an error for each id; the good packet behind it is taken."""
    back, burst = stage.back(), Burst()
    stage.send(good(stage))
    assert back.take(burst) == 1
    assert back.fatal == 0
    assert back.counters().tx_errors == 1
    assert sorted(stage.answers()) == sorted(
        [*((id, int(ERROR)) for id in ids), (99, int(OKAY)), *[(0, int(Status.NULL))] * n_extras]
    )
    assert stage.tx_back.outstanding == 0


# -- slots


@pytest.mark.parametrize("following", [0, 1, 16, 17, 18])
def test_18_slots_after_the_first_are_taken(stage: NetStage, following: int) -> None:
    stage.send(*chain(stage, following))
    burst = Burst()
    assert stage.back().take(burst) == 1
    assert burst[0] == b"".join(pattern(4096, i)[:100] for i in range(following + 1))
    assert stage.answers() == [(i, OKAY) for i in range(following + 1)]


@pytest.mark.parametrize("following", [19, 20])
def test_with_the_19th_the_whole_packet_is_consumed_and_answered_error(stage: NetStage, following: int) -> None:
    stage.send(*chain(stage, following))
    drops(stage, list(range(following + 1)))


@pytest.mark.parametrize("following", [21, 22, 40])
def test_more_than_20_are_fatal(stage: NetStage, following: int) -> None:
    parts = chain(stage, 20)
    parts[-1]["flags"] = MORE
    stage.send(*parts, *(stage.request(0, 1, flags=MORE if i < following - 21 else 0) for i in range(following - 20)))
    ends(stage.back(), Fatal.SLOTS)


@pytest.mark.parametrize("following", [1, 2, 18, 19])
def test_more_data_without_a_further_request_is_fatal(stage: NetStage, following: int) -> None:
    stage.send(*chain(stage, following)[:-1])
    ends(stage.back(), Fatal.SHORT)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_slot_that_crosses_its_page_is_fatal(stage: NetStage, at: int) -> None:
    parts = chain(stage, 2)
    parts[at]["offset"] = 3997
    stage.send(*parts)
    ends(stage.back(), Fatal.PAGE)


def test_a_slot_that_crosses_its_page_is_fatal_in_a_packet_that_is_dropped(stage: NetStage) -> None:
    parts = chain(stage, 2)
    parts[1]["size"] = 1000
    parts[2]["offset"] = 3997
    stage.send(*parts)
    ends(stage.back(), Fatal.PAGE)


@pytest.mark.parametrize("offset", [3996, 0])
def test_a_slot_that_ends_with_its_page_is_well(stage: NetStage, offset: int) -> None:
    parts = chain(stage, 1)
    for part in parts:
        part["offset"] = offset
    stage.send(*parts)
    assert stage.back().take(Burst()) == 1


@pytest.mark.parametrize("sizes", [(300, 301), (300, 200, 101), (10, 4096, 4096), (0, 1)])
def test_a_later_slot_larger_than_the_rest_drops_the_packet(stage: NetStage, sizes: tuple[int, ...]) -> None:
    """Of frames of 64 KiB and more, of which the size has wrapped, there are some of frontends that mean no harm."""
    parts = chain(stage, len(sizes) - 1)
    for part, size in zip(parts, sizes, strict=True):
        part["size"] = size
    stage.send(*parts)
    drops(stage, list(range(len(sizes))))


@pytest.mark.parametrize("n", [0, 1, 13])
def test_less_than_an_ethernet_header_is_an_error(stage: NetStage, n: int) -> None:
    stage.send(stage.request(0, n, id=3))
    drops(stage, [3])


def test_14_bytes_are_a_packet(stage: NetStage) -> None:
    stage.send(stage.request(0, 14))
    assert stage.back().take(Burst()) == 1


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_zero_length_slots_are_answered_okay_and_not_looked_at(stage: NetStage, at: int) -> None:
    parts = chain(stage, 3)
    parts[0]["size"] -= 100
    if at:
        parts[at]["size"] = 0
    parts[at]["gref"] = 0xFFFFFFFF
    stage.send(*parts)
    burst = Burst()
    assert stage.back().take(burst) == 1
    assert burst[0] == b"".join(pattern(4096, i)[:100] for i in range(4) if i != at)
    assert stage.answers() == [(i, OKAY) for i in range(4)]


# -- extra information


@pytest.mark.parametrize("n", [0, 1, 2])
def test_missing_extra_information_is_fatal(stage: NetStage, n: int) -> None:
    stage.send(stage.request(0, 60, flags=EXTRA), *(stage.extra(Extra.HASH, more=True) for _ in range(n)))
    ends(stage.back(), Fatal.NO_EXTRA)


@pytest.mark.parametrize("kind", [0, 6, 7, 255])
def test_extra_information_of_no_known_type_is_fatal(stage: NetStage, kind: int) -> None:
    stage.send(stage.request(0, 60, flags=EXTRA), stage.extra(Extra.HASH, more=True), stage.extra(kind))
    ends(stage.back(), Fatal.EXTRA)


def test_endless_extra_information_is_fatal(stage: NetStage) -> None:
    stage.send(stage.request(0, 60, flags=EXTRA), *(stage.extra(Extra.HASH, more=True) for _ in range(240)))
    ends(stage.back(), Fatal.EXTRA)


@pytest.mark.parametrize("kind", [GsoType.TCPV4, GsoType.TCPV6, 9])
def test_segments_of_no_bytes_are_fatal(stage: NetStage, kind: int) -> None:
    stage.send(stage.request(0, 60, flags=EXTRA), stage.extra(Extra.GSO, bytes([0, 0, kind])))
    ends(stage.back(), Fatal.GSO_SIZE)


@pytest.mark.parametrize("kind", [0, 3, 255])
def test_segments_of_no_known_protocol_are_fatal(stage: NetStage, kind: int) -> None:
    stage.send(stage.request(0, 60, flags=EXTRA), stage.extra(Extra.GSO, bytes([100, 0, kind])))
    ends(stage.back(), Fatal.GSO_TYPE)


def test_a_short_packet_with_wrong_segments_is_an_error_and_not_fatal(stage: NetStage) -> None:
    stage.send(stage.request(0, 13, flags=EXTRA, id=3), stage.extra(Extra.GSO))
    drops(stage, [3], n_extras=1)


def test_extra_information_that_means_nothing_here_is_taken(stage: NetStage) -> None:
    stage.send(
        stage.request(0, 60, flags=EXTRA, id=1), stage.extra(Extra.HASH, more=True), stage.extra(Extra.XDP, b"\xff\xff")
    )
    assert stage.back().take(Burst()) == 1
    assert stage.answers() == [(1, OKAY), (0, Status.NULL), (0, Status.NULL)]


def test_what_came_before_something_fatal_is_answered_and_delivered(stage: NetStage) -> None:
    stage.send(good(stage, id=1), good(stage, id=2), stage.request(0, 60, offset=4090, id=3), good(stage, id=4))
    back, burst = stage.back(), Burst()
    with pytest.raises(PeerError):
        back.take(burst)
    assert (len(burst), stage.answers()) == (2, [(1, OKAY), (2, OKAY)])


@pytest.mark.parametrize(
    ("packet", "gso"),
    [
        (Packet(pattern(100)).frame(), GsoType.TCPV6),
        (Packet(pattern(100), v6=True).frame(), GsoType.TCPV4),
        (Packet(pattern(100), protocol=UDP).frame(), GsoType.TCPV4),
        (plain(100), GsoType.TCPV4),
        (plain(100), 0),
    ],
    ids=["not v6", "not v4", "udp", "no ip", "no checksum"],
)
def test_what_cannot_be_what_is_said_of_it_is_answered_okay_and_dropped(
    stage: NetStage, packet: bytes, gso: int
) -> None:
    stage.put(0, packet)
    flags = TxFlag.CSUM_BLANK | (EXTRA if gso else 0)
    extra = [stage.extra(Extra.GSO, bytes([100, 0, gso]))] if gso else []
    stage.send(stage.request(0, len(packet), flags=flags, id=1), *extra, good(stage))
    back, burst = stage.back(), Burst()
    assert back.take(burst) == 1
    assert back.counters().tx_checksums == 1
    assert [answer for answer in stage.answers() if answer[0]] == [(1, OKAY), (99, OKAY)]


def test_behind_a_batch_of_which_nothing_is_left_the_rest_is_taken(stage: NetStage) -> None:
    """A loop that sleeps as soon as it finds nothing does not sleep on requests that it has of the ring already."""
    stage.put(0, plain(100))
    loop = NetLoop(spin_ns=0)
    legs = [loop.add_back(stage.back(), (stage.back_port, stage.back_port), None), loop.add_user()]
    loop.wire(*legs)
    loop.start()
    try:
        for _ in range(10):
            # It sleeps, and has not been told of anything yet.
            time.sleep(0.01)
            burst = Burst()
            stage.send(*(stage.request(0, 100, flags=TxFlag.CSUM_BLANK) for _ in range(64)), good(stage))
            assert legs[1].get(burst, timeout_s=10.0) == 1
            stage.answers()
    finally:
        loop.stop()
        for leg in legs:
            leg.remove()


# -- how much a guest may send


def sent_in(stage: NetStage, back: NetBack, n: int, now_ns: int) -> int:
    """Packets of n bytes that are taken at once, of 100."""
    room = 100 - stage.tx_back.unconsumed - int(back.core.n_requests)
    if room > 0:
        stage.send(*(stage.request(0, n) for _ in range(room)))
    done = 0
    burst = Burst(64, 1 << 20)
    while True:
        burst.clear()
        if not (n_taken := back.take(burst, now_ns=now_ns)):
            stage.answers()
            return done
        done += n_taken


def test_a_rate_holds_and_a_rest_adds_up_to_a_burst(stage: NetStage) -> None:
    back = stage.back()
    back.set_rate(40_000, 50_000)
    window = S // 20
    assert sent_in(stage, back, 1000, NOW) == 40
    assert back.due_ns == NOW + window
    assert sent_in(stage, back, 1000, NOW + window - 1) == 0
    assert sent_in(stage, back, 1000, NOW + window) == 40
    assert sent_in(stage, back, 1000, NOW + 2 * window) == 40
    assert back.counters().tx_delayed >= 3
    total = sum(sent_in(stage, back, 1000, NOW + (3 + i) * window) for i in range(20))
    assert 20 * 40 <= total <= 20 * 40 + 131


def test_a_packet_larger_than_a_window_comes_after_some(stage: NetStage) -> None:
    back, burst = stage.back(), Burst()
    back.set_rate(1000, 1000)
    stage.send(*chain(stage, 15, size=4096, announced=65535 - 1))
    stage.send(good(stage))
    parts = 0
    now = NOW
    while not back.take(burst, now_ns=now):
        parts += 1
        now = back.due_ns
        assert parts < 100
    assert 64 <= parts <= 66


def test_without_a_rate_nothing_is_held_back(stage: NetStage) -> None:
    back = stage.back()
    back.set_rate(1, 1_000_000)
    assert sent_in(stage, back, 1000, NOW) == 0
    back.set_rate(0, 0)
    assert sent_in(stage, back, 1000, NOW) == 100
    assert back.due_ns == 0


# -- to the guest


@pytest.mark.parametrize(
    ("n", "gso", "hash_", "slots"),
    [
        (60, 0, False, 1),
        (4096, 0, False, 1),
        (4097, 0, False, 2),
        (4096, 1448, False, 2),
        (4097, 1448, False, 3),
        (4097, 1448, True, 4),
        (60, 0, True, 2),
        (65535, 1448, True, 18),
    ],
)
def test_slots_that_a_packet_takes(stage: NetStage, n: int, gso: int, hash_: bool, slots: int) -> None:
    stage.post(30)
    frame = Packet(b"").frame()
    burst = Burst(1, 1 << 17)
    packet = Packet(pattern(n - len(frame))).frame()
    burst.add(packet, flags=FrameFlag.HASH if hash_ else 0, gso_size=gso, gso_type=GsoType.TCPV4 if gso else 0)
    burst.frames["hash"], burst.frames["hash_type"] = 0x01020304, 2
    stage.back().send(burst)
    got = stage.received()
    assert len(got) == slots
    extras = [bytes([Extra.GSO, int(hash_)]) + gso.to_bytes(2, "little") + b"\1\0\0\0"] if gso else []
    extras += [bytes([Extra.HASH, 0, 2, 1]) + (0x01020304).to_bytes(4, "little")] if hash_ else []
    assert [row.tobytes() for row in got[1 : 1 + len(extras)]] == extras
    data = np.concatenate([got[:1], got[1 + len(extras) :]])
    assert data["status"].sum() == n
    blank = RxFlag.CSUM_BLANK | RxFlag.DATA_VALIDATED if gso else 0
    more = RxFlag.MORE_DATA if len(data) > 1 else 0
    assert data["flags"][0] == blank | more | (RxFlag.EXTRA_INFO if extras else 0)
    assert data["flags"][1:].tolist() == [RxFlag.MORE_DATA] * (len(data) - 2) + [0] * (len(data) > 1)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (0, 0),
        (FrameFlag.VALIDATED, RxFlag.DATA_VALIDATED),
        (FrameFlag.CSUM_BLANK | FrameFlag.VALIDATED, RxFlag.CSUM_BLANK | RxFlag.DATA_VALIDATED),
        (FrameFlag.CSUM_BLANK, RxFlag.CSUM_BLANK | RxFlag.DATA_VALIDATED),
    ],
)
def test_flags_of_responses(stage: NetStage, flags: int, expected: int) -> None:
    """The two bits about checksums are swapped against those of requests."""
    stage.post(1)
    burst = Burst()
    burst.add(Packet(pattern(9)).frame(), flags=flags)
    stage.back().send(burst)
    assert stage.received()["flags"].tolist() == [expected]


@pytest.mark.parametrize("features", [ALL, ALL & ~Feature.RX_NOTIFY])
def test_frames_that_wait_too_long_are_dropped(stage: NetStage, features: Feature) -> None:
    back = stage.back(features)
    drain = 10 * S if Feature.RX_NOTIFY in features else int(DRAIN_WITHOUT_NOTIFY_S * S)
    back.send(Burst.of([plain(60), plain(61)]), now_ns=NOW)
    assert back.due_ns == NOW + drain
    back.deliver(now_ns=NOW + drain - 1)
    assert back.waiting[0] == 2
    back.deliver(now_ns=NOW + drain)
    assert (back.waiting, back.counters().rx_expired) == ((0, 0), 2)
    stage.post(1)
    back.send(Burst.of([plain(62)]), now_ns=NOW + drain)
    assert stage.received()["status"].tolist() == [62]


def test_what_waits_comes_in_order_and_before_what_is_new(stage: NetStage) -> None:
    back = stage.back()
    back.send(Burst.of([plain(60), plain(5000)]), now_ns=NOW)
    stage.post(2)
    back.send(Burst.of([plain(70)]), now_ns=NOW)
    assert len(stage.received()) == 0
    back.deliver(now_ns=NOW)
    assert stage.received()["status"].tolist() == [60]
    stage.post(2)
    back.deliver(now_ns=NOW)
    assert stage.received()["status"].tolist() == [4096, 904, 70]


@pytest.mark.parametrize("n", [60, 1514, 60_000])
def test_what_waits_is_bounded_in_bytes(stage: NetStage, n: int) -> None:
    back = stage.back()
    burst = Burst.of([plain(n)] * (WAITING_BYTES // n + 5) if n < 2000 else [plain(n)] * 12)
    back.send(burst, now_ns=NOW)
    assert back.waiting == (WAITING_BYTES // n, WAITING_BYTES // n * n)
    assert back.counters().rx_full == len(burst) - WAITING_BYTES // n


@pytest.mark.parametrize("offered", [0, 1], ids=["no buffers", "too few"])
def test_a_guest_that_takes_nothing_for_a_minute_gets_nothing_kept(stage: NetStage, offered: int) -> None:
    back = stage.back()
    stage.post(offered)
    for second in range(60):
        back.send(Burst.of([plain(5000)]), now_ns=NOW + second * S)
        back.deliver(now_ns=NOW + second * S)
        assert not back.stalled
        assert back.due_ns <= NOW + 60 * S
    back.deliver(now_ns=NOW + 60 * S)
    assert back.stalled
    back.send(Burst.of([plain(5000)]), now_ns=NOW + 60 * S)
    assert (back.counters().stalls, back.counters().rx_stalled) == (1, 1)
    back.deliver(now_ns=NOW + 100 * S)
    assert back.waiting == (0, 0)
    assert back.due_ns == 0
    stage.post(2)
    back.deliver(now_ns=NOW + 100 * S)
    assert not back.stalled
    back.send(Burst.of([plain(60)]), now_ns=NOW + 100 * S)
    assert stage.received()["status"].tolist() == [60]


def test_without_a_promise_to_notify_there_is_no_stall(stage: NetStage) -> None:
    back = stage.back(ALL & ~Feature.RX_NOTIFY)
    back.send(Burst.of([plain(60)]), now_ns=NOW)
    back.deliver(now_ns=NOW + 3600 * S)
    assert not back.stalled
    assert back.due_ns == 0


def test_forms_that_a_guest_does_not_take(stage: NetStage) -> None:
    stage.post(20)
    back = stage.back(Feature(0))
    packet = Packet(pattern(3000))
    burst = Burst(8, 1 << 16)
    burst.add(plain(5000))
    burst.add(packet.frame(), flags=FrameFlag.CSUM_BLANK, gso_size=1000, gso_type=GsoType.TCPV4)
    burst.add(plain(60), flags=FrameFlag.CSUM_BLANK)
    burst.add(Packet(b"x", protocol=UDP).frame(), gso_size=1000, gso_type=GsoType.TCPV4)
    back.send(burst)
    got = stage.received()
    assert [
        stage.page(RX_PAGE + int(i))[: int(n)].tobytes() for i, n in zip(got["id"], got["status"], strict=True)
    ] == (packet.segments(1000))
    counters = back.counters()
    assert (counters.rx_too_large, counters.rx_segmented) == (3, 1)


# -- multicast


def wish(stage: NetStage, kind: Extra, address: bytes, *, id: int = 1) -> np.ndarray:
    return np.concatenate([stage.request(0, 0, flags=EXTRA, id=id), stage.extra(kind, address)])


def group(i: int) -> bytes:
    return bytes([1, 0, 0x5E, 0, i >> 8, i & 0xFF])


def test_a_list_has_64_addresses(stage: NetStage) -> None:
    back = stage.back(ALL | Feature.MCAST_CONTROL)
    for i in range(66):
        stage.send(wish(stage, Extra.MCAST_ADD, group(i)))
        assert back.take(Burst()) == 0
        assert stage.answers() == [(1, OKAY if i < 64 else ERROR), (0, Status.NULL)]
    assert back.counters().mcast_changes == 64
    for kind, i, answer in [(Extra.MCAST_ADD, 5, OKAY), (Extra.MCAST_DEL, 5, OKAY), (Extra.MCAST_ADD, 65, OKAY)]:
        stage.send(wish(stage, kind, group(i)))
        back.take(Burst())
        assert stage.answers()[0] == (1, answer)
    stage.post(10)
    others = [MACS[:6], b"\xff" * 6]
    back.send(Burst.of([address + plain(60)[6:] for address in [group(5), group(6), group(65), group(99), *others]]))
    assert len(stage.received()) == 4
    assert back.counters().rx_filtered == 2


def test_addresses_that_are_not_of_a_group_are_refused(stage: NetStage) -> None:
    back = stage.back(ALL | Feature.MCAST_CONTROL)
    stage.send(wish(stage, Extra.MCAST_ADD, MACS[:6]), good(stage))
    assert back.take(Burst()) == 1
    assert stage.answers()[:2] == [(1, ERROR), (0, Status.NULL)]


def test_without_control_all_multicast_comes(stage: NetStage) -> None:
    stage.post(1)
    stage.back().send(Burst.of([group(1) + plain(60)[6:]]))
    assert stage.received()["status"].tolist() == [60]
