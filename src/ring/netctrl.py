# SPDX-License-Identifier: MIT
"""The control ring of a network device, the backend's half, in C: what its frontend wants hashed, steered
where, and kept mapped.

Source: Xen public/io/netif.h, control messages.
"""

from typing import Any

from paravirt.ring._core import ffi, lib
from paravirt.ring.grant import Mapper
from paravirt.ring.netif import NetBack
from paravirt.ring.shared import BackRing

CData = Any


class NetHash:
    """What a frontend has said of hashes, for all queues of its device. Changed by the thread that moves its frames."""

    def __init__(self, n_queues: int) -> None:
        self.core: CData = ffi.new("struct pv_nethash *")
        self.core.n_queues = n_queues

    @property
    def algorithm(self) -> int:
        """`protocol.netif.HashAlgorithm`."""
        n: int = self.core.algorithm
        return n

    @property
    def flags(self) -> int:
        """`protocol.netif.HashFlag`."""
        n: int = self.core.flags
        return n

    @property
    def key(self) -> bytes:
        return bytes(ffi.buffer(self.core.key))

    @property
    def mapping(self) -> tuple[int, ...]:
        """Queues, by hash modulo their number; (): a hash modulo the number of queues."""
        return tuple(self.core.mapping[0 : self.core.mapping_size])


class NetGrefs:
    """Pages that a frontend wants to stay mapped, a table for each of its queues. Changed by the thread that moves its
    frames.
    """

    def __init__(self, mapper: Mapper, n_queues: int) -> None:
        """`mapper` stays the caller's and must outlive this."""
        self._kept: list[object] = [mapper]
        self.core: CData = ffi.new("struct pv_netgrefs *")
        lib.pv_netgrefs_init(self.core, mapper.core, n_queues)

    def add_queue(self, queue: int, back: NetBack) -> None:
        """Whose requests use the pages: what one names is not unmapped before it is answered."""
        if queue < lib.PV_NETGREFS_QUEUES:
            self._kept.append(back)
            self.core.backs[queue] = back.core

    def counts(self) -> tuple[int, ...]:
        """References of each queue."""
        return tuple(self.core.n[0 : self.core.n_queues])

    def close(self) -> None:
        """Unmap all. Nobody may use them. Harmless when repeated."""
        lib.pv_netgrefs_destroy(self.core)


class NetCtrl:
    """The ring. One thread uses it."""

    def __init__(self, ring: BackRing, mapper: Mapper, net_hash: NetHash, grefs: NetGrefs) -> None:
        """All of them stay the caller's and must outlive this."""
        self._kept = ring, mapper, net_hash, grefs
        self.core: CData = ffi.new("struct pv_netctrl *")
        self.core.ring, self.core.mapper, self.core.hash = ring.core, mapper.core, net_hash.core
        self.core.grefs = grefs.core

    @property
    def requests(self) -> int:
        """That were answered."""
        n: int = self.core.requests
        return n

    @property
    def refused(self) -> int:
        """Of these, otherwise than with success."""
        n: int = self.core.refused
        return n
