# SPDX-License-Identifier: MIT
"""Statistics objects: where the ends of a process' rings live, so that Dom0 can look at them while they run.

`Records` is the process' side: it hands out records for ring ends. `LookedObject` is such an object in Dom0's hands
(`hypervisor/looking.py`); all that stands there may be a lie, so it is copied and checked in C.
"""

import contextlib
import fcntl
import json
import os
import threading
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np

from paravirt.errors import AlreadyExists, Closed, PeerError
from paravirt.ring._core import ffi, lib

CData = Any

N_RECORDS: int = lib.PV_LOOK_RECORDS
_NAME_BYTES = lib.PV_LOOK_NAME_BYTES - 1
_LAYOUT_BYTES = lib.PV_LOOK_LAYOUT_BYTES - 1


class Wish(IntFlag):
    """What Dom0 can want of a record for a while."""

    LATENCY = lib.PV_LOOK_LATENCY
    """The latency of every message."""
    LOG = lib.PV_LOOK_TAP
    """A log of every batch."""


@dataclass(frozen=True, slots=True)
class RingLabel:
    """What an end of a ring says of itself to whoever looks."""

    kind: str
    """Class of the device: "vbd"."""
    device_id: int
    protocol: str
    """Of the messages: "blkif"."""
    domid: int
    """Whose end it is."""
    peer_domid: int
    granter_domid: int
    """In whose pages the ring stands."""
    refs: tuple[int, ...]
    """Grant references of these pages, in order."""
    port: int = 0
    """Event channel of this end; 0: none."""
    queue: int = 0


class Record:
    """A place for one end of a ring, from `Records.claim`; it goes to the ring that is made in it."""

    def __init__(self, owner: "Records", core: CData, number: int, label: RingLabel) -> None:
        self._owner = owner  # and so the memory stays
        self._core = core
        self._number = number
        core.kind, core.protocol = b"", b""
        core.kind = label.kind.encode()[:_NAME_BYTES]
        core.protocol = label.protocol.encode()[:_NAME_BYTES]
        core.device_id, core.queue, core.port = label.device_id % 2**32, label.queue, label.port
        core.domid, core.peer_domid, core.granter_domid = label.domid, label.peer_domid, label.granter_domid
        core.n_refs = min(len(label.refs), lib.PV_LOOK_REFS)
        for i in range(core.n_refs):
            core.refs[i] = label.refs[i]

    @property
    def ring(self) -> CData:
        """`struct pv_ring *`, zeroed or stale, to be made into a ring."""
        owner = self._owner
        return ffi.gc(ffi.addressof(self._core, "ring"), lambda _: owner)  # keeps the memory as long as the pointer

    def begin(self, request: "np.dtype[Any]", response: "np.dtype[Any]") -> None:
        """The ring is made: show it."""
        self._core.request, self._core.response = _layout(request), _layout(response)
        lib.pv_look_begin(self._core, self._number)

    def end(self) -> None:
        """The ring is closed, or was never made. Harmless when repeated."""
        self._owner.give_back(self)

    def give_up(self) -> CData:
        """The memory, once; afterwards None."""
        core, self._core = self._core, None
        return core

    @property
    def number(self) -> int:
        """In its object."""
        return self._number


def _map(fd: int, *, as_dom0: bool) -> CData:
    head = lib.pv_look_map(fd, as_dom0)
    if head == ffi.NULL:
        raise OSError(ffi.errno, f"a statistics object cannot be mapped: {os.strerror(ffi.errno)}")
    return ffi.gc(head, lib.pv_look_unmap)


class Records:
    """One statistics object of this process. Thread-safe. The memory goes with the last of its records."""

    def __init__(self, fd: int) -> None:
        """The descriptor stays the caller's. Raises `OSError`."""
        # Inherited by forked children, whose calls on the rings in it are refused by the mark in each ring.
        self._head = _map(fd, as_dom0=False)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._free = list(range(N_RECORDS - 1, -1, -1))
        lib.pv_look_init(self._head)

    def claim(self, label: RingLabel) -> Record | None:
        """A record for a new end; None when all are taken, or in a forked child."""
        if os.getpid() != self._pid:
            return None
        with self._lock:
            if not self._free:
                return None
            number = self._free.pop()
        return Record(self, lib.pv_look_at(self._head, number), number, label)

    def give_back(self, record: Record) -> None:
        core = record.give_up()
        if core is None or os.getpid() != self._pid:
            return
        if core.state == lib.PV_LOOK_LIVE:
            lib.pv_look_end(core)
        with self._lock:
            self._free.append(record.number)


def _layout(message: "np.dtype[Any]") -> bytes:
    """The fields of a message as JSON; b"" for one that is too long to say."""
    text = json.dumps(_described(message), separators=(",", ":")).encode()
    return text if message.names and len(text) <= _LAYOUT_BYTES else b""


def _described(kind: "np.dtype[Any]") -> Any:
    """A name of numpy's; [kind, shape] of an array; of a structure {field: [kind, offset], "": size}."""
    if kind.subdtype is not None:
        return [_described(kind.subdtype[0]), list(kind.shape)]
    if kind.fields is None:
        return kind.str
    return {name: [_described(field[0]), field[1]] for name, field in kind.fields.items()} | {"": kind.itemsize}


