# SPDX-License-Identifier: MIT
"""What callers ask of a disk, checked and made into transfers: what blocking and awaited calls have in common."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from paravirt.errors import InvalidRequest, IoError
from paravirt.frontend.geometry import Geometry
from paravirt.protocol.blkif import (
    DISCARD_SECURE,
    INDIRECT_PAGE_SEGMENTS,
    MAX_INDIRECT_SEGMENTS,
    MAX_SEGMENTS,
    PAGE_BYTES,
    Operation,
    Status,
)
from paravirt.ring.blkqueue import Transfer, address_in

MAX_BARRIER_BYTES = (MAX_SEGMENTS - 1) * PAGE_BYTES
"""Of the request that has the barrier: it cannot be indirect, and a buffer may begin in the middle of a page."""

Offsets = Sequence[int] | NDArray[Any]
Fill = Callable[[Transfer, int, NDArray[np.int64], int, int], int | None]
Buffer = bytes | bytearray | memoryview | NDArray[Any]


def io_error(status: int, operation: int, offset: int, length: int) -> IoError:
    """What to raise for a request that was answered with this status."""
    what = f"{Operation(operation).name} of {length} bytes at {offset}"
    return IoError(f"{what} failed: the backend answered {Status(status).name}", status)


def reads(geometry: Geometry, buffers: Sequence[Buffer], offset: int) -> tuple[Transfer, int]:
    """Bytes from `offset` on into the buffers, one after the other; (transfer, bytes)."""
    return _vector(geometry, Operation.READ, buffers, offset)


def writes(
    geometry: Geometry, buffers: Sequence[Buffer], offset: int, *, barrier: bool = False
) -> tuple[Transfer, int]:
    """The bytes of the buffers to `offset` on. Of a barrier the last request has it: it waits for the others."""
    geometry.check_writable()
    if barrier:
        geometry.check_barrier()
        if buffers:
            last = memoryview(cast(bytes, buffers[-1])).cast("B")
            tail = min(len(last), MAX_BARRIER_BYTES)
            buffers = [*buffers[:-1], *([last[:-tail]] if tail < len(last) else []), last[len(last) - tail :]]
    transfer, n_bytes = _vector(geometry, Operation.WRITE, buffers, offset)
    if barrier:
        transfer.pieces[transfer.n - 1].operation = Operation.WRITE_BARRIER
    return transfer, n_bytes


def _vector(geometry: Geometry, operation: Operation, buffers: Sequence[Buffer], offset: int) -> tuple[Transfer, int]:
    found = [address_in(buffer, writable=operation is Operation.READ) for buffer in buffers]
    total = sum(n_bytes for _, _, n_bytes in found)
    geometry.check(offset, total)
    transfer = Transfer(len(found))
    for i, (pointer, address, n_bytes) in enumerate(found):
        geometry.check(offset, n_bytes)
        transfer.put(i, operation, offset, n_bytes, address)
        transfer.kept.append(pointer)
        offset += n_bytes
    return transfer, total


def write_list(geometry: Geometry, pairs: Iterable[tuple[int, Buffer]]) -> tuple[Transfer | None, int]:
    """Each (offset, data), in their order; None when there is none."""
    geometry.check_writable()
    found = [(offset, *address_in(data)) for offset, data in pairs]
    if not found:
        return None, 0
    transfer, total = Transfer(len(found)), 0
    for i, (offset, pointer, address, n_bytes) in enumerate(found):
        geometry.check(offset, n_bytes)
        transfer.put(i, Operation.WRITE, offset, n_bytes, address)
        transfer.kept.append(pointer)
        total += n_bytes
    return transfer, total


def batch(
    geometry: Geometry, fill: Fill, operation: Operation, offsets: "Offsets", n_bytes: int, memory: Any
) -> tuple[Transfer | None, int]:
    """`n_bytes` at each offset, side by side in `memory`; None when there are no offsets. One call of `fill` (of
    `TransferQueue`) whatever the number.
    """
    if operation is Operation.WRITE:
        geometry.check_writable()
    try:
        places = np.ascontiguousarray(offsets, np.int64)
    except (TypeError, ValueError, OverflowError):
        places = np.empty((0, 0), np.int64)
    if places.ndim != 1 or (isinstance(offsets, np.ndarray) and offsets.dtype.kind not in "iu"):
        _find_bad(geometry, offsets, n_bytes)
        raise InvalidRequest("offsets are whole numbers of bytes, in one dimension")
    n = len(places)
    if n == 0:
        return None, 0
    pointer, address, room = address_in(memory, writable=operation is Operation.READ)
    if n_bytes <= 0:
        geometry.check(int(places[0]), n_bytes)
    if room != n * n_bytes:
        raise InvalidRequest(f"{n} times {n_bytes} bytes are not the {room} bytes of that memory")
    transfer = Transfer(n)
    transfer.kept.append(pointer)
    wrong = fill(transfer, operation, places, n_bytes, address)
    if wrong is not None:
        geometry.check(wrong, n_bytes)
        raise InvalidRequest(f"{n_bytes} bytes at {wrong} are not inside the disk")
    return transfer, n * n_bytes


def _find_bad(geometry: Geometry, offsets: Any, n_bytes: int) -> None:
    """Offsets that are too large for an array are not inside the disk."""
    for offset in offsets:
        if isinstance(offset, int):
            geometry.check(offset, n_bytes)


def flushes(geometry: Geometry) -> Transfer | None:
    """None where nothing is to be flushed. An old backend has only barriers: an empty one is a flush."""
    if not geometry.can_flush:
        return None
    transfer = Transfer(1)
    transfer.put(0, Operation.FLUSH_DISKCACHE if geometry.has_flush else Operation.WRITE_BARRIER, 0, 0)
    return transfer


def discards(geometry: Geometry, offset: int, n_bytes: int, *, secure: bool) -> Transfer:
    """Raises `InvalidRequest` where the backend has none of that."""
    geometry.check(offset, n_bytes)
    geometry.check_writable()
    geometry.check_discard(secure=secure)
    transfer = Transfer(1)
    transfer.put(0, Operation.DISCARD, offset, n_bytes, flag=DISCARD_SECURE if secure else 0)
    return transfer


def max_request_bytes(n_slots: int, max_indirect_segments: int) -> int:
    """The most one request moves: what the backend takes, but no more than a quarter of the slots, so that the next
    ones are under way while it is served.
    """
    pages = n_slots // 4 * MAX_SEGMENTS
    segments = min(max_indirect_segments, MAX_INDIRECT_SEGMENTS, pages - -(-pages // INDIRECT_PAGE_SEGMENTS))
    return max(segments, MAX_SEGMENTS) * PAGE_BYTES
