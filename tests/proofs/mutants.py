# SPDX-License-Identifier: MIT
"""Weakens every atomic access of the C core, one at a time, and lets the explorer look for what goes wrong then."""

import re
import sys
import tempfile
import time
from pathlib import Path

from .jobs import each, progress
from .sites import CORE, WEAKER, Site, all_sites, build, explore, scenarios

BOUND = 3
PARTS = {"ring": 4}  # of what takes long
HEADING = "## Orders that no test needs"


def reaching(program: Path, bound: int) -> dict[int, list[str]]:
    """By number of an access: the scenarios that use it."""
    found: dict[int, list[str]] = {}
    for name in scenarios():
        for number in re.findall(r"^reached (\d+)$", explore(program, bound, name)[1], re.MULTILINE):
            found.setdefault(int(number), []).append(name)
    return found


def survivors(program: Path, bound: int) -> dict[str, str]:
    """By access: the weaker orders with which no scenario fails, "not reached" where none uses it."""
    used = reaching(program, bound)

    def alive(site: Site) -> str:
        if site.number not in used:
            return "not reached"
        found = []
        for level, name in enumerate(WEAKER[site.macro], 1):
            if not all(explore(program, bound, it, site=site.number, level=level)[0] for it in used[site.number]):
                break
            found.append(name)
        return ", ".join(found)

    weakened = [site for site in all_sites() if site.macro in WEAKER]
    return {str(site): found for site, found in each(alive, weakened) if found}


def argued() -> dict[str, str]:
    """The same as the table in c_ext/README.md has it; ValueError for a row without a reason."""
    found = {}
    for row in (CORE / "README.md").read_text().split(HEADING)[1].splitlines():
        accesses = re.findall(r"`\w+` `\w+` `\w+\([^`]*\)`", row)
        if not accesses:
            continue
        _, _, weaker, why, _ = row.split("|")
        if not why.strip():
            raise ValueError(f"no reason: {row}")
        found.update({access: weaker.strip() for access in accesses})
    return found


def main() -> int:
    """Four messages with three preemptions, all of them right; then the mutants, with fewer of both."""
    start, right = time.monotonic(), True
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as small:
        program = build(Path(whole))

        def run(piece: tuple[str, int, int]) -> tuple[bool, str]:
            name, part, parts = piece
            return explore(program, BOUND, name, part=part, parts=parts)

        pieces = [(name, part, PARTS.get(name, 1)) for name in scenarios() for part in range(PARTS.get(name, 1))]
        for (_, part, parts), (good, said) in each(run, pieces):
            progress(said.splitlines()[0] + (f", part {part + 1} of {parts}" if parts > 1 else ""), start)
            right &= good
        found = survivors(build(Path(small), "-DMESSAGES=3u"), 1)
    known = argued()
    for access in sorted(found.keys() | known.keys()):
        if found.get(access) != known.get(access):
            print(f"{access}: not caught {found.get(access)}, the table has {known.get(access)}")
    progress(f"{len(found)} accesses have a weaker order that is not caught; all argued: {found == known}", start)
    return not right or found != known


if __name__ == "__main__":
    sys.exit(main())
