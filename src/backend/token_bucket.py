# SPDX-License-Identifier: MIT
"""A token bucket: so much a second, and after a rest a burst at once."""

import time
from collections.abc import Callable

DEFAULT_BURST_S = 0.1


class TokenBucket:
    """`take` says how long to wait before what it was asked for may be done.

    The bucket may go below zero, so what is larger than the burst passes too, and whoever comes next waits for it: over
    any time t never more than rate * t + burst, and one thing more, is let through.
    """

    def __init__(self, rate: float, burst: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`rate`: tokens a second. `burst`: how many a full bucket has; a tenth of a second's worth, at least 1, if not
        given.
        """
        self.rate = rate
        self.burst = max(1.0, rate * DEFAULT_BURST_S) if burst is None else burst
        self._clock = clock
        self._tokens = self.burst
        self._last = clock()

    def take(self, n: float) -> float:
        """Take `n` tokens; seconds to wait until they are there, 0 when they are."""
        now = self._clock()
        self._tokens = min(self.burst, self._tokens + (now - self._last) * self.rate)
        self._last = now
        self._tokens -= n
        return max(0.0, -self._tokens / self.rate)
