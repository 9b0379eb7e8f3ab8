# SPDX-License-Identifier: MIT
"""Build the fuzz target of the ring's C core and run it: `python -m tests.ring.fuzz [RUNS]`, as `make fuzz-ring` does.

With clang it is libFuzzer's; with gcc alone it runs random inputs.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.xenstore.fuzz.build import has_clang

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "c_ext"


@dataclass(frozen=True)
class Target:
    """A file with what is tried, and the parts of the core that it needs."""

    driver: Path
    parts: tuple[str, ...]

    @property
    def sources(self) -> list[Path]:
        return [self.driver, *(path for part in self.parts for path in sorted(CORE.glob(f"{part}.c")))]


RINGS = ("pv_ring*", "pv_spin", "pv_event*", "pv_wait*", "pv_grant*", "pv_home")
RING = Target(HERE / "fuzz_core.c", (*RINGS, "pv_stream", "pv_flex", "pv_look*", "pv_blkif*"))
FLAGS = [
    "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unused-value",
    "-fno-sanitize-recover=all", f"-I{CORE}", f"-I{HERE}", '-DPV_ATOMIC_SHIM="fuzz_shim.h"',
]  # fmt: skip
SANITIZERS = "address,undefined"

Change = tuple[str, str, str]
"""(name of a source, what stands there once, what stands there instead): a mistake put in to see it found."""


def build(folder: Path, *, clang: bool, change: Change | None = None, target: Target = RING) -> Path:
    """The program; raises CalledProcessError when it does not compile. What a folder has compiled is used again."""
    changed, before, after = change or ("", "", "")
    how = ["clang", f"-fsanitize=fuzzer-no-link,{SANITIZERS}"]
    link = ["clang", f"-fsanitize=fuzzer,{SANITIZERS}"]
    if not clang:
        how = ["gcc", f"-fsanitize={SANITIZERS}", "-DFUZZ_STANDALONE"]
        link = how[:2]

    def compiled(path: Path) -> Path:
        to = folder / f"{path.stem}.o"
        if path.name == changed:
            text = path.read_text()
            assert text.count(before) == 1, f"{path.name} has not once: {before}"
            path = folder / path.name
            path.write_text(text.replace(before, after))
            to = folder / f"{path.stem}_changed.o"
        elif to.exists():
            return to
        subprocess.run([*how, *FLAGS, "-c", path, "-o", to], check=True)
        return to

    program = folder / f"{target.driver.stem}{len(list(folder.iterdir()))}"
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, target.sources))
    subprocess.run([*link, *objects, "-o", program, "-pthread"], check=True)
    return program


def run(program: Path, n_runs: int, *, seed: int = 1) -> "subprocess.CompletedProcess[str]":
    """Where a run fails the program ends with a code other than 0 and says why; the input is left in its folder."""
    command = [program, f"-runs={n_runs}", f"-seed={seed}", "-max_len=400"]
    return subprocess.run(command, cwd=program.parent, capture_output=True, text=True, check=False)


def main(target: Target = RING) -> int:
    n_runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as folder:
        done = run(build(Path(folder), clang=has_clang(), target=target), n_runs)
    print(done.stderr[-3000:])
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
