# SPDX-License-Identifier: MIT
"""A block device of a domain: `pread`, `pwrite`, `flush`, in vectors, batches and without copying, over rings.

Source: Xen public/io/blkif.h. Calls may come from any thread; `Disk.aio` has the same ones for an event loop.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paravirt.frontend import requests
from paravirt.frontend.async_disk import AsyncDisk
from paravirt.frontend.disk_buffers import DiskBuffers as DiskBuffers
from paravirt.frontend.disk_device import CONNECT_TIMEOUT_S as CONNECT_TIMEOUT_S
from paravirt.frontend.disk_device import DEFAULT_RING_PAGE_ORDER as DEFAULT_RING_PAGE_ORDER
from paravirt.frontend.disk_device import DEFAULT_SPIN_NS as DEFAULT_SPIN_NS
from paravirt.frontend.disk_device import DiskDevice
from paravirt.frontend.disk_statistics import DiskStatistics as DiskStatistics
from paravirt.frontend.disk_statistics import QueueStatistics as QueueStatistics
from paravirt.frontend.requests import Buffer as Buffer
from paravirt.frontend.requests import Offsets, io_error
from paravirt.protocol.blkif import Operation
from paravirt.ring.blkqueue import Transfer


class Disk(DiskDevice):
    """An open block device. Offsets and lengths are in bytes, multiples of `sector_size`.

    Any number of threads may use it. A signal handler that raises in the middle of a call does no harm while the main
    thread is the only one that uses the disk; Python's locks do not promise that for several.

    All calls raise `InvalidRequest` (range, alignment), `IoError`, `Closed`, `PeerGone`, `PeerError`, and with a
    `timeout_s` `TimedOut`: it may still be under way then, but nothing is written to the caller's memory any more,
    except to that of `buffers`. Those that write raise `ReadOnly`, too.
    """

    @cached_property
    def aio(self) -> AsyncDisk:
        """The same calls for an event loop."""
        return AsyncDisk(self)

    def pread(self, n_bytes: int, offset: int, *, timeout_s: float | None = None) -> bytes:
        """`n_bytes` from `offset`."""
        data = self.queue.pread(n_bytes, offset, timeout_s)
        if data is not None:
            return data
        self.check(offset, n_bytes)
        out = bytearray(n_bytes)
        self._run(requests.reads(self, (out,), offset)[0], timeout_s)
        return bytes(out)

    def pread_into(self, buffer: Buffer, offset: int, *, timeout_s: float | None = None) -> int:
        """Fill a buffer (bytearray, memoryview, numpy array ...) from `offset` on; its length in bytes."""
        return self.preadv((buffer,), offset, timeout_s=timeout_s)

    def preadv(self, buffers: Sequence[Buffer], offset: int, *, timeout_s: float | None = None) -> int:
        """Fill buffers, of whole sectors each, one after the other from `offset` on; the bytes read."""
        transfer, n_bytes = requests.reads(self, buffers, offset)
        self._run(transfer, timeout_s)
        return n_bytes

    def pwrite(self, data: Buffer, offset: int, *, barrier: bool = False, timeout_s: float | None = None) -> int:
        """Write all of `data` at `offset`; its length. Durable after `flush`.

        `barrier`: what was answered before is durable before it, and it is durable itself when it is answered; other
        calls do not overtake it. `InvalidRequest` where the backend has none.
        """
        if type(data) is bytes and not barrier and not self.read_only and self.queue.pwrite(data, offset, timeout_s):
            return len(data)
        return self.pwritev((data,), offset, barrier=barrier, timeout_s=timeout_s)

    def pwritev(
        self, buffers: Sequence[Buffer], offset: int, *, barrier: bool = False, timeout_s: float | None = None
    ) -> int:
        """Write buffers, of whole sectors each, one after the other to `offset` on; the bytes written. As `pwrite`."""
        transfer, n_bytes = requests.writes(self, buffers, offset, barrier=barrier)
        self._run(transfer, timeout_s, barrier=barrier)
        return n_bytes

    def flush(self, *, timeout_s: float | None = None) -> None:
        """Return when every write that was answered before, in whatever thread, is on stable storage."""
        transfer = requests.flushes(self)
        if transfer is not None:
            self._run(transfer, timeout_s)

    def discard(self, offset: int, n_bytes: int, *, secure: bool = False, timeout_s: float | None = None) -> None:
        """Tell that these bytes are not needed: they read as zeroes or as they were, until they are written again.

        `secure`: nobody can read the old ones afterwards. `InvalidRequest` where the backend has none of that.
        """
        self._run(requests.discards(self, offset, n_bytes, secure=secure), timeout_s)

    def read_many(self, offsets: Sequence[int], n_bytes: int, *, timeout_s: float | None = None) -> list[bytes]:
        """`n_bytes` from each offset, all in flight together as far as the ring holds them."""
        out = bytearray(max(0, n_bytes) * len(offsets))
        self.read_batch(offsets, n_bytes, out, timeout_s=timeout_s)
        return [bytes(out[start : start + n_bytes]) for start in range(0, len(out), n_bytes)]

    def write_many(self, writes: Iterable[tuple[int, Buffer]], *, timeout_s: float | None = None) -> int:
        """Write each (offset, data), all in flight together, sent in this order; the bytes written."""
        transfer, n_bytes = requests.write_list(self, writes)
        if transfer is not None:
            self._run(transfer, timeout_s)
        return n_bytes

    def read_batch(
        self, offsets: Offsets, n_bytes: int, into: Any = None, *, timeout_s: float | None = None
    ) -> "NDArray[np.uint8] | Any":
        """`n_bytes` from each of an array of offsets, side by side in `into` (None: a new array, a row an offset).

        Whatever their number, they are sent and finished by the C core. `into` is returned.
        """
        if into is None:
            into = np.empty((len(offsets), max(0, n_bytes)), np.uint8)
        transfer, _ = requests.batch(self, self.fill, Operation.READ, offsets, n_bytes, into)
        if transfer is not None:
            self._run(transfer, timeout_s)
        return into

    def write_batch(self, offsets: Offsets, n_bytes: int, data: Any, *, timeout_s: float | None = None) -> int:
        """`n_bytes` to each of an array of offsets, from memory where they stand side by side; the bytes written.

        They are sent in this order.
        """
        transfer, total = requests.batch(self, self.fill, Operation.WRITE, offsets, n_bytes, data)
        if transfer is not None:
            self._run(transfer, timeout_s)
        return total

    def _run(self, transfer: Transfer, timeout_s: float | None, *, barrier: bool = False) -> None:
        if barrier:
            self._run_barrier(transfer, timeout_s)
        else:
            self.queue.run(transfer, timeout_s)
        self.check_answers(transfer)

    def check_answers(self, transfer: Transfer) -> None:
        """Raises `IoError` for the first request of it that failed."""
        failure = transfer.failure
        if failure is None:
            return
        error = io_error(*failure)
        if error.status == -2:
            self.forget_feature(failure[1])
        raise error
