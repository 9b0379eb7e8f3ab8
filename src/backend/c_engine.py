# SPDX-License-Identifier: MIT
"""The engine in C behind a backend: what it says of itself becomes what `Terms` wants to hear."""

import errno
import itertools
import logging
import os
import threading
from dataclasses import replace
from typing import Literal

from paravirt.backend.connection import Connection
from paravirt.backend.disks import Disk
from paravirt.backend.disks.base import core_kind
from paravirt.backend.engine import (
    OPTIONAL,
    STOP_PATIENCE_S,
    STOP_RETRY_S,
    EngineFactory,
    EngineStatistics,
    PythonEngine,
    Terms,
    VbdEngine,
    limits_of,
)
from paravirt.errors import InvalidRequest, ParavirtError, PeerError
from paravirt.protocol.blkif import Operation
from paravirt.ring import vbd_engine
from paravirt.ring.blkif_grants import PersistentGrants
from paravirt.ring.vbd_engine import Board, DiskPlace, Notice, What
from paravirt.ring.waiting import take_spin

log = logging.getLogger(__name__)

EngineName = Literal["auto", "c", "python"]
ENGINES: tuple[EngineName, ...] = ("auto", "c", "python")


class CEngine:
    """A thread in C for one ring. Disks that are what the core knows (`core_kind`); others are a `PythonEngine`'s."""

    def __init__(self, connection: Connection, disk: Disk, terms: Terms) -> None:
        """Raises `InvalidRequest` for a disk whose own methods have to be called."""
        kind = core_kind(disk)
        if kind is None:
            raise InvalidRequest(f"{type(disk).__name__} is no disk that the engine in C can serve")
        self._connection = connection
        self._terms = terms
        self._limits = limits_of(terms.offer)
        self._changing = threading.Lock()  # guards _limits
        self._errors = 0  # kinds of errors that were complained of
        self._persistent = PersistentGrants(connection.mapper) if terms.persistent else None
        self._office = _Office.enter()
        self._token = self._office.register(self)
        try:
            self._engine = vbd_engine.Engine(
                connection.ring,
                connection.mapper,
                self._office.board,
                self._token,
                limits=self._limits,
                disk=DiskPlace(
                    kind,
                    memory=disk.memory,
                    fd=-1 if disk.fd is None else disk.fd,
                    uring=disk.uring,
                    direct=disk.direct,
                ),
                x86_32=terms.x86_32,
                persistent=self._persistent,
                throttle=terms.throttle,
                take_spin_ns=take_spin(terms.spin_ns),
                wait_spin_ns=connection.ring.wait_ns,
            )
        except BaseException:
            self._office.leave(self._token)
            if self._persistent is not None:
                self._persistent.close()
            raise
        self._left = False
        if error := self._engine.uring_error:
            _say_once(f"no io_uring ({error}): files are read and written by blocking calls")

    def start(self) -> None:
        self._engine.start()

    def stop(self) -> None:
        patience_s = STOP_PATIENCE_S
        while not self._engine.stop(patience_s):
            patience_s = STOP_RETRY_S  # the kernel is at it, whom nobody can interrupt
        if self._persistent is not None:
            self._persistent.close()
        if not self._left:
            self._left = True
            self._office.leave(self._token)

    def resize(self, sectors: int) -> None:
        self._change(sectors=sectors)

    @property
    def uring(self) -> bool:
        """The disk is asked through io_uring."""
        return self._engine.uring

    def withdraw(self, operation: Operation) -> None:
        if name := OPTIONAL.get(operation):
            self._change(**{name: False})

    def _change(self, **limits: int | bool) -> None:
        with self._changing:
            self._limits = replace(self._limits, **limits)  # type: ignore[arg-type]
            self._engine.set_limits(self._limits)

    def statistics(self) -> EngineStatistics:
        done = self._engine.counters
        return EngineStatistics(
            reads=done.reads,
            writes=done.writes,
            flushes=done.flushes,
            discards=done.discards,
            read_bytes=done.read_bytes,
            written_bytes=done.written_bytes,
            refused=done.refused,
            errors=done.errors,
            batches=self._engine.batches,
            ring=self._connection.ring.statistics(),
            persistent_grants=self._persistent.statistics().cached if self._persistent else 0,
        )

    def hear(self, notice: Notice) -> None:
        """What the engine has said, in the office's thread."""
        try:
            self._hear(notice)
        except PeerError as error:
            self._terms.on_failure(error)
        except ParavirtError as error:
            self._terms.on_failure(ParavirtError(f"the engine failed: {error}"))

    def _hear(self, notice: Notice) -> None:
        if What.DISK in notice.what:
            log.warning("requests failed: %s", os.strerror(notice.error))
        if What.REFUSED in notice.what:
            log.debug("requests refused, the first: %s", notice.reason)
        if What.STALE in notice.what:
            self._connection.port.notify_stale()
        for operation in Operation:
            if notice.unsupported >> operation & 1:
                self._withdraw(operation)
        if What.PEER in notice.what:
            self._connection.ring.settle_push(-errno.EPROTO)
        if What.FAILED in notice.what:
            raise ParavirtError(os.strerror(notice.failure))

    def _withdraw(self, operation: Operation) -> None:
        """The disk does not have it after all: it is offered no longer."""
        name = OPTIONAL.get(operation)
        if name is not None and getattr(self._limits, name):
            self._change(**{name: False})
            self._terms.on_unsupported(operation)


