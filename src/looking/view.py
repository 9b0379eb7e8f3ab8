# SPDX-License-Identifier: MIT
"""One ring at one moment, as numbers: both ends' private view, the shared indexes, and who sleeps.

`RingView` is pure; `view_of` takes one of a live ring. The parts are read one after the other while the ring goes on,
so they need not fit together: whoever concludes something looks twice (`stuck.py`).
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from paravirt.errors import HypervisorError, NotFound
from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.events import PortState
from paravirt.hypervisor.looking import Header, LiveRing, LookedEnd, Looker

WRAP = 2**32
Process = Literal["running", "stopped", "gone", "unknown"]


@dataclass(frozen=True, slots=True)
class PortView:
    """An end's event channel, as the broker and the inbox say."""

    bound: bool
    pending: bool
    masked: bool
    asleep: bool
    """Its owner sleeps, and is woken by the next event that is not masked."""


@dataclass(frozen=True, slots=True)
class EndView:
    """The private view of one end."""

    prod: int
    """Next index it produces."""
    cons: int
    """Next index it consumes."""
    pid: int = 0
    """0: not known."""
    process: Process = "unknown"
    domid: int = 0
    dead: bool = False
    """It found that its peer broke the protocol."""
    port: PortView | None = None
    """None: it has none that is open."""
    port_number: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RingView:
    """One ring. Indexes run freely over 32 bits."""

    name: str
    place: str
    at_s: float
    """CLOCK_MONOTONIC."""
    size: int
    shared: Header | None
    """None: the ring's memory is gone."""
    front: EndView | None
    back: EndView | None
    waiting_s: float = 0.0
    """Since the oldest request that the back end did not take was pushed, at least."""
    held_s: float = 0.0
    """Since the oldest request that the back end took and did not answer was taken, at least."""

    @property
    def requests_waiting(self) -> int:
        """Published, not taken by the back end."""
        if self.back is None or self.shared is None:
            return 0
        return self._between(self.back.cons, self.shared.req_prod)

    @property
    def held(self) -> int:
        """Taken by the back end, not answered."""
        return 0 if self.back is None else self._between(self.back.prod, self.back.cons)

    @property
    def responses_waiting(self) -> int:
        """Published, not taken by the front end."""
        if self.front is None or self.shared is None:
            return 0
        return self._between(self.front.cons, self.shared.rsp_prod)

    @property
    def in_flight(self) -> int:
        """Sent by the front end, which has no answer yet."""
        return 0 if self.front is None else self._between(self.front.cons, self.front.prod)

    def _between(self, start: int, end: int) -> int:
        """Messages from one index to another; 0 when it makes no sense."""
        n = (end - start) % WRAP
        return n if n <= self.size else 0


def view_of(looker: Looker, hypervisor: Hypervisor, ring: LiveRing) -> RingView:
    """A view of a ring of the last look."""
    shared = None
    with suppress(NotFound):
        shared = looker.header(ring)
    front, back = ring.front, ring.back
    view = RingView(
        name=ring.name,
        place=ring.place,
        at_s=ring.end.at_ns / 1e9,
        size=ring.end.size,
        shared=shared,
        front=None if front is None else _end(hypervisor, front),
        back=None if back is None else _end(hypervisor, back),
    )
    waiting = front.age_of(back.cons)[0] if front and back and view.requests_waiting else 0.0
    held = back.age_of(back.prod)[0] if back and view.held else 0.0
    values: dict[str, Any] = {name: getattr(view, name) for name in view.__dataclass_fields__}
    return RingView(**{**values, "waiting_s": waiting, "held_s": held})


def _end(hypervisor: Hypervisor, end: LookedEnd) -> EndView:
    counters = end.statistics
    return EndView(
        prod=end.prod,
        cons=end.cons,
        pid=end.pid,
        process=process_state(end.pid),
        domid=end.domid,
        dead=end.dead,
        port=_port(hypervisor, end),
        port_number=end.port,
        counters={name: getattr(counters, name) for name in counters.__dataclass_fields__},
    )


def _port(hypervisor: Hypervisor, end: LookedEnd) -> PortView | None:
    if not end.port:
        return None
    try:
        status = hypervisor.port_status(end.port, end.domid)
    except (NotFound, HypervisorError):
        return None
    if status.state is PortState.CLOSED:
        return None
    bound = status.state is PortState.INTERDOMAIN
    return PortView(bound=bound, pending=status.pending, masked=status.masked, asleep=status.asleep)


def process_state(pid: int) -> Process:
    """Of a process of this machine."""
    if pid <= 0:
        return "unknown"
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1]
    except FileNotFoundError:
        return "gone"
    except OSError:
        return "unknown"
    if state in (b"T", b"t"):
        return "stopped"
    return "gone" if state in (b"Z", b"X") else "running"
