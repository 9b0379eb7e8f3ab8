# SPDX-License-Identifier: MIT
"""Calls of the C core into libc that fail: memory that is refused, descriptors that run out, a disk that is full.

Only the core's own calls fail, not those of Python or of a library beside it (see faults.c).
"""

import ctypes
import errno
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paravirt.ring import _core

SOURCE = Path(__file__).with_suffix(".c")
ALLOCATIONS = ("malloc", "calloc", "realloc")
FOR_EVER = 2**62
FAILURES = dict.fromkeys(ALLOCATIONS, 0)
"""What a function returns when it fails, if that is not -1."""


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "faults.so"
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC"]
        subprocess.run(["gcc", *flags, SOURCE, "-o", library], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.faults_calls.restype = ctypes.c_long
    return loaded


class Fault:
    """What came of the calls of one function."""

    def __init__(self, number: int, first: int) -> None:
        self._number = number
        self._first = first
        self._calls: int | None = None

    @property
    def calls(self) -> int:
        """How many there were, failed ones included."""
        return int(_library().faults_calls(self._number)) if self._calls is None else self._calls

    @property
    def happened(self) -> bool:
        """Whether there were enough calls for one to fail."""
        return self.calls >= self._first

    def end(self) -> None:
        self._calls = self.calls
        _library().faults_unhook(self._number)


@contextmanager
def failing(
    function: str, error: int = errno.ENOMEM, *, at: int = 1, times: int = FOR_EVER, result: int | None = None
) -> Iterator[Fault]:
    """The core's calls of `function` fail with `error`, from number `at` on `times` of them.

    `function`: of six arguments at most, none of them a float; preadv and pwritev are all reads and writes of a
    file at a place. `result`: what the calls return, where it is not the function's usual way to fail: a short write,
    an end of file.
    """
    answer = FAILURES.get(function, -1) if result is None else result
    number = _library().faults_hook(
        _core.__file__.encode(), function.encode(), ctypes.c_long(at), ctypes.c_long(at + times - 1),
        ctypes.c_long(answer), error,
    )  # fmt: skip
    if number < 0:
        raise OSError(-number, f"cannot make {function} of the core fail: {errno.errorcode[-number]}")
    fault = Fault(number, at)
    try:
        yield fault
    finally:
        fault.end()


def each_call_fails(function: str, scenario: Callable[[], object], error: int = errno.ENOMEM) -> int:
    """Run `scenario` with the first call of `function` failing, then the second, until it has no more; how many it has.

    `scenario` checks by itself that what it sees is right, whichever call failed.
    """
    for at in range(1, 100_000):
        with failing(function, error, at=at, times=1) as fault:
            scenario()
        if not fault.happened:
            return at - 1
    raise AssertionError(f"{function} is called without end")
