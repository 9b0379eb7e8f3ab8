# SPDX-License-Identifier: MIT
"""Build the fuzz targets and run them: `python -m tests.xenstore.fuzz.build [RUNS]`, which `make fuzz-xenstore` does.

With clang they are libFuzzer's; with gcc alone a driver of their own mutates the seeds (fuzz.h).
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
C_CORE: Final = HERE.parent.parent.parent / "c_ext"
SOURCES: Final = [
    *sorted(C_CORE.glob("pv_xs_*.c")),
    *(C_CORE / f"pv_{n}.c" for n in ("event", "home", "spin", "stream", "wait", "wait_late")),
]
FLAGS: Final = [
    "-std=gnu11", "-g", "-O1", "-fno-omit-frame-pointer", "-fno-strict-aliasing", "-Wall", "-Wextra",
    "-Wno-unused-parameter", "-fno-sanitize-recover=all", f"-I{C_CORE}", f"-I{HERE}",
]  # fmt: skip
SANITIZERS: Final = "address,undefined"
SHARES: Final = {"engine": 5, "journal": 3, "ring": 2}
"""How the runs are shared out."""
LENGTHS: Final = {"engine": 1500, "journal": 600, "ring": 1000}
"""The longest inputs worth a try, bytes."""
OWN_FLAGS: Final = {"ring": ['-DPV_ATOMIC_SHIM="fuzz_ring_shim.h"']}
"""A target whose engine is compiled in another way."""
ARTIFACTS: Final = HERE.parent.parent.parent / "build" / "fuzz"

Change = tuple[str, str]
"""(what stands in a source once, what stands there instead): a mistake put in to see it found."""


def has_clang() -> bool:
    """Whether there is a clang that can fuzz."""
    if shutil.which("clang") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.c"
        probe.write_text("int LLVMFuzzerTestOneInput(const char *data, unsigned long n) { return !data && n; }\n")
        command = ["clang", f"-fsanitize=fuzzer,{SANITIZERS}", str(probe), "-o", f"{folder}/probe"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Builder:
    """Compiles into a folder; what was compiled is used again."""

    def __init__(self, folder: Path, *, clang: bool) -> None:
        self.folder = folder
        self.clang = clang

    def program(self, target: str, changes: Mapping[str, Change] | None = None) -> Path:
        """The program of a target; `changes`: by name of a source."""
        sources = [HERE / f"fuzz_{target}.c", *SOURCES]
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: self._object(target, source, changes or {}), sources))
        program = self.folder / f"fuzz_{target}{len(list(self.folder.iterdir()))}"
        link = f"-fsanitize=fuzzer,{SANITIZERS}" if self.clang else f"-fsanitize={SANITIZERS}"
        self._run([self._compiler, link, *map(str, objects), "-o", str(program), "-pthread"])
        return program

    @property
    def _compiler(self) -> str:
        return "clang" if self.clang else "gcc"

    def _object(self, target: str, source: Path, changes: Mapping[str, Change]) -> Path:
        # Only what has atomic accesses differs.
        own = OWN_FLAGS.get(target, []) if "pv_atomic.h" in source.read_text() else []
        tag = (target if own else "any") + ("_changed" if source.name in changes else "")
        compiled = self.folder / f"{tag}_{source.stem}.o"
        if source.name in changes:
            before, after = changes[source.name]
            text = source.read_text()
            assert text.count(before) == 1, f"{source.name} has not once: {before}"
            source = self.folder / source.name
            source.write_text(text.replace(before, after))
        elif compiled.exists():
            return compiled
        mode = (
            [f"-fsanitize=fuzzer-no-link,{SANITIZERS}"]
            if self.clang
            else [f"-fsanitize={SANITIZERS}", "-DFUZZ_STANDALONE"]
        )
        self._run([self._compiler, *FLAGS, *mode, *own, "-c", str(source), "-o", str(compiled)])
        return compiled

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(done.stderr)


def command(program: Path, target: str, runs: int, *, corpus: Path, artifacts: Path, seed: int = 0) -> list[str]:
    """What runs a target: new inputs go to `corpus`, one that fails to `artifacts`. seed 0: another one each time."""
    return [
        str(program), f"-runs={runs}", f"-seed={seed}", f"-max_len={LENGTHS[target]}", "-len_control=0",
        f"-dict={HERE / 'words.dict'}", f"-artifact_prefix={artifacts}/{target}-", "-timeout=60", "-rss_limit_mb=2048",
        str(corpus), str(HERE / "seeds" / target),
    ]  # fmt: skip


def main() -> int:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    clang = has_clang()
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(Path(folder), clang=clang)
        for target, share in SHARES.items():
            part = runs * share // sum(SHARES.values())
            print(f"fuzz_{target}: {part} runs, {'libFuzzer' if clang else 'gcc and a driver of its own'}", flush=True)
            corpus = Path(folder) / f"corpus_{target}"
            corpus.mkdir()
            program = builder.program(target)
            status = subprocess.run(
                command(program, target, part, corpus=corpus, artifacts=ARTIFACTS), check=False
            ).returncode
            if status:
                print(f"fuzz_{target} has found something: the input is in {ARTIFACTS}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
