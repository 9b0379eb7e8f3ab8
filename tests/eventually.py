# SPDX-License-Identifier: MIT
"""Waiting for what nobody announces."""

import time
from collections.abc import Callable

_DEADLINE_S = 30.0


def eventually(condition: Callable[[], object], what: str = "what was waited for") -> None:
    """Wait until something holds; fails with `what` if it does not."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.003)
