# SPDX-License-Identifier: MIT
"""xenstored: the engine's loop, and around it what needs Python: places, the journal, the hypervisor, CONTROL."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import threading
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Final, Self

from paravirt.errors import Closed, InvalidRequest, ResourceLimit
from paravirt.ring._core import lib
from paravirt.xenstore import listener
from paravirt.xenstore.actions import Actions
from paravirt.xenstore.core import CoreHub, Event
from paravirt.xenstore.domains import DOM0, AnyConnection
from paravirt.xenstore.journal import Journal
from paravirt.xenstore.limits import Limits
from paravirt.xenstore.loop import Loop
from paravirt.xenstore.update import Handover, NextProgram
from paravirt.xenstore.wire import Errno

if TYPE_CHECKING:
    from paravirt.hypervisor.client import Hypervisor
    from paravirt.xenstore.guests import Guests

log = logging.getLogger(__name__)

TRIAL_TIMEOUT_S: Final = 10
"""How long the store may stand still while a program that is to take over is tried."""
OUT_OF_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class XenstoreServer:
    """`start` and `stop` run it in a thread of its own, `serve_forever` in the caller's. A context manager.

    `socket_path`: where Dom0's clients connect; None: only `connect`, in this process. `hypervisor`: whose domains it
    serves too; it stays the caller's, who closes it after `stop`. `journal`: the directory that keeps the store; None:
    it is gone with the process. `sync`: what is acknowledged also survives the machine's end. `access_log`: a file that
    gets a line for each request. `replace`: how a live update goes on as another program.
    `handover`: what a former program has left for this one. Connections are accepted from the moment this object
    exists.

    Raises `AlreadyExists` if another daemon serves that path, that hypervisor or that journal, `DamagedJournal`.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str] | None = None,
        hypervisor: Hypervisor | None = None,
        *,
        limits: Limits | None = None,
        journal: str | os.PathLike[str] | None = None,
        sync: bool = False,
        access_log: str | os.PathLike[str] | None = None,
        replace: NextProgram | None = None,
        handover: Handover | None = None,
    ) -> None:
        self._path = os.fspath(socket_path) if socket_path is not None else None
        self._runner: threading.Thread | None = None
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._release_lock = threading.Lock()
        self._closed = self._released = False
        self._complained: set[int] = set()
        self._guests: Guests | None = None
        self._own_file: tuple[int, int] | None = None
        self._listener: socket.socket | None = None
        self._accepting = False
        self._update: tuple[str, str | None] | None = None
        self._replace = replace
        with ExitStack() as stack:
            self.hub = CoreHub(limits=limits, control=self)
            stack.callback(self.hub.close)
            self._loop = Loop(self.hub)
            stack.callback(self._loop.close)
            self._actions = Actions(self.hub, access_log, self._plan_update if replace is not None else None)
            stack.callback(self._actions.close)
            self.hub.actions = self._actions
            self._journal = Journal(journal, self.hub, sync=sync) if journal is not None else None
            if self._journal is not None:
                stack.callback(self._journal.close)
            self._open_places(hypervisor, handover, stack)
            self._react_to_events()
            self._stack = stack.pop_all()

    def _open_places(self, hypervisor: Hypervisor | None, handover: Handover | None, stack: ExitStack) -> None:
        if handover is not None:
            handover.restore(self.hub, with_tree=self._journal is None)
            self._listener = handover.listener
        if self._path is not None:
            if self._listener is None:
                self._listener = listener.listen(self._path)
            self._own_file = listener.identity(self._path)
            stack.callback(self._close_listener)
            self._accept_more()
        if hypervisor is not None:
            from paravirt.xenstore.guests import Guests

            if self._journal is not None and not self._journal.is_of(hypervisor.identity):
                if handover is None:
                    self.hub.died(list(self.hub.domains))  # domids of another life: none of them means the same now
                self._journal.assign(hypervisor.identity)
            self._guests = Guests(hypervisor, self.hub, self._loop, self._adopt, resume=handover is not None)
            stack.callback(self._guests.close)

    def _close_listener(self) -> None:
        if self._listener is not None and self._path is not None:
            listener.unlink_own(self._path, self._own_file)
            self._listener.close()

    def _react_to_events(self) -> None:
        loop = self._loop
        loop.on(lib.PV_XS_EVENT_CLOSED, self._on_closed)
        loop.on(lib.PV_XS_EVENT_STALE, self._on_stale)
        loop.on(lib.PV_XS_EVENT_MEMORY, self._on_memory)
        if self._journal is not None:
            loop.on(lib.PV_XS_EVENT_JOURNAL, self._on_journal)
            loop.on(lib.PV_XS_EVENT_LONG, self._journal.on_long)
            loop.on(lib.PV_XS_EVENT_SNAPSHOT, self._journal.on_snapshot)

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
            runner = self._runner
        if runner is not None and runner is not threading.current_thread():
            self._finished.wait()
        self._release()

    close = stop

    def serve_forever(self) -> None:
        """Serve in this thread until `stop` (in the main thread also SIGTERM or SIGINT); then close everything."""
        with self._lock:
            if self._runner is not None:
                raise InvalidRequest("this store is running already")
            if self._closed:
                return  # whoever has stopped it closes everything
            self._runner = threading.current_thread()
        main = self._runner is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        others_fd = signal.set_wakeup_fd(self._loop.wake_fd) if main else -1
        if others_fd >= 0:
            signal.set_wakeup_fd(others_fd)  # somebody else hears signals, and calls `stop`
        try:
            self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if main and others_fd < 0:
                signal.set_wakeup_fd(-1)
            self.stop()

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._loop.stop()

    def _run(self) -> None:
        try:
            self._loop.run(self._after_wake_up)
        finally:
            self._finished.set()

    def _after_wake_up(self) -> None:
        if self._update is not None:
            (program, command_line), self._update = self._update, None
            self._become(program, command_line)

    def _release(self) -> None:
        with self._release_lock:  # whoever comes second returns when all is released
            with self._lock:
                former, self._closed, self._released = self._released, True, True
            if not former:
                self._stack.close()

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
        client.setblocking(False)
        try:
            self.hub.serve_socket(domid, client.detach())
        except ResourceLimit as error:
            log.warning("a client of domain %d is sent away: %s", domid, error)

    def _accept_more(self) -> None:
        if self._listener is not None and not self._accepting:
            self._accepting = True
            self._loop.add(self._listener.fileno(), self._on_accept)

    def _on_accept(self, _events: int) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                log.warning("no more clients until one leaves: %s", error.strerror)
                self._accepting = False
                self._loop.remove(self._listener.fileno())
            return
        if listener.peer_may_be_dom0(client):
            self._adopt(client, DOM0)
        else:
            log.warning("refused a client of another user")
            client.close()

    def _on_closed(self, event: Event) -> None:
        if event.reason is not None:
            level = logging.DEBUG if event.domid in self._complained else logging.WARNING
            log.log(level, "closed a connection of domain %d: %s", event.domid, event.reason)
            if event.domid != DOM0:
                self._complained.add(event.domid)  # a guest must not fill the log
        self._accept_more()

    def _on_memory(self, event: Event) -> None:
        domain = self.hub.domains.get(event.domid)
        if domain is None:
            return  # it has died in the same wake-up
        soft = domain.quotas["soft-memory"]
        log.warning("domain %d holds %d bytes, over its soft quota of %d", event.domid, domain.memory_bytes, soft)

    def _on_journal(self, event: Event) -> None:
        assert self._journal is not None
        self._journal.on_error(event)
        if not event.mask and self._guests is not None:
            self._guests.look_again()

    def _on_stale(self, event: Event) -> None:
        if self._guests is not None:
            self._guests.on_stale(event.domid)

    # -- live update

    def _plan_update(self, program: str, command_line: str | None, _timeout_s: int) -> str | None:
        """Why not, or None: after this wake-up."""
        assert self._replace is not None
        try:
            if self._journal is not None:
                self._journal.finish()
        except OSError as error:
            return f"the journal cannot be written: {error.strerror}"
        refusal = self._replace.why_not(program, command_line, TRIAL_TIMEOUT_S)
        if refusal is None:
            self._update = program, command_line
        return refusal

    def _become(self, program: str, command_line: str | None) -> None:
        """Go on as another program; if that fails, as this one."""
        assert self._replace is not None
        try:
            if self._guests is not None:
                self._guests.suspend()
            if self._journal is not None:
                self._journal.finish()  # replies are handed over, and what they acknowledge must not be lost
            with Handover.of(self.hub, self._listener, with_tree=self._journal is None) as handover:
                self._replace.become(program, command_line, handover)
        except OSError as error:
            log.error("the live update failed, this program goes on: %s", error)
            if self._guests is not None:
                self._guests.resume()

    # -- what the hub asks for (`domains.DomainControl`)

    def exists(self, domid: int) -> bool:
        return self._guests is not None and self._guests.exists(domid)

    def attach_ring(self, connection: AnyConnection, page: int, port: int) -> Errno | None:
        if self._guests is None:
            return Errno.EINVAL
        return self._guests.attach_ring(connection.domain.domid, port)

    def detach(self, connection: AnyConnection) -> None:
        domid = connection.domain.domid
        self._complained.discard(domid)
        if self._guests is not None:
            self._guests.detach(domid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<XenstoreServer {self._path or 'in this process'}{' stopped' if self._closed else ''}>"
