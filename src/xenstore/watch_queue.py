# SPDX-License-Identifier: MIT
"""Where a client's watch events wait to be taken: merged and bounded, whatever the other side does."""

import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from paravirt.errors import Closed, InvalidRequest, ParavirtError
from paravirt.xenstore.protocol_state import Subscription, fresh

PENDING_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """Something changed at or below a watched path. `path` as the watch was given, absolute or relative."""

    path: str
    token: str


class PendingEvents:
    """Events that wait to be taken, in order. Pure; whoever owns it has a lock.

    Events that are equal to one still waiting are merged. If more than `pending_max` different ones wait, they are
    replaced by one event for each watch, at the watch's own path: look at everything again.
    """

    def __init__(self, pending_max: int) -> None:
        self._pending_max = pending_max
        self._events: dict[WatchEvent, None] = {}
        self.n_merged = 0
        self.n_overflows = 0

    def put(self, event: WatchEvent, watched: Iterable[Subscription]) -> None:
        """One more; `watched` are all watches whose events come here."""
        if event in self._events:
            self.n_merged += 1
        elif len(self._events) >= self._pending_max:
            self.n_overflows += 1
            self._events = {WatchEvent(other.path, other.token): None for other in watched}
        else:
            self._events[event] = None

    def take(self) -> WatchEvent | None:
        """The oldest, if there is any."""
        if not self._events:
            return None
        event = next(iter(self._events))
        del self._events[event]
        return event

    def drop(self, subscription: Subscription) -> None:
        """Those of a watch that was taken away."""
        for event in [event for event in self._events if _belongs(event, subscription)]:
            del self._events[event]

    def clear(self) -> None:
        self._events.clear()

    def __len__(self) -> int:
        return len(self._events)


@dataclass(frozen=True, slots=True)
class Watcher:
    """What a queue needs of its client."""

    watch: Callable[[Subscription], None]
    unwatch: Callable[[Subscription], None]
    forget: Callable[["WatchQueue"], None]


class WatchQueue:
    """Events of some watches, in order. Any thread may use it; a context manager.

    Events are merged and bounded as `PendingEvents` says. `for event in queue` takes them until `close`, or a `kick`.
    When the client has connected anew, each watch gives one event at its own path.
    """

    def __init__(self, watcher: Watcher, new_wire_token: Callable[[], str], *, pending_max: int = PENDING_MAX) -> None:
        self._watcher = watcher
        self._new_wire_token = new_wire_token
        self._subscriptions: dict[tuple[str, str], Subscription] = {}
        self._pending = PendingEvents(pending_max)
        self._changed = threading.Condition()
        self._pid = os.getpid()
        self._kicked = False
        self._ended: ParavirtError | None = None

    def add(self, path: str, token: str | None = None, *, depth: int | None = None) -> None:
        """Watch `path` and everything (or `depth` levels) below it; an event comes at once.

        `token` (the path if None) comes with each event. `InvalidRequest` if this queue has that watch already.
        """
        token = path if token is None else token
        self._check_process()
        subscription = Subscription(self, path, token, self._new_wire_token(), depth)
        with self._changed:
            self._check()
            if (path, token) in self._subscriptions:
                raise InvalidRequest(f"{path} is watched already with the token {token!r}")
            self._subscriptions[path, token] = subscription
        try:
            self._watcher.watch(subscription)
        except BaseException:
            with self._changed:
                self._subscriptions.pop((path, token), None)
            raise

    def remove(self, path: str, token: str | None = None) -> None:
        """Stop watching; events of this watch that still wait are dropped. `InvalidRequest` if there is none."""
        token = path if token is None else token
        self._check_process()
        with self._changed:
            self._check()
            subscription = self._subscriptions.pop((path, token), None)
        if subscription is None:
            raise InvalidRequest(f"{path} is not watched with the token {token!r}")
        try:
            self._watcher.unwatch(subscription)
        finally:
            with self._changed:
                self._pending.drop(subscription)

    def get(self, timeout_s: float | None = None) -> WatchEvent | None:
        """The next event, waiting for one; None after `timeout_s`, or when `kick` was called.

        `StoreGone` when the daemon is dead, `Closed` when this queue or its client is.
        """
        self._check_process()
        with self._changed:
            self._changed.wait_for(lambda: self._kicked or len(self._pending) > 0 or self._ended is not None, timeout_s)
            if self._kicked:
                self._kicked = False
                return None
            event = self._pending.take()
            if event is None:
                self._check()
            return event

    def get_nowait(self) -> WatchEvent | None:
        """The next event if there is one."""
        return self.get(timeout_s=0)

    def kick(self) -> None:
        """Make one `get`, the one that waits or the next, return None."""
        with self._changed:
            self._kicked = True
            self._changed.notify_all()

    def close(self) -> None:
        """Take all watches away. Harmless when repeated or when the daemon is dead."""
        with self._changed:
            if self._ended is None:
                self._ended = Closed("this watch queue is closed")
            subscriptions, self._subscriptions = list(self._subscriptions.values()), {}
            self._pending.clear()
            self._changed.notify_all()
        self._watcher.forget(self)
        for subscription in subscriptions:
            try:
                self._watcher.unwatch(subscription)
            except ParavirtError:
                return  # the connection is over, and its watches with it

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> WatchEvent:
        """The next event, waiting for one. The end is when this queue or its client is closed or `kick` was called."""
        try:
            event = self.get()
        except Closed:
            raise StopIteration from None
        if event is None:
            raise StopIteration
        return event

    def __len__(self) -> int:
        """Events that wait."""
        return len(self._pending)

    @property
    def n_merged(self) -> int:
        """Events that were equal to one that waited."""
        return self._pending.n_merged

    @property
    def n_overflows(self) -> int:
        """How often too many waited."""
        return self._pending.n_overflows

    # -- the client's side

    def put(self, subscription: Subscription, path: str) -> None:
        """An event has come."""
        with self._changed:
            if self._ended is None:
                self._pending.put(WatchEvent(path, subscription.token), self._subscriptions.values())
                self._changed.notify_all()

    def forget_watches(self) -> None:
        """The daemon has dropped all watches of the connection."""
        with self._changed:
            self._subscriptions.clear()
            self._pending.clear()

    def end(self, error: ParavirtError) -> None:
        """No event can come any more."""
        with self._changed:
            if self._ended is None:
                self._ended = error
            self._changed.notify_all()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise Closed("this watch queue belongs to the parent of this process")

    def _check(self) -> None:
        if self._ended is not None:
            raise fresh(self._ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<WatchQueue: {len(self._subscriptions)} watches, {len(self._pending)} events wait>"


def _belongs(event: WatchEvent, subscription: Subscription) -> bool:
    path = subscription.path.rstrip("/")
    return event.token == subscription.token and (event.path == subscription.path or event.path.startswith(path + "/"))
