# SPDX-License-Identifier: MIT
"""Xen's security advisories that concern network devices, as tests of what has to hold here.

| advisory | fault | held by |
|---|---|---|
| 39 | malformed rings loop or leak | test_xsa_39_... |
| 90 | a device is shut down where nothing may sleep | test_xsa_90_... |
| 155 | what a peer shares is fetched twice | test_xsa_155_... |
| 332, 391 | storms of events, from either side | test_xsa_332_391_... |
| 361, 367 | statuses of a batch are not looked at one by one | test_xsa_361_367_... |
| 374 | a queue is stopped twice | test_xsa_374_... |
| 391 | a frontend believes its backend | test_xsa_391_..., tests/net/test_netfront.py |
| 392 | packets queue up for ever | test_xsa_392_..., tests/net/test_netback_rules.py |
| 396 | a page is used again that the backend still holds | test_xsa_396_... |
| 403 | other data beside what is granted | test_xsa_403_... |
| 423, 432 | headers in many slots | test_xsa_423_..., test_xsa_432_... |
| 448 | slots of no bytes | test_xsa_448_... |
| 465 | a device is removed that is not connected | test_xsa_465_... |
| no number | short Ethernet headers, ids that are not in flight, responses to nothing | test_netfront_... |
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from paravirt.errors import Closed, PeerError
from paravirt.protocol import netif
from paravirt.protocol.netif import Extra, Fatal, GsoType, Status, TxFlag
from paravirt.ring.netif import Burst, Feature
from paravirt.ring.netloop import NetLoop

from ..eventually import eventually
from .net_stage import ALL, BASE, PAGES, RX_PAGE, NetStage, make_net_stage
from .packets import Packet, pattern, plain

MORE, EXTRA = TxFlag.MORE_DATA, TxFlag.EXTRA_INFO
S = 1_000_000_000
NOW = 1000 * S


@pytest.fixture
def stage() -> Iterator[NetStage]:
    with make_net_stage() as made:
        yield made


@contextmanager
def meanwhile(seed: int, *targets: memoryview) -> Iterator[None]:
    """Another thread writes noise into shared memory."""
    stop, random_ = threading.Event(), random.Random(seed)

    def write() -> None:
        while not stop.is_set():
            for target in targets:
                at = random_.randrange(len(target) // 4) * 4
                target[at : at + 4] = random_.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", random_.randbytes(4)])

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20.0)


def set_producer(stage: NetStage, ahead: int) -> None:
    """As if so many more requests were published than fit."""
    at = int.from_bytes(stage.tx_memory.view[:4], "little")
    stage.tx_memory.view[:4] = ((at + ahead) & 0xFFFFFFFF).to_bytes(4, "little")


@pytest.mark.parametrize("ahead", [257, 1000, 1 << 31, 0xFFFFFFFF])
def test_xsa_39_bad_indexes_stop_that_device_only(stage: NetStage, ahead: int) -> None:
    back, burst = stage.back(), Burst()
    with make_net_stage() as other:
        set_producer(stage, ahead)
        for _ in range(3):
            with pytest.raises(PeerError):
                back.take(burst)
        assert len(burst) == 0
        other.put(0, plain(60))
        other.send(other.request(0, 60))
        assert other.back().take(burst) == 1


def test_xsa_39_malformed_packets_leave_nothing_behind(stage: NetStage) -> None:
    """However many: each is answered, nothing stays pinned."""
    back, burst = stage.back(), Burst()
    stage.put(0, plain(60))
    for round_ in range(500):
        bad = [stage.request(0, 60, flags=MORE), stage.request(0, 61), stage.request(9, 60), stage.request(0, 3)]
        stage.send(*bad, stage.request(0, 60, id=round_))
        burst.clear()
        assert back.take(burst) == 1
        assert len(stage.answers()) == 5
    assert stage.mapper.statistics().pinned_pages == 0
    assert (back.counters().tx_errors, back.counters().tx_copy_errors) == (1000, 500)


def test_xsa_90_what_is_fatal_is_only_said(stage: NetStage) -> None:
    """Whoever takes packets frees nothing and tells nobody: that is for the owner, who still has a queue."""
    back = stage.back()
    stage.send(stage.request(0, 60, offset=4095))
    with pytest.raises(PeerError):
        back.take(Burst())
    assert (back.fatal, stage.answers()) == (Fatal.PAGE, [])
    stage.post(1)
    back.send(Burst.of([plain(60)]))
    assert stage.received()["status"].tolist() == [60]
    back.deliver()


def test_xsa_155_requests_are_not_fetched_twice(stage: NetStage) -> None:
    """A frontend that rewrites its slots after they were taken changes nothing."""
    back, burst = stage.back(), Burst(1)
    for i in range(3):
        stage.put(i, plain(60 + i))
        stage.send(stage.request(i, 60 + i, id=i))
    assert back.take(burst) == 1
    stage.tx_memory.view[64:] = b"\xff" * (4096 - 64)
    for i in (1, 2):
        burst.clear()
        assert back.take(burst) == 1
        assert burst[0] == plain(60 + i)
    stage.page(2)[:] = 0xFF
    assert burst[0] == plain(62), "the packet is a copy"


def test_xsa_155_buffers_are_not_fetched_twice(stage: NetStage) -> None:
    back = stage.back()
    stage.post(4)
    back.send(Burst.of([plain(60)]))
    stage.rx_memory.view[64:] = b"\xff" * (4096 - 64)
    back.send(Burst.of([plain(61), plain(62)]))
    got = stage.received()
    assert got[1:].tolist() == [(1, 0, 0, 61), (2, 0, 0, 62)]
    assert stage.page(RX_PAGE + 2)[:62].tobytes() == plain(62)


@pytest.mark.parametrize("seed", range(4))
def test_xsa_155_a_frontend_that_rewrites_everything_meanwhile(stage: NetStage, seed: int) -> None:
    """Requests, pages and grants change while the backend works: packets of allowed lengths, or the end of it."""
    random_ = random.Random(seed)
    back, burst = stage.back(), Burst(64, 1 << 20)
    for page in range(64):
        stage.put(page, plain(4096, page))
    stage.post(200)
    entries = stage.entries.view[: 8 * PAGES]
    with meanwhile(seed, stage.tx_memory.view[64:], stage.rx_memory.view[64:], stage.data.view[: 64 * 4096], entries):
        for _ in range(200):
            if back.fatal:
                back = stage.back()
            stage.tx.push(np.concatenate([stage.request(random_.randrange(64), 100) for _ in range(20)]))
            burst.clear()
            try:
                back.take(burst)
            except PeerError:
                assert back.fatal
            assert all(14 <= n <= 65535 for n in burst.frames["length"].tolist())
            back.send(Burst.of([plain(5000)]))
            stage.tx.take_batch()
            stage.rx.take_batch()
    assert stage.mapper.statistics().pinned_pages == 0


@pytest.mark.parametrize("side", ["backend", "frontend"])
def test_xsa_332_391_a_storm_of_events_wakes_a_few_times(stage: NetStage, side: str) -> None:
    """Without work behind them events are heard less and less often."""
    own, peer = (stage.back_port, stage.front_port) if side == "backend" else (stage.front_port, stage.back_port)
    own.late_eoi()
    loop = NetLoop(spin_ns=0)
    if side == "backend":
        leg = loop.add_back(stage.back(), (own, own), None)
    else:
        front = stage.front()
        front.post_all()
        leg = loop.add_front(front, (own, own), None)
    loop.start()
    try:
        eventually(lambda: loop.sleeps > 0)
        for _ in range(20_000):
            peer.notify()
        assert leg.counters().wakeups < 100
        assert loop.sleeps < 200
    finally:
        loop.stop()
        leg.remove()


@pytest.mark.parametrize("bad", range(6))
def test_xsa_361_367_each_copy_has_its_own_outcome(stage: NetStage, bad: int) -> None:
    """One page of a batch that cannot be read fails its packet, and no other."""
    for page in range(6):
        stage.put(page, plain(300)[page // 2 * 100 :] if page % 2 else plain(300))
    stage.granter.revoke(BASE + bad)
    requests = []
    for i in range(0, 6, 2):
        requests += [stage.request(i, 200, flags=MORE, id=i), stage.request(i + 1, 100, id=i + 1)]
    stage.send(*requests)
    back, burst = stage.back(), Burst()
    assert back.take(burst) == 2
    failed = {bad // 2 * 2, bad // 2 * 2 + 1}
    assert stage.answers() == [(i, Status.ERROR if i in failed else Status.OKAY) for i in range(6)]
    assert back.counters().tx_copy_errors == 1
    assert all(packet[:14] == plain(300)[:14] for packet in burst)


@pytest.mark.parametrize("gref", [0, BASE - 1, BASE + PAGES, 0xFFFFFFFF])
def test_xsa_361_367_references_to_nothing(stage: NetStage, gref: int) -> None:
    request = stage.request(0, 60, id=4)
    request["gref"] = gref
    stage.send(request)
    back = stage.back()
    assert back.take(Burst()) == 0
    assert stage.answers() == [(4, Status.ERROR)]
    buffer = np.zeros(1, netif.RX_REQUEST)
    buffer["id"], buffer["gref"] = 5, gref
    stage.rx.push(buffer)
    back.send(Burst.of([plain(60)]))
    assert stage.received().tolist() == [(5, 0, 0, Status.ERROR)]


def test_xsa_374_queues_are_closed_twice_and_not_used_afterwards(stage: NetStage) -> None:
    back, front = stage.back(), stage.front()
    back.send(Burst.of([plain(60)]), now_ns=NOW)
    for _ in range(2):
        back.close()
        front.close()
    assert back.waiting == (0, 0)
    for use in (
        lambda: back.take(Burst()),
        lambda: back.send(Burst.of([plain(60)])),
        back.deliver,
        lambda: back.set_rate(1, 1),
        lambda: front.send(Burst.of([plain(60)])),
        lambda: front.take(Burst()),
        front.reap,
        front.post_all,
    ):
        with pytest.raises(Closed):
            use()


def test_xsa_392_a_guest_that_takes_nothing_costs_a_bounded_amount(stage: NetStage) -> None:
    back, burst = stage.back(), Burst.of([plain(1500)] * 64)
    for second in range(120):
        for _ in range(20):
            back.send(burst, now_ns=NOW + second * S)
            assert back.waiting[1] <= 512 * 1024
        back.deliver(now_ns=NOW + second * S)
    counters = back.counters()
    assert (back.stalled, counters.stalls) == (True, 1)
    assert counters.rx_expired > 0
    assert counters.rx_full > 0
    assert counters.rx_stalled > 0
    assert counters.rx_packets == 0


def test_xsa_396_a_page_that_the_backend_holds_is_not_taken_back(stage: NetStage) -> None:
    front = stage.front()
    gref = BASE + RX_PAGE
    stage.mapper.map(gref)
    assert not stage.granter.revoke(gref)
    assert stage.granter.in_use(gref)
    stage.mapper.unmap(gref)
    assert stage.granter.revoke(gref)
    front.close()


def test_xsa_403_beside_what_is_sent_the_pages_have_nothing(stage: NetStage) -> None:
    """Of private memory only the frames come into granted pages."""
    front = stage.front()
    burst = Burst(64, 1 << 20)
    for n in (14, 60, 1514, 4096, 9000, 65535):
        burst.add(plain(n))
    burst.memory[burst.core.used :] = 0xAA
    assert front.send(burst) == 6
    requests = stage.tx_back.take_batch()
    expected = np.zeros(256 * 4096, np.uint8)
    at = 0
    for packet in burst:
        for done in range(0, len(packet), 4096):
            part = packet[done : done + 4096]
            start = (int(requests["gref"][at]) - BASE) * 4096 + int(requests["offset"][at])
            expected[start : start + len(part)] = np.frombuffer(part, np.uint8)
            at += 1
    assert np.array_equal(np.frombuffer(stage.data.view, np.uint8)[: 256 * 4096], expected)


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("first", [14, 15, 20, 34, 40, 53, 54])
def test_xsa_423_headers_in_many_slots_become_one_piece(stage: NetStage, first: int, v6: bool) -> None:
    """Whoever gets the frame finds all headers in a row, and what is said of its checksum is looked at there."""
    packet = Packet(pattern(3000), v6=v6)
    content = Packet(pattern(3000), v6=v6, checksum=0).frame()
    at, requests = 0, []
    cuts = [first, *([1] * 10), 7, len(content) - first - 17]
    for i, size in enumerate(cuts):
        stage.put(i, content[at : at + size])
        flags = (TxFlag.CSUM_BLANK | EXTRA if i == 0 else 0) | (MORE if i < len(cuts) - 1 else 0)
        requests.append(stage.request(i, size if i else len(content), flags=flags))
        if i == 0:
            kind = GsoType.TCPV6 if v6 else GsoType.TCPV4
            requests.append(stage.extra(Extra.GSO, (1000).to_bytes(2, "little") + bytes([kind])))
        at += size
    stage.send(*requests)
    back, burst = stage.back(ALL & ~(Feature.GSO4 | Feature.GSO6)), Burst()
    assert back.take(burst) == 1
    assert burst[0][: packet.checksum_at] == content[: packet.checksum_at]
    stage.post(4)
    back.send(burst)
    got = stage.received()
    pages = [stage.page(RX_PAGE + i)[: int(n)].tobytes() for i, n in enumerate(got["status"])]
    assert pages == packet.segments(1000)


def splits(n: int, n_slots: int, random_: random.Random) -> list[list[int]]:
    """Ways to cut n bytes into so many slots: all in one of them, evenly, single bytes at either end, at random."""
    ones = [1] * (n_slots - 1)
    made = [
        [n, *([0] * (n_slots - 1))],
        [*([0] * (n_slots - 1)), n],
        [n - n_slots + 1, *ones],
        [*ones, n - n_slots + 1],
    ]
    made.append([n // n_slots + (i < n % n_slots) for i in range(n_slots)])
    for _ in range(3):
        cuts = sorted(random_.randrange(n + 1) for _ in range(n_slots - 1))
        made.append([b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)])
    return [sizes for sizes in made if min(sizes) >= 0]


@pytest.mark.parametrize("n_slots", range(1, 19))
def test_xsa_432_every_split_of_a_small_packet(stage: NetStage, n_slots: int) -> None:
    random_ = random.Random(n_slots)
    back, burst = stage.back(), Burst(64, 1 << 20)
    for page in range(18):
        stage.grant(page)
    for n in range(14, 201):
        content = plain(n, n)
        for sizes in splits(n, n_slots, random_):
            at, requests = 0, []
            for i, size in enumerate(sizes):
                offset = random_.choice([0, 4096 - size, random_.randrange(3000)])
                stage.put(i, content[at : at + size], offset)
                more = MORE if i < n_slots - 1 else 0
                requests.append(stage.request(i, size if i else n, offset=offset, flags=more, id=i))
                at += size
            stage.send(*requests)
            burst.clear()
            assert back.take(burst) == 1
            assert burst[0] == content, sizes
            assert stage.answers() == [(i, Status.OKAY) for i in range(n_slots)]
    assert not back.counters().tx_errors


@pytest.mark.parametrize("n", [1, 5, 17, 18])
def test_xsa_448_slots_of_no_bytes(stage: NetStage, n: int) -> None:
    """At the front, behind it, all but one: answered at once, whatever page they name."""
    back, burst = stage.back(), Burst(64, 1 << 20)
    stage.put(0, plain(60))
    for where in range(n + 1):
        requests = [stage.request(200, 0, offset=4096, flags=MORE, id=i) for i in range(n + 1)]
        requests[where]["gref"], requests[where]["offset"] = BASE, 0
        requests[where]["size"] = requests[0]["size"] = 60
        requests[-1]["flags"] = 0
        stage.send(*requests)
        burst.clear()
        assert back.take(burst) == 1
        assert burst[0] == plain(60)
        assert stage.answers() == [(i, Status.OKAY) for i in range(n + 1)]


def test_xsa_448_nothing_but_slots_of_no_bytes(stage: NetStage) -> None:
    stage.send(*(stage.request(200, 0, flags=MORE if i < 18 else 0, id=i) for i in range(19)))
    back = stage.back()
    assert back.take(Burst()) == 0
    assert stage.answers() == [(i, Status.ERROR) for i in range(19)]


def test_xsa_465_a_device_that_was_never_connected_is_removed(stage: NetStage) -> None:
    front = stage.front()
    front.close()
    assert front.in_flight == 0
    with make_net_stage() as other:
        front = other.front()
        front.send(Burst.of([plain(60)]))
        assert front.in_flight == 1
        front.close()
        front.close()
        assert front.in_flight == 0


# -- what has no number


@pytest.mark.parametrize("n", [0, 1, 13])
def test_netfront_drops_packets_with_a_short_ethernet_header(stage: NetStage, n: int) -> None:
    front, burst = stage.front(), Burst()
    front.post_all()
    ids = stage.rx_back.take_batch()["id"][:2]
    stage.rx_back.push(np.array([(ids[0], 0, 0, n), (ids[1], 0, 0, 60)], netif.RX_RESPONSE))
    assert front.take(burst) == 1
    assert burst.frames["length"].tolist() == [60]
    assert front.counters.rx_errors == 1


@pytest.mark.parametrize("id", [1, 255, 256, 65535])
def test_netfront_believes_no_answer_to_what_was_not_sent(stage: NetStage, id: int) -> None:
    front = stage.front()
    assert front.send(Burst.of([plain(60)])) == 1
    stage.tx_back.take_batch()
    stage.tx_back.push(np.array([(id, 0)], netif.TX_RESPONSE))
    with pytest.raises(PeerError):
        front.reap()
    with pytest.raises(PeerError):
        front.send(Burst.of([plain(60)]))
    assert front.in_flight == 1


def test_netfront_believes_no_second_answer(stage: NetStage) -> None:
    front = stage.front()
    front.send(Burst.of([plain(60), plain(61)]))
    ids = stage.tx_back.take_batch()["id"]
    stage.tx_back.push(np.array([(ids[0], 0), (ids[0], 0)], netif.TX_RESPONSE))
    with pytest.raises(PeerError):
        front.reap()
    assert front.in_flight == 1


def test_netfront_believes_no_more_responses_than_requests(stage: NetStage) -> None:
    front = stage.front()
    front.post_all()
    at = int.from_bytes(stage.rx_memory.view[8:12], "little")
    stage.rx_memory.view[8:12] = ((at + 257) & 0xFFFFFFFF).to_bytes(4, "little")
    for _ in range(2):
        with pytest.raises(PeerError):
            front.take(Burst())
    stage.rx_memory.view[8:12] = at.to_bytes(4, "little")
