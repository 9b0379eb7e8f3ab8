# SPDX-License-Identifier: MIT
"""Watch events for asyncio: the queue of `watch_queue` without threads."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from paravirt.errors import Closed, InvalidRequest, ParavirtError
from paravirt.xenstore.protocol_state import Subscription, fresh
from paravirt.xenstore.watch_queue import PENDING_MAX, PendingEvents, WatchEvent


@dataclass(frozen=True, slots=True)
class AsyncWatcher:
    """What a queue needs of its client."""

    watch: Callable[[Subscription], Awaitable[None]]
    unwatch: Callable[[Subscription], Awaitable[None]]
    forget: Callable[["AsyncWatchQueue"], None]


class AsyncWatchQueue:
    """Events of some watches, in order; merged and bounded as in `WatchQueue`. An async context manager.

    `async for event in queue` takes them until `close`.
    """

    def __init__(
        self, watcher: AsyncWatcher, new_wire_token: Callable[[], str], *, pending_max: int = PENDING_MAX
    ) -> None:
        self._watcher = watcher
        self._new_wire_token = new_wire_token
        self._subscriptions: dict[tuple[str, str], Subscription] = {}
        self._pending = PendingEvents(pending_max)
        self._changed = asyncio.Event()
        self._ended: ParavirtError | None = None
        self._first: tuple[str, str | None, int | None] | None = None

    def begin_with(self, path: str, token: str | None, depth: int | None) -> None:
        """What to watch when the block is entered or iteration begins."""
        self._first = (path, token, depth)

    async def add(self, path: str, token: str | None = None, *, depth: int | None = None) -> None:
        """As `WatchQueue.add`."""
        token = path if token is None else token
        self._check()
        if (path, token) in self._subscriptions:
            raise InvalidRequest(f"{path} is watched already with the token {token!r}")
        subscription = Subscription(self, path, token, self._new_wire_token(), depth)
        self._subscriptions[path, token] = subscription
        try:
            await self._watcher.watch(subscription)
        except BaseException:
            self._subscriptions.pop((path, token), None)
            raise

    async def remove(self, path: str, token: str | None = None) -> None:
        """As `WatchQueue.remove`."""
        token = path if token is None else token
        self._check()
        subscription = self._subscriptions.pop((path, token), None)
        if subscription is None:
            raise InvalidRequest(f"{path} is not watched with the token {token!r}")
        self._pending.drop(subscription)
        await self._watcher.unwatch(subscription)

    async def get(self, timeout_s: float | None = None) -> WatchEvent | None:
        """The next event, waiting for one; None after `timeout_s`. `StoreGone` and `Closed` as in `WatchQueue`."""
        await self._begin()
        if timeout_s is None:
            return await self._next()
        try:
            async with asyncio.timeout(timeout_s):
                return await self._next()
        except TimeoutError:
            return self.get_nowait()

    def get_nowait(self) -> WatchEvent | None:
        """The next event if there is one."""
        event = self._pending.take()
        if event is None:
            self._check()
            self._changed.clear()
        return event

    async def _next(self) -> WatchEvent:
        while (event := self.get_nowait()) is None:
            await self._changed.wait()
        return event

    async def _begin(self) -> None:
        if self._first is not None:
            (path, token, depth), self._first = self._first, None
            await self.add(path, token, depth=depth)

    async def close(self) -> None:
        """Take all watches away. Harmless when repeated or when the daemon is dead."""
        if self._ended is None:
            self._ended = Closed("this watch queue is closed")
        subscriptions, self._subscriptions = list(self._subscriptions.values()), {}
        self._pending.clear()
        self._changed.set()
        self._watcher.forget(self)
        for subscription in subscriptions:
            try:
                await self._watcher.unwatch(subscription)
            except ParavirtError:
                return  # the connection is over, and its watches with it

    # -- the client's side

    def put(self, subscription: Subscription, path: str) -> None:
        if self._ended is None:
            self._pending.put(WatchEvent(path, subscription.token), self._subscriptions.values())
            self._changed.set()

    def forget_watches(self) -> None:
        self._subscriptions.clear()
        self._pending.clear()

    def end(self, error: ParavirtError) -> None:
        if self._ended is None:
            self._ended = error
        self._changed.set()

    def _check(self) -> None:
        if self._ended is not None:
            raise fresh(self._ended)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchEvent:
        await self._begin()
        try:
            return await self._next()
        except Closed:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        try:
            await self._begin()
        except BaseException:
            self._watcher.forget(self)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __len__(self) -> int:
        """Events that wait."""
        return len(self._pending)

    def __repr__(self) -> str:
        return f"<AsyncWatchQueue: {len(self._subscriptions)} watches, {len(self._pending)} events wait>"
