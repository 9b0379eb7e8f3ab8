# SPDX-License-Identifier: MIT
"""A disk that is allowed so many operations and bytes a second."""

from collections.abc import Callable
from typing import Self

from paravirt.backend.disks.base import Disk
from paravirt.backend.disks.filters.around import Operation, WaitBeforeEach
from paravirt.backend.disks.spec import Opening
from paravirt.backend.token_bucket import TokenBucket
from paravirt.errors import InvalidRequest


class RateFilter(WaitBeforeEach):
    """`rate,iops=1000,bytes=100M:DISK`: calls wait for their turn. `iops-burst` and `bytes-burst` are what may come at
    once after a pause, a tenth of a second's worth if not given. Of zeroes and discards only the operation is counted.
    """

    def __init__(
        self,
        below: Disk,
        *,
        operations: TokenBucket | None = None,
        n_bytes: TokenBucket | None = None,
        wait: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(below, wait)
        self._operations = operations
        self._bytes = n_bytes

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

    def wait_s(self, operation: Operation, length: int) -> float:
        seconds = 0.0
        if self._operations is not None:
            seconds = self._operations.take(1)
        if self._bytes is not None and operation in ("read", "write"):
            seconds = max(seconds, self._bytes.take(length))
        return seconds
