# SPDX-License-Identifier: MIT
"""FreeBSD's unit tests of its network backend, case by case, asked of this one: a fake frontend writes into both rings,
whose indexes begin where one of them is about to wrap. Names are those of the cases.

Theirs look at functions inside; these look at what comes of them: what is consumed, answered and delivered.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from paravirt.errors import InvalidRequest, PeerError
from paravirt.protocol.keys import number
from paravirt.protocol.netif import Extra, GsoType, RxFlag, Status, TxFlag
from paravirt.protocol.vif import Rate
from paravirt.ring.netif import Burst, Chain, Feature, FrameFlag, Piece, parse_chain

from .net_stage import ALL, BASE, RX_PAGE, NetStage, make_net_stage
from .packets import ICMP, MACS, UDP, Packet, internet_sum, pattern, plain, word

MORE, EXTRA = TxFlag.MORE_DATA, TxFlag.EXTRA_INFO
CLUSTER = 2048
GSO = (1448).to_bytes(2, "little") + bytes([GsoType.TCPV4])


@pytest.fixture(params=[0, 254, 2**32 - 2], ids=["start", "end of the ring", "end of numbers"])
def stage(request: pytest.FixtureRequest) -> Iterator[NetStage]:
    with make_net_stage(start=request.param) as made:
        yield made


def together(*requests: np.ndarray) -> np.ndarray:
    return np.concatenate(requests)


def taken(stage: NetStage) -> Burst:
    """What a backend makes of all that was sent."""
    burst = Burst()
    assert stage.back().take(burst) == len(burst)
    return burst


def send_packet(stage: NetStage, content: bytes, sizes: list[int], *, flags: int = 0, extra: bytes = b"") -> None:
    """One packet, in a page for each of those sizes."""
    every, at = [], 0
    for i, size in enumerate(sizes):
        stage.put(i, content[at : at + size])
        more = MORE if i < len(sizes) - 1 else 0
        own = (flags | (EXTRA if extra else 0), len(content)) if i == 0 else (0, size)
        every.append(stage.request(i, own[1], flags=own[0] | more, id=10 + i))
        if i == 0 and extra:
            every.append(stage.extra(Extra.GSO, extra))
        at += size
    stage.send(*every)


# -- the ring to a packet


def test_ring2pkt_emptyring(stage: NetStage) -> None:
    """xnb_ring2pkt_emptyring: nothing was sent, nothing is consumed."""
    assert len(taken(stage)) == 0
    assert stage.tx_back.outstanding == 0
    assert stage.answers() == []


def test_ring2pkt_1req(stage: NetStage) -> None:
    """xnb_ring2pkt_1req: one request is one packet."""
    said = parse_chain(stage.request(3, 60, offset=16, id=5))
    assert said == Chain(1, 0, n_bytes=60, pieces=(Piece(BASE + 3, 16, 60),))


def test_ring2pkt_2req(stage: NetStage) -> None:
    """xnb_ring2pkt_2req: the first size is the packet's, and what the second has is not the first's."""
    said = parse_chain(together(stage.request(0, 100, flags=MORE), stage.request(1, 40)))
    assert said == Chain(2, 0, n_bytes=100, flags=MORE, pieces=(Piece(BASE, 0, 60), Piece(BASE + 1, 0, 40)))


def test_ring2pkt_3req(stage: NetStage) -> None:
    """xnb_ring2pkt_3req: the same with three."""
    chain = [stage.request(0, 200, flags=MORE), stage.request(1, 40, flags=MORE), stage.request(2, 50)]
    said = parse_chain(together(*chain))
    assert isinstance(said, Chain)
    assert (said.n_requests, [piece.n_bytes for piece in said.pieces]) == (3, [110, 40, 50])


def test_ring2pkt_extra(stage: NetStage) -> None:
    """xnb_ring2pkt_extra: a slot of extra information stands between the requests and is none."""
    chain = [stage.request(0, 150, flags=MORE | EXTRA), stage.extra(Extra.GSO, GSO), stage.request(1, 50)]
    said = parse_chain(together(*chain))
    assert isinstance(said, Chain)
    assert (said.n_requests, said.n_extras, said.gso_size, said.gso_type) == (3, 1, 1448, GsoType.TCPV4)
    assert [piece.n_bytes for piece in said.pieces] == [100, 50]


@pytest.mark.parametrize("n", [1, 2])
def test_ring2pkt_partial(stage: NetStage, n: int) -> None:
    """xnb_ring2pkt_partial: of a packet that does not end nothing is consumed."""
    chain = [stage.request(0, 200, flags=MORE), stage.request(1, 50, flags=MORE), stage.request(2, 50)]
    assert parse_chain(together(*chain[:n])) == 0


def test_ring2pkt_wraps(stage: NetStage) -> None:
    """xnb_ring2pkt_wraps: the ring ends in the middle of a packet."""
    content = plain(300)
    send_packet(stage, content, [100, 100, 100])
    assert list(taken(stage)) == [content]
    assert stage.tx_back.outstanding == 0


# -- a packet to its responses


def test_txpkt2rsp_emptypkt(stage: NetStage) -> None:
    """xnb_txpkt2rsp_emptypkt: no packet, no response."""
    taken(stage)
    assert stage.answers() == []


def test_txpkt2rsp_1req(stage: NetStage) -> None:
    """xnb_txpkt2rsp_1req."""
    send_packet(stage, plain(60), [60])
    taken(stage)
    assert stage.answers() == [(10, Status.OKAY)]


def test_txpkt2rsp_extra(stage: NetStage) -> None:
    """xnb_txpkt2rsp_extra: the slot of extra information is answered NULL."""
    packet = Packet(pattern(200)).frame()
    send_packet(stage, packet, [len(packet)], extra=GSO)
    taken(stage)
    assert stage.answers() == [(10, Status.OKAY), (0, Status.NULL)]


def test_txpkt2rsp_long(stage: NetStage) -> None:
    """xnb_txpkt2rsp_long: an answer for each of three requests and for two slots of extra information."""
    packet = Packet(pattern(3000)).frame()
    stage.put(0, packet[:1000])
    stage.put(1, packet[1000:2000])
    stage.put(2, packet[2000:])
    stage.send(
        stage.request(0, len(packet), flags=MORE | EXTRA, id=1),
        stage.extra(Extra.HASH, more=True),
        stage.extra(Extra.GSO, GSO),
        stage.request(1, 1000, flags=MORE, id=2),
        stage.request(2, len(packet) - 2000, id=3),
    )
    assert taken(stage)[0][60:] == packet[60:]
    assert stage.answers() == [(1, Status.OKAY), *[(0, Status.NULL)] * 2, (2, Status.OKAY), (3, Status.OKAY)]


def test_txpkt2rsp_invalid(stage: NetStage) -> None:
    """xnb_txpkt2rsp_invalid: each request of a packet that is none is answered ERROR, and the ring goes on."""
    stage.put(0, plain(60))
    stage.send(stage.request(0, 60, flags=MORE, id=1), stage.request(0, 61, id=2), stage.request(0, 60, id=3))
    assert list(taken(stage)) == [plain(60)]
    assert sorted(stage.answers()) == [(1, Status.ERROR), (2, Status.ERROR), (3, Status.OKAY)]


def test_txpkt2rsp_error(stage: NetStage) -> None:
    """xnb_txpkt2rsp_error: a page that cannot be copied makes an error of the packet, not of its neighbours."""
    stage.put(0, plain(60))
    stage.send(
        stage.request(0, 60, id=1),
        stage.request(0, 160, flags=MORE, id=2),
        stage.request(9, 100, id=3),
        stage.request(0, 60, id=4),
    )
    assert len(taken(stage)) == 2
    assert stage.answers() == [(1, 0), (2, Status.ERROR), (3, Status.ERROR), (4, 0)]


def test_txpkt2rsp_wraps(stage: NetStage) -> None:
    """xnb_txpkt2rsp_wraps: the ring ends in the middle of the responses."""
    back, burst = stage.back(), Burst()
    for round_ in range(300):
        stage.put(0, plain(80, round_))
        stage.put(1, plain(80, round_)[50:])
        stage.send(stage.request(0, 80, flags=MORE, id=round_), stage.request(1, 30, id=round_ + 1))
        burst.clear()
        assert back.take(burst) == 1
        assert burst[0] == plain(80, round_)
        assert stage.answers() == [(round_, 0), (round_ + 1, 0)]


# -- room for a packet


def test_pkt2mbufc_empty(stage: NetStage) -> None:
    """xnb_pkt2mbufc_empty: no packet takes no room."""
    burst = taken(stage)
    assert burst.core.used == 0


def test_pkt2mbufc_short(stage: NetStage) -> None:
    """xnb_pkt2mbufc_short: one that fits into the smallest piece of memory."""
    send_packet(stage, plain(64), [64])
    (frame,) = taken(stage).frames
    assert (frame["length"], frame["flags"], frame["gso_type"]) == (64, 0, 0)


@pytest.mark.parametrize("blank", [True, False], ids=["blank", "validated"])
def test_pkt2mbufc_csum(stage: NetStage, blank: bool) -> None:
    """xnb_pkt2mbufc_csum: what the request says of its checksum is said of the frame."""
    packet = Packet(pattern(10)).frame()
    send_packet(stage, packet, [len(packet)], flags=TxFlag.DATA_VALIDATED | (TxFlag.CSUM_BLANK if blank else 0))
    (frame,) = taken(stage).frames
    assert frame["flags"] == FrameFlag.VALIDATED | (FrameFlag.CSUM_BLANK if blank else 0)


@pytest.mark.parametrize("n", [CLUSTER, CLUSTER + 1, 4096, 65535], ids=["1cluster", "largecluster", "page", "largest"])
def test_pkt2mbufc(stage: NetStage, n: int) -> None:
    """xnb_pkt2mbufc_1cluster and _largecluster: as much room as the packet says, for the largest, too."""
    content = plain(n)
    send_packet(stage, content, [min(4096, n - at) for at in range(0, n, 4096)])
    assert list(taken(stage)) == [content]


def test_pkt2mbufc_2cluster(stage: NetStage) -> None:
    """xnb_pkt2mbufc_2cluster: there is no room, so the packet stays where it is and comes later."""
    back, burst = stage.back(), Burst(4, 4096)
    for i in range(3):
        stage.put(i, plain(1900, i))
        stage.send(stage.request(i, 1900, id=i))
    assert back.take(burst) == 2
    assert stage.answers() == [(0, 0), (1, 0)]
    burst.clear()
    assert back.take(burst) == 1
    assert burst[0] == plain(1900, 2)


# -- a packet to copies


def test_txpkt2gnttab_empty(stage: NetStage) -> None:
    """xnb_txpkt2gnttab_empty: nothing to copy."""
    taken(stage)
    assert stage.mapper.statistics().copies == 0


def test_txpkt2gnttab_short(stage: NetStage) -> None:
    """xnb_txpkt2gnttab_short: one copy, from the offset that the request says."""
    stage.put(0, b"\xee" * 4096)
    stage.put(0, plain(60), 1000)
    stage.send(stage.request(0, 60, offset=1000))
    assert list(taken(stage)) == [plain(60)]
    assert (stage.mapper.statistics().copies, stage.mapper.statistics().copied_bytes) == (1, 60)


def test_txpkt2gnttab_2req(stage: NetStage) -> None:
    """xnb_txpkt2gnttab_2req: two, one behind the other."""
    send_packet(stage, plain(1000), [300, 700])
    assert list(taken(stage)) == [plain(1000)]
    assert stage.mapper.statistics().copies == 2


def test_txpkt2gnttab_2cluster(stage: NetStage) -> None:
    """xnb_txpkt2gnttab_2cluster: a page is copied once, whatever pieces the memory is of."""
    send_packet(stage, plain(CLUSTER + 600), [CLUSTER + 600])
    assert list(taken(stage)) == [plain(CLUSTER + 600)]
    assert stage.mapper.statistics().copies == 1


# -- the frames after the copies


@pytest.mark.parametrize("sizes", [[60], [60, 40], [4096, 4000]], ids=["short", "2req", "2cluster"])
def test_update_mbufc(stage: NetStage, sizes: list[int]) -> None:
    """xnb_update_mbufc_short, _2req, _2cluster: the frame is as long as all its parts."""
    content = plain(sum(sizes))
    send_packet(stage, content, sizes)
    burst = taken(stage)
    assert burst.frames["length"].tolist() == [sum(sizes)]
    assert list(burst) == [content]


# -- a frame to the guest's slots


def responses(stage: NetStage, packets: list[bytes], n_buffers: int, **how: int) -> np.ndarray:
    """What comes of sending those frames to a guest with so many buffers."""
    stage.post(n_buffers)
    burst = Burst(64, 1 << 20)
    for packet in packets:
        burst.add(packet, **how)
    stage.back().send(burst)
    return stage.received()


def test_mbufc2pkt_empty(stage: NetStage) -> None:
    """xnb_mbufc2pkt_empty: no frame takes no slot; one that is too short to be one is dropped."""
    back, burst = stage.back(), Burst()
    stage.post(2)
    back.send(burst)
    burst.add(plain(13))
    back.send(burst)
    assert len(stage.received()) == 0
    assert back.counters().rx_too_large == 1


@pytest.mark.parametrize(
    ("n", "lengths"),
    [(64, [64]), (CLUSTER, [CLUSTER]), (4096, [4096]), (4097, [4096, 1]), (5 * 4096 - 7, [4096] * 4 + [4089])],
    ids=["short", "1cluster", "page", "page and 1", "long"],
)
def test_mbufc2pkt(stage: NetStage, n: int, lengths: list[int]) -> None:
    """xnb_mbufc2pkt_short, _1cluster, _long: as many slots as pages are needed."""
    got = responses(stage, [plain(n)], 8)
    assert got["status"].tolist() == lengths
    assert got["flags"].tolist() == [RxFlag.MORE_DATA] * (len(lengths) - 1) + [0]
    assert got["id"].tolist() == list(range(len(lengths)))


def test_mbufc2pkt_2short(stage: NetStage) -> None:
    """xnb_mbufc2pkt_2short: two frames do not share a slot."""
    assert responses(stage, [plain(60), plain(70)], 4)["status"].tolist() == [60, 70]


def test_mbufc2pkt_extra(stage: NetStage) -> None:
    """xnb_mbufc2pkt_extra: a large packet has a slot of extra information behind its first."""
    packet = Packet(pattern(6000)).frame()
    got = responses(stage, [packet], 8, flags=FrameFlag.CSUM_BLANK, gso_size=1448, gso_type=GsoType.TCPV4)
    assert len(got) == 3
    assert got[1].tobytes() == bytes([Extra.GSO, 0]) + GSO + bytes(3)
    assert got["status"][[0, 2]].tolist() == [4096, len(packet) - 4096]


def test_mbufc2pkt_nospace(stage: NetStage) -> None:
    """xnb_mbufc2pkt_nospace: with too few buffers no slot is taken, and the frame comes when there are enough."""
    back = stage.back()
    stage.post(2)
    back.send(Burst.of([plain(3 * 4096)]), now_ns=1)
    assert len(stage.received()) == 0
    assert back.waiting == (1, 3 * 4096)
    stage.post(1)
    back.deliver(now_ns=2)
    assert stage.received()["status"].tolist() == [4096] * 3


# -- copies to the guest


def test_rxpkt2gnttab_empty(stage: NetStage) -> None:
    """xnb_rxpkt2gnttab_empty: nothing to copy."""
    responses(stage, [], 2)
    assert stage.mapper.statistics().copies == 0


def test_rxpkt2gnttab_short(stage: NetStage) -> None:
    """xnb_rxpkt2gnttab_short: into the page of the buffer, from its beginning, and no further."""
    stage.page(RX_PAGE)[:] = 0xEE
    responses(stage, [plain(60)], 1)
    assert stage.page(RX_PAGE).tobytes() == plain(60) + b"\xee" * 4036


def test_rxpkt2gnttab_2req(stage: NetStage) -> None:
    """xnb_rxpkt2gnttab_2req: into two."""
    content = plain(4096 + 100)
    responses(stage, [content], 2)
    assert stage.page(RX_PAGE).tobytes() + stage.page(RX_PAGE + 1)[:100].tobytes() == content
    assert stage.mapper.statistics().copies == 2


# -- responses to the guest


def test_rxpkt2rsp_empty(stage: NetStage) -> None:
    """xnb_rxpkt2rsp_empty."""
    assert len(responses(stage, [], 2)) == 0


def test_rxpkt2rsp_short(stage: NetStage) -> None:
    """xnb_rxpkt2rsp_short: id, offset, flags and length of one."""
    assert responses(stage, [plain(60)], 1).tolist() == [(0, 0, 0, 60)]


def test_rxpkt2rsp_extra(stage: NetStage) -> None:
    """xnb_rxpkt2rsp_extra: the first response announces it, and says that the checksum is blank."""
    packet = Packet(pattern(3000)).frame()
    got = responses(stage, [packet], 8, flags=FrameFlag.CSUM_BLANK, gso_size=1448, gso_type=GsoType.TCPV4)
    assert got["flags"][0] == RxFlag.CSUM_BLANK | RxFlag.DATA_VALIDATED | RxFlag.EXTRA_INFO
    assert len(got) == 2


def test_rxpkt2rsp_2short(stage: NetStage) -> None:
    """xnb_rxpkt2rsp_2short: in the slots of their requests."""
    assert responses(stage, [plain(60), plain(70)], 2).tolist() == [(0, 0, 0, 60), (1, 0, 0, 70)]


def test_rxpkt2rsp_2slots(stage: NetStage) -> None:
    """xnb_rxpkt2rsp_2slots."""
    assert responses(stage, [plain(5000)], 2).tolist() == [(0, 0, RxFlag.MORE_DATA, 4096), (1, 0, 0, 904)]


def test_rxpkt2rsp_copyerror(stage: NetStage) -> None:
    """xnb_rxpkt2rsp_copyerror: a buffer that cannot be written is answered ERROR, the others are not."""
    stage.post(3)
    assert stage.granter.revoke(BASE + RX_PAGE + 1)
    back = stage.back()
    back.send(Burst.of([plain(60), plain(61), plain(62)]))
    assert stage.received().tolist() == [(0, 0, 0, 60), (1, 0, 0, Status.ERROR), (2, 0, 0, 62)]
    assert back.counters().rx_copy_errors == 1


# -- checksums


def delivered(stage: NetStage, packet: bytes, features: Feature = ALL | Feature.NO_CSUM) -> bytes:
    """What a guest that takes no blank checksums gets of a frame with one."""
    stage.post(1)
    burst = Burst()
    burst.add(packet, flags=FrameFlag.CSUM_BLANK)
    stage.back(features).send(burst)
    got = stage.received()
    return stage.page(RX_PAGE)[: int(got["status"][0])].tobytes() if len(got) else b""


def test_add_mbuf_cksum_arp(stage: NetStage) -> None:
    """xnb_add_mbuf_cksum_arp: ARP has no checksum; one that is said to be blank makes no packet of it, and without that
    it goes through as it is.
    """
    frame = MACS + word(0x0806) + pattern(46)
    assert delivered(stage, frame) == b""
    stage.back(ALL | Feature.NO_CSUM).send(Burst.of([frame]))
    assert stage.received()["status"].tolist() == [60]
    assert stage.page(RX_PAGE)[:60].tobytes() == frame


def test_add_mbuf_cksum_icmp(stage: NetStage) -> None:
    """xnb_add_mbuf_cksum_icmp: the same holds for ICMP, whose checksum no card fills in."""
    frame = Packet(pattern(40), protocol=ICMP).frame()
    assert delivered(stage, frame) == b""


@pytest.mark.parametrize("before", [0, 0x1234, None], ids=["tcp", "tcp_swcksum", "right already"])
def test_add_mbuf_cksum_tcp(stage: NetStage, before: int | None) -> None:
    """xnb_add_mbuf_cksum_tcp and _tcp_swcksum: TCP's is filled in, whatever was there; IP's stays right."""
    packet = Packet(pattern(101))
    sent = Packet(pattern(101), checksum=before).frame()
    assert delivered(stage, sent) == packet.frame()
    assert internet_sum(packet.frame()[14:34]) == 0xFFFF


def test_add_mbuf_cksum_udp(stage: NetStage) -> None:
    """xnb_add_mbuf_cksum_udp."""
    packet = Packet(pattern(33), protocol=UDP, checksum=0)
    assert delivered(stage, packet.frame()) == Packet(pattern(33), protocol=UDP).frame()


# -- numbers in the store: sscanf's cases


@pytest.mark.parametrize("text", ["137", "0", "00000000255"])
def test_sscanf_hhu(text: str) -> None:
    """sscanf_hhu: unsigned numbers, as far as the key's limit goes."""
    assert number({"key": text}, "key") == int(text)
    assert number({"key": text}, "key", maximum=255) == int(text)
    with pytest.raises(PeerError):
        number({"key": "256"}, "key", maximum=255)


