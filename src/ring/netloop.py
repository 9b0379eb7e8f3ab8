# SPDX-License-Identifier: MIT
"""A thread in C that moves frames between legs: queues of network devices, TAP interfaces, ports of programs."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from paravirt.errors import Closed, InvalidRequest, ResourceLimit, TimedOut
from paravirt.ring._core import ffi, lib
from paravirt.ring.event import EventPort
from paravirt.ring.netctrl import NetCtrl, NetHash
from paravirt.ring.netif import Burst, NetBack, NetFront
from paravirt.ring.switch import Switch

CData = Any

DEFAULT_SPIN_NS = 30_000


class LegState(IntEnum):
    """How a leg is."""

    RUNNING = lib.PV_NETLEG_RUNNING
    PEER = lib.PV_NETLEG_PEER
    """The other end broke the protocol."""
    FAILED = lib.PV_NETLEG_FAILED


@dataclass(frozen=True, slots=True)
class LegCounters:
    """In: what came from it, out: what went to it."""

    in_packets: int
    in_bytes: int
    out_packets: int
    out_bytes: int
    dropped: int
    """On the way out: it took no more."""
    wakeups: int
    bursts: int
    held: int
    """Times that nothing was taken from it for a moment, as much of it waited at guests."""


class Leg:
    """One of a loop's legs. Made by the loop."""

    def __init__(self, loop: "NetLoop", core: CData, kept: tuple[object, ...]) -> None:
        self.loop = loop
        self.core = core
        self._kept = kept
        self._removed = False

    @property
    def port(self) -> int | None:
        """Of the switch."""
        port: int = self.core.port
        return port if port >= 0 else None

    @property
    def state(self) -> LegState:
        return LegState(self.core.state)

    @property
    def error(self) -> str:
        """What failed, in words."""
        return os.strerror(self.core.error) if self.core.error else ""

    @property
    def stale(self) -> bool:
        """Its peer could not be notified: its owner has to ask where it is."""
        return bool(self.core.stale)

    def revive(self) -> None:
        """It is not stale any more."""
        with self.loop.still():
            self.core.stale = 0
            lib.pv_netloop_activate(self.core)

    def counters(self) -> LegCounters:
        """Live."""
        core = self.core.counters
        return LegCounters(**{name: getattr(core, name) for name in LegCounters.__slots__})

    def give(self, burst: Burst, start: int = 0, stop: int | None = None) -> int:
        """Of a program's port: frames (from `start` up to before `stop`) into the loop; how many there was room for."""
        if self._removed:
            raise Closed("this port is closed")
        core = burst.core
        end = core.n if stop is None else min(stop, core.n)
        n: int = lib.pv_netleg_give(self.core, core.memory, core.frames + start, max(0, end - start))
        return n

    def wait_room(self, n_bytes: int, *, timeout_s: float) -> bool:
        """Of a program's port: wait until `give` has room for a frame of so many bytes."""
        if self._removed:
            raise Closed("this port is closed")
        return bool(lib.pv_netleg_wait_room(self.core, n_bytes, int(timeout_s * 1e9)))

    @property
    def back(self) -> NetBack | None:
        """Of a guest's queue: what stands behind it."""
        return next((one for one in self._kept if isinstance(one, NetBack)), None)

    def get(self, burst: Burst, max_packets: int = 64, *, timeout_s: float = 0.0) -> int:
        """Of a program's port: frames of the loop to the end of `burst`; how many, 0 after the time-out."""
        if self._removed:
            raise Closed("this port is closed")
        n: int = lib.pv_netleg_get(self.core, burst.core, max_packets, int(timeout_s * 1e9))
        return n

    def remove(self) -> None:
        """Nothing of it is touched any more. Nobody may be inside `give` or `get`. Harmless when repeated."""
        if self._removed:
            return
        self._removed = True
        with self.loop.still():
            lib.pv_netloop_remove(self.core)
        self._kept = ()


