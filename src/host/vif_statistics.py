# SPDX-License-Identifier: MIT
"""The network devices of a host as their bridges see them: ports, put together with the names of domains."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paravirt.errors import NotFound
from paravirt.protocol.bridge_state import BridgeState, PortState, vif_of_port

NO_PORT = PortState("", "vif", "", -1, {}, {}, ())


@dataclass(frozen=True, slots=True)
class LiveVif:
    """A network device that is attached, on a bridge, or both."""

    domid: int
    """Whose it is."""
    domain: str
    """The name of that domain; its number when it has gone."""
    handle: int
    bridge: str
    port: PortState | None
    """None: it has none, as its backend has not taken it, or does not run."""

    @property
    def name(self) -> str:
        """Domain and number: guest/0."""
        return f"{self.domain}/{self.handle}"

    @property
    def state(self) -> str:
        """The worst of its queues', in a word."""
        if self.port is None:
            return "no backend"
        if not self.port.queues:
            return "not connected"
        states = {"stalled" if queue.stalled else queue.state for queue in self.port.queues}
        return next(word for word in ("failed", "peer", "stalled", "running", *states) if word in states)

    @property
    def shown(self) -> PortState:
        """Its port, one without queues if there is none."""
        return self.port or NO_PORT


def vifs_of(
    states: Iterable[BridgeState], names: Mapping[int, str], attached: Iterable[tuple[int, int, str]] = ()
) -> list[LiveVif]:
    """By domain and number. `names`: of domains. `attached`: domain, number and bridge of those that the store has."""
    found = {
        vif: LiveVif(vif[0], names.get(vif[0], str(vif[0])), vif[1], state.name, port)
        for state in states
        for port in state.ports
        if port.kind == "vif" and (vif := vif_of_port(port.name)) is not None
    }
    for domid, handle, bridge in attached:
        found.setdefault((domid, handle), LiveVif(domid, names.get(domid, str(domid)), handle, bridge, None))
    return [found[vif] for vif in sorted(found)]


def is_named(text: str, domid: int, domain: str, handle: int) -> bool:
    """Whether a user means this device: guest/0, 1/0, vif/1/0, vif1.0, or guest for its number 0."""
    if text == f"vif{domid}.{handle}":
        return True
    owner, _, number = text.removeprefix("vif/").rpartition("/")
    if not owner:
        owner, number = number, "0"
    return owner in (domain, str(domid)) and number == str(handle)


def choose(name: str, there: list[LiveVif]) -> LiveVif:
    """The device that a user named. Raises `NotFound`, which says what there is."""
    for vif in there:
        if is_named(name, vif.domid, vif.domain, vif.handle):
            return vif
    known = ", ".join(vif.name for vif in there[:20]) or "none"
    raise NotFound(f"there is no network device {name!r}; there are: {known}")
