# SPDX-License-Identifier: MIT
"""The store's engine without memory, under the address sanitizer where there is one: see no_memory.c."""

import os
import subprocess
from pathlib import Path

from tests.ring.support import compile_c, run_c
from tests.xenstore.fuzz.build import SOURCES

WRAPPED = "-Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=free"
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EACH = 5
"""Of the allocations from which on all fail, every fifth is tried: each takes a process."""


def test_each_allocation_fails(tmp_path: Path) -> None:
    (tmp_path / "probe.c").write_text("int main(void) { return 0; }\n")
    probe = ["gcc", *SANITIZED, tmp_path / "probe.c", "-o", tmp_path / "probe"]
    flags = SANITIZED if subprocess.run(probe, capture_output=True, check=False).returncode == 0 else []
    sources = [Path(__file__).with_name("no_memory.c"), *SOURCES]
    program = compile_c(tmp_path / "no_memory", sources, "-O1", "-fno-strict-aliasing", WRAPPED, *flags)
    said = run_c([program, str(EACH)], timeout=120, environment={**os.environ, "ASAN_OPTIONS": "detect_leaks=1"})
    assert [line.split(":")[0] for line in said.splitlines()] == ["once", "little", "none"]
