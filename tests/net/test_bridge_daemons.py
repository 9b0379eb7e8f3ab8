# SPDX-License-Identifier: MIT
"""Looking at bridges of a host of daemons, capturing there and replaying: the commands, and who does it wrongly."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from paravirt.backend.bridge_door import MAX_CLIENTS
from paravirt.errors import NotFound, ResourceLimit
from paravirt.host import bridge_client
from paravirt.host.bridge_client import RemoteCapture
from paravirt.protocol.bridge_state import MAX_REQUEST_BYTES, BridgeState, CaptureRequest, CaptureWish, PortState
from paravirt.protocol.pcap import pcap_header, read_frames

from ..eventually import eventually
from ..host.running import RunningHost, read_all, read_line
from .frames import BROADCAST, frame
from .test_capture import STATION, random_frames, tcpdump, write_pcap

WORKER = Path(__file__).with_name("vif_counter.py")
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def host() -> Iterator[RunningHost]:
    with RunningHost() as running:
        yield running


class Guest:
    """A guest that receives and sends as it is told."""

    def __init__(self, host: RunningHost, name: str, *, bridge: str) -> None:
        host.ask("domain", "create", name, "--shared")
        host.ask("vif", "attach", name, "--bridge", bridge)
        self.host, self.name = host, name
        self.process = host.spawn(
            *("run", "--shared", name, "--", sys.executable, str(WORKER)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.mac = bytes.fromhex(read_line(self.process.stdout))

    def tell(self, *words: object) -> str:
        """Its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        self.process.stdin.flush()
        return read_line(self.process.stdout)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0
        with self.process:
            pass
        self.host.ask("vif", "detach", self.name)
        self.host.ask("domain", "destroy", self.name)


@contextmanager
def guests(host: RunningHost, bridge: str, *names: str) -> Iterator[list[Guest]]:
    made = [Guest(host, name, bridge=bridge) for name in names]
    yield made
    for guest in made:
        guest.close()


