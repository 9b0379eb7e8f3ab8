# SPDX-License-Identifier: MIT
"""The C core under the sanitizers: threads on one mapping, memory with nothing behind the last entry."""

import os
import subprocess
from pathlib import Path

import pytest

from paravirt.ring.waiting import offer_fence

from .support import C_CORE, DEADLINE_S, EVENT_SOURCES, HERE, RING_SOURCES, compile_c, run_c

SOURCES = [
    HERE / "stress.c",
    *(C_CORE / f"{name}.c" for name in (*RING_SOURCES, "pv_stream")),
]
EOI_SOURCES = [HERE / "eoi_stress.c", *(C_CORE / f"{name}.c" for name in EVENT_SOURCES)]
# ThreadSanitizer does not know fences: nothing may depend on one for the order of plain data, which is what it checks.
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
}


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_stress(sanitizer: str, tmp_path: Path) -> None:
    assert run_sanitized(tmp_path, sanitizer, SOURCES, "20000", "1", "full") == "ok\n"


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_stress_with_a_light_fence(sanitizer: str, tmp_path: Path) -> None:
    if not offer_fence("process"):
        pytest.skip("this kernel has no membarrier(2)")
    assert run_sanitized(tmp_path, sanitizer, SOURCES, "20000", "2", "process") == "ok\n"


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_late_eois_of_many_threads(sanitizer: str, tmp_path: Path) -> None:
    assert run_sanitized(tmp_path, sanitizer, EOI_SOURCES, "5000") == "ok\n"


def run_sanitized(tmp_path: Path, sanitizer: str, sources: list[Path], *arguments: str) -> str:
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    missing = subprocess.run(
        ["gcc", *FLAGS[sanitizer], probe, "-o", tmp_path / "probe"], capture_output=True, check=False
    )
    if missing.returncode and os.environ.get("CI") != "true":
        pytest.skip(f"this compiler has no {sanitizer} sanitizer: install libasan and libtsan")
    program = compile_c(tmp_path / "stress", sources, *FLAGS[sanitizer])
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    return run_c([program, *arguments], timeout=DEADLINE_S, environment=environment)
