# SPDX-License-Identifier: MIT
"""How much a disk may do a second, shared by all that serve it (pv_vbd_throttle.h)."""

from typing import Any

from paravirt.errors import ResourceLimit
from paravirt.ring._core import ffi, lib


class Throttle:
    """Two buckets, of requests and of bytes. Every method from any thread."""

    def __init__(self) -> None:
        """Without limits. Raises `ResourceLimit`."""
        core = lib.pv_vbd_throttle_new()
        if core == ffi.NULL:
            raise ResourceLimit("no memory for the limits of a disk")
        self.core: Any = ffi.gc(core, lib.pv_vbd_throttle_free)

    def set(self, requests: int = 0, requests_burst: int = 0, bytes: int = 0, bytes_burst: int = 0) -> None:
        """So many a second from now on, and so many at once after a rest, which there was.

        A rate of 0: no limit; a burst of 0: a tenth of a second's worth.
        """
        rates = ffi.new("struct pv_vbd_rates *", (requests, requests_burst, bytes, bytes_burst))
        lib.pv_vbd_throttle_set(self.core, rates)

    @property
    def is_on(self) -> bool:
        """There is a limit."""
        return bool(lib.pv_vbd_throttle_is_on(self.core))

    def room(self, most: int) -> int:
        """How many requests may be taken now, up to `most` (1 or more); 0: none before `wait_s` are over."""
        room: int = lib.pv_vbd_throttle_room(self.core, most)
        return room

    @property
    def wait_s(self) -> float:
        """Until there is room."""
        return int(lib.pv_vbd_throttle_wait_ns(self.core)) / 1e9

    def charge(self, requests: int, n_bytes: int) -> None:
        """What was taken. More than there was room for has to be waited for by whoever comes next."""
        lib.pv_vbd_throttle_charge(self.core, requests, n_bytes)