class _Office:
    """The thread that reads the board of all engines of this process: there while there is one."""

    _lock = threading.Lock()  # guards _open and everything of an office but its board
    _open: "_Office | None" = None

    def __init__(self) -> None:
        self.board = Board()
        self._engines: dict[int, CEngine] = {}
        self._users = 0
        self._pid = os.getpid()
        self._hearing = threading.RLock()  # an engine that has left is not heard any more
        self._thread = threading.Thread(target=self._run, name="vbd-engines", daemon=True)

    @classmethod
    def enter(cls) -> "_Office":
        with cls._lock:
            office = cls._open
            if office is None or office._pid != os.getpid():
                office = cls._open = cls()
                office._thread.start()
            office._users += 1
            return office

    def register(self, engine: CEngine) -> int:
        """The engine's token."""
        token = next(_tokens)
        with self._hearing:
            self._engines[token] = engine
        return token

    def leave(self, token: int) -> None:
        """When this returns, nothing is said in the engine's name any more."""
        if self._pid != os.getpid():
            return
        with self._hearing:
            self._engines.pop(token)
        with self._lock:
            self._users -= 1
            if self._users:
                return
            _Office._open = None
        self.board.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while (notice := self.board.wait()) is not None:
            with self._hearing:
                engine = self._engines.get(notice.token)
                if engine is None:
                    continue
                try:
                    engine.hear(notice)
                except Exception:
                    log.exception("what an engine said could not be dealt with")


_tokens = itertools.count(1)
_said: set[str] = set()


def _say_once(what: str) -> None:
    """Of what is so for all engines of this process."""
    if what not in _said:
        _said.add(what)
        log.warning("%s", what)


def make_engine(connection: Connection, disk: Disk, terms: Terms) -> VbdEngine:
    """In C for a disk that is served there, else in Python."""
    return (PythonEngine if core_kind(disk) is None else CEngine)(connection, disk, terms)


_FACTORIES: dict[EngineName, EngineFactory] = {"auto": make_engine, "c": CEngine, "python": PythonEngine}


def engine_factory(name: EngineName) -> EngineFactory:
    """`auto`: in C for every disk that can be served there, in Python for the others; `python`: all in Python; `c`: in
    C, and other disks are refused.

    Raises `InvalidRequest`.
    """
    if name not in ENGINES:
        raise InvalidRequest(f"an engine is one of {', '.join(ENGINES)}, not {name!r}")
    return _FACTORIES[name]
