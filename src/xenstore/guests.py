# SPDX-License-Identifier: MIT
"""The hypervisor's side of the daemon: sockets of domains, their ring pages, their deaths.

Everything runs in the server's loop. When the broker dies, connections go on; there are no new ones.
"""

import logging
import socket
from collections.abc import Callable
from contextlib import ExitStack

from paravirt.errors import ParavirtError
from paravirt.hypervisor.channels import EventChannel
from paravirt.hypervisor.client import XENSTORE_GREF, Hypervisor
from paravirt.hypervisor.domains import DomainState
from paravirt.hypervisor.events import VIRQ_DOM_EXC
from paravirt.xenstore.hub import Hub
from paravirt.xenstore.loop import Loop
from paravirt.xenstore.ring_link import RingLink
from paravirt.xenstore.session import Connection
from paravirt.xenstore.wire import Errno

log = logging.getLogger(__name__)

Adopt = Callable[[socket.socket, int], None]


class Guests:
    """Serves the domains of one hypervisor. Owns its registration, not the hypervisor's connection."""

    def __init__(self, hypervisor: Hypervisor, hub: Hub, loop: Loop, adopt: Adopt) -> None:
        """`adopt` takes a connected socket and the domid it speaks for. `AlreadyExists`: there is a xenstored."""
        self._hypervisor = hypervisor
        self._hub = hub
        self._loop = loop
        self._adopt = adopt
        self._links: dict[EventChannel, RingLink] = {}
        with ExitStack() as stack:
            self._registration = hypervisor.register_store()
            stack.callback(self._registration.close)
            self._waiter = hypervisor.waiter()
            stack.callback(self._waiter.close)
            self._deaths = hypervisor.bind_virq(self._waiter, VIRQ_DOM_EXC)
            self._registration_fd = self._registration.fileno()
            loop.add(self._registration_fd, self._on_connections)
            loop.add(self._waiter.fileno(), self._on_events)
            stack.pop_all()
        loop.call(self._look_at_domains)

    def exists(self, domid: int) -> bool:
        try:
            return self._hypervisor.find_domain(domid).state is not DomainState.DYING
        except ParavirtError:
            return False

    def attach_ring(self, connection: Connection, port: int) -> RingLink | Errno:
        """Serve a connection over its domain's reserved ring page and the event channel `port` of that domain."""
        domid = connection.domain.domid
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
            stack.callback(self._links.pop, channel)
            link = RingLink(pages.view, channel, connection, self._loop.call, stack.pop_all().close)
        self._links[channel] = link
        return link

    def close(self) -> None:
        """The rings are closed already."""
        self._forget_registration()
        self._loop.remove(self._waiter.fileno())
        self._waiter.close()

    def _forget_registration(self) -> None:
        fd, self._registration_fd = self._registration_fd, -1
        if fd >= 0:
            self._loop.remove(fd)
            self._registration.close()

    def _on_connections(self, _events: int) -> None:
        try:
            domid, client = self._registration.next()
            domain = self._hub.known(domid)
            if domain is None:
                client.close()  # it died meanwhile
                return
            self._adopt(client, domid)
            self._hub.served(domain)  # its processes need no ring page, so nobody may ever introduce it
        except ParavirtError as error:
            log.error("%s: connections go on, but no domain can connect any more", error)
            self._forget_registration()

    def _on_events(self, _events: int) -> None:
        self._waiter.drain_bells()
        for port in self._waiter.take_pending():
            if port is self._deaths:
                self._look_at_domains()
            elif isinstance(port, EventChannel) and port in self._links:
                self._links[port].on_event()

    def _look_at_domains(self) -> None:
        """Some domain has shut down or died: see which."""
        try:
            domains = {domain.domid: domain.state for domain in self._hypervisor.list_domains(dying=True)}
            for domid, state in domains.items():
                if state is DomainState.SHUTDOWN:
                    self._hub.shut_down(domid)
            dead = [domid for domid, state in domains.items() if state is DomainState.DYING]
            self._hub.died([*dead, *(domid for domid in self._hub.domains if domid not in domains)])
            for domid in dead:
                self._registration.released(domid)
        except ParavirtError as error:
            log.error("%s: the deaths of domains are not seen any more", error)
