# SPDX-License-Identifier: MIT
"""What is said to a program in C that has a block device of its own: the messages of c_ext/pv_nbdkit.h."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from paravirt.errors import PeerError
from paravirt.ring._core import ffi, lib

CData = Any

MESSAGE_BYTES: int = ffi.sizeof("struct pv_nbdkit_message")
_MAX_REFS = lib.PV_FRONT_MAX_REFS


class Kind(IntEnum):
    """What a message is about."""

    MAKE = lib.PV_NBDKIT_MAKE
    """A new ring and port for a backend."""
    GO = lib.PV_NBDKIT_GO
    """The backend is connected."""
    RESHAPE = lib.PV_NBDKIT_RESHAPE
    """The backend has said something new of its disk."""
    PAUSE = lib.PV_NBDKIT_PAUSE
    """The backend is gone: let go of ring and port, keep what is in flight."""
    FAIL = lib.PV_NBDKIT_FAIL
    """No request will be answered any more."""
    COUNT = lib.PV_NBDKIT_COUNT
    """How much it has done."""
    COMPLAIN = lib.PV_NBDKIT_COMPLAIN
    """Unasked: the backend has broken the protocol."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a disk is and what its backend takes."""

    size_bytes: int
    sector_size: int
    physical_sector_size: int
    max_request_bytes: int
    read_only: bool
    flush: bool
    barrier: bool
    discard: bool


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts since the disk was opened."""

    reads: int
    """Requests answered well."""
    writes: int
    flushes: int
    discards: int
    errors: int
    """Requests answered with an error."""
    in_flight: int
    reissued: int
    """Requests sent once more, to another backend."""
    sleeps: int
    """Of the threads that waited for the backend."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A message of that program."""

    kind: int
    status: int
    """0 or a negative errno."""
    refs: tuple[int, ...]
    """MAKE: grant references of the pages of the ring."""
    port: int
    counters: Counters
    text: str


def make(backend_domid: int, ring_order: int, max_spin_ns: int) -> bytes:
    """The ring has 2**`ring_order` pages; a wait spins for `max_spin_ns` at most."""
    asked = _new(Kind.MAKE)
    asked.backend, asked.ring_order, asked.max_spin_ns = backend_domid, ring_order, max_spin_ns
    return bytes(ffi.buffer(asked))


def shape(kind: Kind, disk: Shape) -> bytes:
    """GO or RESHAPE."""
    asked = _new(kind)
    said = asked.shape
    said.size, said.sector, said.physical_sector = disk.size_bytes, disk.sector_size, disk.physical_sector_size
    said.max_request, said.read_only = disk.max_request_bytes, disk.read_only
    said.flush, said.barrier, said.discard = disk.flush, disk.barrier, disk.discard
    return bytes(ffi.buffer(asked))


def fail(code: int) -> bytes:
    """`code`: errno of all calls from then on."""
    asked = _new(Kind.FAIL)
    asked.error = code
    return bytes(ffi.buffer(asked))


def plain(kind: Kind) -> bytes:
    """PAUSE or COUNT."""
    return bytes(ffi.buffer(_new(kind)))


def parse(data: bytes) -> Answer:
    """Raises `PeerError` for anything that is no message."""
    if len(data) != MESSAGE_BYTES:
        raise PeerError(f"a message has {MESSAGE_BYTES} bytes, not {len(data)}")
    said = ffi.from_buffer("struct pv_nbdkit_message *", data)
    n_refs = said.keys.n_refs
    if n_refs > _MAX_REFS:
        raise PeerError(f"a ring has at most {_MAX_REFS} pages, not {n_refs}")
    counters = Counters(**{name: getattr(said.counters, name) for name in Counters.__dataclass_fields__})
    text = bytes(said.text).partition(b"\0")[0].decode(errors="replace")
    return Answer(said.kind, said.status, tuple(said.keys.refs[0:n_refs]), said.keys.port, counters, text)


def _new(kind: Kind) -> CData:
    asked = ffi.new("struct pv_nbdkit_message *")
    asked.kind = kind
    return asked
