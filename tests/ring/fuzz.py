# SPDX-License-Identifier: MIT
"""Build the fuzz target of the ring's C core and run it: `python -m tests.ring.fuzz [RUNS]`, as `make fuzz-ring` does.

With clang it is libFuzzer's; with gcc alone it runs random inputs.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.xenstore.fuzz.build import has_clang

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "c_ext"
SOURCES = [
    path for pattern in ("pv_ring*", "pv_spin", "pv_event*", "pv_wait*", "pv_stream", "pv_flex", "pv_grant*", "pv_home")
    for path in sorted(CORE.glob(f"{pattern}.c"))
]  # fmt: skip
FLAGS = [
    "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unused-value",
    "-fno-sanitize-recover=all", f"-I{CORE}", f"-I{HERE}", '-DPV_ATOMIC_SHIM="fuzz_shim.h"',
]  # fmt: skip
SANITIZERS = "address,undefined"

Change = tuple[str, str, str]
"""(name of a source, what stands there once, what stands there instead): a mistake put in to see it found."""


def build(folder: Path, *, clang: bool, change: Change | None = None) -> Path:
    """The program; raises CalledProcessError when it does not compile."""
    paths = [HERE / "fuzz_core.c", *SOURCES]
    if change is not None:
        name, before, after = change
        text = (CORE / name).read_text()
        assert text.count(before) == 1, f"{name} has not once: {before}"
        (folder / name).write_text(text.replace(before, after))
        paths = [folder / name if path.name == name else path for path in paths]
    program = folder / "fuzz_core"
    how = ["clang", f"-fsanitize=fuzzer,{SANITIZERS}"]
    if not clang:
        how = ["gcc", f"-fsanitize={SANITIZERS}", "-DFUZZ_STANDALONE"]
    subprocess.run([*how, *FLAGS, *paths, "-o", program, "-pthread"], check=True)
    return program


def run(program: Path, n_runs: int, *, seed: int = 1) -> "subprocess.CompletedProcess[str]":
    """Where a run fails the program ends with a code other than 0 and says why; the input is left in its folder."""
    command = [program, f"-runs={n_runs}", f"-seed={seed}", "-max_len=400"]
    return subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)


def main() -> int:
    n_runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        done = run(build(Path(folder), clang=has_clang()), n_runs)
    print(done.stderr[-3000:])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
