# SPDX-License-Identifier: MIT
"""The backend's half of blkif in C: validation, grants and segment copies of a whole batch in one call.

Messages are in private memory when they come here: `BackRing.take` copied them. Source: Xen public/io/blkif.h.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from paravirt.ring._core import ffi, lib
from paravirt.ring.grant import Mapper
from paravirt.ring.shared import BackRing

REQUEST_BYTES: int = ffi.sizeof("struct pv_blkif_request")
RESPONSE_BYTES: int = ffi.sizeof("struct pv_blkif_response")
MAX_SEGMENTS = lib.PV_BLKIF_MAX_SEGMENTS

OKAY = lib.PV_BLKIF_RSP_OKAY
ERROR = lib.PV_BLKIF_RSP_ERROR
EOPNOTSUPP = lib.PV_BLKIF_RSP_EOPNOTSUPP

REFUSED = {
    lib.PV_BLKIF_REFUSED_OPERATION: "operation unknown or not offered",
    lib.PV_BLKIF_REFUSED_SEGMENTS: "number of segments not from 1 to 11",
    lib.PV_BLKIF_REFUSED_BOUNDS: "segment bounds outside the page",
    lib.PV_BLKIF_REFUSED_RANGE: "beyond the end of the disk",
    lib.PV_BLKIF_REFUSED_ALIGNMENT: "not aligned to the sector size",
    lib.PV_BLKIF_REFUSED_READ_ONLY: "write to a read-only disk",
    lib.PV_BLKIF_REFUSED_GRANT: "a grant could not be mapped",
}

CData = Any


class RequestBatch:
    """Up to `capacity` requests on their way through a backend, with plans and responses beside them.

    `requests` and `responses` are byte arrays to take into and to push from; `counters` is a C struct that `finish`
    keeps.
    """

    def __init__(self, mapper: Mapper, data: memoryview, capacity: int) -> None:
        """`data` is the memory behind `mapper`, which the extents of a plan point into."""
        self._mapper = mapper
        self._data = data
        self._requests = ffi.new("struct pv_blkif_request[]", capacity)
        self._plans = ffi.new("struct pv_blkif_plan[]", capacity)
        self._responses = ffi.new("struct pv_blkif_response[]", capacity)
        self._core = ffi.new("struct pv_blkif_batch *")
        self._core.mapper = mapper.core
        self._core.requests, self._core.plans, self._core.responses = self._requests, self._plans, self._responses
        self._core.fd = -1
        self._limits = ffi.addressof(self._core, "limits")
        self.counters = ffi.addressof(self._core, "counters")
        self.requests = bytes_of(self._requests)
        self.responses = bytes_of(self._responses)
        self.capacity = capacity

    def set_limits(self, *, sectors: int, sector_size: int, read_only: bool, flush: bool) -> None:
        """What the disk allows: size in 512-byte sectors, sector size in bytes."""
        self._limits.sectors = sectors
        self._limits.sector_size = sector_size
        self._limits.read_only = read_only
        self._limits.flush = flush

    def prepare(self, n: int) -> int:
        """Validate the first `n` requests and map their grants; how many need the disk."""
        pending: int = lib.pv_blkif_prepare(self._mapper.core, self._limits, self._requests, n, self._plans)
        return pending

    def set_disk(self, *, memory: CData | None = None, n_bytes: int = 0, fd: int = -1) -> None:
        """What `serve` serves from: `n_bytes` at a C pointer, which the caller keeps, or an open file."""
        self._core.disk = ffi.NULL if memory is None else memory
        self._core.disk_bytes, self._core.fd = n_bytes, fd

    def serve(self, ring: BackRing, n: int) -> int:
        """Validate, do and answer the first `n` requests in one call; the first errno of the file, or 0."""
        status = lib.pv_blkif_serve(self._core, ring.core, n)
        if status != n:
            ring.settle_push(status)
        error: int = self._core.error
        return error

    def copy(self, n: int, disk: CData, disk_bytes: int) -> None:
        """Serve every pending request from memory at `disk` (a C pointer)."""
        lib.pv_blkif_copy(self._mapper.core, self._plans, n, disk, disk_bytes)

    def is_pending(self, i: int) -> bool:
        pending: bool = self._plans[i].status == lib.PV_BLKIF_PENDING
        return pending

    def operation(self, i: int) -> int:
        """The operation request `i` asks for, from its plan."""
        operation: int = self._plans[i].operation
        return operation

    def place(self, i: int) -> tuple[int, int]:
        """Offset and length in bytes on the disk of request `i`."""
        plan = self._plans[i]
        return plan.offset, plan.length

    def buffers(self, i: int) -> list[memoryview]:
        """The guest's memory of request `i`, in order. To be dropped before `finish`."""
        plan = self._plans[i]
        data = self._data
        return [
            data[extent.offset : extent.offset + extent.length]
            for extent in (plan.extents[k] for k in range(plan.n_extents))
        ]

    def complete(self, i: int, status: int) -> None:
        self._plans[i].status = status

    def finish(self, n: int) -> None:
        """Unmap the grants of all `n` requests and make their responses."""
        lib.pv_blkif_finish(self._mapper.core, self._requests, self._plans, n, self._responses, self.counters)

    def refusal(self, n: int) -> str | None:
        """Why the first refused one of the first `n` requests was refused; None when none was."""
        return next((REFUSED[self._plans[i].reason] for i in range(n) if self._plans[i].reason), None)


def bytes_of(messages: CData) -> NDArray[np.uint8]:
    """The bytes of a C array, writable; an array, because rings remember the addresses of arrays."""
    return np.frombuffer(ffi.buffer(messages), np.uint8)
