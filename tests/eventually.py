# SPDX-License-Identifier: MIT
"""Waiting for what nobody announces."""

import time
from collections.abc import Callable
from typing import TypeVar

_DEADLINE_S = 30.0
T = TypeVar("T")


def eventually(condition: Callable[[], object], what: str = "what was waited for") -> None:
    """Wait until something holds; fails with `what` if it does not."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.003)


def steady(reading: Callable[[], T], for_s: float = 0.1) -> T:
    """What is read when it has not changed for so long: what was before may still have been ending."""
    deadline, since, last = time.monotonic() + _DEADLINE_S, time.monotonic(), reading()
    while time.monotonic() < since + for_s:
        assert time.monotonic() < deadline, f"never at rest: {last}"
        time.sleep(0.01)
        if (now := reading()) != last:
            since, last = time.monotonic(), now
    return last
