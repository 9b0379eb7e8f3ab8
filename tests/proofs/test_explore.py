# SPDX-License-Identifier: MIT
"""The real C code under a weak memory model, with few messages and one preemption; `make proofs` has more of both."""

from pathlib import Path

import pytest

from .mutants import argued, survivors
from .sites import FILES, SITES_A_FILE, all_sites, build, explore, sites_of

BOUND = 1
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("explore"), "-DMESSAGES=2u")


def test_the_code_is_right_in_every_schedule_and_with_every_stale_read(program: Path) -> None:
    right, said = explore(program, BOUND)
    assert right, said
    assert said.count(" executions") > 10


def test_each_weaker_order_is_caught_or_argued(program: Path) -> None:
    assert survivors(program, BOUND) == argued()


def test_sites_are_numbered_without_overlap() -> None:
    assert all(len(sites_of(file, 0)) < SITES_A_FILE for file in FILES)
    names = [str(site) for site in all_sites() if site.macro not in ("load_relaxed", "store_relaxed", "fence_compiler")]
    assert len(names) == len(set(names)), "two accesses of one name: the table cannot tell them apart"
