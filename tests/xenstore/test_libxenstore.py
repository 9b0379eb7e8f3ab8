# SPDX-License-Identifier: MIT
"""Xen's own C client library against this daemon: every call of xenstore.h, and threads that share a handle."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.xenstore.server import XenstoreServer
from tests.needs import missing

from .reference import start_reference

SOURCE = Path(__file__).with_name("libxenstore_client.c")
HEADER = Path("/usr/include/xenstore.h")
DEADLINE_S = 55.0

if not HEADER.exists():
    missing(f"{HEADER} is missing; install libxen-dev", module=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("libxenstore") / "client"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *flags, str(SOURCE), "-lxenstore", "-o", str(program)], check=True)
    return program


@pytest.fixture(params=["ours", "theirs"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A daemon's socket; Debian's C daemon shows that what is tried is what must be."""
    if request.param == "ours":
        with XenstoreServer(tmp_path / "s").start():
            yield tmp_path / "s"
    else:
        with start_reference("c", tmp_path) as daemon:
            yield daemon.socket_path


@pytest.mark.parametrize(
    "trial",
    [
        *("nodes", "large_directory", "permissions", "watches", "transactions"),
        *("domains", "control", "threads", "handles"),
    ],
)
def test_calls(program: Path, path: Path, trial: str) -> None:
    environment = {**os.environ, "XENSTORED_PATH": str(path)}
    done = subprocess.run(
        [str(program), trial], env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert not done.returncode, done.stderr
