# SPDX-License-Identifier: MIT
"""`paravirt bench vbd`: what it reports, never how fast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def bench(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "paravirt", "bench", "vbd", "--seconds", "0.1", "--depth", "1", "--depth", "8"]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.parametrize("options", [[], ["--writes"], ["--driver", "null"], ["--wait", "sleep"], ["--isolated"]])
def test_json(options: list[str]) -> None:
    done = bench("--json", *options)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert [result["depth"] for result in results] == [1, 8]
    for result in results:
        assert result["requests"] > 0
        assert result["requests"] % result["depth"] == 0
        assert result["p50_us"] <= result["p99_us"]
        assert result["notifications"] + result["suppressed"] > 0
        assert result["iops"] == pytest.approx(result["requests"] / result["seconds"])


def test_table_of_an_image(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    done = bench("--image", str(image))
    assert done.returncode == 0, done.stderr
    assert "disk, 4 KiB x 1" in done.stdout
    assert "disk, 4 KiB x 8" in done.stdout


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--size", "100"], "multiple of 512"),
        (["--image", "/nowhere.img"], "does not exist"),
        (["--bytes", "100"], "--bytes"),
        (["--bytes", "1000"], "multiple of 512"),
        (["--depth", "0"], "--depth"),
    ],
)
def test_bad_input_is_one_line(options: list[str], complaint: str) -> None:
    done = bench(*options)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
