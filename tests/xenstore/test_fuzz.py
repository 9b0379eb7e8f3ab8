# SPDX-License-Identifier: MIT
"""The C engine under coverage-guided fuzzing, for a little while; for long: `make fuzz-xenstore`.

Where clang is missing the same targets are built with gcc, and a driver of their own mutates the seeds.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs import missing
from tests.xenstore.fuzz import make_seeds
from tests.xenstore.fuzz.build import Builder, Change, command, has_clang

CI = os.environ.get("CI") == "true"
RUNS = {"engine": 8000, "journal": 10000, "ring": 8000} if CI else {"engine": 1000, "journal": 2000, "ring": 1500}
DEADLINE_S = 600
BUILT_IN_S = 900

MISTAKES: dict[str, tuple[str, str, Change]] = {
    "a length that is not checked": (
        "engine",
        "pv_xs_conn.c",
        (
            'if (header.n > PV_XS_PAYLOAD_MAX) {\n\t\t\tpv_xs_give_up(connection, "a payload',
            'if (header.n > 2 * PV_XS_PAYLOAD_MAX) {\n\t\t\tpv_xs_give_up(connection, "a payload',
        ),
    ),
    "a reference that is not counted": (
        "engine",
        "pv_xs_transaction.c",
        ("access->content = xs_content_keep(node->content);", "access->content = node->content;"),
    ),
    "a removal that the journal does not have": (
        "engine",
        "pv_xs_operations.c",
        ("xs_log_removed(hub, walk->path, walk->end[walk->n_levels], nodes[n - 1]);", ""),
    ),
    "a record longer than its frame": (
        "journal",
        "pv_xs_journal_read.c",
        ("if (n > reader->left) {", "if (n > reader->left + 4096) {"),
    ),
    "an index that is fetched twice": (
        "ring",
        "pv_stream.c",
        (
            "if (n > available)\n\t\tn = (uint32_t)available;\n\tfrom = stream->read",
            "if (n > available)\n\t\tn = pv_load_acquire(stream->in_prod) - stream->read;\n\tfrom = stream->read",
        ),
    ),
}
MISTAKE_RUNS = 20_000
"""Each is found within so many runs, by far fewer as a rule."""


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    clang = has_clang()
    if not clang and CI:
        missing("clang with libFuzzer is missing: install clang and libclang-rt-dev")
    folder = tmp_path_factory.mktemp("fuzz")
    if (
        not clang
        and subprocess.run(
            ["gcc", "-fsanitize=address,undefined", "-xc", "-", "-o", folder / "probe"],
            input=b"int main(void) { return 0; }",
            capture_output=True,
            check=False,
        ).returncode
    ):
        missing("neither clang nor gcc has the address sanitizer here")
    yield Builder(folder, clang=clang)
    shutil.rmtree(folder)


def play(program: Path, target: str, runs: int, folder: Path) -> "subprocess.CompletedProcess[str]":
    corpus = folder / f"corpus_{program.name}"
    corpus.mkdir()
    words = command(program, target, runs, corpus=corpus, artifacts=folder, seed=1)
    return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=DEADLINE_S, check=False)


@pytest.mark.timeout(BUILT_IN_S)
@pytest.mark.parametrize("target", RUNS)
def test_nothing_is_found(builder: Builder, target: str, tmp_path: Path) -> None:
    done = play(builder.program(target), target, RUNS[target], tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "Done " in done.stderr


@pytest.mark.timeout(BUILT_IN_S)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(builder: Builder, mistake: str, tmp_path: Path) -> None:
    target, source, change = MISTAKES[mistake]
    program = builder.program(target, {source: change})
    done = play(program, target, MISTAKE_RUNS, tmp_path)
    assert done.returncode != 0, f"{mistake}: not found in {MISTAKE_RUNS} runs"
    assert "ERROR" in done.stderr or "does not hold" in done.stderr or "runtime error" in done.stderr, done.stderr[
        -3000:
    ]


def test_the_seeds_are_those_of_the_stories() -> None:
    """A step that was added to a target renumbers those after it: the seeds have to be made anew."""
    for target, seeds in (("ring", make_seeds.ring_seeds()), ("journal", make_seeds.journal_seeds())):
        stored = [path.read_bytes() for path in sorted((make_seeds.HERE / "seeds" / target).iterdir())]
        assert stored == seeds, f"run {sys.executable} -m tests.xenstore.fuzz.make_seeds"
