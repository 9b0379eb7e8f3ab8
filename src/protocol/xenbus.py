# SPDX-License-Identifier: MIT
"""Xenbus: device states, the transition table of both roles, device paths.

Pure: what a driver does on seeing the other end's state is looked up in `frontend_step` and `backend_step`; only their
answers change a state. Source: Xen public/io/xenbus.h for the states; the tables follow Linux' blkfront and QEMU's
xen-block, with each deviation explained where it stands.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum, auto

from paravirt.errors import PeerError


class XenbusState(IntEnum):
    """The `state` node of a device directory; a missing node reads as UNKNOWN."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


class FrontendStep(Enum):
    """What a frontend does next."""

    NOTHING = auto()
    NEGOTIATE = auto()  # allocate ring and port, publish our keys, go to INITIALISED
    CONNECT = auto()  # read what the backend published, go to CONNECTED
    REFRESH = auto()  # already connected: the backend rewrote its state, look at `sectors` again
    RECONNECT = auto()  # the backend is a new one: drop the ring, go to INITIALISING, then NEGOTIATE
    CLOSE = auto()  # stop, free everything, go to CLOSED


class BackendStep(Enum):
    """What a backend does next."""

    NOTHING = auto()
    OFFER = auto()  # check the configuration, publish our keys, go to INIT_WAIT
    CONNECT = auto()  # map ring and port, start serving, go to CONNECTED
    RESTART = auto()  # the frontend started over while we served it: disconnect, then OFFER
    CLOSING = auto()  # go to CLOSING, nothing torn down yet
    DISCONNECT = auto()  # stop serving, unmap, go to CLOSED, stay for a reconnect
    REMOVE = auto()  # as DISCONNECT, then forget the device
    FAIL = auto()  # the frontend is in a state it must not be in: report the error, go to CLOSING


_S = XenbusState

# (our state, backend's state) -> step; what is not listed is NOTHING. Handlers read states fresh, so an event may be
# seen twice or a state missed: each row must be right for whoever looks at the two states at any moment.
_FRONTEND: Mapping[tuple[XenbusState, XenbusState], FrontendStep] = {
    (_S.INITIALISING, _S.INIT_WAIT): FrontendStep.NEGOTIATE,
    (_S.INITIALISED, _S.CONNECTED): FrontendStep.CONNECT,
    (_S.CONNECTED, _S.CONNECTED): FrontendStep.REFRESH,
    # A backend that was connected to us never returns to INIT_WAIT: this one has restarted and knows nothing of our
    # ring. (From INITIALISED it is an old event: that backend will find our keys by itself.)
    (_S.CONNECTED, _S.INIT_WAIT): FrontendStep.RECONNECT,
    # UNKNOWN is the backend directory removed by force; treated as CLOSED.
    **{
        (own, gone): FrontendStep.CLOSE
        for own in (_S.INITIALISING, _S.INITIALISED, _S.CONNECTED, _S.CLOSING)
        for gone in (_S.CLOSING, _S.CLOSED, _S.UNKNOWN)
    },
}
# A frontend that starts against a backend that is closing or closed (a reconnect) waits for its INIT_WAIT.
_FRONTEND_STARTING = frozenset({_S.CLOSING, _S.CLOSED, _S.UNKNOWN})

_BACKEND: Mapping[tuple[XenbusState, XenbusState], BackendStep] = {
    (_S.INITIALISING, _S.INITIALISING): BackendStep.OFFER,
    (_S.INITIALISING, _S.INITIALISED): BackendStep.OFFER,
    (_S.INITIALISING, _S.CONNECTED): BackendStep.OFFER,
    (_S.CLOSED, _S.INITIALISING): BackendStep.OFFER,
    # INITIALISED was missed, or the frontend is of Mirage's kind and goes straight to CONNECTED.
    (_S.INIT_WAIT, _S.INITIALISED): BackendStep.CONNECT,
    (_S.INIT_WAIT, _S.CONNECTED): BackendStep.CONNECT,
    (_S.CLOSED, _S.INITIALISED): BackendStep.OFFER,
    # A crashed and rebooted frontend (or kexec): it starts over although we never saw it close.
    (_S.CONNECTED, _S.INITIALISING): BackendStep.RESTART,
    (_S.CLOSING, _S.INITIALISING): BackendStep.RESTART,
    **{(own, _S.CLOSING): BackendStep.CLOSING for own in (_S.INITIALISING, _S.INIT_WAIT, _S.CONNECTED)},
    **{(own, _S.CLOSED): BackendStep.DISCONNECT for own in (_S.INIT_WAIT, _S.CONNECTED, _S.CLOSING)},
    **{(own, _S.UNKNOWN): BackendStep.REMOVE for own in XenbusState},
    **{
        (own, wrong): BackendStep.FAIL
        for own in (_S.INITIALISING, _S.INIT_WAIT, _S.CONNECTED)
        for wrong in (_S.INIT_WAIT, _S.RECONFIGURING, _S.RECONFIGURED)
    },
}


def frontend_step(own: XenbusState, backend: XenbusState, *, was_open: bool = True) -> FrontendStep:
    """The step of a frontend in state `own` that sees the backend in `backend`.

    `was_open` is false until the backend has been seen in a state other than CLOSING, CLOSED and UNKNOWN since the
    frontend started: one that starts over must not take what is left of the last connection for a removal.
    """
    if not was_open and backend in _FRONTEND_STARTING:
        return FrontendStep.NOTHING
    return _FRONTEND.get((own, backend), FrontendStep.NOTHING)


def backend_step(own: XenbusState, frontend: XenbusState, *, online: bool) -> BackendStep:
    """The step of a backend in state `own` that sees the frontend in `frontend`.

    `online` is the toolstack's `online` node: false asks for removal. A device that goes offline while no frontend is
    connected has nobody to wait for and is removed at once (a domain destroyed while connecting).
    """
    if not online and frontend in (_S.INITIALISING, _S.CLOSED, _S.UNKNOWN):
        return BackendStep.REMOVE
    return _BACKEND.get((own, frontend), BackendStep.NOTHING)


@dataclass(frozen=True, slots=True)
class DevicePath:
    """Where one device's two directories stand in xenstore."""

    kind: str  # "vbd", "vif" ...
    frontend_domid: int
    device_id: int
    backend_domid: int = 0

    @property
    def frontend(self) -> str:
        """Its directory in the home of the guest."""
        return f"/local/domain/{self.frontend_domid}/device/{self.kind}/{self.device_id}"

    @property
    def backend(self) -> str:
        """Its directory in the home of the backend."""
        return f"/local/domain/{self.backend_domid}/backend/{self.kind}/{self.frontend_domid}/{self.device_id}"

    @classmethod
    def from_backend(cls, path: str) -> "DevicePath | None":
        """The device whose backend directory is `path` or has `path` in it; None when it is not such a path."""
        parts = path.split("/")
        if len(parts) < 8 or parts[:3] != ["", "local", "domain"] or parts[4] != "backend":
            return None
        numbers = (parts[3], parts[6], parts[7])
        if not all(number.isascii() and number.isdigit() and len(number) < 11 for number in numbers):
            return None
        return cls(parts[5], int(parts[6]), int(parts[7]), int(parts[3]))


def parse_state(text: str | None) -> XenbusState:
    """The state a node's text means: a missing node is UNKNOWN, anything but 0-8 is the other end's error."""
    if text is None:
        return XenbusState.UNKNOWN
    if len(text) == 1 and text in "012345678":
        return XenbusState(int(text))
    raise PeerError(f"state is {text[:40]!r}, not a number from 0 to 8")
