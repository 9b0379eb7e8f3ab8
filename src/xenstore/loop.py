# SPDX-License-Identifier: MIT
"""The daemon's loop: the engine serves its clients without the GIL, and comes back for what is Python's business."""

import contextlib
import os
import select
from collections import deque
from collections.abc import Callable
from typing import Final

from paravirt.ring._core import lib
from paravirt.xenstore.core import CoreHub, Event

READABLE: Final = select.EPOLLIN

Callback = Callable[[int], None]
"""Called with the epoll events of its descriptor."""


class Loop:
    """Runs in one thread. `call` and `stop` may be used from any thread and signal handler before `close`.

    A byte written to `wake_fd` makes the loop look at itself: for `signal.set_wakeup_fd`, as a signal that arrives just
    before the engine sleeps has a handler that waits for Python to be back.
    """

    def __init__(self, hub: CoreHub) -> None:
        self._hub = hub
        self._callbacks: dict[int, Callback] = {}
        self._handlers: dict[int, Callable[[Event], None]] = {lib.PV_XS_EVENT_FD: self._on_descriptor}
        self._calls: deque[Callable[[], None]] = deque()
        self._heard_fd, self.wake_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._stopping = False
        hub.open_loop()
        self.add(self._heard_fd, self._on_wake)

    def add(self, fd: int, callback: Callback) -> None:
        """Call back while a descriptor is readable."""
        self._callbacks[fd] = callback
        self._hub.add_descriptor(fd, READABLE)

    def remove(self, fd: int) -> None:
        """Forget a descriptor that is still open."""
        del self._callbacks[fd]
        self._hub.remove_descriptor(fd)

    def listen(self, fd: int, callback: Callback) -> None:
        """Call back for a descriptor that the engine itself watches."""
        self._callbacks[fd] = callback

    def on(self, kind: int, handler: Callable[[Event], None]) -> None:
        """Have another kind of event (lib.PV_XS_EVENT_*) handled."""
        self._handlers[kind] = handler

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` in the loop's thread soon."""
        self._calls.append(function)
        self._wake()

    def stop(self) -> None:
        """Make `run` return after what it is at."""
        self._stopping = True
        self._wake()

    def run(self, after_wake_up: Callable[[], None]) -> None:
        """Serve until `stop`; `after_wake_up` runs each time the engine has come back and its events are handled."""
        handlers = self._handlers
        while not self._stopping:
            for event in self._hub.poll():
                handler = handlers.get(event.kind)
                if handler is not None:
                    handler(event)
            after_wake_up()

    def close(self) -> None:
        """After `run` has returned. Calls that came too late are run, so that what they carry can be closed."""
        while self._calls:
            self._calls.popleft()()
        self._callbacks.clear()
        os.close(self._heard_fd)
        os.close(self.wake_fd)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full: the loop will wake
            os.write(self.wake_fd, b"w")

    def _on_descriptor(self, event: Event) -> None:
        callback = self._callbacks.get(event.fd)
        if callback is not None:
            callback(event.mask)

    def _on_wake(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._heard_fd, 4096)
        while self._calls:
            self._calls.popleft()()
