# SPDX-License-Identifier: MIT
"""Domains and connections of the C engine, as Python sees them: read anew each time. Made by `core.CoreHub`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from paravirt.errors import Closed
from paravirt.ring._core import ffi, lib
from paravirt.xenstore.domains import DOM0
from paravirt.xenstore.limits import QUOTAS

if TYPE_CHECKING:
    from paravirt.xenstore.core import CoreHub

CData = Any

_OUTPUT_BYTES: Final = 256 << 10


class CoreDomain:
    """A domain as the engine has it now: an `admin.AdminDomain`, read anew each time."""

    def __init__(self, hub: CoreHub, domid: int) -> None:
        self._hub = hub
        self.domid = domid

    def _get(self) -> CData:
        return self._hub.domain_of(self.domid)

    @property
    def privileged(self) -> bool:
        return self.domid == DOM0

    @property
    def introduced(self) -> bool:
        return bool(self._get().introduced)

    @property
    def shut_down(self) -> bool:
        return bool(self._get().shut_down)

    @property
    def target(self) -> int | None:
        domain = self._get()
        return domain.target if domain.has_target else None

    @property
    def features(self) -> int:
        return int(self._get().features)

    @property
    def quotas(self) -> Mapping[str, int]:
        return dict(zip(QUOTAS, self._get().quotas, strict=True))

    @property
    def maxima(self) -> Mapping[str, int]:
        return dict(zip(QUOTAS, self._get().maxima, strict=True))

    @property
    def n_nodes(self) -> int:
        return int(self._get().n_nodes)

    @property
    def n_watches(self) -> int:
        return int(self._get().n_watches)

    @property
    def n_transactions(self) -> int:
        return int(self._get().n_transactions)

    @property
    def n_outstanding(self) -> int:
        return int(self._get().n_outstanding)

    @property
    def memory_bytes(self) -> int:
        return int(self._get().memory_bytes)

    @property
    def ring_location(self) -> tuple[int, int]:
        """(frame, port) it was introduced with; (0, 0): it speaks over sockets alone."""
        domain = self._get()
        return domain.gfn, domain.port

    def __repr__(self) -> str:
        return f"<CoreDomain {self.domid}{' introduced' if self.introduced else ''}>"


class CoreDomains(Mapping[int, CoreDomain]):
    """The known domains of an engine."""

    def __init__(self, hub: CoreHub) -> None:
        self._hub = hub

    def __getitem__(self, domid: int) -> CoreDomain:
        if not self._hub.domain_of(domid).known:
            raise KeyError(domid)
        return CoreDomain(self._hub, domid)

    def __iter__(self) -> Iterator[int]:
        return iter(self._hub.domids())

    def __len__(self) -> int:
        return len(self._hub.domids())


class CoreConnection:
    """A connection whose bytes the caller moves: `session.Connection`'s methods."""

    def __init__(self, hub: CoreHub, core: CData) -> None:
        self.hub = hub
        self._core: CData | None = core
        self.domain: Final = CoreDomain(hub, lib.pv_xs_domid(core))
        self.number: int = lib.pv_xs_number(core)

    @property
    def core(self) -> CData:
        """The C connection. `Closed` when it is no more."""
        if self._core is None:
            raise Closed("this connection to the store is closed")
        return self._core

    @property
    def closed(self) -> bool:
        return self._core is None or bool(lib.pv_xs_closed(self._core))

    @property
    def broken(self) -> str | None:
        if self._core is None:
            return None
        reason = lib.pv_xs_broken(self._core)
        return ffi.string(reason).decode() if reason else None

    @property
    def wants_input(self) -> bool:
        return self._core is not None and bool(lib.pv_xs_wants_input(self._core))

    @property
    def n_output_bytes(self) -> int:
        return int(lib.pv_xs_n_output(self._core)) if self._core is not None else 0

    @property
    def n_dropped_events(self) -> int:
        return int(lib.pv_xs_n_dropped_events(self._core)) if self._core is not None else 0

    def feed(self, data: bytes) -> None:
        if lib.pv_xs_feed(self.core, data, len(data)):
            self.hub.answer_parked()

    def resume(self) -> None:
        """Go on with requests that waited, as far as they may be handled now."""
        self.feed(b"")

    def output(self) -> bytes:
        buffer = ffi.new("uint8_t[]", _OUTPUT_BYTES)
        return bytes(ffi.buffer(buffer, lib.pv_xs_output(self.core, buffer, _OUTPUT_BYTES)))

    def sent(self, n_bytes: int) -> None:
        lib.pv_xs_sent(self.core, n_bytes)

    def reset(self) -> None:
        lib.pv_xs_reset(self.core)

    @property
    def freed(self) -> bool:
        return self._core is None

    def free(self) -> None:
        """It is disconnected, if it was not."""
        core, self._core = self._core, None
        if core is not None:
            lib.pv_xs_conn_free(core)

    def __repr__(self) -> str:
        state = "closed" if self.closed else self.broken or f"{self.n_output_bytes} bytes to send"
        return f"<CoreConnection {self.number} of domain {self.domain.domid}: {state}>"
