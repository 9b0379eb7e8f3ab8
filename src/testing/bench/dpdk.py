# SPDX-License-Identifier: MIT
"""DPDK's headers, whose rings are all inline: unpacked, not installed, because the package wants sixty others.

`python -m paravirt.testing.bench.dpdk` gets them from Debian.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Final

from paravirt.errors import NotFound
from paravirt.testing.debian import unpack

PACKAGE: Final = "libdpdk-dev"
VARIABLE: Final = "PARAVIRT_DPDK"
_INCLUDE: Final = "usr/include"


def folder() -> Path:
    """Where they are unpacked: named by PARAVIRT_DPDK, or in this Python's environment."""
    return Path(os.environ.get(VARIABLE) or Path(sys.prefix) / "dpdk")


def flags() -> tuple[str, ...]:
    """What a compiler is told, as pkg-config says for libdpdk: for the headers installed or unpacked."""
    roots = [folder() / _INCLUDE, Path("/") / _INCLUDE]
    places = [place for root in roots for place in [*sorted(root.glob("*/dpdk")), root / "dpdk"] if place.is_dir()]
    march = ("-march=corei7",) if os.uname().machine == "x86_64" else ()
    return (*(f"-I{place}" for place in places), "-include", "rte_config.h", *march)


def fetch(to: Path) -> None:
    """Unpack the headers into a folder, if none are there. Raises `NotFound` if this machine has no such package."""
    if (to / _INCLUDE / "dpdk").is_dir():
        return
    to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to) as scratch:
        unpack(PACKAGE, Path(scratch))
        (to / _INCLUDE).parent.mkdir(exist_ok=True)
        (Path(scratch) / _INCLUDE).rename(to / _INCLUDE)


def main() -> None:
    try:
        fetch(folder())
    except NotFound as reason:
        sys.exit(str(reason))


if __name__ == "__main__":
    main()
