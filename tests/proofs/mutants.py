# SPDX-License-Identifier: MIT
"""Weakens every atomic access of the C core, one at a time, and lets the explorer look for what goes wrong then."""

import re
import sys
import tempfile
from pathlib import Path

from .sites import CORE, WEAKER, all_sites, build, explore

HEADING = "## Orders that no test needs"


def survivors(program: Path, bound: int) -> dict[str, str]:
    """By access: the weaker orders with which no scenario fails, "not reached" where none uses it."""
    _, said = explore(program, bound)
    reached = {int(number) for number in re.findall(r"^reached (\d+)$", said, re.MULTILINE)}
    found = {}
    for site in all_sites():
        if site.macro not in WEAKER:
            continue
        if site.number not in reached:
            found[str(site)] = "not reached"
            continue
        alive = []
        for level, name in enumerate(WEAKER[site.macro], 1):
            if not explore(program, bound, site.number, level)[0]:
                break
            alive.append(name)
        if alive:
            found[str(site)] = ", ".join(alive)
    return found


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
    """Four messages with three preemptions, all of them right; then the mutants, with two."""
    with tempfile.TemporaryDirectory() as folder:
        right, said = explore(build(Path(folder)), 3)
        print(re.sub(r"^reached.*\n", "", said, flags=re.MULTILINE), end="", flush=True)
        found = survivors(build(Path(folder), "-DMESSAGES=3u"), 1)
    known = argued()
    for access in sorted(found.keys() | known.keys()):
        if found.get(access) != known.get(access):
            print(f"{access}: not caught {found.get(access)}, the table has {known.get(access)}")
    print(f"{len(found)} accesses have a weaker order that is not caught; all argued: {found == known}")
    return not right or found != known


if __name__ == "__main__":
    sys.exit(main())
