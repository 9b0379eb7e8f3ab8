# SPDX-License-Identifier: MIT
"""Programs in C and C++ that are compiled when they are needed, and gone afterwards."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

HERE: Final = Path(__file__).parent
PEERS: Final = HERE / "peers"
C_CORE: Final = HERE / "c_core"
"""The sources of this project's C core."""
RING_PARTS: Final = ("ring", "ring_wait", "spin", "event", "home", "wait", "wait_late")
"""Of these, what a ring needs."""

_COMPILERS: Final = {".c": ("gcc", "-std=gnu11"), ".cc": ("g++", "-std=gnu++17")}


class NotHere(Exception):
    """Something that a measurement needs is not on this machine; the text says what."""


class Programs:
    """A folder of compiled programs, each made once."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paravirt-bench-")
        self._made: dict[tuple[str, ...], Path | NotHere] = {}

    def compile(self, name: str, sources: Sequence[Path], *flags: str, core: Sequence[str] = ()) -> Path:
        """The program of some sources and of parts of the C core ("ring" is pv_ring.c).

        Raises `NotHere` where it does not compile.
        """
        return self._make(name, [*sources, *(self._object(part) for part in core)], *flags)

    def _object(self, part: str) -> Path:
        """One part of the C core, compiled as in the package."""
        return self._make(f"{part}.o", [C_CORE / f"pv_{part}.c"], "-c", "-fPIC")

    def _make(self, name: str, files: Sequence[Path], *flags: str) -> Path:
        compiler = _COMPILERS[files[0].suffix]
        libraries = [flag for flag in flags if flag.startswith("-l")]  # behind what needs them
        flags = tuple(flag for flag in flags if not flag.startswith("-l"))
        command = (*compiler, "-O2", f"-I{C_CORE}", f"-I{PEERS}", *flags, *map(str, files), *libraries, "-pthread")
        if command not in self._made:
            target = Path(self._folder.name) / f"{len(self._made)}-{name}"
            self._made[command] = _compile([*command, "-o", str(target)], name) or target
        made = self._made[command]
        if isinstance(made, NotHere):
            raise made
        return made

    def close(self) -> None:
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _compile(command: list[str], name: str) -> NotHere | None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError:
        return NotHere(f"there is no compiler here ({command[0]})")
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if "error" in line] or ["for no reason given"]
        return NotHere(f"{name} does not compile: {said[0]}")
    return None
