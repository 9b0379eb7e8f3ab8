# SPDX-License-Identifier: MIT
"""Nothing is lost wherever one side's call is interrupted by a whole call of the other side."""

from pathlib import Path

from .support import C_CORE, DEADLINE_S, HERE, RING_SOURCES, compile_c, run_c


def test_every_place(tmp_path: Path) -> None:
    sources = [HERE / "interrupt.c", *(C_CORE / f"{name}.c" for name in RING_SOURCES)]
    program = compile_c(tmp_path / "interrupt", sources, f"-I{HERE}", '-DPV_ATOMIC_SHIM="interrupt_shim.h"')
    said = run_c([program], timeout=DEADLINE_S)
    assert int(said.removesuffix(" places\n")) > 50
