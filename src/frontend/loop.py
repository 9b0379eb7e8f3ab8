# SPDX-License-Identifier: MIT
"""One event loop that hears a doorbell as long as somebody waits there."""

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress

from paravirt.errors import InvalidRequest


class LoopListener:
    """Guarded by its user's lock."""

    def __init__(self, fileno: Callable[[], int], on_readable: Callable[[], None], *, stays: bool = False) -> None:
        """`fileno()`: of the doorbell; `on_readable`: called in the loop. `stays`: listen on when nobody waits, until
        somebody waits in another loop: for many short waits.
        """
        self._fileno = fileno
        self._on_readable = on_readable
        self._stays = stays
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = self._fd = self._listeners = 0

    def __bool__(self) -> bool:
        """Whether somebody waits."""
        return self._listeners > 0

    def enter(self, loop: asyncio.AbstractEventLoop) -> None:
        """Somebody waits in this loop, which runs now. Raises `InvalidRequest` while others wait in another one."""
        if self._loop is not None and self._loop is not loop:
            if self._listeners and not self._loop.is_closed():
                raise InvalidRequest("another event loop waits for this device")
            self.close()
            self._listeners = 0  # those of a closed loop wait no more
        if self._loop is None:
            # A descriptor of our own: the waiter may be closed before the loop has forgotten it.
            self._fd = os.dup(self._fileno())
            loop.add_reader(self._fd, self._on_readable)
            self._loop, self._thread = loop, threading.get_ident()
        self._listeners += 1

    def leave(self) -> None:
        """He does not any more."""
        self._listeners -= 1
        if not self._listeners and not self._stays:
            self.close()

    def close(self) -> None:
        """Listen no more, from any thread. Harmless when nobody does."""
        loop, fd = self._loop, self._fd
        self._loop, self._thread = None, 0
        if loop is None:
            return

        def forget() -> None:
            loop.remove_reader(fd)
            os.close(fd)

        if loop.is_closed():
            os.close(fd)
        elif asyncio._get_running_loop() is loop:
            forget()
        else:
            try:
                loop.call_soon_threadsafe(forget)
            except RuntimeError:  # closed meanwhile
                os.close(fd)

    def wake(self, future: "asyncio.Future[None]") -> None:
        """Have a future of the loop done, from any thread."""

        def done() -> None:
            if not future.done():
                future.set_result(None)

        if threading.get_ident() == self._thread:
            done()
        else:
            with suppress(RuntimeError):  # the loop is closed
                future.get_loop().call_soon_threadsafe(done)
