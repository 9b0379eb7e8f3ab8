# SPDX-License-Identifier: MIT
"""A thread's event loop over epoll: callbacks by descriptor, calls from other threads, a clean stop."""

import contextlib
import os
import select
from collections import deque
from collections.abc import Callable
from typing import Final

READABLE: Final = select.EPOLLIN
WRITABLE: Final = select.EPOLLOUT
EVENTS_PER_WAKE_UP: Final = 256

Callback = Callable[[int], None]
"""Called with the epoll events of its descriptor."""


class Loop:
    """Runs callbacks in one thread. `call` and `stop` may be used from any thread and signal handler before `close`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callback] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping = False
        self.n_wake_ups = 0
        self.add(self._wake_fd, self._on_wake)

    def add(self, fd: int, callback: Callback, events: int = READABLE) -> None:
        self._callbacks[fd] = callback
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget a descriptor that is still open."""
        del self._callbacks[fd]
        self._epoll.unregister(fd)

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` in the loop's thread soon."""
        self._calls.append(function)
        self._wake()

    def stop(self) -> None:
        """Make `run` return after the wake-up it is in."""
        self._stopping = True
        self._wake()

    def run(self, after_wake_up: Callable[[], int | None], before_wake_up: Callable[[], None] | None = None) -> None:
        """Serve until `stop`; the two functions run once before and after the callbacks of each wake-up.

        What `after_wake_up` returns is in how many milliseconds to wake up next, whatever happens; None: not for that.
        """
        poll, callbacks = self._epoll.poll, self._callbacks
        timeout_ms: int | None = None
        while not self._stopping:
            events = poll(-1 if timeout_ms is None else timeout_ms / 1000, EVENTS_PER_WAKE_UP)
            self.n_wake_ups += 1
            if before_wake_up is not None:
                before_wake_up()
            for fd, mask in events:
                callback = callbacks.get(fd)
                if callback is not None:
                    callback(mask)
            timeout_ms = after_wake_up()

    def close(self) -> None:
        """After `run` has returned. Calls that came too late are run, so that what they carry can be closed."""
        while self._calls:
            self._calls.popleft()()
        self._callbacks.clear()
        self._epoll.close()
        os.close(self._wake_fd)

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def _on_wake(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while self._calls:
            self._calls.popleft()()
