# SPDX-License-Identifier: MIT
"""What a connected device consists of, and what serves it: the seam between negotiation and data path."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from paravirt.hypervisor.client import ForeignArena, MappedPages
from paravirt.ring.event import EventPort, EventWaiter
from paravirt.ring.grant import Mapper
from paravirt.ring.memory import Mapping
from paravirt.ring.shared import BackRing

S_co = TypeVar("S_co", covariant=True)


@dataclass(slots=True)
class Connection:
    """One queue of a connected device: what an engine is handed. The device owns it, and closes it after the engine has
    stopped.
    """

    ring: BackRing
    arena: ForeignArena
    """Another queue of the frontend may have the same one."""
    waiter: EventWaiter
    port: EventPort
    pages: MappedPages
    """Of the ring."""
    queue: int = 0

    @property
    def mapper(self) -> Mapper:
        """Pins pages of the frontend."""
        return self.arena.mapper

    @property
    def data(self) -> Mapping:
        """The pages of the frontend's arena."""
        return self.arena.data

    def close(self) -> None:
        """Unbind and unmap; once."""
        self.ring.close()
        self.port.close()
        self.waiter.close()
        self.pages.close()
        self.arena.close()


class Engine(Protocol[S_co]):
    """Serves one ring; a device with several queues has an engine for each. It calls its `on_failure` from its own
    thread, once, when the peer broke the protocol.
    """

    def start(self) -> None:
        """Begin serving."""

    def stop(self) -> None:
        """Finish what was taken, then stop; harmless when repeated. Nothing is in use afterwards."""

    def statistics(self) -> S_co:
        """The counters, live."""
