# SPDX-License-Identifier: MIT
"""The backend's half of blkif in C: validation, grants and segment copies of a whole batch in one call.

Messages are in private memory when they come here: `BackRing.take` copied them. Source: Xen public/io/blkif.h.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import ResourceLimit
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkif_counters import Counting
from paravirt.ring.blkif_grants import PersistentGrants
from paravirt.ring.grant import Mapper
from paravirt.ring.shared import BackRing

REQUEST_BYTES: int = ffi.sizeof("struct pv_blkif_request")
RESPONSE_BYTES: int = ffi.sizeof("struct pv_blkif_response")
X86_32_REQUEST_BYTES = 108
MAX_SEGMENTS = lib.PV_BLKIF_MAX_SEGMENTS
MAX_INDIRECT_SEGMENTS = lib.PV_BLKIF_MAX_INDIRECT_SEGMENTS

OKAY = lib.PV_BLKIF_RSP_OKAY
ERROR = lib.PV_BLKIF_RSP_ERROR
EOPNOTSUPP = lib.PV_BLKIF_RSP_EOPNOTSUPP

REFUSED = {
    lib.PV_BLKIF_REFUSED_OPERATION: "operation unknown or not offered",
    lib.PV_BLKIF_REFUSED_SEGMENTS: "number of segments 0 or above what was offered",
    lib.PV_BLKIF_REFUSED_BOUNDS: "segment bounds outside the page",
    lib.PV_BLKIF_REFUSED_RANGE: "beyond the end of the disk",
    lib.PV_BLKIF_REFUSED_ALIGNMENT: "not aligned to the sector size",
    lib.PV_BLKIF_REFUSED_READ_ONLY: "write to a read-only disk",
    lib.PV_BLKIF_REFUSED_GRANT: "a grant could not be mapped",
    lib.PV_BLKIF_REFUSED_MEMORY: "no memory for its segments",
    lib.PV_BLKIF_REFUSED_INDIRECT: "indirect operation that is neither a read nor a write",
    lib.PV_BLKIF_REFUSED_IN_USE: "a persistent grant that another request is using",
}

CData = Any


@dataclass(frozen=True, slots=True)
class Limits:
    """What a disk allows and what was offered."""

    sectors: int  # of 512 bytes
    sector_size: int = 512  # bytes
    read_only: bool = False
    flush: bool = True
    barrier: bool = False
    discard: bool = False
    discard_secure: bool = False
    max_indirect_segments: int = 0


class RequestBatch:
    """Up to `capacity` requests on their way through a backend, with plans and responses beside them.

    `requests` and `responses` are byte arrays to take into and to push from.
    """

    def __init__(self, mapper: Mapper, data: memoryview, capacity: int, *, x86_32: bool = False) -> None:
        """`data` is the memory behind `mapper`, which the extents of a plan point into. `x86_32`: requests come in the
        layout of that ABI.
        """
        self._mapper = mapper
        self._data = data
        self._requests = ffi.new("struct pv_blkif_request[]", capacity)
        self._plans = ffi.new("struct pv_blkif_plan[]", capacity)
        self._responses = ffi.new("struct pv_blkif_response[]", capacity)
        self._core = ffi.gc(ffi.new("struct pv_blkif_batch *"), _free_pool)
        self._core.mapper = mapper.core
        self._core.requests, self._core.plans, self._core.responses = self._requests, self._plans, self._responses
        self._core.fd = -1
        self._limits = ffi.addressof(self._core, "limits")
        self._pool = ffi.addressof(self._core, "pool")
        if lib.pv_blkif_pool_init(self._pool, capacity * MAX_SEGMENTS):
            raise ResourceLimit(f"no memory for a batch of {capacity} requests")
        self._counting = Counting(self._core)
        self._grants: PersistentGrants | None = None
        self._wire = ffi.new("uint8_t[]", capacity * X86_32_REQUEST_BYTES) if x86_32 else None
        self.requests = bytes_of(self._requests if self._wire is None else self._wire)
        self.responses = bytes_of(self._responses)
        self.capacity = capacity

    @property
    def counters(self) -> CData:
        """`struct pv_blkif_counters *`: what `finish` and `serve` count."""
        return self._counting.core

    def count_in(self, ring: BackRing | None) -> None:
        """Count where Dom0 sees it, with `ring`, until that is closed; None: privately. While nobody serves."""
        self._counting.show_in(ring)

    def set_limits(self, limits: Limits) -> None:
        """For the requests of the next `prepare` or `serve`."""
        for name in Limits.__slots__:
            setattr(self._limits, name, getattr(limits, name))

    def persist(self, grants: PersistentGrants | None) -> None:
        """With nothing in flight: from now on what is mapped stays in `grants`, which are the caller's, or does not."""
        self._grants = grants
        self._pool.grants = ffi.NULL if grants is None else grants.core

    def prepare(self, n: int) -> int:
        """Validate the first `n` requests and map their grants; how many need the disk."""
        self._convert(n)
        pending: int = lib.pv_blkif_prepare(self._mapper.core, self._limits, self._requests, n, self._plans, self._pool)
        return pending

    def _convert(self, n: int) -> None:
        if self._wire is not None:
            lib.pv_blkif_from_x86_32(self._wire, self._requests, n)

    def set_disk(self, *, memory: CData | None = None, n_bytes: int = 0, fd: int = -1) -> None:
        """What `serve` serves from: `n_bytes` at a C pointer, which the caller keeps, or an open file."""
        self._core.kind = lib.PV_BLKIF_DISK_FILE if memory is None else lib.PV_BLKIF_DISK_MEMORY
        self._core.disk = ffi.NULL if memory is None else memory
        self._core.disk_bytes, self._core.fd = n_bytes, fd

    def serve(self, ring: BackRing, n: int) -> bool:
        """Validate, do and answer the first `n` requests in one call; what went wrong is in `error` and `unsupported`.

        False: there is a discard among them, and they are only prepared.
        """
        self._convert(n)
        status = lib.pv_blkif_serve(self._core, ring.core, n)
        if status == lib.PV_BLKIF_UNSERVED:
            return False
        if status != n:
            ring.settle_push(status)
        return True

    @property
    def error(self) -> int:
        """The first errno of the disk in the last `serve`, or 0."""
        error: int = self._core.error
        return error

    @property
    def unsupported(self) -> int:
        """Operations that the disk did not have in the last `serve`: a bit for each."""
        unsupported: int = self._core.unsupported
        return unsupported

    def do(self, n: int) -> None:
        """Do every pending request on the disk; what went wrong is in `error` and `unsupported`."""
        lib.pv_blkif_do_all(self._core, n)

    def is_pending(self, i: int) -> bool:
        pending: bool = self._plans[i].status == lib.PV_BLKIF_PENDING
        return pending

    def operation(self, i: int) -> int:
        """The operation request `i` asks for, from its plan: of an indirect one what it is underneath."""
        operation: int = self._plans[i].operation
        return operation

    def is_secure(self, i: int) -> bool:
        """Request `i` is a discard after which nobody may read the old data."""
        secure: bool = self._plans[i].secure != 0
        return secure

    def place(self, i: int) -> tuple[int, int]:
        """Offset and length in bytes on the disk of request `i`."""
        plan = self._plans[i]
        return plan.offset, plan.length

    def buffers(self, i: int) -> list[memoryview]:
        """The guest's memory of request `i`, in order. To be dropped before `finish`."""
        plan, extents, data = self._plans[i], self._core.pool.extents, self._data
        return [
            data[extent.offset : extent.offset + extent.length]
            for extent in (extents[k] for k in range(plan.first, plan.first + plan.n_extents))
        ]

    def complete(self, i: int, status: int) -> None:
        self._plans[i].status = status

    def finish(self, n: int) -> None:
        """Unmap the grants of all `n` requests and make their responses."""
        lib.pv_blkif_finish(
            self._mapper.core, self._requests, self._plans, n, self._pool, self._responses, self.counters
        )

    def refusal(self, n: int) -> str | None:
        """Why the first refused one of the first `n` requests was refused; None when none was."""
        return next((REFUSED[self._plans[i].reason] for i in range(n) if self._plans[i].reason), None)


def _free_pool(batch: CData) -> None:
    lib.pv_blkif_pool_free(ffi.addressof(batch, "pool"))


def bytes_of(messages: CData) -> NDArray[np.uint8]:
    """The bytes of a C array, writable; an array, because rings remember the addresses of arrays."""
    return np.frombuffer(ffi.buffer(messages), np.uint8)
