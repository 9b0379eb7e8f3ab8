# SPDX-License-Identifier: MIT
"""The model of ring and event channel, with few messages; `make proofs` runs it with many."""

import shutil

import pytest

from tests.needs import missing

from .jobs import each
from .spin import HOLDS, QUICK, Verdict, check, check_bug

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def _spin() -> None:
    if shutil.which("spin") is None:
        missing("spin is not installed: apt-get install spin")


def test_no_schedule_loses_anything(tmp_path_factory: pytest.TempPathFactory) -> None:
    def run(name: str) -> Verdict:
        switches, _, messages = HOLDS[name]
        return check(switches, messages, tmp_path_factory.mktemp("spin"), optimize=False)

    for name, verdict in each(run, [name for name, (_, _, messages) in HOLDS.items() if messages]):
        assert verdict.errors == 0, f"{name}: {verdict.what}"
        assert verdict.states > 1000, name


def test_seeded_bugs_are_found(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = dict(each(lambda bug: check_bug(bug, tmp_path_factory.mktemp("spin")).errors, QUICK))
    assert all(found.values()), found
