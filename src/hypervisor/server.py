# SPDX-License-Identifier: MIT
"""The broker: a thin shell around the tables. One thread, one selector, one connection a process.

It runs as a process of its own (`serve_forever`) or as a thread of somebody else's (`start`, `connect`, `stop`). It
never blocks on a peer: every socket call is nonblocking, and a connection whose replies are not read is not listened
to.
"""

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paravirt.errors import Closed, HypervisorError, InvalidRequest, ParavirtError, PeerError, ResourceLimit
from paravirt.hypervisor import sockets
from paravirt.hypervisor.domains import Domain
from paravirt.hypervisor.messages import Op, new_message, parse, to_bytes
from paravirt.hypervisor.operations import Answer, Operations
from paravirt.hypervisor.processes import Processes
from paravirt.hypervisor.resources import Resources, available_bytes
from paravirt.hypervisor.rules import DOM0, Limits, Refused
from paravirt.hypervisor.state import State
from paravirt.ring.memory import PROVIDERS, Provider

log = logging.getLogger(__name__)

END_SLICE = 2048
"""Mappings and ports of a process that ended are let go so many at a time: more than a guest may have."""


class _Session:
    """One connection: a socket with a label."""

    def __init__(self, number: int, domid: int, ours: socket.socket) -> None:
        self.number = number
        self.domid = domid
        self.socket = ours
        self.greeted = False
        self.pid = sockets.peer_pid(ours)
        self.unsent: Answer | None = None

    def __str__(self) -> str:
        return f"connection {self.number} of domain {self.domid}"


