# SPDX-License-Identifier: MIT
"""What all tests need."""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from paravirt.backend.c_engine import EngineName


def pytest_configure() -> None:
    """What the processes that tests start inherit.

    Ctrl-C works in them, also where the tests were started with SIGINT ignored; and numpy's threads for matrices, which
    nothing here has, are not started in each.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Thousands of tests are a large heap, which the garbage collector need not walk through again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", params=["auto", "python"])
def vbd_engine(request: pytest.FixtureRequest) -> EngineName:
    """What serves disks: tests of block devices are run with each."""
    name: EngineName = request.param
    return name


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An own directory for run directories, whose sockets need short paths: those of `tmp_path` name user and test."""
    with tempfile.TemporaryDirectory(prefix="pv") as path:
        yield Path(path)
