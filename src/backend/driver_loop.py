# SPDX-License-Identifier: MIT
"""The event loop in which a driver's `async def answer` runs: a thread of its own for each connection."""

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any


class LoopThread:
    """Starts with the first coroutine. `run` and `close` are called by one thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Have it done in the loop, beside all others."""
        if self._thread is None:
            self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name=self._name, daemon=True)
            self._thread.start()
            self._started.wait()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin, work)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await self._stop.wait()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """Cancel what is under way. Harmless when repeated."""
        if self._thread is None or self._loop is None or self._stop is None:
            return
        with suppress(RuntimeError):  # it is closed
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
