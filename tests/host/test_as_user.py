# SPDX-License-Identifier: MIT
"""The promises that differ between root and an ordinary user, tried as the latter when the tests run as root."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
DEADLINE_S = 240.0


@pytest.mark.skipif(os.geteuid() != 0, reason="these tests run as an ordinary user already; root's way is not run")
@pytest.mark.timeout(DEADLINE_S + 10)
@pytest.mark.parametrize(
    ("module", "chosen"),
    [
        ("host/test_launch.py", ""),
        ("host/test_isolation.py", ""),
        ("cli/test_up.py", "TestDomains or owner or knows_itself or output or destroy or shared or level"),
    ],
    ids=["launch", "isolation", "up"],
)
def test_an_ordinary_user_has_the_same(module: str, chosen: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", "-k", chosen]
    done = subprocess.run(
        [
            sys.executable,
            str(TESTS / "host/as_user.py"),
            sys.executable,
            "-B",
            "-m",
            "pytest",
            *options,
            str(TESTS / module),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
