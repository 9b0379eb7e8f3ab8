# SPDX-License-Identifier: MIT
"""The backend half of one device of any class: negotiation and life of its connections, by the transition table.

A device has a connection and an engine for each queue of its frontend, most classes one. What is particular to a class
is in its subclass: what it offers, how it reads the frontend's keys, what serves a connection. The order of events is
QEMU's (keys published before INIT_WAIT, INITIALISED or CONNECTED accepted). Methods are called from the service's
thread, but for `fail` and `statistics`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from paravirt.backend.connection import Connection, Engine
from paravirt.errors import Closed, HypervisorGone, ParavirtError, PeerError, StoreGone, XenstoreError
from paravirt.hypervisor.client import EventChannel, Hypervisor, MappedPages, Waiter
from paravirt.protocol.keys import FENCE_KEY, RingRequest
from paravirt.protocol.xenbus import BackendStep, DevicePath, XenbusState, backend_step, parse_state
from paravirt.ring.looking import RingLabel
from paravirt.ring.shared import BackRing
from paravirt.ring.waiting import Fence, SpinBudget, Wait, fence_word, spin_limit, wait_after
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import XenstoreClient

log = logging.getLogger(__name__)

MAX_STEPS = 8  # transitions in one look at the states; more would be a loop of the two ends

DEFAULT_SPIN_NS = 30_000
SPIN_SHARE = 0.25
"""Of one CPU, that a domain can make its backends spin beyond what waking up for it would have cost."""

S = TypeVar("S")
"""What the statistics of a connected device are."""

Layout = np.dtype[Any]


class QueuePlace(Protocol):
    """Where the rings of one queue are. Those of most classes are a `RingRequest`."""

    @property
    def ring_refs(self) -> tuple[int, ...]:
        """References of the pages of its (first) ring."""


class RingPlaces(Protocol):
    """The frontend's keys, as far as every class has them. Two of the same rings are equal."""

    @property
    def queues(self) -> tuple[QueuePlace, ...]:
        """Rings and ports of each queue, one or more."""


class RingPolicy:
    """How backends treat the rings of all domains: the same one for all devices of a service."""

    def __init__(self, *, max_spin_ns: int = DEFAULT_SPIN_NS, fence: Fence = "full", wait: Wait = "adaptive") -> None:
        """`max_spin_ns`: how long an engine looks at most before it sleeps, while it pays; all rings of one domain
        together no more than `SPIN_SHARE` of a CPU. 0: it sleeps at once; `POLLING_NS` and more: it never sleeps.
        `wait`: "sleep" and "spin" say the same by name.

        `fence`: offered to frontends; "host" or "process" for those that are trusted as Dom0 is.
        """
        self.max_spin_ns = spin_limit(wait, max_spin_ns)
        self.fence: Fence = fence
        self._budgets: dict[int, SpinBudget] = {}

    def budget(self, domid: int) -> SpinBudget:
        """What all rings of this domain may spin."""
        return self._budgets.setdefault(domid, SpinBudget(SPIN_SHARE))


