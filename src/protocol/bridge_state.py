# SPDX-License-Identifier: MIT
"""What a bridge says of itself to who looks, and what can be asked of it, as values and as JSON. Pure.

A request is one line of JSON, an object whose `do` says what; so is its answer, or {"error": text, "kind": name of a
class of `paravirt.errors`}.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

from paravirt.errors import InvalidRequest
from paravirt.protocol.bridge_link import LinkConfig

MAX_REQUEST_BYTES = 4096
MAX_ANSWER_BYTES = 64 << 20
DEFAULT_BUFFER_BYTES = 4 << 20
MAX_SNAPLEN = 262_144
MAX_COUNT = 1 << 62

CaptureDirection = Literal["both", "in", "out"]
"""in: from what is at the port; out: to it."""
CaptureFormat = Literal["pcapng", "pcap"]
PortKind = Literal["vif", "tap", "program", "null", "pcap", "replay"]
_VIF = re.compile(r"vif([0-9]{1,5})\.([0-9]{1,3})", re.ASCII)

Counters = Mapping[str, int]


def vif_of_port(name: str) -> tuple[int, int] | None:
    """Domain and number of the device whose port has this name."""
    found = _VIF.fullmatch(name)
    return (int(found[1]), int(found[2])) if found else None


# -- what a bridge says


@dataclass(frozen=True, slots=True)
class QueueState:
    """One leg of a port: a queue of a device, or all of another port."""

    state: str
    """running, peer (it broke the protocol), failed."""
    error: str
    counters: Counters
    """Of the leg: packets and bytes in (from it) and out, what it took no more, wake-ups."""
    netback: Counters | None = None
    """Of a device: packets and bytes, tx from the guest and rx to it; what was dropped, by reason."""
    waiting_frames: int = 0
    """For buffers of the guest."""
    waiting_bytes: int = 0
    stalled: bool = False
    """The guest takes nothing, so nothing is kept for it."""


NETBACK_DROPS = (
    "tx_errors", "tx_copy_errors", "tx_checksums", "rx_copy_errors", "rx_full", "rx_expired", "rx_stalled",
    "rx_too_large", "rx_filtered",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PortState:
    """A port of a bridge."""

    name: str
    kind: PortKind
    detail: str
    """Of a file: its name, and how far it is."""
    number: int
    switch: Counters
    """Frames and bytes as the switch counts them: rx from the port, tx to it. All 0 on a wire."""
    refused: Counters
    """What the switch dropped of what came from it, by reason."""
    queues: tuple[QueueState, ...]

    def total(self, name: str) -> int:
        """A counter of the legs, of all together."""
        return sum(queue.counters.get(name, 0) for queue in self.queues)

    def netback(self, name: str) -> int:
        """A counter of the device, of all queues together."""
        return sum((queue.netback or {}).get(name, 0) for queue in self.queues)

    @property
    def drops(self) -> dict[str, int]:
        """Frames that ended here, by reason, without those that never happened: as the switch calls it, as netback does
        (rx: on the way to the guest), `no_room` where the port took no more.
        """
        found = {
            **self.refused,
            **{name: self.netback(name) for name in NETBACK_DROPS},
            "no_room": self.total("dropped"),
        }
        return {name: n for name, n in found.items() if n}

    def split(self) -> "list[PortState]":
        """Each queue as a port of its own."""
        return [
            PortState(f"{self.name} q{i}", self.kind, self.detail, self.number, {}, {}, (queue,))
            for i, queue in enumerate(self.queues)
        ]


@dataclass(frozen=True, slots=True)
class Station:
    """An address that was learnt."""

    mac: str
    vid: int
    port: str
    age_s: float
    """Since it was last heard, to a 256th of the ageing time."""


@dataclass(frozen=True, slots=True)
class BridgeState:
    """A bridge now."""

    name: str
    is_wire: bool
    mirror: str | None
    sleeps: int
    """Times that its thread had nothing to do."""
    time_ns: int
    """When it was looked at, by a clock that does not go back."""
    captures: int
    """Readers of what passes it."""
    ports: tuple[PortState, ...]
    stations: tuple[Station, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, said: Any) -> Self:
        """Raises `InvalidRequest` for what is none."""
        try:
            ports = tuple(
                PortState(**{**port, "queues": tuple(QueueState(**queue) for queue in port["queues"])})
                for port in said["ports"]
            )
            return cls(**{**said, "ports": ports, "stations": tuple(Station(**each) for each in said["stations"])})
        except (TypeError, KeyError, AttributeError) as error:
            raise InvalidRequest(f"no state of a bridge: {error}") from error


# -- what is asked


@dataclass(frozen=True, slots=True)
class CaptureWish:
    """What is to be captured, and how."""

    port: str | None = None
    """None: all ports."""
    direction: CaptureDirection = "both"
    count: int = 0
    """Packets, then it is over; 0: until it is stopped."""
    snaplen: int = 0
    """Bytes that are kept of a frame; 0: all."""
    format: CaptureFormat = "pcapng"
    buffer_bytes: int = DEFAULT_BUFFER_BYTES
    """That wait for the reader, a power of two; what is more is dropped."""

    def __post_init__(self) -> None:
        if self.direction not in get_args(CaptureDirection):
            raise InvalidRequest(f"direction is {self.direction!r}, not one of {', '.join(get_args(CaptureDirection))}")
        if self.format not in get_args(CaptureFormat):
            raise InvalidRequest(f"format is {self.format!r}, not one of {', '.join(get_args(CaptureFormat))}")
        _check_number("count", self.count, MAX_COUNT)
        _check_number("snaplen", self.snaplen, MAX_SNAPLEN)
        _check_number("buffer_bytes", self.buffer_bytes, 1 << 30)


@dataclass(frozen=True, slots=True)
class CaptureReport:
    """What came of a capture."""

    ended: str
    """Why it did."""
    ports: Mapping[str, tuple[int, int]]
    """By port: packets that were captured, and those that were dropped, as the reader was too slow."""

    @property
    def captured(self) -> int:
        return sum(kept for kept, _ in self.ports.values())

    @property
    def dropped(self) -> int:
        return sum(lost for _, lost in self.ports.values())

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ports": {name: list(counts) for name, counts in self.ports.items()}}

    @classmethod
    def from_json(cls, said: Any) -> Self:
        """Raises `InvalidRequest`."""
        try:
            return cls(
                str(said["ended"]), {name: (int(kept), int(lost)) for name, (kept, lost) in said["ports"].items()}
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InvalidRequest(f"no report of a capture: {error}") from error


@dataclass(frozen=True, slots=True)
class Look:
    """The state of all bridges, or of one."""

    bridge: str | None = None
    stations: bool = True
    """With the addresses that were learnt."""


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """Capture at this bridge; None: at the one that has the port."""

    bridge: str | None = None
    wish: CaptureWish = field(default_factory=CaptureWish)


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """Replay a file into this bridge."""

    bridge: str
    link: LinkConfig


Request = Look | CaptureRequest | ReplayRequest
_NAMES: dict[type[Request], str] = {Look: "look", CaptureRequest: "capture", ReplayRequest: "replay"}


def request_line(request: Request) -> bytes:
    """As it is sent."""
    said = asdict(request)
    if isinstance(request, ReplayRequest):
        said["link"] = request.link.to_json()
    return json.dumps({"do": _NAMES[type(request)]} | said).encode() + b"\n"


def parse_request(line: bytes) -> Request:
    """Raises `InvalidRequest`, which says what was wrong."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"a request is {line[:40]!r}, not JSON") from None
    if not isinstance(said, dict):
        raise InvalidRequest("a request is no object of JSON")
    what = said.pop("do", None)
    try:
        if what == "look":
            return Look(_text_or_none(said.pop("bridge", None)), bool(said.pop("stations", True)), **said)
        if what == "capture":
            wish = said.pop("wish", {})
            if not isinstance(wish, dict):
                raise InvalidRequest("wish is no object of JSON")
            bridge = _text_or_none(said.pop("bridge", None))
            return CaptureRequest(bridge, CaptureWish(**wish | {"port": _text_or_none(wish.get("port"))}), **said)
        if what == "replay":
            bridge, link = _text_or_none(said.pop("bridge", None)), said.pop("link", {})
            if bridge is None or not isinstance(link, dict) or link.get("kind") != "replay":
                raise InvalidRequest("a replay is of a link into a bridge")
            return ReplayRequest(bridge, LinkConfig.from_json("replay", link), **said)
    except TypeError as error:
        raise InvalidRequest(f"a request to {what} is wrong: {error}") from None
    raise InvalidRequest(f"do is {str(what)[:40]!r}, not look, capture or replay")


def _text_or_none(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"{str(value)[:40]!r} is no name")
    return value


def _check_number(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise InvalidRequest(f"{name} is {str(value)[:40]!r}, not a number from 0 to {most}")
