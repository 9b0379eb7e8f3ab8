# SPDX-License-Identifier: MIT
"""Each macro of Xen's ring.h against the function that stands for it, byte for byte, over random steps and wraps."""

from pathlib import Path

import pytest

from .support import C_CORE, DEADLINE_S, HERE, RING_SOURCES, compile_c, need_xen_header, run_c


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_macros_say_the_same(tmp_path: Path, seed: int) -> None:
    need_xen_header()
    sources = [HERE / "xen_macros.c", *(C_CORE / f"{name}.c" for name in RING_SOURCES)]
    program = compile_c(tmp_path / "xen_macros", sources)
    assert run_c([program, "100000", str(seed)], timeout=DEADLINE_S) == "ok\n"