def test_sscanf_llu() -> None:
    """sscanf_llu: large ones."""
    assert number({"key": "4294967295"}, "key") == 2**32 - 1
    assert Rate.from_text("9223372036854775807,999999999") == Rate(2**63 - 1, 999_999_999)


@pytest.mark.parametrize("text", ["-1", "-137", "+1", "-0"])
def test_sscanf_hhd(text: str) -> None:
    """sscanf_hhd: negative ones are refused here."""
    with pytest.raises(PeerError):
        number({"key": text}, "key")
    with pytest.raises(InvalidRequest):
        Rate.from_text(f"{text},50000")


@pytest.mark.parametrize("text", ["4294967296", "18446744073709551617", "-9223372036854775809", "9" * 4000])
def test_sscanf_lld(text: str) -> None:
    """sscanf_lld: what is too large is refused, not taken modulo something."""
    with pytest.raises(PeerError):
        number({"key": text}, "key")
    with pytest.raises(InvalidRequest):
        Rate.from_text(f"1,{text}")


@pytest.mark.parametrize(
    "text",
    ["", "12n", "1 2", "0x10", "1\n", "١٢", "1,2", "1e3", "9223372036854775808,1", "0,1", "1,0", "1,-1", ",", "1,1,1"],
)
def test_sscanf_hhn(text: str) -> None:
    """sscanf_hhn: whatever stands behind a number is looked at, so that no part of a text counts for the whole."""
    with pytest.raises(PeerError):
        number({"key": text}, "key")
    with pytest.raises(InvalidRequest):
        Rate.from_text(text if "," in text and text != "1,2" else f"{text},x")
