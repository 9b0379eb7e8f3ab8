# SPDX-License-Identifier: MIT
"""What passes the ports of a bridge, as a capture file: in C up to its bytes (`ring/netcapture.py`), here its headers,
which ports there are, and its end.
"""

import logging
import select
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paravirt.errors import ResourceLimit
from paravirt.protocol import pcap, pcapng
from paravirt.protocol.bridge_state import CaptureReport, CaptureWish
from paravirt.ring.netcapture import CaptureRing, Direction, Format
from paravirt.ring.netloop import Leg, NetLoop

if TYPE_CHECKING:
    from paravirt.backend.bridge import BridgePort

log = logging.getLogger(__name__)

APPLICATION = b"paravirt"


@dataclass(slots=True)
class _Interface:
    name: str
    number: int


class Capture:
    """What one reader takes of a bridge. Made by `Bridge.capture`; closed by its reader, or by the end of its port."""

    def __init__(self, loop: NetLoop, wish: CaptureWish) -> None:
        """Raises `InvalidRequest`, `ResourceLimit`."""
        self.wish = wish
        self._directions = Direction[wish.direction.upper()]
        self._is_plain = wish.format == "pcap"
        self._snaplen = wish.snaplen or pcap.MAX_SNAPLEN
        self._ring = CaptureRing(
            loop,
            snaplen=wish.snaplen,
            format=Format[wish.format.upper()],
            most=wish.count,
            n_bytes=wish.buffer_bytes,
        )
        self._lock = threading.Lock()
        self._interfaces: list[_Interface] = []
        self._by_port: dict[str, _Interface] = {}
        self._reason: str | None = None
        if self._is_plain:
            self._ring.put(pcap.pcap_header(self._snaplen))
        else:
            self._ring.put(pcapng.section({pcapng.SECTION_APPLICATION: APPLICATION}))

    # -- told by the bridge, under its lock

    def add_port(self, port: "BridgePort") -> None:
        """What passes it is captured, too, if it is meant. A reader that is too slow misses ports that are new."""
        if self.wish.port not in (None, port.name):
            return
        with self._lock:
            if self._reason is not None:
                return
            block = b""
            if not self._is_plain:
                block = pcapng.interface(port.name, "", link=pcap.ETHERNET, snaplen=self._snaplen)
            try:
                interface = _Interface(port.name, self._ring.add_interface(block))
            except ResourceLimit as error:
                log.warning("port %s is not captured: %s", port.name, error)
                return
            self._interfaces.append(interface)
            self._by_port[port.name] = interface
        for leg in port.legs:
            self.add_leg(port, leg)

    def add_leg(self, port: "BridgePort", leg: Leg) -> None:
        """Another queue of a port."""
        with self._lock:
            interface = self._by_port.get(port.name)
            if interface is None or self._reason is not None:
                return
            try:
                self._ring.attach(leg, interface.number, self._directions)
            except ResourceLimit as error:
                log.warning("a queue of port %s is not captured: %s", port.name, error)

    def leg_gone(self, leg: Leg) -> None:
        """It was removed."""
        with self._lock:
            self._ring.forget(leg)

    def port_gone(self, port: "BridgePort") -> None:
        """The capture of one port ends with it."""
        with self._lock:
            self._by_port.pop(port.name, None)
        if self.wish.port == port.name:
            self.finish(f"port {port.name} is gone")

    # -- its reader

    def finish(self, reason: str) -> None:
        """No more packets from now on. Harmless when repeated."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
                self._ring.finish()

    @property
    def is_finished(self) -> bool:
        return self._reason is not None

    def chunks(self, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes of the file as they come, up to its end; each good until the next one. It ends after `finish`,
        after as many packets as were wished, and when the descriptor `stop` can be read, or its other end is gone.
        """
        poller = select.poll()
        poller.register(self._ring.fileno(), select.POLLIN)
        if stop is not None:
            poller.register(stop, select.POLLIN | select.POLLRDHUP)
        while not self._ring.is_over:
            sleeps = self._ring.sleep()
            ready = {fd for fd, _ in poller.poll(None if sleeps else 0)}
            if sleeps:
                self._ring.awake()
            if stop is not None and stop in ready:
                poller.unregister(stop)
                self.finish("it was stopped")
            if content := self._ring.read():
                yield content
        self.finish("all that was asked for is there" if self.wish.count else "it was stopped")
        if trailer := self._trailer():
            yield memoryview(trailer)

    def _trailer(self) -> bytes:
        if self._is_plain:
            return b""
        now = time.time_ns()
        counts = [(interface.number, *self._ring.count(interface.number)) for interface in self._interfaces]
        return b"".join(
            pcapng.statistics(number, now, received=seen, dropped=dropped) for number, seen, dropped in counts
        )

    def report(self) -> CaptureReport:
        """What was captured, so far or in all."""
        counts = {interface.name: (0, 0) for interface in self._interfaces}
        for interface in self._interfaces:
            seen, dropped = self._ring.count(interface.number)
            before = counts[interface.name]
            counts[interface.name] = before[0] + seen - dropped, before[1] + dropped
        return CaptureReport(self._reason or "", counts)
