# SPDX-License-Identifier: MIT
"""The tool that makes the core's calls into libc fail fails those it is told to, and no others."""

import errno

import pytest

from paravirt.errors import ParavirtError
from paravirt.ring.event import EventWaiter

from .faults import each_call_fails, failing


def test_the_calls_it_is_told_to_fail() -> None:
    with failing("eventfd", errno.EMFILE, at=2, times=1) as fault:
        EventWaiter().close()
        with pytest.raises((OSError, ParavirtError)):
            EventWaiter()
        EventWaiter().close()
    assert fault.calls == 3
    EventWaiter().close()
    assert fault.calls == 3


def test_each_call_in_turn() -> None:
    outcomes: list[bool] = []

    def scenario() -> None:
        try:
            EventWaiter().close()
        except (OSError, ParavirtError):
            outcomes.append(False)
        else:
            outcomes.append(True)

    assert each_call_fails("fcntl", scenario) == 2
    assert outcomes == [False, False, True]


def test_a_function_that_the_core_does_not_call() -> None:
    with pytest.raises(OSError, match="qsort_r"):
        with failing("qsort_r"):
            pass