class NetLoop:
    """A thread that moves frames, and a switch between its legs."""

    def __init__(self, *, spin_ns: int = DEFAULT_SPIN_NS, max_addresses: int = 0) -> None:
        """`spin_ns`: how long a leg without work is looked at before it sleeps. Raises `ResourceLimit`."""
        made = ffi.new("struct pv_netloop **")
        status = lib.pv_netloop_new(spin_ns, max_addresses, made)
        if status:
            raise ResourceLimit(f"no loop for frames: {os.strerror(-status)}")
        self._core: CData = ffi.gc(made[0], lib.pv_netloop_free)
        self.switch = Switch.borrow(lib.pv_netloop_switch(self._core), self._core)
        self._started = self._stopped = False

    def start(self) -> None:
        """Raises `ResourceLimit`."""
        status = lib.pv_netloop_start(self._core)
        if status == -errno.ECHILD:
            raise Closed("this loop belongs to the parent of this process")
        if status:
            raise ResourceLimit(f"no thread for a loop: {os.strerror(-status)}")
        self._started = True

    def stop(self) -> None:
        """The thread has ended afterwards. Harmless when repeated."""
        self._stopped = True
        lib.pv_netloop_stop(self._core)

    @contextmanager
    def still(self) -> Iterator[None]:
        """The loop stands still meanwhile."""
        lib.pv_netloop_enter(self._core)
        try:
            yield
        finally:
            lib.pv_netloop_leave(self._core)

    @property
    def thread(self) -> int:
        """The kernel's number of the thread, once it runs."""
        n: int = lib.pv_netloop_thread(self._core)
        return n

    @property
    def sleeps(self) -> int:
        """Times that it had nothing to do and slept."""
        n: int = lib.pv_netloop_sleeps(self._core)
        return n

    def set_hold(self, hold_s: float) -> None:
        """How long a leg is held back at most whose frames wait at guests; 0: not at all."""
        with self.still():
            lib.pv_netloop_set_hold(self._core, round(hold_s * 1e9))

    def wait_news(self, timeout_s: float) -> bool:
        """Wait until a leg has changed its state, or is stale. `TimedOut`; False after `stop`."""
        status: int = lib.pv_netloop_wait_news(self._core, int(timeout_s * 1e9))
        if status == -errno.ETIME:
            raise TimedOut("no news")
        return status >= 0

    def add_back(
        self,
        back: NetBack,
        events: tuple[EventPort, EventPort],
        port: int | None,
        net_hash: NetHash | None = None,
    ) -> Leg:
        """A queue of a guest's device; `events`: of its transmit and receive ring. `port`: of the switch. `net_hash`:
        what the guest wants of hashes.
        """
        leg = self._leg(lib.PV_NETLEG_BACK, events)
        leg.back = back.core
        if net_hash is not None:
            leg.hash = net_hash.core
        return self._add(leg, port, (back, events, net_hash))

    def add_ctrl(self, ctrl: NetCtrl, event: EventPort) -> Leg:
        """The control ring of a guest's device."""
        leg = self._leg(lib.PV_NETLEG_CTRL, (event, event))
        leg.ctrl = ctrl.core
        return self._add(leg, None, (ctrl, event))

    def add_front(self, front: NetFront, events: tuple[EventPort, EventPort], port: int | None = None) -> Leg:
        """The guest's own end of a queue."""
        leg = self._leg(lib.PV_NETLEG_FRONT, events)
        leg.front = front.core
        return self._add(leg, port, (front, events))

    def add_tap(self, fd: int, vnet_bytes: int, port: int | None = None) -> Leg:
        """An interface of the kernel, whose descriptor does not block and stays the caller's. `vnet_bytes`: of the
        header before each frame, 0: none.
        """
        if vnet_bytes not in (0, 10, 12):
            raise InvalidRequest(f"a virtio header has 10 or 12 bytes, not {vnet_bytes}")
        leg = self._leg(lib.PV_NETLEG_TAP, None)
        leg.fd, leg.vnet_bytes = fd, vnet_bytes
        return self._add(leg, port, ())

    def add_user(self, port: int | None = None) -> Leg:
        """A port of this program."""
        return self._add(self._leg(lib.PV_NETLEG_USER, None), port, ())

    def add_null(self, port: int | None = None) -> Leg:
        """What takes everything and gives nothing."""
        return self._add(self._leg(lib.PV_NETLEG_NULL, None), port, ())

    def wire(self, one: Leg, other: Leg | None) -> None:
        """All that comes from one goes to the other, and back; None: where its port is, if it has one."""
        with self.still():
            lib.pv_netloop_wire(one.core, ffi.NULL if other is None else other.core)

    def set_wire(self, on: bool, ends: tuple[int | None, int | None] = (None, None)) -> None:
        """Instead of a switch: what comes from one of two of its ports goes to the other. None: not there yet."""
        one, other = (-1 if port is None else port for port in ends)
        with self.still():
            lib.pv_netloop_set_wire(self._core, on, one, other)

    def _leg(self, kind: int, events: tuple[EventPort, EventPort] | None) -> CData:
        leg = ffi.new("struct pv_netleg *")
        leg.kind, leg.fd = kind, -1
        if events is not None:
            leg.events[0] = events[0].core
            leg.events[1] = ffi.NULL if events[1] is events[0] else events[1].core
        return leg

    def _add(self, core: CData, port: int | None, kept: tuple[object, ...]) -> Leg:
        with self.still():
            status = lib.pv_netloop_add(self._core, core, -1 if port is None else port)
        if status:
            raise ResourceLimit(f"no memory for a leg: {os.strerror(-status)}")
        return Leg(self, core, kept)
