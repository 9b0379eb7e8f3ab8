# SPDX-License-Identifier: MIT
"""What a disk costs a host that has more of them, in what can be counted; never how long anything takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    picture = tmp_path_factory.mktemp("growth") / "growth.svg"
    command = [sys.executable, "-m", "benchmarks.growth", "5", "40", "--json", "--plot", str(picture)]
    command += ["--rounds", "1", "--real", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "<svg" in picture.read_text()
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_threads_and_descriptors_of_a_disk_stay_few(costs: list[dict[str, Any]]) -> None:
    few, many = costs
    assert (few["disks"], many["disks"]) == (5, 40)
    assert many["threads"] <= 2  # the backend's engine, and the frontend's that follows xenstore
    assert max(few["descriptors"], many["descriptors"]) <= 20


def test_memory_of_a_disk_is_what_it_uses(costs: list[dict[str, Any]]) -> None:
    """The arena of its requests alone would be 5.6 MiB."""
    for cost in costs:
        assert cost["daemons_kib"] < 300
        assert cost["frontend_kib"] < 600


def test_idle_disks_wake_nobody(costs: list[dict[str, Any]]) -> None:
    """Some threads look now and then, however many disks there are: a second each at most, and not one more a disk."""
    few, many = costs
    assert many["idle_wakeups"] <= max(10.0, 2 * few["idle_wakeups"]) < 60