def parse_layout(text: bytes, n_bytes: int) -> "np.dtype[Any] | None":
    """What `_layout` wrote; None for anything that is not a layout of exactly `n_bytes`."""
    with contextlib.suppress(Exception):  # numpy raises whatever it likes for nonsense
        made = _parsed(json.loads(text), n_bytes)
        if made.names and made.itemsize == n_bytes and not made.hasobject:
            return made
    return None


def _parsed(told: Any, n_bytes: int) -> "np.dtype[Any]":
    """Of exactly so many bytes. Raises whatever comes for anything else."""
    if isinstance(told, dict):
        size = told.pop("")
        fields = {name: (_parsed(kind, n_bytes), offset) for name, (kind, offset) in told.items()}
        made = np.dtype(
            {
                "names": list(fields),
                "formats": [kind for kind, _ in fields.values()],
                "offsets": [offset for _, offset in fields.values()],
                "itemsize": size,
            }
        )
    elif isinstance(told, list):
        made = np.dtype((_parsed(told[0], n_bytes), tuple(told[1])))
    else:
        made = np.dtype(str(told))
    if made.itemsize > n_bytes:
        raise ValueError("too large")
    return made


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of messages as an end pushed or took it: an entry of a log."""

    time_ns: int
    """CLOCK_MONOTONIC."""
    record: int
    """Of the end, in its object..."""
    generation: int
    """...and the end's generation."""
    index: int
    """Of the first message in the ring; the others follow, modulo 2**32. A gap to the batch before was lost."""
    count: int
    message_bytes: int
    taken: bool
    """Taken from the ring by this end, not pushed by it."""
    data: bytes
    """All messages, packed."""


class LookedObject:
    """A statistics object of another process, as Dom0 sees it: records to copy, wishes to write, a log to read."""

    def __init__(self, fd: int) -> None:
        """The descriptor is taken. Raises `OSError` when it cannot be mapped."""
        self._fd = fd
        self._lock_fd = -1
        self._entry = ffi.new("struct pv_look_entry *")
        self._messages = ffi.new("uint8_t[]", lib.PV_RING_MAX_BYTES)
        try:
            self._head: CData | None = _map(fd, as_dom0=True)
        except BaseException:
            os.close(fd)
            raise

    @property
    def head(self) -> CData:
        """`struct pv_look_head *` of the whole object, for the C functions that read it."""
        if self._head is None:
            raise Closed("this statistics object is closed")
        return self._head

    @property
    def fd(self) -> int:
        """A descriptor of the object."""
        return self._fd

    def copy(self, number: int) -> CData | None:
        """A private `struct pv_look_record *` of record `number`; None when it is free."""
        made = ffi.new("struct pv_look_record *")
        return made if lib.pv_look_copy(self.head, number, made) else None

    def live(self) -> list[int]:
        """Numbers of the records that are not free."""
        return [n for n in range(N_RECORDS) if lib.pv_look_at(self.head, n).state == lib.PV_LOOK_LIVE]

    def want(self, number: int, what: Wish, until_ns: int) -> None:
        """Want something of a record until then (CLOCK_MONOTONIC)."""
        lib.pv_look_want(self.head, number, what, until_ns)

    # The log of batches

    def open_log(self) -> None:
        """Begin to read what is logged from now on. Raises `AlreadyExists` while another recorder reads it."""
        if self._lock_fd < 0:
            # A description of our own, so that the lock is ours and not everybody's who has the object.
            self._lock_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._lock_fd)
                self._lock_fd = -1
                raise AlreadyExists("another recorder listens to this process") from error
        lib.pv_look_tap_open(self.head)

    def read_log(self) -> Batch | None:
        """The next batch; None when there is none yet. Raises `PeerError` when the process wrote nonsense, which is
        skipped with all that was logged up to now: count it, and stop when there is no end to it.
        """
        entry, messages = self._entry, self._messages
        result = lib.pv_look_tap_read(self.head, entry, messages)
        if result == 0:
            return None
        if result < 0:
            raise PeerError("a process has written nonsense into its log of batches")
        return Batch(
            time_ns=entry.ns,
            record=entry.record,
            generation=entry.generation,
            index=entry.index,
            count=entry.n,
            message_bytes=entry.message_bytes,
            taken=bool(entry.taken),
            data=bytes(ffi.buffer(messages, entry.n * entry.message_bytes)),
        )

    @property
    def log_lost(self) -> int:
        """Messages of the process that found no room in its log, ever."""
        return int(self.head.tap_lost)

    def close_log(self) -> None:
        """Give the memory of the log back and let another recorder have it. Harmless when repeated."""
        if self._lock_fd >= 0:
            lib.pv_look_tap_free(self._fd)
            os.close(self._lock_fd)
            self._lock_fd = -1

    def close(self) -> None:
        """Harmless when repeated."""
        self.close_log()
        head, self._head = self._head, None
        if head is not None:
            ffi.release(head)
            os.close(self._fd)

    def __enter__(self) -> "LookedObject":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
