# SPDX-License-Identifier: MIT
"""The data path of a block backend: take requests, do them, answer.

An engine serves one connected ring until it is stopped. Discovery, negotiation and policy are not its business
(`backend/vbd.py`), which is why several engines can stand behind the same negotiation.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from paravirt.backend import connection
from paravirt.backend.connection import Connection as Connection
from paravirt.backend.disks import Disk
from paravirt.errors import ParavirtError, PeerError
from paravirt.protocol.blkif import SECTOR_BYTES, Operation
from paravirt.ring import blkif
from paravirt.ring.memory import address_of
from paravirt.ring.shared import RingStatistics
from paravirt.ring.waiting import take_spin

log = logging.getLogger(__name__)

# How long the thread answers bad requests at most: one error a millisecond, so that a guest cannot make Dom0 spend its
# time on refusals (Linux' blkback does the same).
ERROR_PAUSE_S = 0.001

# Requests answered at once, at most: a frontend with many in flight gets the first while the last are done.
MAX_BATCH = 16


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Counts since the engine started."""

    reads: int  # answered requests that needed the disk
    writes: int
    flushes: int
    read_bytes: int  # of those that succeeded
    written_bytes: int
    refused: int  # requests that failed validation
    errors: int  # requests the disk failed
    batches: int  # times the ring was found non-empty
    ring: RingStatistics


Engine = connection.Engine[EngineStatistics]


class EngineFactory(Protocol):
    def __call__(
        self, connection: Connection, disk: Disk, *, spin_ns: int, on_failure: Callable[[ParavirtError], None]
    ) -> Engine:
        """An engine that is not started yet."""


class PythonEngine:
    """One thread: take a batch, validate and map it in C, read or write the disk, answer."""

    def __init__(
        self, connection: Connection, disk: Disk, *, spin_ns: int, on_failure: Callable[[ParavirtError], None]
    ) -> None:
        self._ring = connection.ring
        self._waiter = connection.waiter
        self._disk = disk
        self._spin_ns = take_spin(spin_ns)
        self._on_failure = on_failure
        capacity = min(MAX_BATCH, connection.ring.size)
        self._batch = blkif.RequestBatch(connection.mapper, connection.data.view, capacity)
        self._batch.set_limits(
            sectors=disk.size_bytes // SECTOR_BYTES,
            sector_size=disk.sector_size,
            read_only=disk.read_only,
            flush=True,
        )
        self._memory = None if disk.memory is None else address_of(disk.memory)[0]
        self._in_c = self._memory is not None or disk.fd is not None
        self._batch.set_disk(memory=self._memory, n_bytes=disk.size_bytes, fd=-1 if disk.fd is None else disk.fd)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vbd-engine", daemon=True)
        self._batches = 0
        self._errors: set[int] = set()  # errno of what has been complained of

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._waiter.kick()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._batch.set_disk()
        self._memory = None

    def statistics(self) -> EngineStatistics:
        done = self._batch.counters
        return EngineStatistics(
            reads=done.reads,
            writes=done.writes,
            flushes=done.flushes,
            read_bytes=done.read_bytes,
            written_bytes=done.written_bytes,
            refused=done.refused,
            errors=done.errors,
            batches=self._batches,
            ring=self._ring.statistics(),
        )

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._serve_once()
        except PeerError as error:
            self._on_failure(error)
        except Exception as error:
            if not self._stopping.is_set():
                log.exception("the engine failed")
                self._on_failure(ParavirtError(f"the engine failed: {error}"))

    def _serve_once(self) -> None:
        batch, ring = self._batch, self._ring
        n = ring.take(batch.requests, spin_ns=self._spin_ns)
        if n == 0:
            ring.wait()
            return
        self._batches += 1
        refused = batch.counters.refused
        self._answer(n)
        if batch.counters.refused != refused:
            log.debug("%d requests refused, the first: %s", batch.counters.refused - refused, batch.refusal(n))
            self._stopping.wait(ERROR_PAUSE_S)

    def _answer(self, n: int) -> None:
        """Do the first `n` requests of the batch and send the answers."""
        batch = self._batch
        if self._in_c:
            if error := batch.serve(self._ring, n):
                self._complain(error)
            return
        batch.prepare(n)
        for i in range(n):
            if batch.is_pending(i):
                batch.complete(i, self._one(i))
        batch.finish(n)
        self._ring.push(batch.responses, n)

    def _one(self, i: int) -> int:
        operation = self._batch.operation(i)
        offset, _ = self._batch.place(i)
        try:
            if operation == Operation.READ:
                self._disk.preadv(self._batch.buffers(i), offset)
            elif operation == Operation.WRITE:
                self._disk.pwritev(self._batch.buffers(i), offset)
            else:
                self._disk.flush()
        except OSError as error:
            log.debug("request at byte %d: %s", offset, error)
            self._complain(error.errno or errno.EIO)
            return blkif.ERROR
        return blkif.OKAY

    def _complain(self, error: int) -> None:
        """Of the disk, loudly once for each kind of error: a guest must not fill the log."""
        log.log(logging.DEBUG if error in self._errors else logging.WARNING, "requests failed: %s", os.strerror(error))
        self._errors.add(error)
