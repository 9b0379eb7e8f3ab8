# SPDX-License-Identifier: MIT
"""The benchmarks' judgement, and that they run; never how fast anything is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Bench, Mark, OutsideLoad, Pair, Spread

ROOT = Path(__file__).parent.parent


def pairs(count: int, ours: float = 30e6, theirs: float = 3e6, cache_line_ns: float = 100) -> list[Pair]:
    return [Pair(ours, theirs, cache_line_ns)] * count


@pytest.mark.parametrize(
    ("samples", "load", "mark", "verdict"),
    [
        (pairs(15), 0.0, Mark(ratio=4), "met"),
        (pairs(15), 0.0, Mark(ratio=4, value=10e6), "met"),
        (pairs(15), 0.0, Mark(ratio=11), "missed"),
        (pairs(15), 0.0, Mark(value=31e6), "missed"),
        (pairs(15), 0.0, Mark(), "-"),
        (pairs(15), 0.2, Mark(ratio=4), "inconclusive"),
        (pairs(9), 0.0, Mark(ratio=4), "inconclusive"),
        (pairs(15, theirs=0), 0.0, Mark(ratio=4), "inconclusive"),
        (pairs(15, cache_line_ns=5000), 0.0, Mark(ratio=4), "inconclusive"),
        (pairs(8, cache_line_ns=50) + pairs(7, cache_line_ns=200), 0.0, Mark(ratio=4), "inconclusive"),
        (pairs(12, ours=10e6) + pairs(5, ours=90e6, cache_line_ns=200), 0.0, Mark(ratio=4), "missed"),
    ],
)
def test_verdicts(samples: list[Pair], load: float, mark: Mark, verdict: str) -> None:
    assert Bench.compare("x", "y", samples, load, mark).verdict == verdict


@pytest.mark.parametrize(("ns", "name"), [(60, "same core"), (65, "near"), (135, "far"), (340, "disturbed")])
def test_distances(ns: float, name: str) -> None:
    assert Pair(1, 1, ns).distance == name


def test_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)


def test_own_time_is_no_outside_load() -> None:
    load = OutsideLoad()
    sum(range(1_000_000))
    assert load.share(running_cpu_s=1e9) == 0.0


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_question_is_asked(tmp_path: Path) -> None:
    target = tmp_path / "answers.json"
    command = [sys.executable, "-m", "benchmarks", "ring_c_core", "--pairs", "2", "--seconds", "0.01"]
    done = subprocess.run(
        [*command, "--json", target], cwd=ROOT, capture_output=True, text=True, check=True, timeout=50
    )
    assert "Is the C core as fast" in done.stdout
    told = json.loads(target.read_text())
    assert told["machine"]["cpu"]
    assert set(told["questions"]) == {"ring_c_core"}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
@pytest.mark.parametrize(
    ("question", "answers"),
    [
        ("sleeping", 5),
        ("grants", 16),
        ("ring_python", 4),
        ("ring_python_peers", 2),
        ("ring_single", 2),
        ("vbd_memory", 3),
        ("vbd_blocking", 1),
    ],
)
def test_what_questions_answer(tmp_path: Path, question: str, answers: int) -> None:
    target = tmp_path / "answers.json"
    # Python's peers need longer than a busy machine may keep one of their two processes waiting.
    seconds = "0.1" if question == "ring_python_peers" else "0.01"
    command = [sys.executable, "-m", "benchmarks", question, "--pairs", "2", "--seconds", seconds, "--json", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=50)
    told = json.loads(target.read_text())["questions"][question]
    if not told:
        pytest.skip(done.stdout.rpartition("skipped:")[2].strip())
    assert len(told) == answers
    for answer in told:
        idle = "idle" in answer["what"]
        assert answer["ours"]["median"] > 0 or idle
        assert answer["theirs"] is None or answer["theirs"]["median"] > 0


def test_an_unknown_question() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "what"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=50
    )
    assert done.returncode == 2
    assert "no question what" in done.stderr
