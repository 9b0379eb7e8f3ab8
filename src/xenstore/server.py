# SPDX-License-Identifier: MIT
"""xenstored: the loop that moves bytes between sockets or rings and the pure `Hub`.

One thread, one epoll set. A wake-up reads what there is, handles it, and writes once to each client that has output.
Nothing blocks: what a client does not read stays in its own bounded queue, and its requests wait meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Self

from paravirt.errors import Closed, InvalidRequest
from paravirt.xenstore import listener
from paravirt.xenstore.domains import DOM0
from paravirt.xenstore.hub import Hub
from paravirt.xenstore.limits import Limits
from paravirt.xenstore.links import Link, SocketLink
from paravirt.xenstore.loop import Loop
from paravirt.xenstore.session import Connection
from paravirt.xenstore.wire import Errno

if TYPE_CHECKING:
    from paravirt.hypervisor.client import Hypervisor
    from paravirt.xenstore.guests import Guests

log = logging.getLogger(__name__)


class XenstoreServer:
    """`start` and `stop` run it in a thread of its own, `serve_forever` in the caller's. A context manager.

    `socket_path`: where Dom0's clients connect; None: only `connect`, in this process. `hypervisor`: whose domains it
    serves too; it stays the caller's, who closes it after `stop`. Connections are accepted from the moment this object
    exists. Raises `AlreadyExists` if another daemon serves that path or that hypervisor.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] | None = None,
        hypervisor: Hypervisor | None = None,
        *,
        limits: Limits | None = None,
    ) -> None:
        self.hub = Hub(limits=limits, control=self)
        self.hub.log = log.warning
        self.hub.clock_us = lambda: time.time_ns() // 1000
        self._look_at_clock()
        self._loop = Loop()
        self._links: dict[Connection, Link] = {}
        self._runner: threading.Thread | None = None
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._release_lock = threading.Lock()
        self._closed = self._released = False
        self._guests: Guests | None = None
        self._path = os.fspath(socket_path) if socket_path is not None else None
        self._own_file: tuple[int, int] | None = None
        self._listener: socket.socket | None = None
        self._accepting = False
        try:
            if self._path is not None:
                self._listener = listener.listen(self._path)
                self._own_file = listener.identity(self._path)
                self._accept_more()
            if hypervisor is not None:
                from paravirt.xenstore.guests import Guests

                self._guests = Guests(hypervisor, self.hub, self._loop, self._adopt)
        except BaseException:
            self._release()
            raise

    # -- running

    def start(self) -> Self:
        """Serve in a background thread; returns at once."""
        with self._lock:
            self._check_open()
            if self._runner is not None:
                raise InvalidRequest("this store is running already")
            self._runner = threading.Thread(target=self._run, name="xenstored", daemon=True)
            self._runner.start()
        return self

    def stop(self) -> None:
        """Stop serving and close everything; from any thread, twice is harmless."""
        with self._lock:
            self._closed = True
            if not self._released:
                self._loop.stop()
        if self._runner is not None and self._runner is not threading.current_thread():
            self._finished.wait()
        self._release()

    close = stop

    def serve_forever(self) -> None:
        """Serve in this thread until `stop` (in the main thread also SIGTERM or SIGINT); then close everything."""
        with self._lock:
            if self._runner is not None:
                raise InvalidRequest("this store is running already")
            self._runner = threading.current_thread()
        main = self._runner is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.stop()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._loop.stop()

    def _run(self) -> None:
        try:
            self._loop.run(self._after_wake_up, self._look_at_clock)
        finally:
            self._finished.set()

    def _release(self) -> None:
        with self._release_lock:  # whoever comes second returns when all is released
            with self._lock:
                former, self._closed, self._released = self._released, True, True
            if not former:
                self._release_all()

    def _release_all(self) -> None:
        for connection in list(self._links):
            self._end(connection)
        if self._guests is not None:
            self._guests.close()
        if self._listener is not None and self._path is not None:
            listener.unlink_own(self._path, self._own_file)
            self._listener.close()
        self._loop.close()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this store is stopped")

    # -- connections

    def connect(self, domid: int = DOM0) -> socket.socket:
        """A new connection of this process that speaks for `domid`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._lock:
            if self._closed:
                ours.close()
                theirs.close()
            self._check_open()
            self._loop.call(lambda: self._adopt(ours, domid))
        return theirs

    def _adopt(self, client: socket.socket, domid: int) -> None:
        if self._closed:
            client.close()
            return
        connection = self.hub.connect(domid)
        self._links[connection] = SocketLink(client, connection, self._loop, self._end)

    def _accept_more(self) -> None:
        if self._listener is not None and not self._accepting:
            self._accepting = True
            self._loop.add(self._listener.fileno(), self._on_accept)

    def _on_accept(self, _events: int) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                log.warning("no more clients until one leaves: %s", error.strerror)
                self._accepting = False
                self._loop.remove(self._listener.fileno())
            return
        if listener.peer_may_be_dom0(client):
            self._adopt(client, DOM0)
        else:
            log.warning("refused a client of another user")
            client.close()

    def _end(self, connection: Connection) -> None:
        """A client is gone, or is to go."""
        domain = connection.domain
        if connection.broken is not None:
            level = logging.DEBUG if domain.complained else logging.WARNING  # a guest must not fill the log
            log.log(level, "closing a connection of domain %d: %s", domain.domid, connection.broken)
            domain.complained = not domain.privileged
        self.hub.disconnect(connection)
        self._drop_link(connection)

    def _drop_link(self, connection: Connection) -> None:
        link = self._links.pop(connection, None)
        if link is not None:
            link.close()
            if not self._closed:
                self._accept_more()

    def _look_at_clock(self) -> None:
        self.hub.now_ms = time.monotonic_ns() // 1_000_000

    def _after_wake_up(self) -> int | None:
        self.hub.on_time()
        self._flush()
        return self.hub.next_timeout_ms()

    def _flush(self) -> None:
        """Write what the requests of this wake-up have caused."""
        dirty = self.hub.dirty
        while dirty:
            connection = dirty.pop()
            link = self._links.get(connection)
            if link is not None:
                link.flush()

    # -- what the hub asks for (`domains.DomainControl`)

    def exists(self, domid: int) -> bool:
        return self._guests is not None and self._guests.exists(domid)

    def attach_ring(self, connection: Connection, page: int, port: int) -> Errno | None:
        if self._guests is None:
            return Errno.EINVAL
        former = self._links.pop(connection, None)
        if former is not None:
            former.close()
        link = self._guests.attach_ring(connection, port)
        if isinstance(link, Errno):
            return link
        self._links[connection] = link
        return None

    def detach(self, connection: Connection) -> None:
        self._drop_link(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<XenstoreServer {self._path or 'in this process'}: {len(self._links)} connections>"
