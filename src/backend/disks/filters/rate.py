# SPDX-License-Identifier: MIT
"""A disk that is allowed so many operations and bytes a second."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Self

from paravirt.backend.disks.base import Disk
from paravirt.backend.disks.filters.around import AroundEach, Operation
from paravirt.backend.disks.spec import Opening
from paravirt.backend.token_bucket import TokenBucket
from paravirt.errors import InvalidRequest


class RateFilter(AroundEach):
    """`rate,iops=1000,bytes=100M:DISK`: calls wait for their turn. `iops-burst` and `bytes-burst` are what may come at
    once after a pause, a tenth of a second's worth if not given. Of zeroes and discards only the operation is counted.
    """

    def __init__(
        self,
        below: Disk,
        *,
        operations: TokenBucket | None = None,
        n_bytes: TokenBucket | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(below)
        self._operations = operations
        self._bytes = n_bytes
        self._sleep = sleep

    @classmethod
    def open(cls, opening: Opening) -> Self:
        options = opening.options
        iops, iops_burst = options.count("iops"), options.count("iops-burst")
        n_bytes, bytes_burst = options.size("bytes", 1), options.size("bytes-burst", 1)
        options.end()
        if (iops is None and iops_burst) or (n_bytes is None and bytes_burst):
            raise InvalidRequest("rate: has a burst without the rate it belongs to")
        if iops is None and n_bytes is None:
            raise InvalidRequest("rate: has neither iops nor bytes")
        return cls(
            opening.below(opening.read_only),
            operations=None if iops is None else TokenBucket(iops, iops_burst),
            n_bytes=None if n_bytes is None else TokenBucket(n_bytes, bytes_burst),
        )

    def around(self, operation: Operation, offset: int, length: int) -> AbstractContextManager[object]:
        wait_s = 0.0
        if self._operations is not None:
            wait_s = self._operations.take(1)
        if self._bytes is not None and operation in ("read", "write"):
            wait_s = max(wait_s, self._bytes.take(length))
        if wait_s > 0:
            self._sleep(wait_s)
        return nullcontext()
