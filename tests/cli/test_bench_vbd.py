# SPDX-License-Identifier: MIT
"""`paravirt bench vbd`: what it reports, never how fast."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paravirt.testing.temporary import TemporaryHost


def paravirt(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "paravirt", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def bench(*options: str) -> "subprocess.CompletedProcess[str]":
    return paravirt("bench", "vbd", "--pairs", "2", "--runtime", "0.02", *options)


def told_by(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["null:1G", "--rw", "read", "--bs", "128k"],
        ["memory:4M", "--rw", "randrw", "--rwmixread", "70", "--wait", "sleep"],
        ["memory:4M", "--rw", "write", "--isolated", "--size", "1M"],
        ["memory:4M", "--wait", "spin", "--fence", "host"],
    ],
)
def test_json(options: list[str]) -> None:
    told = told_by(bench("--json", "--iodepth", "1", "--iodepth", "8", *options))
    assert [result["case"]["depth"] for result in told["results"]] == [1, 8]
    for result in told["results"]:
        assert result["side"] == "paravirt"
        assert result["iops"]["median"] > 0
        assert result["p50_ns"]["median"] <= result["p99_ns"]["median"]
        assert result["back_cpu_us"]["median"] >= 0
        assert sum(n for _, n in result["histogram_ns"]) > 0
    assert told["verified"] is None


def test_tables_and_a_baseline(tmp_path: Path) -> None:
    before = bench("memory:1M", "--json")
    told_by(before)
    (tmp_path / "before.json").write_text(before.stdout)
    plot = tmp_path / "plot.html"
    done = bench("memory:1M", "--baseline", str(tmp_path / "before.json"), "--plot", str(plot))
    assert done.returncode == 0, done.stderr
    for text in ("1 in flight", "32 in flight", "kIOPS", "share of the requests", "speed beside the baseline"):
        assert text in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80 or "inconclusive" in done.stdout
    assert "<svg" in plot.read_text()


def test_beside_a_peer() -> None:
    told = told_by(bench("memory:1M", "--compare", "psync,model", "--iodepth", "4", "--json"))
    sides = [result["side"] for result in told["results"]]
    assert sides == [name for name in ("paravirt", "psync", "model") if name in sides]
    assert set(sides) | set(told["skipped"]) >= {"paravirt", "psync", "model"}


def test_verified(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    done = bench(f"file:{image}", "--rw", "randrw", "--verify", "--iodepth", "8")
    assert done.returncode == 0, done.stderr
    assert "256 blocks were read and are as they were written" in " ".join(done.stdout.split())


def test_disks_of_a_host_that_runs() -> None:
    """By Dom0, and by a process of the domain itself."""
    with TemporaryHost() as host:
        run = ["--run", str(host.rundir.path)]
        assert paravirt(*run, "domain", "create", "guest", "--shared").returncode == 0
        assert paravirt(*run, "vbd", "attach", "guest", "1M", "--driver", "memory").returncode == 0
        options = ["bench", "vbd", "xvda", "--pairs", "2", "--runtime", "0.02", "--iodepth", "4", "--json"]
        by_dom0 = told_by(paravirt(*run, *options, "--domain", "guest"))
        inside = told_by(paravirt(*run, "run", "guest", "--shared", "--", sys.executable, "-m", "paravirt", *options))
        for told in (by_dom0, inside):
            (result,) = told["results"]
            assert result["disk"] == "xvda"
            assert result["iops"]["median"] > 0
            assert result["back_cpu_us"] is None
        missing = paravirt(*run, *options[:2], "xvdz", "--domain", "guest")
        assert missing.returncode == 2
        assert "no disk xvdz" in missing.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["memory:100"], "multiple of 512"),
        (["file:/nowhere.img"], "No such file"),
        (["nothing:1M"], "unknown disk driver"),
        (["xvda"], "say --domain"),
        (["--bs", "100"], "--bs"),
        (["--bs", "0"], "--bs"),
        (["--iodepth", "0"], "--iodepth"),
        (["--rw", "trim"], "--rw"),
        (["--queues", "99"], "--queues"),
        (["--compare", "nobody"], "no peer nobody"),
        (["--compare", "psync", "--verify"], "not with --compare"),
        (["delay,read=1ms:memory:1M", "--verify"], "choose a --rw that writes"),
        (["--plot", "x.png"], "an .svg or .html"),
        (["memory:1M", "--bs", "2M"], "no block"),
        (["xvda", "--domain", "guest", "--compare", "psync"], "--compare needs to know"),
        (["xvda", "--domain", "guest"], "is not running"),
    ],
)
def test_bad_input_is_one_line(options: list[str], complaint: str) -> None:
    done = bench("--pairs", "1", *options)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
