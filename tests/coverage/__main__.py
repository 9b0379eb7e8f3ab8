# SPDX-License-Identifier: MIT
"""How much of the C core the tests run: `python -m tests.coverage [TESTS]`, as `make coverage` does.

The core is built again, with gcc's counters and without optimization, into `build/coverage`; pytest runs with that
one, and gcovr reads what was counted. Ends with 1 when a test fails or the total is below the marks.

A branch counts as taken when its jump was; both sides of each condition of an `&&` are branches of their own. Left out
are lines without code (braces, declarations) and nothing else: no function, no error path, no failed allocation is
excluded, see `tests/faults.py`. A process that is ended by kill -9 leaves no counters; that makes the result smaller.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BASE = ROOT / "build" / "coverage"
CORE = ROOT / "c_ext"
LINES, BRANCHES = 98.0, 92.0
"""The marks, in percent."""
TESTS = [
    *(f"tests/{folder}" for folder in ("ring", "hypervisor", "backend", "frontend", "net", "xenstore")),
    "tests/host/test_process_rights.py",
    "tests/cli/test_xenstore_trace.py",
    "tests/integration/test_nbd_export.py",
]
OTHER_USERS = [
    "--deselect",
    "tests/host/test_as_user.py",
    "--deselect",
    "tests/integration/test_nbd_export.py::test_mistakes",
]
"""Tests with processes that may not write the counters, and say so."""
COUNTERS = ["--coverage", "-fprofile-update=atomic"]
"""Threads count too; an addition that is not atomic would lose some."""


def build() -> None:
    """The package with a counting core, in BASE/lib."""
    BASE.mkdir(parents=True, exist_ok=True)
    config = BASE / "build.cfg"
    config.write_text(f"[build]\nbuild_base={BASE}/build\n")
    environment = {
        **os.environ,
        "DIST_EXTRA_CONFIG": str(config),
        "CFLAGS": " ".join(COUNTERS),
        "LDFLAGS": "--coverage -Wl,-u,__gcov_dump",
        "PARAVIRT_OPTIMIZE": "-O0",
    }
    install = ["install", "--disable-pip-version-check", "-q", "--no-deps", "--upgrade", "--target", str(BASE / "lib")]
    subprocess.run([sys.executable, "-m", "pip", *install, "."], cwd=ROOT, env=environment, check=True)


def run_tests(arguments: list[str], programs: str) -> int:
    """pytest's exit code. `programs`: where the tests' files go; a short path, for sockets are made there."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{BASE}/lib:{HERE}/site",
        # A process that may not write its counters says so there, not on a stream that a test looks at.
        "GCOV_ERROR_FILE": str(BASE / "errors"),
        "PARAVIRT_TEST_CFLAGS": " ".join(["-O0", *COUNTERS]),
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "300", *OTHER_USERS]
    command = [*pytest, f"--basetemp={programs}/t", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def measure(files: tuple[str, ...], programs: str) -> Any:
    """gcovr's summary of what was counted since the counters were last removed; its pages of each line, too."""
    pages = BASE / "html"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    command = [str(Path(sys.executable).parent / "gcovr"), "--root", str(ROOT), str(BASE / "build"), programs]
    for name in files:
        command += ["--filter", f"{CORE}/{name}"]
    # gcov takes counters for consistent that were written while a thread went on, and finds less than nothing there: 0.
    command += ["--gcov-ignore-parse-errors", "negative_hits.warn_once_per_file"]
    command += ["--exclude-noncode-lines", "--json-summary", str(BASE / "summary.json")]
    command += ["--html-details", str(pages / "index.html"), "--json", str(BASE / "lines.json")]
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((BASE / "summary.json").read_text())


def percent(covered: int, total: int) -> float:
    return 100.0 * covered / total if total else 100.0


def table(summary: Any) -> str:
    """A row for each file and one for all."""
    rows = [f"{'file':24}{'lines':>7}{'missed':>8}{'%':>8}{'branches':>10}{'missed':>8}{'%':>8}"]
    for part in [*summary["files"], {**summary, "filename": "all"}]:
        cells = []
        for kind, width in (("line", 7), ("branch", 10)):
            total, covered = part[f"{kind}_total"], part[f"{kind}_covered"]
            cells.append(f"{total:{width}}{total - covered:8}{percent(covered, total):8.1f}")
        rows.append(f"{Path(part['filename']).name:24}{''.join(cells)}")
    return "\n".join(rows)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--keep", is_flag=True, help="Add to what was counted before instead of starting anew.")
@click.option("--files", metavar="REGEX", multiple=True, default=[".*"], help="Report only these files: 'pv_xs.*'.")
@click.option("--no-marks", is_flag=True, help="Do not fail for a low total: for a part of the tests or of the files.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(keep: bool, files: tuple[str, ...], no_marks: bool, arguments: tuple[str, ...]) -> None:
    """Run pytest with ARGUMENTS (those that exercise the C core when there are none) and report by file.

    The lines and branches that were missed stand in build/coverage/html/index.html.
    """
    build()
    if not keep:
        for counters in BASE.rglob("*.gcda"):
            counters.unlink()
    with tempfile.TemporaryDirectory(prefix="pvc") as programs:
        status = run_tests(list(arguments) or TESTS, programs)
        summary = measure(files, programs)
    print(table(summary))
    lines, branches = summary["line_percent"], summary["branch_percent"]
    if not no_marks and (lines < LINES or branches < BRANCHES):
        print(f"below the marks: {LINES} % of lines, {BRANCHES} % of branches")
        status = status or 1
    sys.exit(status)


if __name__ == "__main__":
    main()
