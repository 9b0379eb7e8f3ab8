# SPDX-License-Identifier: MIT
"""Captures of what passes bridges, and files that are replayed into them."""

import io
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import paravirt
from paravirt.backend import bridge_links
from paravirt.backend.bridge import Bridge
from paravirt.backend.bridge_links import Replay, add_link, due_times
from paravirt.errors import InvalidRequest, NotFound
from paravirt.frontend.vif import Vif
from paravirt.host.vif_statistics import choose, vifs_of
from paravirt.protocol import pcap, pcapng
from paravirt.protocol.bridge_link import LinkConfig
from paravirt.protocol.bridge_state import BridgeState, CaptureReport, CaptureWish
from paravirt.protocol.netif import GsoType
from paravirt.protocol.pcap import Recorded, read_frames
from paravirt.protocol.vif_port import PortConfig, Vlans
from paravirt.ring.netif import Burst, FrameFlag

from ..eventually import eventually
from ..needs import missing, own_environment
from .frames import BROADCAST, frame
from .packets import TCP, UDP, Packet, pattern

SECOND = 5.0
STATION = bytes.fromhex("020000000001")
OTHER = bytes.fromhex("020000000002")


@pytest.fixture
def host() -> Iterator[paravirt.Host]:
    with paravirt.Host() as host:
        yield host


@pytest.fixture
def bridge(host: paravirt.Host) -> Iterator[Bridge]:
    with host.bridge() as bridge:
        yield bridge


