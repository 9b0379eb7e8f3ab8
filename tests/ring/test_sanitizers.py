# SPDX-License-Identifier: MIT
"""The C core under the sanitizers: threads on one mapping, memory with nothing behind the last entry."""

import os
import subprocess
from pathlib import Path

import pytest

from paravirt.ring.waiting import offer_fence

from .support import C_CORE, DEADLINE_S, HERE, RING_SOURCES, compile_c, run_c

SOURCES = [
    HERE / "stress.c",
    *(C_CORE / f"{name}.c" for name in (*RING_SOURCES, "pv_stream")),
]
# ThreadSanitizer does not know fences: nothing may depend on one for the order of plain data, which is what it checks.
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_stress(sanitizer: str, tmp_path: Path) -> None:
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    missing = subprocess.run(
        ["gcc", *FLAGS[sanitizer], probe, "-o", tmp_path / "probe"], capture_output=True, check=False
    )
    if missing.returncode and os.environ.get("CI") != "true":
        pytest.skip(f"this compiler has no {sanitizer} sanitizer: install libasan and libtsan")
    if not offer_fence("process"):
        pytest.skip("this kernel has no membarrier(2)")
    program = compile_c(tmp_path / "stress", SOURCES, *FLAGS[sanitizer])
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    for seed, fence in (("1", "full"), ("2", "process")):
        assert run_c([program, "20000", seed, fence], timeout=DEADLINE_S, environment=environment) == "ok\n"
