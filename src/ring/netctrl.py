# SPDX-License-Identifier: MIT
"""The control ring of a network device, the backend's half, in C: what its frontend wants hashed, and steered where.

Source: Xen public/io/netif.h, control messages.
"""

from typing import Any

from paravirt.ring._core import ffi
from paravirt.ring.grant import Mapper
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


class NetCtrl:
    """The ring. One thread uses it."""

    def __init__(self, ring: BackRing, mapper: Mapper, net_hash: NetHash) -> None:
        """All of them stay the caller's and must outlive this."""
        self._kept = ring, mapper, net_hash
        self.core: CData = ffi.new("struct pv_netctrl *")
        self.core.ring, self.core.mapper, self.core.hash = ring.core, mapper.core, net_hash.core

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