class BackendDevice(ABC, Generic[S]):
    """The backend half of one device."""

    messages: tuple[Layout, Layout]
    """Layouts of requests and responses, unless `_layouts` says otherwise."""
    message_protocol = ""
    """Their name, for whoever looks at the ring; "": the device class is one."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: XenstoreClient,
        path: DevicePath,
        on_failure: Callable[["BackendDevice[S]"], None],
        *,
        rings: RingPolicy | None = None,
    ) -> None:
        """`on_failure`: told from an engine's thread that the device wants to be looked at."""
        self._rings = rings or RingPolicy()
        self.path = path
        self.removed = False
        self.replaced = False  # removed, and its directory is another device's now
        self.retry_at: float | None = None  # monotonic seconds: look again then
        self._hypervisor = hypervisor
        self._store = store
        self._on_failure = on_failure
        self._engines: list[Engine[S]] = []
        self._connections: list[Connection] = []
        self._failure: ParavirtError | None = None
        self._stale: RingPlaces | str | None = None  # keys of our predecessor's time, or what is wrong with them
        self._adopted = False
        self._has_prepared = False
        self._complained = False
        self._refused: dict[str, str] | None = None  # configuration that could not be served

    # -- what a class of devices says

    @abstractmethod
    def _prepare(self) -> dict[str, str] | None:
        """Take what the device stands for, if it is not taken yet; the keys to offer, None when it cannot be had."""

    @abstractmethod
    def _read_request(self) -> RingPlaces:
        """The frontend's keys. Raises `PeerError`."""

    @abstractmethod
    def _make_engine(self, connection: Connection) -> Engine[S]:
        """What serves a connection, not started yet. They are made in the order of the queues."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of what `_prepare` took."""

    def _total(self, queues: Sequence[S]) -> S:
        """The statistics of a device, of those of its queues."""
        return queues[0]

    def _layouts(self, request: RingPlaces) -> tuple[Layout, Layout]:
        """Of the requests and responses of this frontend."""
        return self.messages

    def _look_again(self) -> None:
        """While connected, whenever something in xenstore has changed: publish what is new of the device itself."""

    # -- what the service calls

    def evaluate(self) -> None:
        """Look at both states and take steps until nothing is left to do."""
        for _ in range(MAX_STEPS):
            try:
                if not self._step():
                    return
            except (StoreGone, XenstoreError, HypervisorGone):
                raise
            except ParavirtError as error:
                self._fail(error)
                return
        self._complain("the frontend keeps changing its state")

    def statistics(self) -> S | None:
        """Counters of the present connections together; None while there is none."""
        engines = list(self._engines)
        try:
            return self._total([engine.statistics() for engine in engines]) if engines else None
        except Closed:
            return None  # it was torn down meanwhile

    def fail(self, error: ParavirtError) -> None:
        """From the engine's thread: the device cannot go on. The service's thread does the rest."""
        self._failure = error
        self._on_failure(self)

    def give_up(self, error: ParavirtError) -> None:
        """After a defect of ours: leave the device, and tell the frontend if that is still possible."""
        try:
            self._fail(error)
        except Exception:
            log.exception("%s: could not even be given up", self.path.backend)

    def close(self) -> None:
        """Stop serving and free everything; xenstore is left as it is, for the next backend to find."""
        self._disconnect()
        self._release()

    # -- the steps

    def _step(self) -> bool:
        if self._failure is not None and self._engines:
            failure, self._failure = self._failure, None
            raise failure
        own = xenbus.read_state(self._store, self.path.backend)
        if own is XenbusState.UNKNOWN:
            self._forget()
            return False
        if own is XenbusState.INITIALISING and self._has_prepared:
            # Detached and attached before anybody looked: what we have open may be another disk, of another mode.
            self._forget()
            self.replaced = True
            return False
        frontend = self._frontend_state()
        online = xenbus.read_key(self._store, f"{self.path.backend}/online") == "1"
        if not self._adopted:
            served = own not in (XenbusState.INITIALISING, XenbusState.CLOSED)
            if served and online and frontend is not XenbusState.UNKNOWN:
                return self._adopt(own, frontend)
            self._adopted = True
        step = backend_step(own, frontend, online=online)
        if step is BackendStep.CONNECT and self._is_stale(frontend):
            return False
        if own is XenbusState.CONNECTED and step is BackendStep.NOTHING and self._engines:
            self._look_again()
        log.debug("%s: %s sees %s: %s", self.path.backend, own.name, frontend.name, step.name)
        return self._act(step, frontend)

    def _frontend_state(self) -> XenbusState:
        """UNKNOWN only when the directory is gone: a guest that writes 0 there has closed."""
        text = xenbus.read_key(self._store, f"{self.path.frontend}/state")
        state = parse_state(text)
        return XenbusState.CLOSED if text is not None and state is XenbusState.UNKNOWN else state

    def _act(self, step: BackendStep, frontend: XenbusState) -> bool:
        match step:
            case BackendStep.NOTHING:
                return False
            case BackendStep.OFFER:
                return self._offer()
            case BackendStep.CONNECT:
                return self._connect()
            case BackendStep.RESTART:
                self._disconnect()
                return self._offer()
            case BackendStep.CLOSING:
                return self._switch(XenbusState.CLOSING)
            case BackendStep.DISCONNECT:
                self._disconnect()
                return self._switch(XenbusState.CLOSED)
            case BackendStep.REMOVE:
                self._disconnect()
                self._switch(XenbusState.CLOSED)
                if frontend is XenbusState.UNKNOWN:
                    # The domain is gone and nobody else will tidy up.
                    xenbus.remove_backend(self._store, self.path.backend, unless=f"{self.path.frontend}/state")
                self._forget()
                return False
            case BackendStep.FAIL:
                raise PeerError(f"the frontend is in state {frontend.name}, which is none of a frontend's")

    def _switch(self, state: XenbusState, keys: dict[str, str] | None = None) -> bool:
        return xenbus.switch_state(self._store, self.path.backend, state, keys)

    def _adopt(self, own: XenbusState, frontend: XenbusState) -> bool:
        """A backend before us served this device and died: offer anew, as soon as what it stands for can be had.

        The frontend's present keys name a ring that may be in any condition; if it was CONNECTED they are not to be
        used, however often its state is seen, until it has published others. One that is INITIALISED and was told to
        connect may use its ring at any moment: it goes on to CONNECTED by itself.
        """
        if own is XenbusState.CONNECTED and frontend is XenbusState.INITIALISED:
            return False
        if frontend is XenbusState.CONNECTED:
            self._stale = self._found_request()
        self._adopted = self._offer()
        return self._adopted

    def _is_stale(self, frontend: XenbusState) -> bool:
        if self._stale is None:
            return False
        if frontend is XenbusState.CONNECTED and self._found_request() == self._stale:
            return True
        self._stale = None
        return False

    def _found_request(self) -> RingPlaces | str:
        """The frontend's keys, or why they cannot be used: after an offer of less they may be more than is offered."""
        try:
            return self._read_request()
        except PeerError as error:
            return str(error)

    def _offer(self) -> bool:
        keys = self._prepare()
        if keys is None:
            return False
        word = fence_word(self._rings.fence)
        if word:
            keys = {**keys, FENCE_KEY: word}
        else:
            self._forget_fence(self.path.backend)  # of a predecessor who offered one
        self._has_prepared = True
        return self._switch(XenbusState.INIT_WAIT, {**keys, "hotplug-status": "connected"})

    def _refuse(self, keys: dict[str, str], error: Exception) -> None:
        """The configuration `keys` cannot be served: say why, once."""
        self._refused = keys
        self._hotplug_error(error)

    def _is_refused(self, keys: dict[str, str]) -> bool:
        """We have said why; what wakes us is what we wrote, or the directory on its way out."""
        return self._refused is not None and keys.items() <= self._refused.items()

    def _hotplug_error(self, error: Exception) -> None:
        log.warning("%s: %s", self.path.backend, error)
        xenbus.write_hotplug(self._store, self.path.backend, "error", str(error))

    def _connect(self) -> bool:
        self._disconnect()
        if self._prepare() is None:
            return False
        self._has_prepared = True
        request = self._read_request()
        fence = self._agreed_fence()
        for queue in range(len(request.queues)):
            self._connections.append(self._map(request, queue, fence))
        for connection in self._connections:
            self._engines.append(self._make_engine(connection))
        for engine in self._engines:
            engine.start()
        pages = len(request.queues[0].ring_refs)
        log.info("%s: connected, queues: %d, ring pages: %d", self.path.backend, len(request.queues), pages)
        return self._switch(XenbusState.CONNECTED)

    def _map(self, request: RingPlaces, queue: int, fence: Fence) -> Connection:
        """Ring, data and port of one queue; after a failure nothing of it is kept."""
        place = request.queues[queue]
        assert isinstance(place, RingRequest)
        with ExitStack() as stack:
            arena = stack.enter_context(self._hypervisor.foreign_arena(self.path.frontend_domid, place.ring_refs[0]))
            pages = stack.enter_context(arena.map_pages(place.ring_refs))
            waiter = self._hypervisor.waiter()
            stack.callback(waiter.close)
            port = self._bind(waiter, place.event_channel)
            label = self._label(place, port.port, queue, self.message_protocol or self.path.kind)
            ring = self._attach(pages, self._layouts(request), port, fence, label)
            stack.pop_all()
        return Connection(ring=ring, arena=arena, waiter=waiter, port=port, pages=pages, queue=queue)

    def _bind(self, waiter: Waiter, frontend_port: int) -> EventChannel:
        """Our end of a channel of the frontend's."""
        port = self._hypervisor.bind_interdomain(waiter, self.path.frontend_domid, frontend_port)
        port.late_eoi()  # a guest that sends events without requests wakes us once a second
        return port

    def _attach(
        self, pages: MappedPages, layouts: tuple[Layout, Layout], port: EventChannel, fence: Fence, label: RingLabel
    ) -> BackRing:
        return BackRing.attach(
            pages.view,
            *layouts,
            port=port,
            fence=fence,
            wait=wait_after(self._rings.max_spin_ns),
            max_spin_ns=self._rings.max_spin_ns,
            budget=self._rings.budget(self.path.frontend_domid),
            record=self._hypervisor.ring_record(label),
        )

    def _label(self, place: RingRequest, port: int, queue: int, protocol: str) -> RingLabel:
        guest, own = self.path.frontend_domid, self._hypervisor.domid
        return RingLabel(
            kind=self.path.kind,
            device_id=self.path.device_id,
            protocol=protocol,
            domid=own,
            peer_domid=guest,
            granter_domid=guest,
            refs=place.ring_refs,
            port=port,
            queue=queue,
        )

    def _agreed_fence(self) -> Fence:
        """What both ends do: the offer if the frontend has taken it up, with an answer that counts once."""
        answer = xenbus.read_key(self._store, f"{self.path.frontend}/{FENCE_KEY}")
        self._forget_fence(self.path.backend)
        self._forget_fence(self.path.frontend)
        return self._rings.fence if answer and answer == fence_word(self._rings.fence) else "full"

    def _forget_fence(self, directory: str) -> None:
        if xenbus.read_key(self._store, f"{directory}/{FENCE_KEY}") is not None:
            self._store.rm(f"{directory}/{FENCE_KEY}")

    def _disconnect(self) -> None:
        """Stop, unbind, unmap; harmless when nothing is connected."""
        engines, self._engines = self._engines, []
        for engine in engines:
            engine.stop()
        self._failure = None  # of a queue that failed beside the one that we know of
        connections, self._connections = self._connections, []
        if connections:
            log.info("%s: disconnected", self.path.backend)
        for connection in connections:
            connection.close()

    def _complain(self, what: object) -> None:
        """Of the frontend, loudly once: a guest must not fill the log."""
        # As text: whoever keeps a record of the log must not keep what an error was raised in, such as mapped pages.
        log.log(logging.DEBUG if self._complained else logging.WARNING, "%s: %s", self.path.backend, str(what))
        self._complained = True

    def _fail(self, error: ParavirtError) -> None:
        self._complain(error)
        self._disconnect()
        xenbus.write_error(self._store, self.path.backend, 22, str(error))
        self._switch(XenbusState.CLOSING)

    def _forget(self) -> None:
        self.close()
        self.removed = True
