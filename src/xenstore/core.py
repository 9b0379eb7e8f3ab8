# SPDX-License-Identifier: MIT
"""The C engine (c_ext/pv_xs.h) as a `Hub`: the same methods, the same rules, two orders of magnitude faster.

It is what the daemon runs. `hub.Hub` is the second implementation; tests tell both the same stories.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from paravirt.errors import Closed, ResourceLimit
from paravirt.ring._core import ffi, lib
from paravirt.ring.memory import pinned
from paravirt.xenstore import control as control_requests
from paravirt.xenstore import domain_requests
from paravirt.xenstore.admin import Administer, AdminState, ControlActions, NoActions, Statistics
from paravirt.xenstore.core_clients import CoreConnection, CoreDomain, CoreDomains
from paravirt.xenstore.domains import DOM0, DOMID_FIRST_RESERVED, DomainControl, NoControl
from paravirt.xenstore.limits import QUOTAS, Limits
from paravirt.xenstore.trace import WANTED_MS
from paravirt.xenstore.wire import PAYLOAD_MAX_BYTES, Errno, Op, Reply

CData = Any

log = logging.getLogger(__name__)

_QUOTA_NUMBER: Final = {name: number for number, name in enumerate(QUOTAS)}
_ADMINISTER: Final[dict[int, Administer]] = {
    int(Op.CONTROL): control_requests.control,
    **{int(op): run for op, run in domain_requests.PRIVILEGED.items()},
}
_INTRODUCE, _RELEASE = 0, 1  # the special nodes, as numbered in pv_xs.h
_EVENTS_MAX: Final = 1024


class Event(NamedTuple):
    """Something for whoever runs the loop: `kind` is one of lib.PV_XS_EVENT_*."""

    kind: int
    fd: int
    mask: int
    domid: int
    reason: str | None


class CoreHub:
    """The engine. One thread at a time. A context manager.

    Connections of `connect` are moved by the caller; those of `serve_socket` and `serve_ring` by `poll`.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        control: DomainControl | None = None,
        actions: ControlActions | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.control: DomainControl = control or NoControl()
        self.actions: ControlActions = actions or NoActions()
        self.admin_state = AdminState()
        self.domains = CoreDomains(self)
        self._core: CData | None = lib.pv_xs_new(secrets.randbits(64))
        self._events = ffi.new("struct pv_xs_event[]", _EVENTS_MAX)
        self._connections: dict[CData, CoreConnection] = {}
        self._pages: dict[int, CData] = {}
        self._now_ms = 0
        self.set_limits(self.limits)
        for name, value in self.limits.quotas().items():
            self.set_quota(DOM0, name, value)

    @property
    def core(self) -> CData:
        """The C hub. `Closed` after `close`."""
        if self._core is None:
            raise Closed("this store is closed")
        return self._core

    def set_limits(self, limits: Limits) -> None:
        """Start with these: quotas of domains that are known already stay."""
        self.limits = limits
        core = lib.pv_xs_limits_of(self.core)
        for number, value in enumerate(limits.quotas().values()):
            core.quotas[number] = value
        core.event_timeout_ms = limits.watch_event_timeout_ms
        core.privileged_output_bytes = limits.privileged_output_bytes

    # -- time

    @property
    def now_ms(self) -> int:
        """Whoever moves bytes sets it; `poll` does so itself."""
        return self._now_ms

    @now_ms.setter
    def now_ms(self, value: int) -> None:
        self._now_ms = value
        lib.pv_xs_set_now(self.core, value)

    def next_timeout_ms(self) -> int | None:
        wait_ms = lib.pv_xs_next_timeout(self.core)
        return wait_ms if wait_ms >= 0 else None

    def on_time(self) -> None:
        lib.pv_xs_on_time(self.core)

    # -- connections

    def connect(self, domid: int = DOM0) -> CoreConnection:
        """A new connection that speaks for `domid`; the caller has made sure that it may."""
        connection = CoreConnection(self, lib.pv_xs_connect(self.core, domid))
        self._connections[connection.core] = connection
        return connection

    def disconnect(self, connection: CoreConnection) -> None:
        """The connection is over: what it holds goes. Doing it twice is harmless."""
        if not connection.freed:
            self._connections.pop(connection.core, None)
            connection.free()

    def next_dirty(self) -> CoreConnection | None:
        """The next connection that whoever moves its bytes must look at: it has output, is broken, or may go on."""
        core = lib.pv_xs_next_dirty(self.core)
        return self._connections[core] if core else None

    def serve_socket(self, domid: int, fd: int) -> None:
        """Serve a client over a connected, nonblocking socket, which the engine owns from now on."""
        check_errno(lib.pv_xs_serve_socket(lib.pv_xs_connect(self.core, domid), fd), "a client")

    def socket_fds(self) -> list[int]:
        """Of the sockets it serves."""
        n = lib.pv_xs_sockets(self.core, ffi.NULL, 0)
        fds = ffi.new("int32_t[]", n)
        lib.pv_xs_sockets(self.core, fds, n)
        return list(fds)

    def ring_connection(self, domid: int) -> CoreConnection:
        """The connection over a domain's ring; a new one if it has none."""
        core = lib.pv_xs_ring_of(self.core, domid)
        if not core:
            return self.connect(domid)
        if core not in self._connections:
            self._connections[core] = CoreConnection(self, core)
        return self._connections[core]

    def serve_ring(self, domid: int, page: memoryview, port: CData, how: int) -> None:
        """Serve a domain over a mapped page and a port, which must outlive `stop_ring`. `how`: PV_XS_RING_*."""
        self.stop_ring(domid)
        pointer = pinned(page, writable=True)
        self._pages[domid] = pointer
        lib.pv_xs_serve_ring(self.ring_connection(domid).core, pointer, port, how)

    def stop_ring(self, domid: int) -> None:
        """The page and the port of a domain are not used any more. Harmless when there are none."""
        pointer = self._pages.pop(domid, None)
        if pointer is not None:
            connection = lib.pv_xs_ring_of(self.core, domid)
            if connection:
                lib.pv_xs_stop_ring(connection)
            ffi.release(pointer)

    def ring_bound(self, domid: int) -> None:
        """The port of a domain's ring knows its peer again."""
        lib.pv_xs_ring_bound(self.ring_connection(domid).core)

    def look_at_ring(self, domid: int) -> None:
        """The port of a domain's ring was pending."""
        lib.pv_xs_ring_look(self.ring_connection(domid).core)

    # -- requests that need more than the engine

    def answer_parked(self) -> None:
        """Answer requests that wait for it, and those that come up meanwhile."""
        domid, request = ffi.new("uint32_t *"), ffi.new("struct pv_xs_request *")
        while True:
            if lib.pv_xs_unresolved(self.core, domid):
                lib.pv_xs_resolve(self.core, self.control.exists(domid[0]))
            elif lib.pv_xs_parked(self.core, request):
                self._answer(self._administer(request.op, bytes(ffi.buffer(request.payload, request.n_payload))))
            else:
                return

    def _administer(self, op: int, payload: bytes) -> Reply:
        try:
            return _ADMINISTER[op](self, payload)
        except Exception:  # a mistake of ours: it fails this request and no other
            log.exception("a request of Dom0 (%s) met an error in xenstored", Op(op).name)
            return Errno.EIO

    def _answer(self, reply: Reply) -> None:
        payload = reply.value if isinstance(reply, Errno) else reply
        lib.pv_xs_answer(self.core, isinstance(reply, Errno), payload, len(payload))

    # -- domains

    def domain_of(self, domid: int) -> CData:
        """struct pv_xs_domain; of one that is not known, with its `known` 0."""
        domain = ffi.new("struct pv_xs_domain *")
        if not lib.pv_xs_get_domain(self.core, domid & 0xFFFFFFFF, domain):
            domain.domid = domid & 0xFFFFFFFF
        return domain

    def domids(self) -> list[int]:
        """Of the known domains, ascending."""
        n = lib.pv_xs_domains(self.core, ffi.NULL, 0)
        domids = ffi.new("uint32_t[]", n)
        return list(domids[0 : min(n, lib.pv_xs_domains(self.core, domids, n))])

    def _change(self, domid: int, **fields: int) -> None:
        domain = self.domain_of(domid)
        for name, value in fields.items():
            setattr(domain, name, value)
        lib.pv_xs_set_domain(self.core, domain)

    def known(self, domid: int) -> CoreDomain | None:
        """The domain, if there is one with this id."""
        domain = self.domains.get(domid) if domid >= 0 else None
        if domain is None and 0 <= domid < DOMID_FIRST_RESERVED and self.control.exists(domid):
            self._change(domid, features=15)
            domain = CoreDomain(self, domid)
        return domain

    def introduce(self, domid: int, page: int, port: int) -> Errno | None:
        """Serve a domain over its ring page. Done again, its event channel is bound anew and its connection reset."""
        domain = self.known(domid)
        if domain is None or domid == DOM0:
            return Errno.EINVAL
        connection = self.ring_connection(domid)
        refusal = self.control.attach_ring(connection, page, port)
        if refusal is not None:
            self.stop_ring(domid)
            self.disconnect(connection)
            return refusal
        connection.reset()
        self._change(domid, gfn=page & 0xFFFFFFFF, port=port)
        self.served(domain)
        return None

    def served(self, domain: CoreDomain) -> None:
        """The domain can use the store from now on: watchers are told, once."""
        if not domain.introduced:
            self._change(domain.domid, introduced=1, shut_down=0)
            lib.pv_xs_fire_special(self.core, _INTRODUCE, domain.domid)

    def release(self, domid: int) -> None:
        """The domain is over for the store: its watches, connections, nodes and permissions go, watchers are told."""
        self.forget([domid])
        lib.pv_xs_fire_special(self.core, _RELEASE, domid)

    def resume(self, domid: int) -> None:
        """The domain runs again."""
        self._change(domid, shut_down=0)

    def set_target(self, domid: int, target: int) -> None:
        """The domain has the rights of another, too."""
        self._change(domid, has_target=1, target=target)

    def shut_down(self, domid: int) -> None:
        """The domain has stopped but is still there: watchers are told once, until RESUME."""
        domain = self.domain_of(domid)
        if domain.known and domain.introduced and not domain.shut_down:
            self._change(domid, shut_down=1)
            lib.pv_xs_fire_special(self.core, _RELEASE, domid)

    def died(self, domids: Iterable[int]) -> None:
        """These domains are gone."""
        gone = [domid for domid in domids if domid in self.domains and domid != DOM0]
        told = [domid for domid in gone if self.domains[domid].introduced]
        if gone:
            self.forget(gone)
        for domid in told:
            lib.pv_xs_fire_special(self.core, _RELEASE, domid)

    def forget(self, domids: list[int]) -> None:
        """Take away all that these domains hold, in one pass over the tree."""
        gone = [connection for connection in self._connections.values() if connection.domain.domid in domids]
        for domid in domids:
            self.stop_ring(domid)
        lib.pv_xs_forget(self.core, domids, len(domids))
        for connection in gone:
            self.disconnect(connection)
            self.control.detach(connection)

    # -- administration

    def set_features(self, domid: int, bits: int) -> None:
        self._change(domid, features=bits)

    def quota(self, domid: int | None, name: str) -> int:
        """A domain's quota, or the global one."""
        return int(lib.pv_xs_quota(self.core, _global(domid), _QUOTA_NUMBER[name]))

    def set_quota(self, domid: int | None, name: str, value: int) -> None:
        """Set a domain's quota, or the global one, which new domains get; 0 is none."""
        lib.pv_xs_set_quota(self.core, _global(domid), _QUOTA_NUMBER[name], value)

    def quota_maxima(self, reset: bool) -> Mapping[str, int]:
        """The highest value seen of each quota's count in any guest; `reset`: forget what was before."""
        maxima = ffi.new("uint32_t[]", len(QUOTAS))
        lib.pv_xs_maxima(self.core, maxima, reset)
        return dict(zip(QUOTAS, maxima, strict=True))

    def check(self) -> list[str]:
        """What is inconsistent, a line each."""
        problem = lib.pv_xs_check(self.core)
        return [ffi.string(problem).decode()] if problem else []

    def counters(self) -> CData:
        """struct pv_xs_statistics."""
        counters = ffi.new("struct pv_xs_statistics *")
        lib.pv_xs_get_statistics(self.core, counters)
        return counters

    def statistics(self) -> Statistics:
        """How large the store is now."""
        counters = self.counters()
        return Statistics(
            nodes=counters.nodes,
            watches=counters.watches,
            connections=counters.connections,
            transactions=counters.transactions,
            memory_bytes=counters.memory_bytes,
        )

    def trace_lines(self, seq: int) -> tuple[int, list[str]]:
        """(number of the first line returned, lines) from a number on; requests are traced for a while from now on."""
        lib.pv_xs_trace_until(self.core, self._now_ms + WANTED_MS)
        first, lost = ffi.new("uint64_t *", seq), ffi.new("uint64_t *")
        buffer = ffi.new("uint8_t[]", PAYLOAD_MAX_BYTES)
        n_bytes = lib.pv_xs_trace_read(self.core, first, lost, buffer, PAYLOAD_MAX_BYTES)
        lines = bytes(ffi.buffer(buffer, n_bytes)).decode("ascii", "replace").splitlines()
        return first[0] - len(lines), lines

    def flush_journal(self) -> bool:
        """Write changes to the journal, if there is one, before others hear of them; whether all are there."""
        return lib.pv_xs_journal_flush(self.core) == 0

    # -- the loop

    def open_loop(self) -> None:
        """Before anything is served."""
        check_errno(lib.pv_xs_loop_open(self.core), "the store's loop")

    def add_descriptor(self, fd: int, mask: int) -> None:
        """Have `poll` tell while a descriptor of the caller's is ready."""
        check_errno(lib.pv_xs_loop_add(self.core, fd, mask), "the store's loop")

    def remove_descriptor(self, fd: int) -> None:
        lib.pv_xs_loop_remove(self.core, fd)

    def hear(self, waiter: CData, *, spin_ns: int) -> None:
        """Hear the ports of rings at a waiter (ffi.NULL: no longer), which is always armed."""
        check_errno(lib.pv_xs_loop_waiter(self.core, waiter, spin_ns), "the store's loop")

    def poll(self, timeout_ms: int = -1) -> list[Event]:
        """Serve without the GIL until there is something for the caller. Parked requests are answered already."""
        core, events = self.core, self._events
        n = lib.pv_xs_poll(core, timeout_ms, events, _EVENTS_MAX)
        self._now_ms = lib.pv_now_ns() // 1_000_000
        found = []
        for event in events[0:n]:
            if event.kind == lib.PV_XS_EVENT_PARKED:
                self.answer_parked()
            else:
                reason = ffi.string(event.reason).decode() if event.reason else None
                found.append(Event(event.kind, event.fd, event.mask, event.domid, reason))
        return found

    def close(self) -> None:
        """End all connections and let go of everything. Harmless when repeated."""
        if self._core is None:
            return
        for domid in list(self._pages):
            self.stop_ring(domid)
        core, self._core = self._core, None
        for connection in self._connections.values():
            connection.free()
        self._connections.clear()
        lib.pv_xs_free(core)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_core", None) is not None:
            self.close()

    def __repr__(self) -> str:
        if self._core is None:
            return "<CoreHub closed>"
        total = self.statistics()
        return f"<CoreHub: {total.nodes} nodes, {total.connections} connections>"


def check_errno(status: int, what: str) -> int:
    """Turn a negative errno of the engine into an error."""
    if status < 0:
        raise ResourceLimit(f"{what} cannot be served: {os.strerror(-status)}")
    return status


def _global(domid: int | None) -> int:
    return lib.PV_XS_GLOBAL if domid is None else domid
