# SPDX-License-Identifier: MIT
"""Every byte of every message checked: in threads, in threads with two mappings, in two processes; with each fence.

A short run; `make stress` has STRESS_MESSAGES=1000000000 in each place with each fence.
"""

import os
from pathlib import Path

import pytest

from paravirt.ring import waiting
from paravirt.ring.waiting import Fence

from .support import C_CORE, HERE, RING_SOURCES, compile_c, run_c

MESSAGES = os.environ.get("STRESS_MESSAGES")
SOURCES = [HERE / "stress.c", *(C_CORE / f"{name}.c" for name in (*RING_SOURCES, "pv_stream"))]


@pytest.mark.timeout(0 if MESSAGES else 60)
@pytest.mark.parametrize(
    ("place", "fence"),
    [
        ("threads", "full"),
        ("threads", "process"),
        ("mappings", "full"),
        ("mappings", "process"),
        ("mappings", "host"),
        ("processes", "full"),
        ("processes", "host"),
    ],
)
def test_all_arrive(place: str, fence: Fence, tmp_path: Path) -> None:
    if not waiting.offer_fence(fence):
        pytest.skip("this kernel has no membarrier(2)")
    program = compile_c(tmp_path / "stress", SOURCES)
    arguments = [MESSAGES, "1", fence, place, "one"] if MESSAGES else ["20000", "1", fence, place]
    assert run_c([program, *arguments], timeout=None if MESSAGES else 55) == "ok\n"
