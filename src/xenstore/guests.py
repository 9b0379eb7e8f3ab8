# SPDX-License-Identifier: MIT
"""The hypervisor's side of the daemon: sockets of domains, their ring pages, their deaths.

Everything runs in the server's loop. When the broker dies, connections go on; there are no new ones.
"""

import logging
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from paravirt.errors import AlreadyExists, ParavirtError
from paravirt.hypervisor.channels import EventChannel
from paravirt.hypervisor.client import XENSTORE_GREF, Hypervisor
from paravirt.hypervisor.domains import DomainState
from paravirt.hypervisor.events import VIRQ_DOM_EXC
from paravirt.hypervisor.foreign import MappedPages
from paravirt.hypervisor.store import StoreRegistration
from paravirt.ring._core import ffi, lib
from paravirt.xenstore.core import CoreHub
from paravirt.xenstore.loop import Loop
from paravirt.xenstore.ring_page import RingPage
from paravirt.xenstore.wire import Errno

log = logging.getLogger(__name__)

Adopt = Callable[[socket.socket, int], None]

SPIN_NS: Final = 20_000
"""How long the loop stays awake after a ring has moved: a guest that waits for its answer asks again at once."""
TAKE_OVER_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Ring:
    """What a domain's ring needs while it is served."""

    pages: MappedPages
    channel: EventChannel

    def close(self) -> None:
        self.channel.close()
        self.pages.close()


