# SPDX-License-Identifier: MIT
"""What stands behind a disk that is measured, as far as others can be given the same."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from paravirt.backend.disks.base import parse_size
from paravirt.backend.disks.spec import parse
from paravirt.errors import InvalidRequest
from paravirt.hypervisor.resources import available_bytes
from paravirt.testing.bench.programs import NotHere

Kind = Literal["null", "memory", "file", "other"]

_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """A disk, as a backend is told of it."""

    spec: str
    kind: Kind
    n_bytes: int | None
    """None: only the backend knows."""
    path: Path | None = None
    """Of a file."""


def target_of(spec: str) -> Target:
    """Raises `InvalidRequest` for what is no disk."""
    layer = parse(spec)
    if layer.name in ("null", "memory"):
        kind: Kind = "null" if layer.name == "null" else "memory"
        return Target(spec, kind, parse_size(layer.argument, f"size of a {layer.name} disk", 512))
    if layer.name != "file":
        return Target(spec, "other", None)
    path = Path(layer.argument).absolute()
    try:
        with path.open("rb") as file:
            n_bytes = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None
    return Target(spec, "file", n_bytes, path)


def shared_memory() -> Path:
    """A directory whose files are memory. Raises `NotHere`."""
    for place in ("/dev/shm", "/run/shm"):
        if os.path.isdir(place) and os.access(place, os.W_OK):
            return Path(place)
    raise NotHere("there is no /dev/shm to write files in memory to")


@contextmanager
def file_in_memory(n_bytes: int) -> Iterator[Path]:
    """A file of random bytes, in memory. Raises `NotHere` where there is no room."""
    where = shared_memory()
    room = os.statvfs(where)
    if n_bytes > min(room.f_bavail * room.f_frsize, available_bytes() // 2):
        raise NotHere(f"no room for a file of {n_bytes} bytes in {where}")
    with tempfile.TemporaryDirectory(prefix="paravirt-bench-", dir=where) as folder:
        path = Path(folder) / "disk.img"
        chunk = os.urandom(_CHUNK)
        try:
            with path.open("wb") as file:
                for start in range(0, n_bytes, _CHUNK):
                    file.write(chunk[: n_bytes - start])
        except OSError as error:
            raise NotHere(f"no room for a file of {n_bytes} bytes in {where}: {error.strerror}") from None
        yield path
