# SPDX-License-Identifier: MIT
"""The frontend's end of a connection: arena, ring pages, ring and port, made anew for each backend."""

from typing import Any

import numpy as np

from paravirt.errors import PeerError
from paravirt.hypervisor.client import Arena, EventChannel, Hypervisor, PageRun, Waiter
from paravirt.protocol.xenbus import DevicePath
from paravirt.ring.looking import RingLabel
from paravirt.ring.shared import FrontRing
from paravirt.ring.waiting import Fence, wait_after


class RingEnd:
    """One ring at a time in an arena that stays. Called from the device's thread."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        path: DevicePath,
        protocol: str,
        *,
        queue: int = 0,
        beside: "RingEnd | None" = None,
    ) -> None:
        """`protocol`: name of the messages, for whoever looks at the ring; `queue`: of a device with several, and
        `beside` is then the end of the first, whose arena and size of a ring this one has, too.
        """
        self.waiter: Waiter = hypervisor.waiter()
        self.arena: Arena | None = None
        self.order = 0
        self.ring: FrontRing | None = None
        self._hypervisor = hypervisor
        self._path = path
        self._backend_domid = path.backend_domid
        self._protocol = protocol
        self._queue = queue
        self._beside = beside
        self._pages: PageRun | None = None
        self._shares_channel = False
        self.channel: EventChannel | None = None

    def make(
        self,
        request: "np.dtype[Any]",
        response: "np.dtype[Any]",
        *,
        wanted_order: int,
        max_order: int,
        data_pages: int,
        fence: Fence = "full",
        max_spin_ns: int = 0,
        entry_bytes: int | None = None,
        channel: EventChannel | None = None,
    ) -> tuple[tuple[int, ...], int]:
        """A new ring and port; (grant references of its pages, port).

        The first one decides the size of the ring, 2**`wanted_order` pages if the backend takes that many, and makes
        the arena with `data_pages` beside it. `fence`: as agreed with the backend. `max_spin_ns`: of
        `waiting.spin_limit`; who waits calls `take` with `waiting.take_spin` of it, then `wait`. `entry_bytes`: of an
        entry, if that is more than the union of the messages. `channel`: of another end, for both rings.

        Raises `PeerError` when a later backend takes less.
        """
        if self._beside is not None:
            self.arena, self.order = self._beside.arena, min(self._beside.order, wanted_order)
            assert self.arena is not None
        elif self.arena is None:
            self.order = min(wanted_order, max_order)
            # Room for a second ring: the pages of the first may still be held by a backend that died.
            self.arena = self._hypervisor.create_arena(self._backend_domid, data_pages + (2 << self.order))
        if max_order < self.order:
            raise PeerError(f"the new backend takes rings of {1 << max_order} pages only")
        self._pages = pages = self.arena.allocate(1 << self.order)
        refs = tuple(self.arena.grant(pages.gref + i) for i in range(pages.n_pages))
        self._shares_channel = channel is not None
        self.channel = channel or self._hypervisor.alloc_unbound(self.waiter, self._backend_domid)
        label = RingLabel(
            kind=self._path.kind,
            device_id=self._path.device_id,
            protocol=self._protocol,
            domid=self._hypervisor.domid,
            peer_domid=self._backend_domid,
            granter_domid=self._hypervisor.domid,
            refs=refs,
            port=self.channel.port,
            queue=self._queue,
        )
        # A backend that sends events without responses wakes us once a second.
        if channel is None:
            self.channel.late_eoi()
        self.ring = FrontRing.create(
            pages.view,
            request,
            response,
            port=self.channel,
            entry_bytes=entry_bytes,
            fence=fence,
            wait=wait_after(max_spin_ns),
            max_spin_ns=max_spin_ns,
            record=self._hypervisor.ring_record(label),
        )
        return refs, self.channel.port

    def drop(self) -> None:
        """Let go of ring and port; harmless when there is none."""
        if self.ring is not None:
            self.ring.close()
            self.ring = None
        if self.channel is not None:
            if not self._shares_channel:
                self.channel.close()
            self.channel = None
        if self._pages is not None and self.arena is not None:
            self.arena.free(self._pages)
            self._pages = None

    def close(self) -> None:
        """Give everything back; of several ends, the one with the arena last. Nobody may wait."""
        self.drop()
        if self.arena is not None and self._beside is None:
            self.arena.close()
        self.waiter.close()
