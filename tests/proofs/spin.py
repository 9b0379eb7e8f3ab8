# SPDX-License-Identifier: MIT
"""Runs the model of ring and event channel (ring.pml) through spin. As a program: everything, at full length."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .jobs import each, progress

MODEL = Path(__file__).parent / "ring.pml"

# What must hold, with the number of messages for `make proofs` and for pytest (0: not there).
HOLDS = {
    "sequentially consistent": ((), 12, 2),
    "event after half of what is outstanding": (("HALF",), 12, 0),
    "stores buffered": (("TSO",), 6, 2),
    "stores buffered, asymmetric fence": (("TSO", "ASYMMETRIC"), 6, 2),
    "stores buffered, event after half": (("TSO", "HALF"), 6, 0),
}
# Of the seeded bugs, those that pytest looks for.
QUICK = ["EVENT_AT_CONS", "PUBLISH_FIRST", "NO_LOOK_AFTER_ARM", "NO_FENCE_IN_PUBLISH", "ARM_BY_STORE", "NO_MEMBARRIER"]
# Seeded bugs: each has to be found, with this many messages.
BUGS = {
    "NO_RECHECK": ((), 4),
    "EVENT_AT_CONS": ((), 4),
    "PUBLISH_FIRST": ((), 4),
    "NOTIFY_WHEN_EQUAL": ((), 4),
    "NO_FINAL_CHECK_AT_BACK": ((), 4),
    "PENDING_AFTER_DRAIN": ((), 4),
    "NO_LOOK_AFTER_ARM": ((), 4),
    "ASLEEP_BEFORE_PENDING": ((), 4),
    "NO_ROOM_CHECK": ((), 6),
    "NO_FENCE_IN_PUBLISH": (("TSO",), 4),
    "NO_FENCE_IN_FINAL_CHECK": (("TSO",), 4),
    "FENCE_AT_ONE_END": (("TSO",), 4),
    "ARM_BY_STORE": (("TSO",), 4),
    "NO_MEMBARRIER": (("TSO", "ASYMMETRIC"), 4),
}


@dataclass(frozen=True)
class Verdict:
    errors: int
    states: int
    what: str  # spin's words for the first error, "" for none


def check(switches: tuple[str, ...], messages: int, folder: Path, *, optimize: bool = True) -> Verdict:
    """Explore the model with these -D switches; CalledProcessError when a step fails, ValueError for a cut search."""
    defines = [f"-DMESSAGES={messages}", *(f"-D{switch}" for switch in switches)]
    subprocess.run(["spin", "-a", *defines, str(MODEL)], cwd=folder, check=True, capture_output=True)
    compile_pan = ["gcc", "-O2" if optimize else "-O0", "-DSAFETY", "-DNOFAIR", "-w", "-o", "pan", "pan.c"]
    subprocess.run(compile_pan, cwd=folder, check=True, capture_output=True)
    said = subprocess.run(["./pan", "-m1000000"], cwd=folder, check=True, capture_output=True, text=True).stdout
    errors, states = re.search(r"errors: (\d+)", said), re.search(r"(\d+) states, stored", said)
    if errors is None or states is None or "out of memory" in said or "max search depth too small" in said:
        raise ValueError(f"the search was not complete: {said}")
    what = re.search(r"^pan:1: (.*)$", said, re.MULTILINE)
    return Verdict(int(errors[1]), int(states[1]), what[1] if what else "")


def check_bug(bug: str, folder: Path) -> Verdict:
    switches, messages = BUGS[bug]
    return check((*switches, f"BUG_{bug}"), messages, folder, optimize=False)


def main() -> int:
    if shutil.which("spin") is None:
        print("spin is missing: apt-get install spin", file=sys.stderr)
        return 1
    start, bad = time.monotonic(), 0

    def run(name: str) -> Verdict:
        with tempfile.TemporaryDirectory() as folder:
            if name in BUGS:
                return check_bug(name, Path(folder))
            switches, messages, _ = HOLDS[name]
            return check(switches, messages, Path(folder))

    # The long ones, of 4 GiB each, one after the other.
    for name, verdict in chain(((name, run(name)) for name in HOLDS), each(run, BUGS)):
        if name in BUGS:
            progress(f"{name}: {'found: ' + verdict.what if verdict.errors else 'NOT FOUND'}", start)
            bad += not verdict.errors
        else:
            messages = HOLDS[name][1]
            progress(
                f"{name}: {messages} messages, {verdict.states} states, {verdict.errors} errors {verdict.what}", start
            )
            bad += verdict.errors
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
