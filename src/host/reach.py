# SPDX-License-Identifier: MIT
"""Which paths a domain's command needs, and which of them must be brought into the domain's own view of the files.

An isolated domain gets empty directories of its own where a living host keeps its sockets and scratch files. As root
the command also runs with a uid that may not enter, say, /root, where its interpreter may stand. Both times what the
command needs below such a directory is bound in at the same path.
"""

import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import paravirt

LIVE_DIRECTORIES = ("/run", "/tmp", "/var/tmp", "/dev/shm")
"""Sockets and shared files of the host's other processes: always replaced by empty directories of the domain's own."""


@dataclass(frozen=True, slots=True)
class View:
    """How the file tree of a domain differs from the host's."""

    cover: list[str]
    """Directories that become empty."""
    expose: list[str]
    """Paths below those that are there nevertheless, read-only."""


def view_for(needed: Iterable[Path], *, uid: int | None) -> View:
    """The view in which `uid` (None: the caller's own) reaches all of `needed` that it may read at all."""
    cover = sorted({os.path.realpath(path) for path in LIVE_DIRECTORIES if os.path.isdir(path)})
    expose: set[str] = set()
    for path in needed:
        text = os.path.abspath(path)
        if text in cover or not os.path.exists(text):
            continue
        blocked = _first_closed(text) if uid is not None and not _below(text, cover) else None
        if blocked is not None and blocked != text:
            cover.append(blocked)
        if _below(text, cover):
            expose.add(text)
    return View(cover, sorted(path for path in expose if not _below(path, expose)))


def everywhere(path: Path) -> list[str]:
    """All places where the directory `path` can be seen: the same file system may be mounted more than once.

    Source: proc_pid_mountinfo(5).
    """
    real = os.path.realpath(path)
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    tree = [(device, _plain(root), _plain(point)) for _, _, device, root, point, *_ in mounts]
    around = [mount for mount in tree if _at_or_below(real, mount[2])]
    if not around:
        return [real]
    device, root, point = max(reversed(around), key=lambda mount: len(mount[2]))
    inside = os.path.normpath(os.path.join(root, os.path.relpath(real, point)))
    found = {real}
    for other, root, point in tree:
        if other == device and _at_or_below(inside, root):
            found.add(os.path.normpath(os.path.join(point, os.path.relpath(inside, root))))
    return sorted(found)


def _plain(field: str) -> str:
    """A field of mountinfo without its octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _at_or_below(path: str, directory: str) -> bool:
    return path == directory or _below(path, [directory])


def needs_of(command: Sequence[str], directory: Path, environment: Mapping[str, str]) -> list[Path]:
    """What `command`, started in `directory`, is made of: its program, this Python, this package, the directory."""
    needed = [directory, Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix), Path(paravirt.__file__).parent]
    needed += [Path(entry) for entry in sys.path if os.path.isdir(entry)]
    program = shutil.which(command[0], path=environment.get("PATH"))
    for start in filter(None, (program, sys.executable)):
        needed += _chain(Path(start))
    return [*needed, *(path.resolve() for path in needed)]


def _chain(program: Path) -> list[Path]:
    """The directories of a program and of every symbolic link on the way to it."""
    found = []
    for _ in range(40):
        found.append(program.parent)
        if not program.is_symlink():
            break
        program = program.parent / program.readlink()
    return found


def _first_closed(path: str) -> str | None:
    """The first directory on the way that others may not enter (access lists are not looked at)."""
    for parent in [*reversed(Path(path).parents), Path(path)]:
        status = parent.stat()
        if stat.S_ISDIR(status.st_mode) and not status.st_mode & stat.S_IXOTH:
            return str(parent)
    return None


def _below(path: str, directories: Iterable[str]) -> bool:
    return any(path.startswith(directory.rstrip("/") + "/") for directory in directories)
