# SPDX-License-Identifier: MIT
"""`paravirt vbd stat` and `vbd watch` on a host of daemons: a disk under load, one that nobody uses, one that lies."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paravirt.testing.temporary import TemporaryHost
from tests.host.running import ended, read_line

from .test_ring import Busy, lines

DEADLINE_S = 30
DISK = "guest/xvda"
BLKBACK = ("oo_req", "rd_req", "wr_req", "f_req", "ds_req", "rd_sect", "wr_sect")

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Busy]:
    image = tmp_path_factory.mktemp("stat") / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with TemporaryHost() as host:
        made = Busy(host, image)
        made.ask("vbd", "attach", "guest", "1M", "--driver", "memory", "--dev", "xvdb")
        yield made
        made.close()


def stat(busy: Busy, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(busy.ask("vbd", "stat", *arguments, "--json"))
    return found


def test_stat_says_what_each_disk_has_done(busy: Busy) -> None:
    used, unused = stat(busy)
    assert (used["disk"], used["state"], used["driver"], used["size_bytes"]) == (DISK, "live", "file", 1 << 20)
    assert (unused["disk"], unused["state"], unused["back"], unused["queues"]) == ("guest/xvdb", "not in use", None, [])
    back, front = used["back"], used["front"]
    assert back["pids"] == [busy.host.pid("backend")]
    assert b"tests.integration.worker" in Path(f"/proc/{front['pids'][0]}/cmdline").read_bytes()
    for end in (back, front):
        assert end["reads"] > 0
        assert end["read_bytes"] == 4096 * end["reads"]
        assert end["in_flight"] <= end["size"] == 128
        assert end["requests"] >= end["batches"] > 0
        latency = end["latency"]
        assert latency["count"] == sum(n for _, n in latency["histogram_ns"])
    assert tuple(used["statistics"]) == BLKBACK
    assert used["statistics"]["rd_sect"] == 8 * back["reads"]
    (queue,) = used["queues"]
    assert (queue["queue"], queue["ring"]) == (0, "vbd/1/51712")
    assert queue["back"]["reads"] == back["reads"]
    later = stat(busy, DISK)[0]["back"]
    assert later["reads"] > back["reads"]


def test_a_disk_has_several_names(busy: Busy) -> None:
    names = ("guest/xvdb", DISK, "1/xvda", "1/51712", "guest/51712", "vbd/1/51712")
    assert [disk["disk"] for disk in stat(busy, *names)] == ["guest/xvdb", *[DISK] * 5]


def test_a_wrong_name_says_what_there_is(busy: Busy) -> None:
    for command in ("stat", "watch"):
        done = busy.attempt("vbd", command, "guest/xvdz")
        assert done.returncode == 2
        assert done.stderr == f"paravirt: there is no disk 'guest/xvdz'; there are: {DISK}, guest/xvdb\n"


def test_tables_fit_a_hundred_columns(busy: Busy) -> None:
    table = busy.ask("vbd", "stat").splitlines()
    assert max(len(line) for line in table) <= 100, table
    rows = {line.split()[0]: line.split() for line in table if line.startswith("guest/")}
    assert rows[DISK][-1] == "live"
    assert rows["guest/xvdb"][-3:] == ["not", "in", "use"]
    assert busy.ask("vbd", "stat", "--queues").splitlines()[3].split()[0] == DISK


def test_watch_shows_what_goes_on(busy: Busy) -> None:
    said = busy.ask("vbd", "watch", DISK, "--seconds", "0.4", "--interval", "0.1", "--json", "--exact")
    steps = [json.loads(line) for line in said.splitlines()]
    assert len(steps) == 4
    assert {(step["disk"], step["state"]) for step in steps} == {(DISK, "live")}
    last = steps[-1]
    for end in ("front", "back"):
        rates = last[end]
        assert rates["reads_per_s"] > 0
        assert rates["read_bytes_per_s"] == pytest.approx(4096 * rates["reads_per_s"], rel=0.01)
        assert 0 < rates["latency"]["p50_ns"] <= rates["latency"]["p99_ns"] <= rates["latency"]["max_ns"]
    assert last["front"]["copied_bytes_per_s"] > 0
    assert last["back"]["copied_bytes_per_s"] == 0


def test_watch_as_a_table(busy: Busy) -> None:
    said = busy.ask("vbd", "watch", DISK, "--seconds", "0.2", "--interval", "0.1", "--queues")
    assert "Latency at the frontend q0" in said
    assert [f"{DISK} q0"] == list({line[: len(DISK) + 3] for line in said.splitlines() if line.startswith("guest/")})
    said = busy.ask("vbd", "watch", "--seconds", "0.2", "--interval", "0.1")
    assert "Latency" not in said
    assert DISK in said


def test_watch_waits_for_a_disk_that_nobody_uses(busy: Busy) -> None:
    watched = ("vbd", "watch", "guest/xvdb", "--seconds", "0.1", "--interval", "0.1")
    assert json.loads(busy.ask(*watched, "--json")) == {"disk": "guest/xvdb", "state": "not in use"}
    assert "guest/xvdb: not in use" in busy.ask(*watched)


def test_a_watched_disk_whose_backend_is_killed_comes_back(busy: Busy) -> None:
    before = stat(busy, DISK)[0]["front"]["reads"]
    watcher = busy.spawn("vbd", "watch", DISK, "--interval", "0.05", "--json")
    try:
        said = lines(watcher.stdout)
        assert next(said)["state"] == "live"
        pid = busy.host.pid("backend")
        pidfd = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert ended(pidfd)
        os.close(pidfd)
        assert next(step for step in said if step["state"] != "live").get("back") is None
        busy.host.start("backend")
        assert next(step for step in said if step["state"] == "live" and step["back"])["disk"] == DISK
    finally:
        watcher.terminate()
        watcher.communicate()
    disk = stat(busy, DISK)[0]
    assert disk["front"]["reads"] >= before
    assert disk["back"]["pids"] != [pid]


def test_a_domain_that_lies_garbles_its_own_line_only(busy: Busy) -> None:
    busy.ask("domain", "create", "--shared", "liar")
    busy.ask("vbd", "attach", "liar", "1M", "--driver", "memory")
    command = busy._command("run", "--shared", "liar", "--", sys.executable, "-m", "tests.cli.lying_disk")
    liar = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert read_line(liar.stdout) == "ready"
        for _ in range(2):
            found = {disk["disk"]: disk for disk in stat(busy)}
            good = found[DISK]
            assert good["back"]["read_bytes"] == 4096 * good["back"]["reads"]
            assert good["state"] == "live"
            # What the backend counted of it is the truth, whatever it says itself.
            assert found["liar/xvda"]["back"]["reads"] == 1
            assert [name for name in found if not name.startswith("liar/")] == [DISK, "guest/xvdb"]
        table = busy.ask("vbd", "stat", "--queues").splitlines()
        assert any(line.startswith(DISK) and line.split()[-1] == "live" for line in table)
        for more in ((), ("--json", "--queues", "--exact")):
            assert DISK in busy.ask("vbd", "watch", "--seconds", "1", "--interval", "0.05", *more)
    finally:
        liar.communicate(b"", DEADLINE_S)
    assert liar.returncode == 0