class Guests:
    """Serves the domains of one hypervisor. Owns its registration, not the hypervisor's connection."""

    def __init__(self, hypervisor: Hypervisor, hub: CoreHub, loop: Loop, adopt: Adopt, *, resume: bool = False) -> None:
        """`adopt` takes a connected socket and the domid it speaks for. `resume`: a former program has left its rings
        as they are, and may hold the registration for a moment more. `AlreadyExists`: there is a xenstored."""
        self._hypervisor = hypervisor
        self._hub = hub
        self._loop = loop
        self._adopt = adopt
        self._rings: dict[int, Ring] = {}
        with ExitStack() as stack:
            self._registration = _register(hypervisor, TAKE_OVER_S if resume else 0)
            stack.callback(self._registration.close)
            self._waiter = hypervisor.waiter()
            stack.callback(self._waiter.close)
            self._deaths = hypervisor.bind_virq(self._waiter, VIRQ_DOM_EXC)
            self._registration_fd = self._registration.fileno()
            loop.add(self._registration_fd, self._on_connections)
            loop.listen(self._waiter.fileno(), self._on_events)
            hub.hear(self._waiter.core, spin_ns=SPIN_NS)
            stack.callback(hub.hear, ffi.NULL, spin_ns=0)
            self._look_at_domains()  # nobody is shown what domains have left that died while there was no xenstored
            self._take_back_rings(resume=resume)
            stack.pop_all()

    def exists(self, domid: int) -> bool:
        try:
            return self._hypervisor.find_domain(domid).state is not DomainState.DYING
        except ParavirtError:
            return False

    # -- rings

    def attach_ring(self, domid: int, port: int, *, how: int = lib.PV_XS_RING_FRESH) -> Errno | None:
        """Serve a domain over its reserved ring page and the event channel `port` of that domain."""
        self.detach(domid)
        with ExitStack() as stack:
            try:
                with self._hypervisor.foreign_arena(domid, XENSTORE_GREF) as arena:
                    pages = arena.map_pages([XENSTORE_GREF])
                stack.callback(pages.close)
                channel = self._hypervisor.bind_interdomain(self._waiter, domid, port)
                stack.callback(channel.close)
            except ParavirtError as error:
                log.warning("domain %d: its xenstore ring cannot be served: %s", domid, error)
                return Errno.EINVAL
            stack.pop_all()
        self._rings[domid] = Ring(pages, channel)
        self._hub.serve_ring(domid, pages.view, channel.core, how)
        RingPage(pages.view).updating = False
        return None

    def detach(self, domid: int) -> None:
        """Let go of a domain's ring, if it has one."""
        ring = self._rings.pop(domid, None)
        if ring is not None:
            self._hub.stop_ring(domid)
            ring.close()

    def on_stale(self, domid: int) -> None:
        """The binding of a ring's port has changed: learn it, then send what could not be sent."""
        ring = self._rings.get(domid)
        if ring is not None:
            ring.channel.notify_stale()
            self._hub.ring_bound(domid)

    def _take_back_rings(self, *, resume: bool) -> None:
        """The rings of a former program: as they are, or (it was killed, and what was under way is lost) with an error
        that tells the guest to reconnect."""
        for domid, domain in self._hub.domains.items():
            _, port = domain.ring_location
            if port and domain.introduced and self.exists(domid):
                self.attach_ring(domid, port, how=lib.PV_XS_RING_RESUME if resume else lib.PV_XS_RING_BROKEN)

    # -- events

    def _take_connection(self) -> None:
        domid, client = self._registration.next()
        domain = self._hub.known(domid)
        if domain is None:
            client.close()  # it died meanwhile
            return
        self._adopt(client, domid)
        self._hub.served(domain)  # its processes need no ring page, so nobody may ever introduce it

    def _on_connections(self, _events: int) -> None:
        try:
            self._take_connection()
        except ParavirtError as error:
            log.error("%s: connections go on, but no domain can connect any more", error)
            self._forget_registration()

    def _on_events(self, _events: int) -> None:
        """The engine has heard its rings; what is left is for us."""
        for port in self._waiter.take_pending():
            if port is self._deaths:
                self._look_at_domains()
            else:
                for domid, ring in self._rings.items():
                    if ring.channel is port:
                        self._hub.look_at_ring(domid)

    def look_again(self) -> None:
        """The journal can be written again: the hypervisor may hear of deaths that were not in it."""
        self._look_at_domains()

    def _look_at_domains(self) -> None:
        """Some domain has shut down or died: see which."""
        try:
            domains = {domain.domid: domain.state for domain in self._hypervisor.list_domains(dying=True)}
            for domid, state in domains.items():
                if state is DomainState.SHUTDOWN:
                    self._hub.shut_down(domid)
            dead = [domid for domid, state in domains.items() if state is DomainState.DYING]
            gone = [*dead, *(domid for domid in self._hub.domains if domid not in domains)]
            for domid in gone:
                self.detach(domid)
            self._hub.died(gone)
            if not self._hub.flush_journal():
                return  # after a crash their domids must not mean new domains: `look_again`
            for domid in dead:
                self._registration.released(domid)
        except ParavirtError as error:
            log.error("%s: the deaths of domains are not seen any more", error)

    # -- live update

    def suspend(self) -> None:
        """Another program is going to take this one's place: guests on rings are told to wait for it, and connections
        that the broker has sent already are taken."""
        for ring in self._rings.values():
            RingPage(ring.pages.view).updating = True
        if self._registration_fd < 0:
            return
        self._registration.end()
        try:
            while True:
                self._take_connection()
        except ParavirtError:
            self._forget_registration()  # that was all

    def resume(self) -> None:
        """There was no other program: go on."""
        for ring in self._rings.values():
            RingPage(ring.pages.view).updating = False
        try:
            self._registration = _register(self._hypervisor, TAKE_OVER_S)
        except ParavirtError as error:
            log.error("%s: connections go on, but no domain can connect any more", error)
            return
        self._registration_fd = self._registration.fileno()
        self._loop.add(self._registration_fd, self._on_connections)

    # -- end

    def close(self) -> None:
        """Let go of rings, registration and waiter."""
        for domid in list(self._rings):
            self.detach(domid)
        self._forget_registration()
        self._hub.hear(ffi.NULL, spin_ns=0)
        self._waiter.close()

    def _forget_registration(self) -> None:
        fd, self._registration_fd = self._registration_fd, -1
        if fd >= 0:
            self._loop.remove(fd)
            self._registration.close()


def _register(hypervisor: Hypervisor, patience_s: float) -> StoreRegistration:
    """Be the hypervisor's xenstored."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return hypervisor.register_store()
        except AlreadyExists:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)  # the broker has not seen yet that the former program is gone