def stat(host: RunningHost, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(host.ask("vif", "stat", *arguments, "--json"))
    return found


def state(host: RunningHost, bridge: str) -> BridgeState:
    return bridge_client.look(host.run / "network.sock", bridge)[0]


def port(host: RunningHost, bridge: str, name: str) -> PortState:
    return next(port for port in state(host, bridge).ports if port.name == name)


def error_of(host: RunningHost, bridge: str) -> str:
    """What stands at the bridge in the store."""
    found = [one for one in json.loads(host.ask("bridge", "list", "--json")) if one["name"] == bridge]
    return str(found[0]["error"]) if found else ""


def ended(process: "subprocess.Popen[bytes]") -> str:
    """What a command has said on standard error, once it has ended well."""
    assert process.wait(30) == 0
    return read_all(process.stderr).decode()


# -- looking


def test_stat_and_watch_count_known_traffic_exactly(host: RunningHost) -> None:
    with guests(host, "counted", "one", "other") as (one, other):
        watcher = host.spawn("vif", "watch", "one", "--interval", "0.05", "--json", stdout=subprocess.PIPE)
        assert json.loads(read_line(watcher.stdout))["sent_per_s"] == 0
        assert one.tell("send", other.mac.hex(), 200, 1000) == "sent 200"
        assert other.tell("receive", 200) == "received 200"
        sender, receiver = stat(host, "one/0", "other")
        assert (sender["device"], sender["bridge"], sender["state"]) == ("one/0", "counted", "running")
        assert (sender["sent"], sender["sent_bytes"], sender["received"]) == (200, 200_000, 0)
        assert (receiver["received"], receiver["received_bytes"], receiver["sent"]) == (200, 200_000, 0)
        assert receiver["drops"] == {}
        assert receiver["queues"][0]["netback"]["rx_packets"] == 200
        assert receiver["queues"][0]["counters"]["out_packets"] == 200
        sent = 0.0
        while sent < 199.5:
            step = json.loads(read_line(watcher.stdout))
            sent += step["sent_per_s"] * step["interval_s"]
            assert (step["device"], step["state"]) == ("one/0", "running")
        assert sent == pytest.approx(200, abs=0.1)
        watcher.send_signal(signal.SIGINT)
        watcher.wait(30)
        with watcher:
            pass
        text = host.ask("vif", "stat")
        assert ["one/0", "counted", "200", "200k"] in [line.split()[:4] for line in text.splitlines()]
        assert "one/0" in host.ask("vif", "watch", "--seconds", "0.1", "--interval", "0.1")
        assert "one/0 q0" not in host.ask("vif", "stat", "--queues")
        heard = json.loads(host.ask("bridge", "addresses", "counted", "--json"))
        assert [each["mac"] for each in heard] == [one.mac.hex(":")]
        assert heard[0]["port"] == sender["port"]
        assert one.mac.hex(":") in host.ask("bridge", "addresses", "counted")
        ports = json.loads(host.ask("bridge", "ports", "counted", "--json"))
        assert [(each["kind"], each["switch"]["rx_frames"], each["switch"]["tx_frames"]) for each in ports] == [
            ("vif", 200, 0),
            ("vif", 0, 200),
        ]
        assert "vif" in host.ask("bridge", "ports", "counted")


def test_what_a_port_may_not_send_is_counted_by_reason(host: RunningHost) -> None:
    with guests(host, "guarded", "bad", "victim") as (bad, victim):
        host.ask("vif", "set", "bad", "--locking", "locked", "--ipv4", "10.0.0.1")
        name = stat(host, "bad")[0]["port"]
        eventually(lambda: bad.tell("send", victim.mac.hex(), 1, 60) and port(host, "guarded", name).drops)
        (one,) = stat(host, "bad")
        assert set(one["drops"]) == {"spoof"}
        assert f"{one['drops']['spoof']} (spoof)" in host.ask("vif", "stat", "bad")
        assert "spoof" in host.ask("bridge", "ports", "guarded")


def test_a_device_that_nobody_uses_or_that_is_not_there(host: RunningHost) -> None:
    host.ask("domain", "create", "idle", "--shared")
    host.ask("vif", "attach", "idle", "--dev", "3")
    assert stat(host, "idle/3")[0]["state"] == "not connected"
    for command in ("stat", "watch"):
        done = host.attempt("vif", command, "idle/0")
        assert done.returncode == 2
        assert "there is no network device 'idle/0'; there are: idle/3" in done.stderr
    host.ask("domain", "destroy", "idle")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("vif", "capture", "-o", "-"), "what is to be captured"),
        (("vif", "capture", "nobody", "-o", "-"), "there is no network device 'nobody'"),
        (("vif", "capture", "--bridge", "none", "-o", "-"), "there is no bridge none"),
        (("vif", "capture", "--port", "none", "-o", "-"), "no bridge has a port none"),
        (("vif", "capture", "a", "--port", "none", "-o", "-"), "not both"),
        (("bridge", "ports", "none"), "there is no bridge none"),
        (("bridge", "addresses", "none"), "there is no bridge none"),
        (("bridge", "replay", "none", "/dev/null"), "there is no bridge none"),
        (("bridge", "set", "x", "--null", "a b"), "'a b' is no name of a port"),
        (("bridge", "set", "x", "--null", "t", "--tap", "t"), "an interface and a link"),
        (("bridge", "set", "x", "--replay", "/x", "--rate", "5", "--as-recorded"), "not both"),
    ],
)
def test_mistakes_are_one_line(host: RunningHost, arguments: tuple[str, ...], reason: str) -> None:
    done = host.attempt(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert reason in done.stderr


# -- capturing


def test_a_capture_in_a_file_and_in_a_pipe_to_tcpdump(host: RunningHost, tmp_path: Path) -> None:
    with guests(host, "seen", "cap1", "cap2") as (one, other):
        file = tmp_path / "out.pcapng"
        capture = host.spawn("vif", "capture", "cap1", "-o", str(file), "--count", "20", stderr=subprocess.PIPE)
        piped = host.spawn(
            *("vif", "capture", "--bridge", "seen", "--out", "-", "--pcap"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        eventually(lambda: state(host, "seen").captures == 2)
        assert one.tell("send", other.mac.hex(), 50, 100) == "sent 50"
        assert other.tell("receive", 50) == "received 50"
        assert ended(capture) == "20 packets captured; ended: all that was asked for is there\n"
        eventually(lambda: state(host, "seen").captures == 1)
        piped.send_signal(signal.SIGINT)
        content, said = read_all(piped.stdout), ended(piped)
        assert said == "50 packets captured; ended: it was stopped\n"
        (tmp_path / "piped").write_bytes(content)
        with (tmp_path / "piped").open("rb") as opened, file.open("rb") as other_file:
            frames = [each.data for each in read_frames(opened)]
            assert [each.data for each in read_frames(other_file)] == frames[:20]
        assert len(frames) == 50
        assert tcpdump(file).count("length 100") == 20
        assert tcpdump(tmp_path / "piped").count("length 100") == 50
        eventually(lambda: state(host, "seen").captures == 0)
        for process in (capture, piped):
            with process:
                pass
        assert "exists already" in host.attempt("vif", "capture", "cap1", "-o", str(file)).stderr
        done = host.attempt("vif", "capture", "cap1", "-o", str(file), "--force", "--seconds", "0.1")
        assert done.stderr == "0 packets captured; ended: it was stopped\n"


def test_a_capture_ends_with_its_port(host: RunningHost, tmp_path: Path) -> None:
    host.ask("bridge", "set", "short", "--null", "sink")
    capture = host.spawn("vif", "capture", "--port", "sink", "-o", str(tmp_path / "out"), stderr=subprocess.PIPE)
    with capture:
        eventually(lambda: state(host, "short").captures == 1)
        host.ask("bridge", "set", "short", "--no-link", "sink")
        assert ended(capture) == "0 packets captured; ended: port sink is gone\n"
    assert tcpdump(tmp_path / "out") == ""
    host.ask("bridge", "remove", "short")


def test_a_killed_capture_leaves_nothing(host: RunningHost, tmp_path: Path) -> None:
    host.ask("bridge", "set", "killed", "--null", "sink")
    pid = host.pid("--network")
    eventually(lambda: [one.name for one in bridge_client.look(host.run / "network.sock")].count("killed"))
    before = len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
    for _ in range(3):
        capture = host.spawn("vif", "capture", "--bridge", "killed", "-o", "-", stdout=subprocess.PIPE)
        with capture:
            eventually(lambda: state(host, "killed").captures == 1)
            capture.kill()
        eventually(lambda: state(host, "killed").captures == 0)
    eventually(lambda: (len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))) == before)
    host.ask("bridge", "remove", "killed")


def test_a_capture_whose_reader_goes_ends_without_any_traffic(host: RunningHost) -> None:
    host.ask("bridge", "set", "left", "--null", "sink")
    capture = host.spawn("vif", "capture", "--bridge", "left", "-o", "-", stdout=subprocess.PIPE)
    with capture:
        eventually(lambda: any(one.captures for one in bridge_client.look(host.run / "network.sock")))
        assert capture.stdout is not None
        capture.stdout.close()
        assert capture.wait(30) == 128 + signal.SIGPIPE
    eventually(lambda: state(host, "left").captures == 0)
    host.ask("bridge", "remove", "left")


def test_a_capture_that_nobody_reads_stops_no_traffic_and_counts_what_it_drops(
    host: RunningHost, tmp_path: Path
) -> None:
    file = write_pcap(tmp_path / "in", [frame(BROADCAST, STATION, bytes([i]), n_bytes=9000) for i in range(100)])
    host.ask("bridge", "set", "slow", "--null", "sink")
    eventually(lambda: state(host, "slow").ports)
    wish = CaptureWish("sink", buffer_bytes=1 << 18)
    with RemoteCapture(host.run / "network.sock", CaptureRequest("slow", wish)) as remote:
        assert host.ask("bridge", "replay", "slow", str(file), "--loop", "20") == f"2000 frames sent, 100 in {file}\n"
        eventually(lambda: port(host, "slow", "sink").total("out_packets") == 2000)
        remote.stop()
        content = b"".join(remote.chunks())
        assert remote.report is not None
        assert remote.report.captured + remote.report.dropped == 2000
        assert remote.report.dropped > 1000
    assert content.count(b"\x88\xb5") == remote.report.captured
    host.ask("bridge", "remove", "slow")


def test_a_capture_whose_backend_is_killed_says_so_and_watch_goes_on(host: RunningHost, tmp_path: Path) -> None:
    with guests(host, "revived", "alive") as (alive,):
        file = tmp_path / "out"
        capture = host.spawn("vif", "capture", "alive", "-o", str(file), stderr=subprocess.PIPE)
        watcher = host.spawn("vif", "watch", "alive", "--interval", "0.05", "--json", stdout=subprocess.PIPE)
        eventually(lambda: state(host, "revived").captures == 1)
        assert json.loads(read_line(watcher.stdout))["state"] == "running"
        alive.tell("send", BROADCAST.hex(), 5, 60)
        eventually(lambda: file.stat().st_size > 300)
        os.kill(host.pid("--network"), signal.SIGKILL)
        assert capture.wait(30) == 2
        assert read_all(capture.stderr).decode() == "paravirt: the network backend has ended\n"
        with file.open("rb") as opened:
            assert len(list(read_frames(opened))) == 5
        while json.loads(read_line(watcher.stdout))["state"] != "no backend":
            pass
        while json.loads(read_line(watcher.stdout))["state"] != "running":
            pass
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(30) == 130
        for process in (capture, watcher):
            with process:
                pass


# -- links


def test_files_in_the_configuration_of_a_bridge(host: RunningHost, tmp_path: Path) -> None:
    frames = random_frames(1, 200, 2000)
    file = write_pcap(tmp_path / "in", frames)
    host.ask("bridge", "set", "files", "--pcap", f"out={tmp_path}/out", "--wire")
    eventually(lambda: state(host, "files").is_wire and len(state(host, "files").ports) == 1)
    host.ask("bridge", "set", "files", "--replay", str(file), "--rate", "100000")
    eventually(lambda: port(host, "files", "out").detail == f"{tmp_path}/out: 200 frames")
    eventually(lambda: port(host, "files", "replay").detail == f"{file}: 200 frames (all)")
    (shown,) = (one for one in json.loads(host.ask("bridge", "list", "--json")) if one["name"] == "files")
    assert (shown["links"], shown["wire"], shown["error"]) == (["out (pcap)", "replay (replay)"], True, "")
    host.ask("bridge", "remove", "files")
    eventually(lambda: "files" not in host.ask("bridge", "list"))
    eventually(lambda: all(one.name != "files" for one in bridge_client.look(host.run / "network.sock")))
    with (tmp_path / "out").open("rb") as opened:
        assert [each.data for each in read_frames(opened)] == frames
    assert tcpdump(tmp_path / "out").count("0x88b5") == 200 - sum(len(each) < 14 for each in frames)


def test_a_third_port_of_a_wire_is_refused(host: RunningHost) -> None:
    host.ask("bridge", "set", "wire", "--wire", "--null", "one")
    host.ask("domain", "create", "third", "--shared")
    host.ask("vif", "attach", "third", "--bridge", "wire")
    done = host.attempt("vif", "attach", "third", "--dev", "1", "--bridge", "wire")
    assert done.returncode == 2
    assert "bridge wire is a wire between one and vif" in done.stderr
    host.ask("bridge", "set", "wire", "--null", "two")
    eventually(lambda: "has no third" in error_of(host, "wire") or "no third port two" in error_of(host, "wire"))
    host.ask("bridge", "set", "wire", "--no-link", "two")
    eventually(lambda: error_of(host, "wire") == "")
    host.ask("vif", "detach", "third")
    done = host.attempt("vif", "attach", "third", "--bridge", "wire", "--vlan", "10")
    assert "is a wire, which does not look at frames: no vlan 10" in done.stderr
    host.ask("domain", "destroy", "third")
    host.ask("bridge", "remove", "wire")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"ab", "the file ends in its first word"),
        (b"hello, world", "this is neither a pcap nor a pcapng file"),
        (pcap_header(0)[:20] + bytes([101, 0, 0, 0]), "link type 101"),
        (pcap_header(0) + bytes(5), "in the middle"),
        (pcap_header(0) + bytes(8) + b"\xff" * 8, "a packet of 4294967295 bytes"),
        (pcap_header(0) + bytes(16), "a frame of 0 bytes"),
    ],
)
def test_a_file_that_is_none_is_refused(host: RunningHost, tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "in"
    file.write_bytes(content)
    host.ask("bridge", "set", "bad", "--replay", str(file))
    eventually(lambda: reason in error_of(host, "bad"))
    assert str(file) in error_of(host, "bad")
    done = host.attempt("bridge", "replay", "bad", str(file))
    assert done.returncode == 2
    assert reason in done.stderr
    host.ask("bridge", "remove", "bad")
    eventually(lambda: error_of(host, "bad") == "")


# -- who asks wrongly


def asked(host: RunningHost, line: bytes, *, end: bool = False) -> dict[str, Any]:
    """The answer to any bytes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(host.run / "network.sock"))
        client.sendall(line)
        if end:
            client.shutdown(socket.SHUT_WR)
        said = b""
        while part := client.recv(65536):
            said += part
        answer: dict[str, Any] = json.loads(said)
        return answer


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense\n", "not JSON"),
        (b"[" * 4000 + b"\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b"[]\n", "no object"),
        (b"{}\n", "do is 'None'"),
        (b'{"do": "look", "more": 1}\n', "unexpected keyword argument"),
        (b'{"do": "look", "bridge": 7}\n', "is no name"),
        (b'{"do": "capture"}\n', "of a bridge, or of a port"),
        (b'{"do": "capture", "wish": {"count": "x"}}\n', "count is 'x'"),
        (b'{"do": "capture", "wish": {"count": -1}}\n', "count is '-1'"),
        (b'{"do": "capture", "wish": {"format": []}}\n', "format is []"),
        (b'{"do": "capture", "wish": {"direction": "up"}}\n', "direction is 'up'"),
        (b'{"do": "capture", "wish": {"buffer_bytes": 1e99}}\n', "buffer_bytes"),
        (b'{"do": "capture", "wish": 3}\n', "wish is no object"),
        (b'{"do": "replay", "bridge": "a", "link": {"kind": "null"}}\n', "a replay is of a link"),
        (b'{"do": "replay", "bridge": "a", "link": {"kind": "replay", "file": "x"}}\n', "not an absolute path"),
        (b"x" * (MAX_REQUEST_BYTES + 1), "a line of up to"),
    ],
)
def test_a_request_that_is_none_is_answered(host: RunningHost, line: bytes, reason: str) -> None:
    answer = asked(host, line)
    assert answer["kind"] == "InvalidRequest"
    assert reason in answer["error"]


def test_a_request_without_an_end_and_clients_that_say_nothing(host: RunningHost) -> None:
    assert "a line of up to" in asked(host, b'{"do": "look"}', end=True)["error"]
    before = bridge_client.look(host.run / "network.sock")
    silent = []
    for _ in range(MAX_CLIENTS + 10):
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(host.run / "network.sock"))
        silent.append(client)
    with pytest.raises(ResourceLimit, match=f"{MAX_CLIENTS} others"):
        bridge_client.look(host.run / "network.sock")
    for client in silent:
        client.close()

    def answers() -> bool:
        try:
            return len(bridge_client.look(host.run / "network.sock")) == len(before)
        except ResourceLimit:
            return False

    eventually(answers)


def test_without_a_backend_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no backend of network devices"):
        bridge_client.look(tmp_path / "network.sock")
