# SPDX-License-Identifier: MIT
"""Disks that are mounted as files, and file systems on these, by tools that know nothing of this project."""

import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.host.running import DEADLINE_S, RunningHost, read_line

from .exported import client


@contextmanager
def mounted(host: RunningHost, *options: str) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    file = host.directory / "mounted.img"
    with host.beside("vbd", "mount", "xvda", str(file), "--domain", "guest", *options) as process:
        assert read_line(process.stdout) == f"xvda is {file}"
        try:
            yield process, file
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
            process.wait(DEADLINE_S)
            subprocess.run(["fusermount3", "-u", "-z", str(file)], capture_output=True, check=False)


def fill(file: Path, directory: Path, names: range, seed: int = 0) -> None:
    """Put files into the file system, of other bytes with another seed."""
    script = directory / "script"
    for name in names:
        (directory / f"{name}").write_bytes(content(name, seed))
    script.write_text("".join(f"write {directory}/{name} {name}\n" for name in names))
    client("debugfs", "-w", "-f", str(script), str(file))


def content(name: int, seed: int) -> bytes:
    """No two blocks are alike, in whatever file of whatever seed."""
    return random.Random(f"{seed} {name}").randbytes(10_000 * name % 300_000 + 1)


def check(file: Path, directory: Path, names: range, seed: int = 0) -> None:
    client("e2fsck", "-f", "-n", str(file))
    out = directory / "out"
    for name in names:
        client("debugfs", "-R", f"dump {name} {out}", str(file))
        assert out.read_bytes() == content(name, seed), name
