# SPDX-License-Identifier: MIT
"""What is measured of a ring, whoever's ring it is: a `Case`; and one measurement of it: a `Sample`."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from paravirt.errors import InvalidRequest

Mode = Literal["echo", "oneway", "pingpong"]
"""Pairs of request and response with many in flight; requests alone; one batch alone and back."""
MODES: Final[tuple[Mode, ...]] = get_args(Mode)

PROTOCOLS: Final[dict[str, tuple[int, int]]] = {"blkif": (112, 16), "netif-tx": (12, 4), "netif-rx": (8, 8)}
"""Bytes of requests and responses of Xen's devices."""

MOST_SLOTS: Final = 65536


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement's parameters."""

    mode: Mode = "echo"
    batch: int = 32
    """Messages in one call, at most, at both ends."""
    request_bytes: int = 112
    response_bytes: int = 16
    slots: int = 128
    """Messages that fit the ring; a queue with one way each has so many for either."""
    in_flight: int = 128
    """Requests without a response, at most."""

    def __post_init__(self) -> None:
        """Raises `InvalidRequest` for what cannot be measured."""
        if self.mode not in MODES:
            raise InvalidRequest(f"a mode is one of {', '.join(MODES)}, not {self.mode!r}")
        if self.request_bytes < 1 or self.response_bytes < 1:
            raise InvalidRequest(f"messages have a byte at least, not {self.request_bytes} and {self.response_bytes}")
        if not 1 <= self.slots <= MOST_SLOTS or self.slots & (self.slots - 1):
            raise InvalidRequest(f"slots are a power of two up to {MOST_SLOTS}, not {self.slots}")
        if not 1 <= self.in_flight <= self.slots:
            raise InvalidRequest(f"{self.in_flight} requests in flight do not fit {self.slots} slots")
        if not 1 <= self.batch <= self.in_flight:
            raise InvalidRequest(f"a batch of {self.batch} does not fit {self.in_flight} requests in flight")

    def arguments(self, cpus: tuple[int, int], seconds: float) -> list[str]:
        """The command line of a measuring program behind its name."""
        first, second = cpus
        sizes = (self.batch, self.request_bytes, self.response_bytes, self.slots, self.in_flight)
        return [self.mode, str(first), str(second), str(seconds), *map(str, sizes)]

    def flags(self) -> tuple[str, ...]:
        """What the compiler of a measuring program is told of the sizes."""
        return (
            f"-DREQUEST_BYTES={self.request_bytes}",
            f"-DRESPONSE_BYTES={self.response_bytes}",
            f"-DSLOTS={self.slots}",
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement."""

    messages_per_s: float
    """Pairs (echo), requests (oneway), or requests with their responses (pingpong)."""
    p50_ns: float | None
    """Round trip of a batch alone on the ring; only pingpong measures it."""
    p99_ns: float | None
    cpu_s: float
    """User and system time of both ends."""
    notified: float | None = None
    """Notifications a message that either end had to send; counted by this project's ring in Python."""
    sleeps: float | None = None
    """Sleeps a message, of either end; counted there, too."""