class Reader:
    """Takes a capture in a thread of its own."""

    def __init__(self, bridge: Bridge, wish: CaptureWish) -> None:
        self.bridge = bridge
        self.capture = bridge.capture(wish)
        self.content = b""
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for chunk in self.capture.chunks():
            self.content += bytes(chunk)

    def end(self) -> list[Recorded]:
        """What was captured until now."""
        self.bridge.uncapture(self.capture)
        return self.wait()

    def wait(self) -> list[Recorded]:
        """When it has ended by itself."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        return list(read_frames(io.BytesIO(self.content)))


def blocks(content: bytes, kind: int) -> list[pcapng.Block]:
    return [block for block in pcapng.read_blocks(io.BytesIO(content)) if block.kind == kind]


def statistics(content: bytes) -> list[tuple[int, int]]:
    """(received, dropped) of each interface, as the end of a file says."""
    options = [pcapng.options_of(block, 12) for block in blocks(content, pcapng.STATISTICS)]
    names = pcapng.STATISTICS_RECEIVED, pcapng.STATISTICS_DROPPED
    return [tuple(int.from_bytes(each[name], "little") for name in names) for each in options]  # type: ignore[misc]


def write_pcap(path: Path, frames: Sequence[bytes], *, step_ns: int = 1_000_000) -> Path:
    """A file as other programs write it."""
    records = [
        b"".join(
            word.to_bytes(4, "little") for word in (i * step_ns // 10**9, i * step_ns % 10**9, len(each), len(each))
        )
        + each
        for i, each in enumerate(frames)
    ]
    path.write_bytes(pcap.pcap_header(pcap.MAX_SNAPLEN) + b"".join(records))
    return path


def random_frames(seed: int, n: int, most: int, *, to: bytes | None = None) -> list[bytes]:
    """Frames of some stations, of 14 to `most` bytes, to one or to all."""
    chance = random.Random(seed)
    made = []
    for i in range(n):
        size = chance.choice([14, 60, 64, 1514, most, chance.randint(14, most)])
        source = STATION[:5] + bytes([16 + i % 5])
        made.append(((to or BROADCAST) + source + b"\x88\xb5" + chance.randbytes(size))[:size])
    return made


def replay(bridge: Bridge, name: str, link: LinkConfig) -> Replay:
    """Once all of it was sent."""
    done = threading.Event()
    made = Replay(bridge, name, link, lambda _: done.set())
    assert done.wait(30)
    return made


def receive(vif: Vif, n: int, *, queue: int = 0) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < n:
        came = vif.receive(n - len(found), queue=queue, timeout_s=SECOND)
        if not came:
            break
        found += came
    return found


def tcpdump(file: Path, *options: str) -> str:
    """What it says of a file."""
    environment = own_environment()
    environment["PATH"] = os.pathsep.join([environment.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    try:
        done = subprocess.run(
            ["tcpdump", "-n", *options, "-r", str(file)], capture_output=True, text=True, env=environment, check=False
        )
    except FileNotFoundError:
        missing("tcpdump is not installed")
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- what is captured


@pytest.mark.parametrize("format", ["pcapng", "pcap"])
def test_what_passes_a_port_is_captured_both_ways_with_times_that_go_on(
    host: paravirt.Host, bridge: Bridge, format: str
) -> None:
    vifs = []
    for name in ("one", "other"):
        domain = host.create_domain(name)
        host.attach_vif(domain)
        vifs.append(domain.open_vif())
    one, other = vifs
    reader = Reader(bridge, CaptureWish("vif1.0", format=format))  # type: ignore[arg-type]
    sent = []
    for i in range(20):
        sent.append(frame(other.mac, one.mac, bytes([i])))
        one.send([sent[-1]])
        assert receive(other, 1) == [sent[-1]]
        sent.append(frame(one.mac, other.mac, bytes([i]), n_bytes=1514))
        other.send([sent[-1]])
        assert receive(one, 1) == [sent[-1]]
    found = reader.end()
    assert [each.data for each in found] == sent
    times = [each.time_ns for each in found]
    assert times == sorted(times)
    assert all(abs(time - os.stat("/proc/self").st_ctime_ns) < 10**13 for time in times)
    assert reader.capture.report() == CaptureReport("it was stopped", {"vif1.0": (40, 0)})
    if format == "pcapng":
        flags = [
            int.from_bytes(pcapng.options_of(each, 20 + len(data) + -len(data) % 4)[pcapng.PACKET_FLAGS], "little")
            for each, data in zip(blocks(reader.content, pcapng.PACKET), sent, strict=True)
        ]
        assert flags == [pcapng.INBOUND, pcapng.OUTBOUND] * 20
        assert statistics(reader.content) == [(40, 0)]


def test_a_direction_a_number_of_packets_and_of_bytes(bridge: Bridge) -> None:
    _, one = bridge.add_user("one")
    _, other = bridge.add_user("other")
    few = Reader(bridge, CaptureWish("one", count=3))
    inward = Reader(bridge, CaptureWish("one", direction="in", snaplen=20))
    outward = Reader(bridge, CaptureWish("one", direction="out"))
    sent = [frame(BROADCAST, STATION, bytes([i]), n_bytes=100) for i in range(10)]
    back = [frame(BROADCAST, OTHER, bytes([i])) for i in range(10)]
    burst = Burst()
    assert one.give(Burst.of(sent)) == 10
    eventually(lambda: other.get(burst, 64) and len(burst) == 10)
    assert other.give(Burst.of(back)) == 10
    burst.clear()
    eventually(lambda: one.get(burst, 64) and len(burst) == 10)
    assert [each.data for each in few.wait()] == sent[:3]
    assert few.capture.report().ended == "all that was asked for is there"
    assert [each.data for each in inward.end()] == [each[:20] for each in sent]
    assert [each.data for each in outward.end()] == back
    lengths = [int.from_bytes(block.body[16:20], "little") for block in blocks(inward.content, pcapng.PACKET)]
    assert lengths == [100] * 10
    bridge.uncapture(few.capture)


def test_a_whole_bridge_with_the_ports_that_come_and_go(bridge: Bridge) -> None:
    first, one = bridge.add_user("one")
    reader = Reader(bridge, CaptureWish())
    second, other = bridge.add_user("other")
    burst = Burst()
    one.give(Burst.of([frame(BROADCAST, STATION, b"1")]))
    eventually(lambda: other.get(burst, 1))
    bridge.remove_port(second)
    third, again = bridge.add_user("other")
    again.give(Burst.of([frame(BROADCAST, OTHER, b"2")]))
    eventually(lambda: one.get(burst, 1))
    assert [each.data[14:15] for each in reader.end()] == [b"1", b"1", b"2", b"2"]
    places = [pcapng.options_of(block, 8)[pcapng.INTERFACE_NAME] for block in blocks(reader.content, pcapng.INTERFACE)]
    assert places == [b"one", b"other", b"other"]
    numbers = [int.from_bytes(block.body[:4], "little") for block in blocks(reader.content, pcapng.PACKET)]
    assert numbers == [0, 1, 2, 0]
    assert reader.capture.report().ports == {"one": (2, 0), "other": (2, 0)}
    for port in (first, third):
        bridge.remove_port(port)


def test_a_capture_ends_with_its_port_and_with_its_bridge(host: paravirt.Host) -> None:
    with host.bridge("br") as bridge:
        port, leg = bridge.add_user("one")
        reader, all_of_it = Reader(bridge, CaptureWish("one")), Reader(bridge, CaptureWish())
        assert bridge.state().captures == 2
        leg.give(Burst.of([frame(BROADCAST, STATION)]))
        eventually(lambda: reader.capture.report().captured)
        bridge.remove_port(port)
        assert len(reader.wait()) == 1
        assert reader.capture.report() == CaptureReport("port one is gone", {"one": (1, 0)})
        assert not all_of_it.capture.is_finished
    assert len(all_of_it.wait()) == 1
    assert all_of_it.capture.report().ended == "bridge br is gone"


def test_there_is_no_capture_of_what_is_not_there(bridge: Bridge) -> None:
    with pytest.raises(NotFound, match="no port nobody"):
        bridge.capture(CaptureWish("nobody"))
    with pytest.raises(InvalidRequest, match="power of two"):
        bridge.capture(CaptureWish(buffer_bytes=300_000))
    assert bridge.state().captures == 0


def test_a_reader_that_is_slow_stops_nothing_and_hears_what_it_has_missed(bridge: Bridge) -> None:
    _, one = bridge.add_user("one")
    bridge.add_null("sink")
    capture = bridge.capture(CaptureWish("one", buffer_bytes=262_144))
    sent = 0
    for i in range(100):
        burst = Burst.of([frame(BROADCAST, STATION, bytes([i]), n_bytes=9000)] * 10)
        while not one.wait_room(90_000, timeout_s=SECOND):
            pass
        sent += one.give(burst)
    assert sent == 1000
    eventually(lambda: bridge.state().ports[0].total("in_packets") == sent, "all of it passed")
    report = capture.report()
    assert report.captured + report.dropped == sent
    assert 20 <= report.captured < 30
    assert report.dropped > 900
    content, pieces = b"", capture.chunks()
    while content.count(b"\x88\xb5") < report.captured:
        content += bytes(next(pieces))
    one.give(Burst.of([frame(BROADCAST, STATION, b"last")]))
    content += bytes(next(pieces))
    bridge.uncapture(capture)
    content += b"".join(bytes(piece) for piece in pieces)
    last = blocks(content, pcapng.PACKET)[-1]
    assert pcapng.options_of(last, 20 + 60)[pcapng.PACKET_DROPPED] == report.dropped.to_bytes(8, "little")
    assert statistics(content) == [(sent + 1, report.dropped)]


# -- checksums, as others see them


@pytest.mark.parametrize("format", ["pcapng", "pcap"])
def test_tcpdump_finds_checksums_right_that_were_blank(bridge: Bridge, tmp_path: Path, format: str) -> None:
    _, one = bridge.add_user("one")
    bridge.add_null("sink")
    reader = Reader(bridge, CaptureWish("one", format=format))  # type: ignore[arg-type]
    burst = Burst()
    for v6 in (False, True):
        for protocol in (TCP, UDP):
            burst.add(Packet(pattern(333), protocol, v6=v6, checksum=0x1234).frame(), flags=FrameFlag.CSUM_BLANK)
            burst.add(Packet(pattern(333), protocol, v6=v6).frame())
    assert one.give(burst) == 8
    eventually(lambda: reader.capture.report().captured == 8)
    reader.end()
    file = tmp_path / "capture"
    file.write_bytes(reader.content)
    said = tcpdump(file, "-vv")
    assert said.count("(correct)") + said.count("udp sum ok") == 8, said
    assert "incorrect" not in said
    assert "bad" not in said


def test_what_was_captured_short_had_its_checksum_made_of_the_whole(bridge: Bridge) -> None:
    _, one = bridge.add_user("one")
    reader = Reader(bridge, CaptureWish("one", snaplen=60))
    burst, packet = Burst(), Packet(pattern(1000))
    burst.add(Packet(pattern(1000), checksum=0).frame(), flags=FrameFlag.CSUM_BLANK)
    one.give(burst)
    eventually(lambda: reader.capture.report().captured)
    assert [each.data for each in reader.end()] == [packet.frame()[:60]]


def test_the_frame_itself_is_as_it_was(bridge: Bridge) -> None:
    _, one = bridge.add_user("one")
    _, other = bridge.add_user("other")
    reader = Reader(bridge, CaptureWish())
    blank, large = Packet(pattern(100), checksum=0x4321).frame(), Packet(pattern(4000), checksum=0x1111).frame()
    burst, got = Burst(), Burst()
    burst.add(blank, flags=FrameFlag.CSUM_BLANK)
    burst.add(large, flags=FrameFlag.CSUM_BLANK, gso_size=1000, gso_type=GsoType.TCPV4)
    one.give(burst)
    eventually(lambda: other.get(got, 64) and len(got) == 2)
    assert list(got) == [blank, large]
    assert got.frames["flags"].tolist() == [FrameFlag.CSUM_BLANK] * 2
    right = Packet(pattern(100)).frame()
    assert [each.data for each in reader.end()] == [right, large, right, large]


# -- replay


@pytest.mark.parametrize("wire", [False, True], ids=["switch", "wire"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_replayed_is_what_is_captured(bridge: Bridge, tmp_path: Path, wire: bool, seed: int) -> None:
    frames = random_frames(seed, 3000, 9000)
    file = write_pcap(tmp_path / "in.pcap", frames)
    bridge.set_wire(wire)
    bridge.add_null("sink")
    reader = Reader(bridge, CaptureWish("sink", buffer_bytes=1 << 26))
    replay(bridge, "player", LinkConfig("replay", str(file)))
    eventually(lambda: reader.capture.report().captured == len(frames))
    found = reader.end()
    assert [each.data for each in found] == frames
    times = [each.time_ns for each in found]
    assert times == sorted(times)
    assert reader.capture.report().dropped == 0


@pytest.mark.parametrize("wire", [False, True], ids=["switch", "wire"])
def test_what_is_replayed_to_a_guest_that_sends_it_back_is_captured_twice(
    host: paravirt.Host, bridge: Bridge, tmp_path: Path, wire: bool
) -> None:
    bridge.set_wire(wire)
    domain = host.create_domain("echo")
    host.attach_vif(domain, mtu=9000)
    vif = domain.open_vif()
    frames = random_frames(7, 60, 9000, to=vif.mac)
    reader = Reader(bridge, CaptureWish(f"vif{domain.domid}.0"))
    played = replay(bridge, "player", LinkConfig("replay", str(write_pcap(tmp_path / "in", frames))))
    got = receive(vif, len(frames))
    assert got == frames
    back = [each[6:12] + each[:6] + each[12:] for each in got]
    vif.send(back, timeout_s=SECOND)
    eventually(lambda: reader.capture.report().captured == 2 * len(frames))
    assert [each.data for each in reader.end()] == frames + back
    assert played.sent == len(frames)


def test_a_capture_is_what_its_replay_captures(bridge: Bridge, tmp_path: Path) -> None:
    frames = random_frames(11, 500, 1514)
    add_link(bridge, "first", LinkConfig("pcap", str(tmp_path / "first.pcapng")))
    source = write_pcap(tmp_path / "in", frames)
    player = replay(bridge, "player", LinkConfig("replay", str(source)))
    eventually(lambda: bridge.state().ports[0].total("out_packets") == len(frames))
    bridge.remove_port(player.port)
    bridge.remove_port(bridge.port("first"))
    again = add_link(bridge, "second", LinkConfig("pcap", str(tmp_path / "first.pcapng"), format="pcap"))
    replay(bridge, "player", LinkConfig("replay", str(tmp_path / "first.pcapng"), loops=2))
    eventually(lambda: bridge.state().ports[0].total("out_packets") == 2 * len(frames))
    assert again.detail() == f"{tmp_path}/first.pcapng.1: 1000 frames"
    bridge.remove_port(again)
    with (tmp_path / "first.pcapng.1").open("rb") as file:
        assert [each.data for each in read_frames(file)] == 2 * frames


@pytest.mark.parametrize("link", [{"rate": 2000}, {"timing": "recorded"}, {"rate": 2000, "loops": 0}])
def test_frames_are_replayed_no_earlier_than_they_are_due(bridge: Bridge, tmp_path: Path, link: dict[str, int]) -> None:
    frames = random_frames(3, 20, 200)
    file = write_pcap(tmp_path / "in", frames, step_ns=500_000)
    bridge.add_null("sink")
    reader = Reader(bridge, CaptureWish("sink", count=20 if link.get("loops", 1) else 60))
    player = Replay(bridge, "player", LinkConfig("replay", str(file), **link), lambda _: None)  # type: ignore[arg-type]
    found = reader.wait()
    assert [each.data for each in found] == frames * (len(found) // 20)
    assert found[-1].time_ns - found[0].time_ns > 0
    bridge.remove_port(player.port)
    bridge.uncapture(reader.capture)


def test_a_replay_without_an_end_ends_with_its_port(bridge: Bridge, tmp_path: Path) -> None:
    file = write_pcap(tmp_path / "in", random_frames(5, 100, 1514))
    port = add_link(bridge, "player", LinkConfig("replay", str(file), loops=0))
    assert port.kind == "replay"
    eventually(lambda: bridge.state().ports[0].total("in_packets") > 1000)
    bridge.remove_port(port)
    assert bridge.ports() == []


# -- ports that are files or nothing


def test_a_file_that_cannot_be_made_makes_no_port(bridge: Bridge, tmp_path: Path) -> None:
    with pytest.raises(paravirt.errors.PermissionRefused, match="No such file"):
        add_link(bridge, "out", LinkConfig("pcap", str(tmp_path / "none/file")))
    assert bridge.ports() == []


def test_a_file_that_cannot_be_written_any_more_stops_nothing(
    bridge: Bridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    monkeypatch.setattr(bridge_links, "_new_file", lambda path: (path, os.open(full, os.O_WRONLY)))
    port = add_link(bridge, "out", LinkConfig("pcap", str(tmp_path / "out")))
    eventually(lambda: port.detail().endswith("out: No space left on device"))
    assert bridge.state().captures == 0
    _, leg = bridge.add_user("one")
    leg.give(Burst.of([frame(BROADCAST, STATION)]))
    eventually(lambda: bridge.state().ports[0].total("out_packets") == 1)


def test_a_mirror_port_that_is_a_file_has_it_all(bridge: Bridge, tmp_path: Path) -> None:
    ports = [bridge.add_user(name) for name in ("one", "other")]
    for port, _ in ports:
        bridge.configure(port, PortConfig(mirrored=True))
    bridge.set_mirror("all")
    file = add_link(bridge, "all", LinkConfig("pcap", str(tmp_path / "all"), snaplen=30))
    burst, sent = Burst(), []
    for i in range(5):
        for (_, leg), (_, to), macs in ((*ports, (OTHER, STATION)), (*ports[::-1], (STATION, OTHER))):
            sent.append(frame(*macs, bytes([i])))
            leg.give(Burst.of(sent[-1:]))
            eventually(lambda to=to: to.get(burst, 1))
    bridge.remove_port(file)
    with (tmp_path / "all").open("rb") as opened:
        assert [each.data for each in read_frames(opened)] == [each[:30] for each in sent]
    assert (tmp_path / "all").stat().st_mode & 0o777 == 0o600


def test_a_null_port_takes_everything_and_gives_nothing(bridge: Bridge) -> None:
    _, one = bridge.add_user("one")
    add_link(bridge, "nothing", LinkConfig("null"))
    one.give(Burst.of([frame(BROADCAST, STATION)] * 5))
    eventually(lambda: bridge.state().ports[1].total("out_packets") == 5)
    assert one.get(Burst(), timeout_s=0.05) == 0


# -- wires


def test_a_wire_looks_at_nothing_and_has_two_ends(bridge: Bridge) -> None:
    bridge.set_wire(True)
    _, one = bridge.add_user("one")
    assert one.give(Burst.of([frame(BROADCAST, STATION)])) == 1  # to nobody
    eventually(lambda: bridge.state().ports[0].total("in_packets") == 1)
    port, other = bridge.add_user("other")
    strange = [b"\xff" * 12 + bytes(8), bytes(14), frame(BROADCAST, BROADCAST), b"\x01\x80\xc2" + bytes(60)]
    burst = Burst()
    one.give(Burst.of(strange))
    eventually(lambda: other.get(burst, 64) and len(burst) == len(strange))
    assert list(burst) == strange
    with pytest.raises(InvalidRequest, match="wire between one and other"):
        bridge.add_null("third")
    bridge.remove_port(port)
    _, third = bridge.add_user("third")
    burst.clear()
    third.give(Burst.of(strange[:1]))
    eventually(lambda: one.get(burst, 64))
    assert list(burst) == strange[:1]
    assert bridge.state().is_wire
    assert bridge.addresses() == []
    bridge.set_wire(False)
    one.give(Burst.of([frame(BROADCAST, STATION)]))
    eventually(bridge.addresses)


def test_a_wire_to_a_device_of_several_queues_uses_them_all(tmp_path: Path) -> None:
    with paravirt.Host(max_queues=2) as host, host.bridge() as bridge:
        bridge.set_wire(True)
        domain = host.create_domain("guest")
        host.attach_vif(domain)
        vif = domain.open_vif(queues=2)
        _, leg = bridge.add_user("program")
        reader = Reader(bridge, CaptureWish(f"vif{domain.domid}.0"))
        sent = [Packet(pattern(50), ports=(1000 + i, 80)).frame() for i in range(64)]
        leg.give(Burst.of(sent))
        eventually(lambda: bridge.state().ports[0].total("out_packets") == len(sent))
        counts = [queue.counters["out_packets"] for queue in bridge.state().ports[0].queues]
        assert all(counts)
        assert sorted(receive(vif, counts[0]) + receive(vif, counts[1], queue=1)) == sorted(sent)
        assert vif.send([frame(BROADCAST, vif.mac)]) == 1
        burst = Burst()
        eventually(lambda: leg.get(burst, 1))
        assert len(reader.end()) == len(sent) + 1
        (one,) = bridge.state().ports[:1]
        assert [part.total("out_packets") for part in one.split()] == counts


def test_no_wire_is_made_of_three_ports_or_of_one_that_is_guarded(bridge: Bridge) -> None:
    ports = [bridge.add_user(name)[0] for name in ("one", "other", "third")]
    with pytest.raises(InvalidRequest, match="a wire has two"):
        bridge.set_wire(True)
    bridge.remove_port(ports[2])
    bridge.configure(ports[0], PortConfig(vlans=Vlans(access=10)))
    with pytest.raises(InvalidRequest, match="no vlan 10"):
        bridge.set_wire(True)
    assert not bridge.state().is_wire
    bridge.configure(ports[0], PortConfig())
    bridge.set_wire(True)
    with pytest.raises(InvalidRequest, match="does not look at frames"):
        bridge.configure(ports[0], PortConfig(locking="disabled"))


# -- times of files


def test_when_frames_are_due() -> None:
    frames = [Recorded(time_ns, b"", 0) for time_ns in (100, 300, 200, 0, 1 << 80, 400)]
    assert due_times(frames, LinkConfig("replay", "/x")).tolist() == [0] * 6
    assert due_times(frames[:3], LinkConfig("replay", "/x", rate=2_000_000)).tolist() == [0, 500, 1000]
    recorded = LinkConfig("replay", "/x", timing="recorded")
    assert due_times(frames, recorded).tolist() == [0, 200, 200, 200, 1 << 62, 1 << 62]
    assert due_times([], recorded).tolist() == []


# -- of a whole host


def test_a_host_in_one_process_says_the_same_of_its_bridges(host: paravirt.Host) -> None:
    assert host.bridge_states() == []
    domain = host.create_domain("guest")
    host.attach_vif(domain, bridge="br")
    vif = domain.open_vif()
    with host.capture(CaptureWish(f"vif{domain.domid}.0", count=2), bridge="br") as capture:
        assert vif.send([frame(BROADCAST, vif.mac)] * 3) == 3
        content = b"".join(bytes(chunk) for chunk in capture.chunks())
    assert len(list(read_frames(io.BytesIO(content)))) == 2
    (state,) = host.bridge_states()
    assert BridgeState.from_json(json.loads(json.dumps(state.to_json()))) == state
    (port,) = state.ports
    assert (state.name, state.captures, port.kind, len(port.queues)) == ("br", 0, "vif", 1)
    assert (port.netback("tx_packets"), port.total("in_packets"), port.switch["rx_frames"]) == (3, 3, 3)
    (station,) = state.stations
    assert (station.mac, station.port) == (vif.mac.hex(":"), port.name)
    (live,) = vifs_of([state], {domain.domid: "guest"})
    assert (live.name, live.state) == ("guest/0", "running")
    names = ("guest", "guest/0", f"{domain.domid}/0", f"vif/{domain.domid}/0", f"vif{domain.domid}.0")
    assert all(choose(name, [live]) is live for name in names)
    for name in ("guest/1", "gues", "vif9.0", "", "/0"):
        with pytest.raises(NotFound, match="there are: guest/0"):
            choose(name, [live])


@pytest.mark.parametrize("said", [None, [], {}, {"ports": 1}, {"ports": [{"queues": []}], "stations": []}])
def test_what_is_no_state_of_a_bridge_is_refused(said: object) -> None:
    with pytest.raises(InvalidRequest, match="no state of a bridge"):
        BridgeState.from_json(said)
    with pytest.raises(InvalidRequest, match="no report"):
        CaptureReport.from_json(said)


# -- what the kernel leaves blank


def test_checksums_that_the_kernel_left_blank_are_right_in_a_capture(tmp_path: Path) -> None:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("/dev/net/tun is not there, or may not be opened")
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode:
        pytest.skip("user namespaces are refused here")
    command = ["unshare", "-rn", sys.executable, str(Path(__file__).with_name("capture_tap.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20
    said = tcpdump(tmp_path / "capture", "-vv", "udp")
    assert said.count("udp sum ok") == 20, said
    assert "bad" not in said