class BrokerServer:
    """The hypervisor broker. Everything but `connect`, `start` and `stop` happens in the serving thread."""

    def __init__(
        self,
        run: Path | None = None,
        *,
        provider: Provider = "posix",
        budget_bytes: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        """`run`: directory (mode 0700) of the listening sockets; None: only `connect` gives connections.

        `provider`: of memory between domains that are not isolated; for isolated ones it is always `memfd`.
        `budget_bytes`: shared memory that may be handed out; None: half of what is available now. `limits`: of each
        domain but Dom0. Raises `AlreadyExists` when another broker listens there, `InvalidRequest`.
        """
        if provider not in PROVIDERS:
            raise InvalidRequest(f"unknown memory provider {provider!r}; there are {', '.join(PROVIDERS)}")
        self._run_dir = run
        self._state = State(limits)
        self._resources = Resources(
            provider=provider,
            budget_bytes=available_bytes() // 2 if budget_bytes is None else budget_bytes,
            disconnect=self._drop_session,
            domain_ended=self._drop_domain,
        )
        self._operations = Operations(self._state, self._resources, self)
        self._sessions: dict[int, _Session] = {}
        self._listeners: dict[int, socket.socket] = {}
        self._store_link: socket.socket | None = None
        self._calls: deque[Callable[[], None]] = deque()
        self._ending: deque[_Session] = deque()
        self._thread: threading.Thread | None = None
        self._running = False
        self._stopping = False
        self._closed = False
        self._close_lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._processes = Processes(self._selector, self._end_domain)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._watch(self._wake_fd, self._run_calls)
        if run is not None:
            try:
                self._listen(DOM0, run / "hypervisor.sock", None)
            except BaseException:
                self._close()
                raise

    # Running

    def start(self) -> None:
        """Serve in a thread until `stop`."""
        self._running = True
        self._thread = threading.Thread(target=self.serve_forever, name="hypervisor", daemon=True)
        self._thread.start()

    def serve_forever(self) -> None:
        """Serve in this thread until `stop`; then everything is closed."""
        self._running = True
        try:
            while not self._stopping:
                for key, _ in self._selector.select(0 if self._ending else None):
                    # What came before in this round may have ended it, and its descriptor may be another's by now.
                    if self._selector.get_map().get(key.fd) is key:
                        self._serve(key.data)
                if self._ending:
                    self._serve(self._go_on_ending)
        finally:
            self._close()

    @staticmethod
    def _serve(event: Callable[[], None]) -> None:
        """One event. Whatever a defect of ours does to it, the domains of everybody else go on."""
        try:
            event()
        except Exception:
            log.exception("a defect of the hypervisor")

    def stop(self) -> None:
        """End serving; from any thread or a signal handler. Harmless when repeated.

        An orderly stop ends every domain: init processes are killed. Other processes keep what they have mapped; their
        next call raises `HypervisorGone`.
        """
        self._stopping = True
        if not self._running:
            self._close()
        elif not self._closed:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake_fd, 1)
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join()

    def connect(self, domid: int = DOM0) -> int:
        """A connected socket of a process of that domain, for this same process; the descriptor is the caller's.

        Raises `HypervisorError` (ESRCH), `ResourceLimit`, `Closed` when the broker does not run.
        """
        try:
            return self._in_loop(lambda: self.domain_socket(domid))
        except Refused as refusal:
            raise HypervisorError(str(refusal), refusal.code) from refusal

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Calls from other threads

    def _in_loop(self, call: Callable[[], int]) -> int:
        result: Future[int] = Future()

        def run() -> None:
            try:
                result.set_result(call())
            except BaseException as error:
                result.set_exception(error)

        with self._close_lock:
            if self._closed or self._stopping or not self._running:
                raise Closed("the hypervisor does not run")
            self._calls.append(run)
            os.eventfd_write(self._wake_fd, 1)
        return result.result()

    def _run_calls(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while self._calls:
            self._calls.popleft()()

    # What operations need (operations.Shell)

    def domain_created(self, domain: Domain) -> None:
        if self._run_dir is None:
            return
        home = self._run_dir / "domains" / str(domain.domid)
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            uid = domain.uid if os.geteuid() == 0 else None
            self._listen(domain.domid, home / "hypervisor.sock", uid)
        except (OSError, ParavirtError) as error:
            short = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOSPC)
            code = errno.ENOSPC if short else errno.EIO
            raise Refused(code, f"no listening socket for domain {domain.domid}: {error}") from error

    def domain_socket(self, domid: int) -> int:
        try:
            ours, theirs = sockets.make_pair()
        except OSError as error:
            raise ResourceLimit(f"no descriptors for another connection: {error.strerror}") from error
        try:
            self._add_session(domid, ours)
        except Refused:
            ours.close()
            theirs.close()
            raise
        return theirs.detach()

    def watch_process(self, domid: int, pidfd: int, *, init: bool) -> None:
        if init:
            self._processes.set_init(domid, pidfd)
        else:
            self._processes.add(domid, pidfd)

    def pid_of(self, connection: int) -> int:
        session = self._sessions.get(connection)
        return 0 if session is None else session.pid

    def open_store_link(self, connection: int) -> int:
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise ResourceLimit(f"no descriptors for xenstored's link: {error.strerror}") from error
        self._store_link = ours
        self._watch(ours.fileno(), self._store_readable)
        return theirs.detach()

    def store_socket(self, domid: int) -> int:
        assert self._store_link is not None
        message = new_message(Op.STORE_CONNECTION)
        message.header.n_fds, message.domain.domid = 1, domid
        try:
            theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            raise ResourceLimit(f"no descriptors for another connection: {error.strerror}") from error
        with theirs:
            try:
                sockets.send(self._store_link, to_bytes(message), [theirs.fileno()])
            except ConnectionError as error:
                ours.close()
                self._drop_store()
                raise Refused(errno.ENOENT, "no xenstored: it has closed its link") from error
            except OSError as error:
                ours.close()
                raise Refused(errno.EAGAIN, f"xenstored takes no connection now: {error.strerror}") from error
        return ours.detach()

    # Events of the selector

    def _watch(self, fd: int, callback: Callable[[], None], events: int = selectors.EVENT_READ) -> None:
        self._selector.register(fd, events, callback)

    def _listen(self, domid: int, path: Path, uid: int | None) -> None:
        listener = sockets.listen(path, uid)
        self._listeners[domid] = listener
        self._watch(listener.fileno(), lambda: self._accept(domid, listener))

    def _accept(self, domid: int, listener: socket.socket) -> None:
        try:
            ours, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away(listener)
            return
        try:
            sockets.limit_backlog(ours)
            self._add_session(domid, ours)
        except Refused as refusal:
            log.warning("connection refused: %s", refusal)
            ours.close()

    def _turn_away(self, listener: socket.socket) -> None:
        """Out of descriptors: take one that waits with the spare one and close it, or it would wake us for ever."""
        log.error("connection refused: out of descriptors")
        os.close(self._spare_fd)
        with contextlib.suppress(OSError):
            listener.accept()[0].close()
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _add_session(self, domid: int, ours: socket.socket) -> None:
        session = _Session(self._state.connect(domid), domid, ours)
        self._sessions[session.number] = session
        self._watch(ours.fileno(), lambda: self._readable(session))

    def _readable(self, session: _Session) -> None:
        if session.number not in self._sessions:
            return
        try:
            received = sockets.receive(session.socket)
        except (BlockingIOError, InterruptedError):
            return
        except PeerError as error:
            self._break_off(session, error)
            return
        if received is None:
            self._end_session(session)
            return
        try:
            self._handle(session, received)
        except PeerError as error:
            self._break_off(session, error)
        except Exception:
            log.exception("%s closed: a defect of the hypervisor", session)
            self._end_session(session)
        finally:
            sockets.close_all(received.fds)

    def _handle(self, session: _Session, received: sockets.Received) -> None:
        request = parse(received.data)
        if session.greeted == (request.header.op == Op.HELLO):
            raise PeerError("a second greeting" if session.greeted else "no greeting")
        if received.lost_fds:
            answer = Answer(new_message(request.header.op, request.header.seq))
            answer.fail(errno.ENOMEM, "the hypervisor can hold no more descriptors")
        else:
            answer = self._operations.answer(session.number, request, received.fds)
        if not session.greeted:
            session.greeted, session.pid = True, received.pid or session.pid
            sockets.name_senders(session.socket, False)
        self._send(session, answer)

    def _send(self, session: _Session, answer: Answer) -> None:
        try:
            try:
                sockets.send(session.socket, to_bytes(answer.message), answer.fds)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                # Somebody of our uid has too many on their way: the client sees that its own are missing.
                sockets.send(session.socket, to_bytes(answer.message), [])
        except BlockingIOError:
            self._send_later(session, answer)
        except OSError as error:
            self._cannot_send(session, answer, error)
        else:
            answer.close()

    def _send_later(self, session: _Session, answer: Answer) -> None:
        """Until then nothing more is heard from there."""
        try:
            answer.keep()
        except OSError as error:
            self._cannot_send(session, answer, error)
        else:
            session.unsent = answer
            self._selector.modify(session.socket, selectors.EVENT_WRITE, lambda: self._writable(session))

    def _cannot_send(self, session: _Session, answer: Answer, error: OSError) -> None:
        log.info("%s: %s", session, error.strerror)
        answer.close()
        self._end_session(session)

    def _writable(self, session: _Session) -> None:
        if session.number not in self._sessions or session.unsent is None:
            return
        answer, session.unsent = session.unsent, None
        self._selector.modify(session.socket, selectors.EVENT_READ, lambda: self._readable(session))
        self._send(session, answer)

    def _store_readable(self) -> None:
        link = self._store_link
        if link is None:
            return
        try:
            received = sockets.receive(link)
        except (BlockingIOError, InterruptedError):
            return
        except PeerError:
            received = None
        if received is None:
            self._drop_store()
            return
        sockets.close_all(received.fds)
        try:
            message = parse(received.data)
            if message.header.op != Op.STORE_RELEASED:
                raise PeerError(f"unknown operation {message.header.op} from xenstored")
        except PeerError as error:
            log.warning("link to xenstored closed: %s", error)
            self._drop_store()
        else:
            self._state.store_released(message.domain.domid)

    def _end_domain(self, domid: int) -> None:
        self._resources.carry_out(self._state.end_domain(domid))

    # Ends

    def _break_off(self, session: _Session, error: PeerError) -> None:
        log.warning("%s closed: %s", session, error)
        self._end_session(session)

    def _end_session(self, session: _Session) -> None:
        """At once if it has little; else it is not listened to any more, and others have their turn in between."""
        if session.number in self._sessions and session not in self._ending and not self._end_some(session):
            self._selector.unregister(session.socket)
            self._ending.append(session)

    def _end_some(self, session: _Session) -> bool:
        effects, done = self._state.disconnect_some(session.number, END_SLICE)
        self._resources.carry_out(effects)
        return done

    def _go_on_ending(self) -> None:
        session = self._ending.popleft()
        if session.number in self._sessions and not self._end_some(session):
            self._ending.append(session)

    def _drop_session(self, number: int) -> None:
        session = self._sessions.pop(number, None)
        if session is not None:
            if session.socket.fileno() in self._selector.get_map():
                self._selector.unregister(session.socket)
            session.socket.close()
            if session.unsent is not None:
                session.unsent.close()

    def _drop_domain(self, domid: int) -> None:
        self._processes.kill(domid)
        if listener := self._listeners.pop(domid, None):
            self._drop_listener(listener)

    def _drop_listener(self, listener: socket.socket) -> None:
        path = Path(listener.getsockname())
        self._selector.unregister(listener)
        listener.close()
        path.unlink(missing_ok=True)
        if path.parent != self._run_dir:
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def _drop_store(self) -> None:
        link, self._store_link = self._store_link, None
        if link is not None:
            self._selector.unregister(link)
            link.close()
            self._state.unregister_store()

    def _close(self) -> None:
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        self._run_calls()
        for session in list(self._sessions):
            self._drop_session(session)
        self._processes.kill_all()
        for listener in self._listeners.values():
            self._drop_listener(listener)
        self._listeners.clear()
        self._drop_store()
        self._resources.close()
        self._selector.close()
        os.close(self._wake_fd)
        os.close(self._spare_fd)

    def __repr__(self) -> str:
        state: Any = "closed" if self._closed else f"{len(self._sessions)} connections"
        return f"<BrokerServer {state}>"
