# SPDX-License-Identifier: MIT
"""A network device as an interface of the kernel: a TAP interface and the PV queue, with a thread in C between them.

The kernel's offloads reach the backend: large packets and blank checksums go as they are.
"""

import logging
import threading
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from paravirt.errors import Closed, ParavirtError, PeerError, TimedOut
from paravirt.frontend.vif import Vif, announcement
from paravirt.hypervisor.client import EventChannel
from paravirt.ring.netif import Burst, NetFront
from paravirt.ring.netloop import DEFAULT_SPIN_NS, Leg, LegCounters, LegState, NetLoop
from paravirt.ring.tap import Tap

log = logging.getLogger(__name__)

NEWS_TIMEOUT_S = 3600.0


class VifTap:
    """The interface, as long as this is open. It goes on when the backend does."""

    def __init__(self, vif: Vif, name: str = "eth0", *, offloads: bool = True, spin_ns: int = DEFAULT_SPIN_NS) -> None:
        """Make interface `name` in this network namespace, with the address and MTU of the device, not yet up. Frames
        of queue 0 go through it. `offloads`: of the kernel.

        Raises as `ring.tap.Tap`, `ResourceLimit`, `InvalidRequest`.
        """
        self._vif = vif
        self._lock = threading.Lock()
        self._front: NetFront | None = None
        self._leg: Leg | None = None
        self._connects = 0
        self._closed = False
        self.tap = Tap(name, offloads=offloads)
        try:
            self.tap.set_mac(vif.mac)
            self.tap.set_mtu(vif.mtu)
            self._loop = NetLoop(spin_ns=spin_ns)
        except BaseException:
            self.tap.close()
            raise
        self._kernel = self._loop.add_tap(self.tap.fd, self.tap.vnet_bytes)
        self._loop.start()
        self._thread = threading.Thread(target=self._hear, name=f"tap-{name}", daemon=True)
        self._thread.start()
        vif.queue_end(0).lend(self)

    @property
    def name(self) -> str:
        return self.tap.name

    def counters(self) -> LegCounters:
        """Of the interface: in is what the kernel has sent."""
        return self._kernel.counters()

    def close(self) -> None:
        """The interface goes. Harmless when repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._vif.queue_end(0).lend(None)
        self._kernel.remove()
        self._loop.stop()
        self._thread.join()
        self.tap.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the queue's word, from the device's thread

    def connected(self, front: NetFront, events: tuple[EventChannel, EventChannel]) -> None:
        """Move frames; after a backend was away, have the switch learn again where we are."""
        self._connects += 1
        if self._connects > 1:
            front.send(Burst.of([announcement(self._vif.mac)]))
        leg = self._loop.add_front(front, events)
        self._loop.wire(leg, self._kernel)
        with self._lock:
            self._leg, self._front = leg, front
        self.tap.set_carrier(True)

    def paused(self) -> None:
        """Stop: what the kernel sends meanwhile waits in its queue."""
        self.tap.set_carrier(False)
        with self._lock:
            leg, self._leg, self._front = self._leg, None, None
        if leg is not None:
            leg.remove()

    def still(self) -> AbstractContextManager[None]:
        """No frames are moved meanwhile."""
        return self._loop.still()

    # -- the thread

    def _hear(self) -> None:
        while True:
            try:
                if not self._loop.wait_news(NEWS_TIMEOUT_S):
                    return
            except TimedOut:
                continue
            except Closed:
                return
            with self._lock:
                leg, front = self._leg, self._front
            if leg is None or front is None:
                continue
            if leg.state is LegState.PEER:
                self._vif.fail(PeerError("the backend broke the protocol of network devices"))
            elif leg.state is LegState.FAILED:
                self._vif.fail(ParavirtError(f"the queue failed: {leg.error}"))
            elif leg.stale:
                leg.revive()
                self._vif.queue_end(0).tell(front)
