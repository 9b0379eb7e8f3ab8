# SPDX-License-Identifier: MIT
"""What all tests need."""

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Ctrl-C works in the processes that tests start, also where the tests were started with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An own directory for run directories, whose sockets need short paths: those of `tmp_path` name user and test."""
    with tempfile.TemporaryDirectory(prefix="pv") as path:
        yield Path(path)
