# SPDX-License-Identifier: MIT
"""The control ring of a network device as a leg of its bridge.

Source: Xen public/io/netif.h, control messages.
"""

from collections.abc import Callable

from paravirt.backend.bridge import BridgePort
from paravirt.backend.connection import Connection
from paravirt.errors import ParavirtError, PeerError
from paravirt.ring.netctrl import NetCtrl, NetGrefs, NetHash
from paravirt.ring.netif import NetBack
from paravirt.ring.netloop import Leg, LegState


class VifControl:
    """Served by the thread that moves the frames of the device, which looks at what it has changed."""

    def __init__(
        self, connection: Connection, net_hash: NetHash, port: BridgePort, fail: Callable[[ParavirtError], None]
    ) -> None:
        """`connection`: of the ring, closed with this. `fail`: called when the frontend is wrong."""
        self.net_hash = net_hash
        self._connection = connection
        self.grefs = NetGrefs(connection.mapper, net_hash.core.n_queues)
        self._ctrl = NetCtrl(connection.ring, connection.mapper, net_hash, self.grefs)
        self._port = port
        self._fail = fail
        self._leg: Leg | None = None
        self._closed = False

    def add_queue(self, queue: int, back: NetBack) -> None:
        """Before `start`."""
        self.grefs.add_queue(queue, back)

    def start(self) -> None:
        self._leg = self._port.bridge.add_ctrl(self._port, self._ctrl, self._connection.port, self._hear)

    def close(self) -> None:
        """Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        if self._leg is not None:
            self._port.bridge.remove_leg(self._port, self._leg)
        self.grefs.close()
        self._connection.close()

    def _hear(self, leg: Leg) -> None:
        if leg.state is LegState.PEER:
            self._fail(PeerError("the frontend broke the protocol: an index of the control ring is out of range"))
        elif leg.state is LegState.FAILED:
            self._fail(ParavirtError(f"the control ring failed: {leg.error}"))
        elif leg.stale:
            self._ctrl.core.stale = 0
            leg.revive()
            self._connection.port.notify_stale()
