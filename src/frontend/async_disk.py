# SPDX-License-Identifier: MIT
"""The calls of a `Disk` for an event loop: nothing blocks it, and no thread is started.

What is asked in one turn of the loop goes out together: one batch, one notification, neighbours as one request. As many
calls as one likes may wait; what the ring has no room for is sent as answers come.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paravirt.frontend import requests
from paravirt.frontend.requests import Buffer, Offsets
from paravirt.protocol.blkif import Operation
from paravirt.ring.blkqueue import Transfer

if TYPE_CHECKING:
    from paravirt.frontend.vbd import Disk


class AsyncDisk:
    """`Disk.aio`. Cancel a call or `asyncio.timeout` it at will: then nothing is written to its memory any more, but to
    that of `Disk.buffers`, and a write is done or not. Arguments and errors are those of `Disk`.

    One event loop at a time; threads may use the disk meanwhile. Memory of a write stays as it is until it is awaited.
    """

    def __init__(self, disk: "Disk") -> None:
        self._disk = disk

    async def pread(self, n_bytes: int, offset: int) -> bytes:
        """`n_bytes` from `offset`."""
        self._disk.check(offset, n_bytes)
        out = bytearray(n_bytes)
        await self._run(requests.reads(self._disk, (out,), offset)[0])
        return bytes(out)

    async def pread_into(self, buffer: Buffer, offset: int) -> int:
        """Fill a buffer from `offset` on; its length in bytes."""
        return await self.preadv((buffer,), offset)

    async def preadv(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Fill buffers one after the other from `offset` on; the bytes read."""
        transfer, n_bytes = requests.reads(self._disk, buffers, offset)
        await self._run(transfer)
        return n_bytes

    async def pwrite(self, data: Buffer, offset: int) -> int:
        """Write all of `data` at `offset`; its length. Durable after `flush`."""
        return await self.pwritev((data,), offset)

    async def pwritev(self, buffers: Sequence[Buffer], offset: int) -> int:
        """Write buffers one after the other to `offset` on; the bytes written."""
        transfer, n_bytes = requests.writes(self._disk, buffers, offset)
        await self._run(transfer)
        return n_bytes

    async def flush(self) -> None:
        """Return when every write that was answered before is on stable storage."""
        transfer = requests.flushes(self._disk)
        if transfer is not None:
            await self._run(transfer)

    async def discard(self, offset: int, n_bytes: int, *, secure: bool = False) -> None:
        """Tell that these bytes are not needed."""
        await self._run(requests.discards(self._disk, offset, n_bytes, secure=secure))

    async def read_many(self, offsets: Sequence[int], n_bytes: int) -> list[bytes]:
        """`n_bytes` from each offset."""
        out = bytearray(max(0, n_bytes) * len(offsets))
        await self.read_batch(offsets, n_bytes, out)
        return [bytes(out[start : start + n_bytes]) for start in range(0, len(out), n_bytes)]

    async def write_many(self, writes: Iterable[tuple[int, Buffer]]) -> int:
        """Write each (offset, data), sent in this order; the bytes written."""
        transfer, n_bytes = requests.write_list(self._disk, writes)
        if transfer is not None:
            await self._run(transfer)
        return n_bytes

    async def read_batch(self, offsets: Offsets, n_bytes: int, into: Any = None) -> "NDArray[np.uint8] | Any":
        """`n_bytes` from each of an array of offsets, side by side in `into` (None: a new array), which is returned."""
        if into is None:
            into = np.empty((len(offsets), max(0, n_bytes)), np.uint8)
        transfer, _ = requests.batch(self._disk, self._disk.fill, Operation.READ, offsets, n_bytes, into)
        if transfer is not None:
            await self._run(transfer)
        return into

    async def write_batch(self, offsets: Offsets, n_bytes: int, data: Any) -> int:
        """`n_bytes` to each of an array of offsets, from memory where they stand side by side; the bytes written."""
        transfer, total = requests.batch(self._disk, self._disk.fill, Operation.WRITE, offsets, n_bytes, data)
        if transfer is not None:
            await self._run(transfer)
        return total

    async def _run(self, transfer: Transfer) -> None:
        await self._disk.queue.run_async(transfer)
        self._disk.check_answers(transfer)

    def __repr__(self) -> str:
        return f"<AsyncDisk of {self._disk!r}>"
