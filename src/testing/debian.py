# SPDX-License-Identifier: MIT
"""Debian packages that tests and benchmarks compare with: unpacked into a folder, not installed."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from paravirt.errors import NotFound


def unpack(package: str, to: Path) -> None:
    """Get a package from Debian's archive and unpack its files below `to`. Raises `NotFound` and says why."""
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to) as scratch:
        run(["apt-get", "download", "-qq", package], scratch)
        (file,) = Path(scratch).glob("*.deb")
        run(["dpkg", "-x", str(file), str(to)], scratch)


def run(command: Sequence[str], where: str | Path, *, hint: str = "") -> None:
    """Run a program in a folder. Raises `NotFound` with what it said last, and with `hint`."""
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotFound(f"{command[0]} is missing") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NotFound(f"{' '.join(command[:3])} failed{hint}: {said[-1]}")
