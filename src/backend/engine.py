# SPDX-License-Identifier: MIT
"""The data path of a block backend: take requests, do them, answer.

An engine serves one connected ring until it is stopped. Discovery, negotiation and policy are not its business
(`backend/vbd.py`), which is why several engines can stand behind the same negotiation.
"""

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

from paravirt.backend import connection
from paravirt.backend.connection import Connection as Connection
from paravirt.backend.disks import Disk
from paravirt.errors import ParavirtError, PeerError
from paravirt.protocol.blkif import Operation
from paravirt.protocol.vbd import VbdOffer
from paravirt.ring import blkif
from paravirt.ring.blkif_grants import PersistentGrants
from paravirt.ring.memory import address_of
from paravirt.ring.ring_statistics import RingStatistics, total_of
from paravirt.ring.vbd_throttle import Throttle
from paravirt.ring.waiting import take_spin

log = logging.getLogger(__name__)

# How long the thread answers bad requests at most: one error a millisecond, so that a guest cannot make Dom0 spend its
# time on refusals (Linux' blkback does the same).
ERROR_PAUSE_S = 0.001

# Requests answered at once, at most: a frontend with many in flight gets the first while the last are done.
MAX_BATCH = 16

# How soon an engine that waits for its disk's limits sees that they have changed.
THROTTLED_S = 0.05

MAX_BUFFERS = 1024  # of one call to a disk, which may be one to the kernel (IOV_MAX)

# What of `blkif.Limits` says whether there is an operation.
OPTIONAL = {
    Operation.WRITE_BARRIER: "barrier",
    Operation.FLUSH_DISKCACHE: "flush",
    Operation.DISCARD: "discard",
}

UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS)

# How long a disk may go on with what it does when the engine stops, and how often it is told to leave it.
STOP_PATIENCE_S = 0.2
STOP_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """Counts since the engine started."""

    reads: int  # answered requests that needed the disk
    writes: int  # with and without a barrier
    flushes: int
    discards: int
    read_bytes: int  # of those that succeeded
    written_bytes: int
    refused: int  # requests that failed validation
    errors: int  # requests the disk failed
    batches: int  # times the ring was found non-empty
    ring: RingStatistics
    queues: tuple["EngineStatistics", ...] = ()
    """Of a device: that of each queue, of which the rest is the sum. Of a queue: nothing."""
    persistent_grants: int = 0  # pages that stay mapped, now


def total(queues: Sequence[EngineStatistics]) -> EngineStatistics:
    """Of a device that has these queues, one or more."""
    counts = {
        field.name: sum(getattr(queue, field.name) for queue in queues)
        for field in fields(EngineStatistics)
        if field.name not in ("ring", "queues")
    }
    return EngineStatistics(**counts, ring=total_of([queue.ring for queue in queues]), queues=tuple(queues))


Engine = connection.Engine[EngineStatistics]


@dataclass(frozen=True, slots=True)
class Terms:
    """What both ends have agreed on, and whom an engine tells what. It calls from its own thread."""

    offer: VbdOffer
    on_failure: Callable[[ParavirtError], None]
    """The peer broke the protocol, or the engine failed; once."""
    on_unsupported: Callable[[Operation], None]
    """The disk does not have an operation that was offered; the request was answered so."""
    x86_32: bool = False
    """Requests have the layout of that ABI."""
    persistent: bool = False
    """Grants stay mapped from one request to the next, until the engine stops."""
    spin_ns: int = 0
    throttle: Throttle | None = None
    """How much the disk may do, shared by its queues; None: as much as it can."""


class VbdEngine(Engine, Protocol):
    def resize(self, sectors: int) -> None:
        """From now on the disk has so many sectors of 512 bytes. From any thread."""

    def withdraw(self, operation: Operation) -> None:
        """Another queue has found that the disk does not have it. From any thread."""


class EngineFactory(Protocol):
    def __call__(self, connection: Connection, disk: Disk, terms: Terms) -> VbdEngine:
        """An engine that is not started yet."""


