# SPDX-License-Identifier: MIT
"""Disk images with real content, for demonstrations and tests."""

import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

VOLUME_NAME = "first-light"
EXTRA_PATH = os.pathsep.join(("/usr/sbin", "/sbin"))  # where mkfs may stand for a user


@dataclass(frozen=True, slots=True)
class Image:
    """An image file: an ext4 of `fs_bytes` at its start, if this machine has mkfs.ext4; else raw data (0)."""

    path: Path
    size_bytes: int
    fs_bytes: int
    files: int

    def check(self) -> str | None:
        """What e2fsck says is wrong with the file system; None when it is clean or there is no e2fsck to ask."""
        tool = find_tool("e2fsck")
        if not self.fs_bytes or tool is None:
            return None
        done = subprocess.run([tool, "-fn", str(self.path)], capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else done.stdout.strip().splitlines()[-1]


def find_tool(name: str) -> str | None:
    """A system tool, also where only root's PATH looks."""
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), EXTRA_PATH)))


def make_image(directory: Path, *, fs_bytes: int = 48 << 20, size_bytes: int = 64 << 20) -> Image:
    """An image of `size_bytes` with an ext4 of `fs_bytes` full of real files (Python's own library) at its start.

    The rest is free for tests that write. Without mkfs.ext4 the same files stand in it one behind the other.
    """
    path = directory / "disk.img"
    library = Path(sysconfig.get_path("stdlib"))
    tree = directory / "files"
    files = _copy_some(library, tree, fs_bytes // 2)
    try:
        tool = find_tool("mkfs.ext4")
        if tool is None:
            _concatenate(tree, path, fs_bytes)
            fs_bytes = 0
        else:
            command = [
                tool,
                "-q",
                "-F",
                "-d",
                str(tree),
                "-L",
                VOLUME_NAME,
                "-b",
                "4096",
                str(path),
                f"{fs_bytes >> 10}k",
            ]
            subprocess.run(command, check=True, capture_output=True)
        os.truncate(path, size_bytes)
    finally:
        shutil.rmtree(tree)
    return Image(path, size_bytes, fs_bytes, files)


def _copy_some(source: Path, target: Path, limit_bytes: int) -> int:
    """Copy Python sources until `limit_bytes` are there; how many files."""
    total = count = 0
    for file in sorted(source.rglob("*.py")):
        if "site-packages" in file.parts or "test" in file.parts or not file.is_file():
            continue
        total += file.stat().st_size
        if total > limit_bytes:
            break
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        count += 1
    return count


def _concatenate(tree: Path, path: Path, limit_bytes: int) -> None:
    with open(path, "wb") as image:
        while image.tell() < limit_bytes // 2:
            for file in sorted(tree.rglob("*.py")):
                image.write(file.read_bytes())
        image.truncate(limit_bytes)
