# SPDX-License-Identifier: MIT
"""The model of ring and event channel, with few messages; `make proofs` runs it with many."""

import shutil
from pathlib import Path

import pytest

from tests.needs import missing

from .spin import BUGS, HOLDS, check

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def _spin() -> None:
    if shutil.which("spin") is None:
        missing("spin is not installed: apt-get install spin")


@pytest.mark.parametrize("name", HOLDS)
def test_no_schedule_loses_anything(name: str, tmp_path: Path) -> None:
    switches, _, messages = HOLDS[name]
    verdict = check(switches, messages, tmp_path)
    assert verdict.errors == 0, verdict.what
    assert verdict.states > 1000


@pytest.mark.parametrize("bug", BUGS)
def test_a_seeded_bug_is_found(bug: str, tmp_path: Path) -> None:
    switches, messages = BUGS[bug]
    assert check((*switches, f"BUG_{bug}"), messages, tmp_path, optimize=False).errors
