# SPDX-License-Identifier: MIT
"""A load on one queue of a network device, in C without the GIL: what `paravirt bench vif` measures with."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from paravirt.errors import InvalidRequest, TimedOut
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkload import Histogram, Latency
from paravirt.ring.netif import Burst, NetFront, checked

CData = Any

HEADER_BYTES: int = lib.PV_NETLOAD_HEADER
MOST_BURST: int = lib.PV_NETLOAD_BURST
MOST_SIZES: int = lib.PV_NETLOAD_SIZES
_ROOM = 128  # of a frame in a burst, beside its bytes


class Way(IntEnum):
    """What a load does."""

    SEND = lib.PV_NETLOAD_SEND
    """Frames as fast as they go."""
    TAKE = lib.PV_NETLOAD_TAKE
    """What comes, until nothing does for `seconds`."""
    TRIP = lib.PV_NETLOAD_TRIP
    """A burst, and the next one when all of it is back."""
    REFLECT = lib.PV_NETLOAD_REFLECT
    """What comes goes back, until nothing does for `seconds`."""


@dataclass(frozen=True, slots=True)
class NetLoadResult:
    """What came of a load."""

    seconds: float
    cpu_s: float
    """Of its thread."""
    sent: int
    sent_bytes: int
    taken: int
    taken_bytes: int
    misplaced: int
    """Came later than one that was sent later."""
    missing: int
    """Numbers that were passed over."""
    wrong: int
    """Came with other bytes than they were sent with; looked at with `verify`."""
    foreign: int
    """Frames of others."""
    bursts: int
    waits: int
    """Times that it waited for the other side."""
    latency: Latency
    """Of round trips."""


_COUNTED = tuple(name for name in NetLoadResult.__slots__ if name not in ("seconds", "cpu_s", "latency"))


class NetLoad:
    """A load, to be run once by one thread."""

    def __init__(
        self,
        way: Way,
        *,
        seconds: float,
        burst: int = 64,
        sizes: Sequence[int] = (64,),
        to: bytes = bytes(6),
        source: bytes = bytes(6),
        verify: bool = False,
        spin_ns: int = 1_000_000,
    ) -> None:
        """`sizes`: of frames in bytes, in turn, at least `HEADER_BYTES`. `spin_ns`: before it sleeps. Raises
        `InvalidRequest`.
        """
        if not 1 <= burst <= MOST_BURST or not 1 <= len(sizes) <= MOST_SIZES or seconds <= 0:
            raise InvalidRequest(f"no load has bursts of {burst} frames of {len(sizes)} sizes for {seconds} s")
        if not all(HEADER_BYTES <= size <= 65535 for size in sizes):
            raise InvalidRequest(f"frames of a load have {HEADER_BYTES} to 65535 bytes, not {list(sizes)}")
        out_bytes = sum(sizes[i % len(sizes)] + _ROOM for i in range(burst))
        # What comes may be larger than what is sent.
        self._bursts = Burst(burst, out_bytes), Burst(burst, max(out_bytes, burst * 2048, 1 << 18))
        self._histogram = Histogram()
        core = self.core = ffi.new("struct pv_netload *")
        core.way, core.burst, core.n_sizes = int(way), burst, len(sizes)
        for i, size in enumerate(sizes):
            core.sizes[i] = size
        core.to, core.verify = to, verify
        setattr(core, "from", source)
        core.length_ns, core.spin_ns, core.latency = round(seconds * 1e9), spin_ns, self._histogram.core
        core.out = self._bursts[0].core
        setattr(core, "in", self._bursts[1].core)

    def run(self, front: NetFront) -> NetLoadResult:
        """Until it is over. `TimedOut`: a round trip took a second. Errors as `NetFront`'s calls."""
        status = lib.pv_netload_run(self.core, front.usable)
        if status == -errno.ETIMEDOUT:
            raise TimedOut("a frame did not come back within a second")
        checked(status, "backend")
        return self.result()

    def stop(self) -> None:
        """From another thread: end soon."""
        lib.pv_netload_stop(self.core)

    def result(self) -> NetLoadResult:
        """So far."""
        core = self.core
        counted = {name: getattr(core, name) for name in _COUNTED}
        return NetLoadResult(core.seconds_ns / 1e9, core.cpu_ns / 1e9, **counted, latency=self._histogram.latency())