class PythonEngine:
    """One thread a queue: take a batch, validate and map it in C, read or write the disk, answer."""

    def __init__(self, connection: Connection, disk: Disk, terms: Terms) -> None:
        self._ring = connection.ring
        self._waiter = connection.waiter
        self._disk = disk
        self._spin_ns = take_spin(terms.spin_ns)
        self._terms = terms
        self._throttle = terms.throttle
        capacity = self._capacity = min(MAX_BATCH, connection.ring.size)
        self._batch = blkif.RequestBatch(connection.mapper, connection.data.view, capacity, x86_32=terms.x86_32)
        self._batch.count_in(connection.ring)
        self._persistent = PersistentGrants(connection.mapper) if terms.persistent else None
        self._batch.persist(self._persistent)
        self._limits = limits_of(terms.offer)
        self._wanted_limits = self._limits
        self._batch.set_limits(self._limits)
        self._memory = None if disk.memory is None else address_of(disk.memory)[0]
        self._in_c = self._memory is not None or disk.fd is not None
        self._batch.set_disk(memory=self._memory, n_bytes=disk.size_bytes, fd=-1 if disk.fd is None else disk.fd)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vbd-engine", daemon=True)
        self._abandoned = False  # a batch that the stop has interrupted is not answered
        self._batches = 0
        self._errors: set[int] = set()  # errno of what has been complained of
        self._changing = threading.Lock()  # guards _wanted_limits against two threads that change it

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._waiter.kick()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(STOP_PATIENCE_S)
            while self._thread.is_alive():
                self._disk.interrupt()
                self._thread.join(STOP_RETRY_S)
        self._batch.set_disk()
        self._batch.persist(None)
        if self._persistent is not None:
            self._persistent.close()
        self._batch.count_in(None)  # the ring is closed next
        self._memory = None

    def resize(self, sectors: int) -> None:
        self._change(sectors=sectors)

    def withdraw(self, operation: Operation) -> None:
        if name := OPTIONAL.get(operation):
            self._change(**{name: False})

    def _change(self, **limits: int | bool) -> None:
        with self._changing:
            self._wanted_limits = replace(self._wanted_limits, **limits)  # type: ignore[arg-type]

    def statistics(self) -> EngineStatistics:
        done = self._batch.counters
        return EngineStatistics(
            reads=done.reads,
            writes=done.writes,
            flushes=done.flushes,
            discards=done.discards,
            read_bytes=done.read_bytes,
            written_bytes=done.written_bytes,
            refused=done.refused,
            errors=done.errors,
            batches=self._batches,
            ring=self._ring.statistics(),
            persistent_grants=self._persistent.statistics().cached if self._persistent else 0,
        )

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._serve_once()
        except PeerError as error:
            self._terms.on_failure(error)
        except Exception as error:
            if not self._stopping.is_set():
                log.exception("the engine failed")
                self._terms.on_failure(ParavirtError(f"the engine failed: {error}"))

    def _serve_once(self) -> None:
        batch, ring = self._batch, self._ring
        room = self._room()
        if not room:
            return
        n = ring.take(batch.requests, room, spin_ns=self._spin_ns)
        if n == 0:
            ring.wait()
            return
        self._batches += 1
        if self._wanted_limits is not self._limits:
            self._limits = self._wanted_limits
            batch.set_limits(self._limits)
        refused, before = batch.counters.refused, self._done()
        self._answer(n)
        if self._throttle is not None and self._throttle.is_on:
            self._throttle.charge(*(after - earlier for after, earlier in zip(self._done(), before, strict=True)))
        if batch.counters.refused != refused:
            log.debug("%d requests refused, the first: %s", batch.counters.refused - refused, batch.refusal(n))
            self._stopping.wait(ERROR_PAUSE_S)

    def _done(self) -> tuple[int, int]:
        """Requests and bytes, so far."""
        done = self._batch.counters
        requests = done.reads + done.writes + done.flushes + done.discards
        return requests, done.read_bytes + done.written_bytes

    def _room(self) -> int:
        """How many requests may be taken, after a wait if there is none now."""
        throttle = self._throttle
        if throttle is None or not throttle.is_on:
            return self._capacity
        if wait_s := throttle.wait_s:
            self._stopping.wait(min(wait_s, THROTTLED_S))
            return 0
        return throttle.room(self._capacity)

    def _answer(self, n: int) -> None:
        """Do the first `n` requests of the batch and send the answers."""
        batch = self._batch
        if not self._in_c:
            batch.prepare(n)
        elif batch.serve(self._ring, n):
            if batch.error:
                self._complain(batch.error)
            if batch.unsupported:
                for operation in Operation:
                    if batch.unsupported >> operation & 1:
                        self._withdraw(operation)
            return
        pending = [i for i in range(n) if batch.is_pending(i)]
        for run in self._runs(pending) if self._disk.many_in_flight else ([i] for i in pending):
            if len(run) > 1:
                self._several(run)
            else:
                batch.complete(run[0], self._one(run[0]))
        batch.finish(n)
        if not self._abandoned:
            self._ring.push(batch.responses, n)

    def _one(self, i: int) -> int:
        operation = Operation(self._batch.operation(i))
        offset, length = self._batch.place(i)
        try:
            self._do(i, operation, offset, length)
        except OSError as error:
            log.debug("request at byte %d: %s", offset, error)
            return self._failed(operation, error.errno or errno.EIO)
        return blkif.OKAY

    def _failed(self, operation: Operation, error: int) -> int:
        """The status of a request that the disk has failed."""
        # What is not done because we stop is not an error: unanswered, the frontend sends it again to the next.
        self._abandoned = self._abandoned or self._stopping.is_set()
        if error in UNSUPPORTED and operation not in (Operation.READ, Operation.WRITE):
            self._withdraw(operation)
            return blkif.EOPNOTSUPP
        self._complain(error)
        return blkif.ERROR

    def _runs(self, pending: Sequence[int]) -> Iterator[list[int]]:
        """Requests in order, those together that may be done in any: reads, and writes that do not overlap."""
        run: list[int] = []
        for i in pending:
            if run and not self._goes_beside(run, i):
                yield run
                run = []
            run.append(i)
        if run:
            yield run

    def _goes_beside(self, run: Sequence[int], i: int) -> bool:
        batch = self._batch
        operation = batch.operation(i)
        if operation not in (Operation.READ, Operation.WRITE) or operation != batch.operation(run[0]):
            return False
        offset, length = batch.place(i)
        places = (batch.place(other) for other in run)
        return operation == Operation.READ or all(
            offset + length <= start or start + n_bytes <= offset for start, n_bytes in places
        )

    def _several(self, run: Sequence[int]) -> None:
        batch, disk = self._batch, self._disk
        operation = Operation(batch.operation(run[0]))
        call = disk.preadv_many if operation == Operation.READ else disk.pwritev_many
        errors = call([(batch.buffers(i), batch.place(i)[0]) for i in run])
        for i, error in zip(run, errors, strict=True):
            batch.complete(i, self._failed(operation, error) if error else blkif.OKAY)

    def _do(self, i: int, operation: Operation, offset: int, length: int) -> None:
        disk, batch = self._disk, self._batch
        match operation:
            case Operation.READ:
                self._move(disk.preadv, batch.buffers(i), offset)
            case Operation.WRITE:
                self._move(disk.pwritev, batch.buffers(i), offset)
            case Operation.WRITE_BARRIER:
                # What was answered before is durable before it, and it is itself when it is answered.
                disk.flush()
                if length:
                    self._move(disk.pwritev, batch.buffers(i), offset)
                    disk.flush()
            case Operation.DISCARD:
                disk.discard(offset, length, batch.is_secure(i))
            case _:
                disk.flush()

    def _move(
        self, call: Callable[[Sequence[memoryview], int], None], buffers: Sequence[memoryview], offset: int
    ) -> None:
        for start in range(0, len(buffers), MAX_BUFFERS):
            part = buffers[start : start + MAX_BUFFERS]
            call(part, offset)
            offset += sum(map(len, part))

    def _withdraw(self, operation: Operation) -> None:
        """The disk does not have it after all: it is offered no longer."""
        name = OPTIONAL.get(operation)
        if name is not None and getattr(self._wanted_limits, name):
            self._change(**{name: False})
            self._terms.on_unsupported(operation)

    def _complain(self, error: int) -> None:
        """Of the disk, loudly once for each kind of error: a guest must not fill the log."""
        log.log(logging.DEBUG if error in self._errors else logging.WARNING, "requests failed: %s", os.strerror(error))
        self._errors.add(error)


def limits_of(offer: VbdOffer) -> blkif.Limits:
    """What requests are held to, after an offer."""
    return blkif.Limits(
        sectors=offer.sectors,
        sector_size=offer.sector_size,
        read_only=offer.read_only,
        flush=offer.flush,
        barrier=offer.barrier,
        discard=offer.discard,
        discard_secure=offer.discard_secure,
        max_indirect_segments=offer.max_indirect_segments,
    )
