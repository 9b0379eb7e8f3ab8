# SPDX-License-Identifier: MIT
"""What all tests need."""

import signal


def pytest_configure() -> None:
    """Ctrl-C works in the processes that tests start, also where the tests were started with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
