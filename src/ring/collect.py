# SPDX-License-Identifier: MIT
"""Taking responses so that none is lost when a signal handler raises in the middle."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from paravirt.ring.event import WaitResult
from paravirt.ring.shared import FrontRing


class Collector:
    """The responses a front end took last. One thread at a time takes; whoever takes next has seen `taken` of them."""

    def __init__(self, response: "np.dtype[Any]", capacity: int) -> None:
        self.responses: NDArray[Any] = np.zeros(capacity, response)  # one array, because a ring remembers addresses
        self.taken = 0

    def take(self, ring: FrontRing, spin_ns: int = 0) -> int:
        """Take what is there, after spinning for it; how many. Raises as `FrontRing.take`."""
        core = ring.core
        before = core.consumed
        try:
            ring.take(self.responses, spin_ns=spin_ns)
        finally:
            self.taken = core.consumed - before
        return self.taken

    def watch(self, ring: FrontRing, spin_ns: int, timeout_s: float | None) -> None:
        """Like `take`, after sleeping for one; none when the wait ended for another reason."""
        if not self.take(ring, spin_ns) and ring.wait(timeout_s=timeout_s) is WaitResult.EVENT:
            self.take(ring)

    def hand_over(self) -> NDArray[Any]:
        """What was taken; it is the caller's business from now on, until the next `take`."""
        n, self.taken = self.taken, 0
        return self.responses[:n]
