# SPDX-License-Identifier: MIT
"""Moves the bytes of one connection through a domain's ring page."""

import contextlib
from collections.abc import Callable
from typing import Final

from paravirt.errors import ParavirtError, PeerError
from paravirt.ring.event import EventPort
from paravirt.ring.memory import Mapping
from paravirt.ring.stream import XENSTORE_BACK, ByteStream
from paravirt.xenstore.links import feed_guarded
from paravirt.xenstore.ring_page import Feature, RingError, RingPage, State
from paravirt.xenstore.session import Connection

ROUNDS_PER_EVENT: Final = 16
"""How often a ring is looked at before it is others' turn: a guest could keep it filled for ever."""


def error_of(error: ParavirtError) -> RingError:
    """What to tell a guest whose ring failed."""
    return RingError.INDEX if isinstance(error, PeerError) else RingError.COMMUNICATION


class RingLink:
    """The server's end of a ring. A guest that breaks the protocol is told so in its page and ignored from then on,
    until it asks for a reconnection or is introduced again."""

    def __init__(
        self,
        page: Mapping | memoryview,
        port: EventPort,
        connection: Connection,
        call_later: Callable[[Callable[[], None]], None],
        on_close: Callable[[], None],
    ) -> None:
        """`call_later` runs a function in the server's loop; `on_close` lets go of the page and the event channel."""
        self._page = RingPage(page)
        self._port = port
        self._connection = connection
        self._call_later = call_later
        self._on_close = on_close
        self._closed = False
        self._scheduled = False
        self._stream: ByteStream | None = None
        self.start()

    def start(self) -> None:
        """Empty both streams and serve them from their beginning."""
        if self._stream is not None:
            self._stream.close()
        self._page.empty_streams()
        self._page.features = self._connection.domain.features
        self._page.error = RingError.NONE
        self._page.state = State.CONNECTED
        self._stream = ByteStream(self._page.view, XENSTORE_BACK, port=self._port)
        self._notify()

    def _notify(self) -> None:
        with contextlib.suppress(ParavirtError):  # the guest's end is gone: nobody to tell
            self._port.notify()

    def on_event(self) -> None:
        """The guest has notified."""
        if self._page.state == State.RECONNECT and self._connection.domain.features & Feature.RECONNECTION:
            self._connection.reset()
            self.start()
        self.pump()

    def pump(self) -> None:
        """Take requests and give replies until neither moves, or until it is others' turn."""
        self._connection.resume()
        for _ in range(ROUNDS_PER_EVENT):
            if not (self._read() | self._write()):
                return
        if not self._scheduled:
            self._scheduled = True
            self._call_later(self._go_on)

    def _go_on(self) -> None:
        self._scheduled = False
        if not self._closed:
            self.pump()

    def _read(self) -> bool:
        connection = self._connection
        if self._stream is None or not connection.wants_input:
            return False
        try:
            data = self._stream.read_nowait()
        except ParavirtError as error:
            self._give_up(error_of(error))
            return False
        if data:
            feed_guarded(connection, data)
            if connection.broken is not None:
                self._give_up(RingError.PROTOCOL)
        return bool(data)

    def _write(self) -> bool:
        connection = self._connection
        if self._stream is None or not connection.n_output_bytes:
            return False
        try:
            n_bytes = self._stream.write_nowait(connection.output())
        except ParavirtError as error:
            self._give_up(error_of(error))
            return False
        if n_bytes:
            connection.sent(n_bytes)
            connection.resume()
        return bool(n_bytes)

    def flush(self) -> None:
        self.pump()

    def _give_up(self, why: RingError) -> None:
        """Ignore this guest, and tell it why. It still counts as introduced until it is really gone."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._connection.reset()
        self._connection.broken = why.name
        self._page.error = why
        self._notify()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._stream is not None:
                self._stream.close()
                self._stream = None
            self._on_close()
