# SPDX-License-Identifier: MIT
"""Event channels in an asyncio program: one reader of the loop for all ports of a waiter."""

import asyncio
from types import TracebackType
from typing import Self

from paravirt.errors import Closed, InvalidRequest
from paravirt.ring.event import EventPort, EventWaiter, WaitResult


class AsyncEvents:
    """The events of one `EventWaiter`, awaited in the running loop. A context manager; used in the loop's thread only.

    Each event goes to one task: to the one that waits for its port, else to the next `wait` for that port or `any`.
    While this is open senders always ring (a system call an event), and nobody else may wait or take on the waiter.
    """

    def __init__(self, waiter: EventWaiter) -> None:
        """In a coroutine or callback. The waiter stays the caller's. Raises `RuntimeError` outside of a loop."""
        self._waiter = waiter
        self._loop = asyncio.get_running_loop()
        self._pending: dict[EventPort, None] = {}
        self._waiting: dict[EventPort, asyncio.Future[WaitResult]] = {}
        self._for_any: asyncio.Future[WaitResult] | None = None
        self._fd = waiter.fileno()
        self._loop.add_reader(self._fd, self._ready)
        self._open = True

    async def wait(self, port: EventPort) -> WaitResult:
        """Until `port` has an event, which is taken: EVENT; KICKED or STALE when the waiter is told that, which every
        task that waits now hears. Cancel or `asyncio.timeout` it at will: no event is lost.

        Raises `InvalidRequest` when a task waits for this port already, `Closed`.
        """
        self._check_open()
        if port in self._waiting:
            raise InvalidRequest(f"a task waits for {port} already")
        self._collect()
        if port in self._pending:
            del self._pending[port]
            return WaitResult.EVENT
        future = self._waiting[port] = self._loop.create_future()
        try:
            result: WaitResult = await future
            return result
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.result() is WaitResult.EVENT:
                self._keep(port)
            raise
        finally:
            self._waiting.pop(port, None)

    async def any(self) -> list[EventPort]:
        """Ports with an event that no task waits for by name, at least one, the best priority first; they are taken.

        Empty when the waiter was kicked or a binding changed. Raises `InvalidRequest` when a task is here already.
        """
        self._check_open()
        if self._for_any is not None:
            raise InvalidRequest("a task waits for any event already")
        self._collect()
        if not self._pending:
            self._for_any = self._loop.create_future()
            try:
                await self._for_any
            finally:
                self._for_any = None
        taken = sorted(self._pending, key=lambda port: port.priority)
        self._pending.clear()
        return taken

    def _ready(self) -> None:
        """The reader of the loop."""
        told = self._waiter.drain_bells()
        self._collect()
        if told is not WaitResult.EVENT:
            for future in [*self._waiting.values(), self._for_any]:
                if future is not None and not future.done():
                    future.set_result(told)

    def _collect(self) -> None:
        for port in self._waiter.take_pending():
            future = self._waiting.get(port)
            if future is not None and not future.done():
                future.set_result(WaitResult.EVENT)
            else:
                self._keep(port)

    def _keep(self, port: EventPort) -> None:
        self._pending[port] = None
        if self._for_any is not None and not self._for_any.done():
            self._for_any.set_result(WaitResult.EVENT)

    def _check_open(self) -> None:
        if not self._open:
            raise Closed("these events are closed")

    def close(self) -> None:
        """Leave the loop; tasks that wait are cancelled. Harmless when repeated."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._fd)
        for future in [*self._waiting.values(), self._for_any]:
            if future is not None:
                future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{len(self._waiting)} tasks wait" if self._open else "closed"
        return f"<AsyncEvents of {self._waiter}: {state}>"
