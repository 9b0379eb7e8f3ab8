# SPDX-License-Identifier: MIT
"""A client's bytes through a xenstore ring page: for a guest that speaks the ring instead of a socket."""

import threading
import time
from typing import Final

from paravirt.errors import StoreGone
from paravirt.ring.event import EventPort, EventWaiter, WaitResult
from paravirt.ring.memory import Mapping
from paravirt.ring.stream import XENSTORE_FRONT, ByteStream
from paravirt.xenstore.ring_page import Feature, RingError, RingPage, State
from paravirt.xenstore.transport import Transport

RECONNECT_TIMEOUT_S: Final = 10.0
UPDATE_TIMEOUT_S: Final = 30.0
"""A daemon that replaces itself and is not back after so long is gone."""


class RingTransport:
    """The guest's end of the page. It owns none of what it is given, which must outlive it.

    The thread that receives is the one that waits on `waiter`; one that sends and finds no room waits for that thread.
    """

    polls_for_room = False

    def __init__(
        self, page: Mapping | memoryview, waiter: EventWaiter, port: EventPort, *, reconnect: bool = False
    ) -> None:
        """`reconnect`: have the daemon start anew first, with empty streams and without former watches and
        transactions; for a guest that finds the page used. `StoreGone` if the daemon cannot or does not do it.
        """
        self._page = RingPage(page)
        self._waiter = waiter
        self._port = port
        self._changed = threading.Condition()
        self._ended = False
        if reconnect:
            self._reconnect()
        self._stream = ByteStream(self._page.view, XENSTORE_FRONT, port=port)

    def _reconnect(self) -> None:
        _ask_for_a_new_start(self._page, self._port)
        while self._page.state == State.RECONNECT:
            if self._waiter.wait(self._port, timeout_s=RECONNECT_TIMEOUT_S) is WaitResult.TIMEOUT:
                raise StoreGone("xenstored did not start the connection anew")

    def send(self, data: bytes, counts: list[int]) -> None:
        while True:
            with self._changed:
                self._check()
                before = self._stream.statistics().bytes_written
                try:
                    self._stream.write_nowait(data)
                finally:
                    n_bytes = self._stream.statistics().bytes_written - before
                    if n_bytes:
                        counts.append(n_bytes)
                if n_bytes:
                    return
                self._changed.wait()

    def receive(self) -> bytes:
        while True:
            self._check()
            data = self._stream.read_nowait()
            if data:
                return data
            if self._waiter.wait(self._port) is WaitResult.STALE and not self._bound_again():
                return b""
            with self._changed:
                self._changed.notify_all()
            if self._ended:
                return b""

    def send_nowait(self, data: bytes) -> int:
        self._check()
        return self._stream.write_nowait(data)

    def receive_nowait(self) -> bytes | None:
        """What has come; looks for events first, so that `fileno` is not readable again until there are more."""
        self._check()
        stale = self._waiter.drain_bells() is WaitResult.STALE
        self._port.take_pending()
        data = self._stream.read_nowait()
        if data:
            return data
        return b"" if stale and not self._still_bound() and not self._page.updating else None

    def _bound_again(self) -> bool:
        """Whether there is a daemon, also one that replaces itself just now: then the next one is waited for."""
        deadline = time.monotonic() + UPDATE_TIMEOUT_S
        while not self._still_bound():
            left = deadline - time.monotonic()
            if not self._page.updating or self._ended or left <= 0:
                return False
            self._waiter.wait(self._port, timeout_s=left)
        return True

    def _still_bound(self) -> bool:
        self._port.notify()  # learns the new binding; an extra event is harmless
        return self._port.bound

    def fileno(self) -> int:
        return self._waiter.fileno()

    def _check(self) -> None:
        error = self._page.error
        if self._ended:
            raise OSError("the connection is closed")
        if error:
            name = RingError(error).name.lower() if error in list(RingError) else str(error)
            raise OSError(f"xenstored does not serve this ring any more ({name} error)")

    def shut_down(self) -> None:
        with self._changed:
            if self._ended:
                return
            self._ended = True
            self._changed.notify_all()
        self._waiter.kick()

    def close(self) -> None:
        self._stream.close()


class RingConnector:
    """Has the daemon, or the one that took its place, start the connection over the same page anew."""

    def __init__(self, page: Mapping | memoryview, waiter: EventWaiter, port: EventPort) -> None:
        """Owns none of what it is given."""
        self._memory = page
        self._page = RingPage(page)
        self._waiter = waiter
        self._port = port
        self._asked = False

    def connect_nowait(self) -> Transport | None:
        if self._asked and self._page.state == State.CONNECTED:
            self._asked = False
            return RingTransport(self._memory, self._waiter, self._port)
        # Each time: a daemon that has just started may have bound the channel after the last kick.
        _ask_for_a_new_start(self._page, self._port)
        self._asked = True
        return None


def _ask_for_a_new_start(page: RingPage, port: EventPort) -> None:
    if not page.features & Feature.RECONNECTION:
        raise StoreGone("this xenstored cannot start a connection anew")
    page.state = State.RECONNECT
    port.notify()
