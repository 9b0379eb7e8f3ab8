# SPDX-License-Identifier: MIT
"""`paravirt ring` and `paravirt evtchn` on a host of daemons whose disk is under load, and on one without a ring."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from paravirt.cli.live import time_text
from paravirt.testing.temporary import TemporaryHost
from tests.host.running import ended, read_line

ROOT = Path(__file__).parent.parent.parent
DEADLINE_S = 30
RING = "vbd/1/51712"

pytestmark = pytest.mark.timeout(120)


class Busy:
    """A host, and a guest that reads and writes its disk until it is told to end."""

    def __init__(self, host: TemporaryHost, image: Path) -> None:
        self.host = host
        self.ask("domain", "create", "--shared", "guest")
        self.ask("vbd", "attach", "guest", str(image))
        command = self._command("run", "--shared", "guest", "--", sys.executable, "-m", "tests.integration.worker")
        self.guest = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        assert read_line(self.guest.stdout) == "ready"

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "paravirt", "--run", str(self.host.rundir.path), *arguments]

    def attempt(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self._command(*arguments), capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )

    def ask(self, *arguments: str) -> str:
        done = self.attempt(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def spawn(self, *arguments: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self._command(*arguments), stdout=subprocess.PIPE)

    def close(self) -> None:
        self.guest.communicate(b"", DEADLINE_S)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    image = tmp_path_factory.mktemp("ring") / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with TemporaryHost() as host:
        made = Busy(host, image)
        yield made
        made.close()


def lines(stream: "IO[bytes] | None") -> Iterator[dict[str, Any]]:
    while True:
        yield json.loads(read_line(stream))


def test_list_names_both_ends_of_every_ring(busy: Busy) -> None:
    (ring,) = json.loads(busy.ask("ring", "list", "--json"))
    assert ring["name"] == RING
    assert ring["place"] == f"1:{ring['refs'][0]}"
    assert ring["back_pid"] == busy.host.pid("backend")
    assert b"tests.integration.worker" in Path(f"/proc/{ring['front_pid']}/cmdline").read_bytes()
    assert (ring["protocol"], ring["size"], ring["pages"], ring["state"]) == ("blkif", 128, 4, "live")
    assert ring["requests"] > 0
    table = busy.ask("ring", "list", "guest").strip().splitlines()
    assert "Ring" in table[0].split() + table[1].split()
    assert table[-1].split()[0] == RING


def test_watch_shows_what_goes_on(busy: Busy) -> None:
    said = busy.ask("ring", "watch", RING, "--seconds", "0.4", "--interval", "0.1", "--json", "--exact")
    steps = [json.loads(line) for line in said.splitlines()]
    assert len(steps) >= 3
    for step in steps:
        assert (step["ring"], step["state"], step["size"]) == (RING, "live", 128)
    last = steps[-1]
    assert {step["front"]["requests_per_s"] > 0 for step in steps} >= {True}
    for end in ("front", "back"):
        latency = last[end]["latency"]
        assert latency["count"] == sum(n for _, n in latency["histogram_ns"]) > 0
        assert 0 < latency["p50_ns"] <= latency["p99_ns"] <= latency["max_ns"]
        assert last[end]["mean_batch"] >= 1
        assert last[end]["outstanding"] <= 128


def test_watch_as_a_table(busy: Busy) -> None:
    said = busy.ask("ring", "watch", RING, "--seconds", "0.2", "--interval", "0.1")
    assert "Latency at the front end" in said
    rows = [line.split()[:2] for line in said.splitlines()]
    assert [RING, "front"] in rows
    assert [RING, "back"] in rows
    assert "Latency" not in busy.ask("ring", "watch", "--seconds", "0.2", "--interval", "0.1")


def test_kick_harms_nobody(busy: Busy) -> None:
    said = busy.ask("ring", "kick", RING)
    assert [line.split(":")[0] for line in said.splitlines()] == [
        f"woke the front end of {RING}",
        f"woke the back end of {RING}",
    ]
    assert busy.ask("ring", "kick", RING, "--end", "back").startswith("woke the back end")
    assert busy.guest.poll() is None


def test_tables_fit_a_hundred_columns(busy: Busy) -> None:
    watched = ("ring", "watch", "--seconds", "0.2", "--interval", "0.1")
    for command in (("ring", "list"), watched, ("evtchn", "list"), ("grant", "list")):
        lines = busy.ask(*command).splitlines()
        assert max(len(line) for line in lines) <= 100, lines


def test_a_wrong_name_says_what_there_is(busy: Busy) -> None:
    for command in ("watch", "kick"):
        done = busy.attempt("ring", command, "vbd/1/9")
        assert done.returncode == 2
        assert done.stderr.startswith(f"paravirt: there is no ring 'vbd/1/9'; there are: {RING} (1:")
    assert busy.attempt("ring", "list", "nobody").returncode == 2


def test_event_channels_with_the_rings_that_use_them(busy: Busy) -> None:
    ports = json.loads(busy.ask("evtchn", "list", "--json"))
    used = {port["device"]: port for port in ports if port["device"]}
    front, back = used[f"{RING} front"], used[f"{RING} back"]
    assert (front["domid"], front["remote_domid"], front["remote_port"]) == (1, 0, back["port"])
    assert (back["domid"], back["remote_domid"], back["remote_port"]) == (0, 1, front["port"])
    assert front["state"] == "interdomain"
    assert {port["domid"] for port in json.loads(busy.ask("evtchn", "list", "guest", "--json"))} == {1}
    assert {port["domid"] for port in json.loads(busy.ask("evtchn", "list", "Domain-0", "--json"))} == {0}
    assert "Pending" in busy.ask("evtchn", "list")


def test_a_watched_ring_whose_backend_is_killed_comes_back(busy: Busy) -> None:
    watcher = busy.spawn("ring", "watch", RING, "--interval", "0.05", "--json")
    try:
        said = lines(watcher.stdout)
        assert next(said)["state"] == "live"
        pid = busy.host.pid("backend")
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert ended(pidfd)
        os.close(pidfd)
        assert next(step for step in said if step["state"] != "live")["back"] is None
        busy.host.start("backend")
        assert next(step for step in said if step["state"] == "live" and step["back"])["ring"] == RING
    finally:
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(DEADLINE_S) == 130
        watcher.communicate()


def test_a_guest_that_is_killed_while_it_is_watched(busy: Busy) -> None:
    """The last test on this host: its guest is gone after it."""
    watcher = busy.spawn("ring", "watch", RING, "--interval", "0.05", "--json")
    try:
        said = lines(watcher.stdout)
        assert next(said)["state"] == "live"
        (ring,) = json.loads(busy.ask("ring", "list", "--json"))
        os.kill(ring["front_pid"], signal.SIGKILL)
        assert next(step for step in said if step["state"] != "live").get("front") is None
        busy.attempt("domain", "destroy", "guest")
        assert next(step for step in said if step["state"] == "gone") == {"ring": RING, "state": "gone"}
    finally:
        watcher.kill()
        watcher.communicate()
    assert json.loads(busy.ask("ring", "list", "--json")) == []


def test_times_have_three_digits() -> None:
    texts = {None: "-", 80: "80 ns", 1500: "1.5 us", 2_345_000: "2.35 ms", 3_000_000_000: "3 s"}
    assert {ns: time_text(ns) for ns in texts} == texts
