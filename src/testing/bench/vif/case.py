# SPDX-License-Identifier: MIT
"""What is measured of a network device: a `VifCase`; and one measurement of it: a `VifSample`."""

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from paravirt.errors import InvalidRequest
from paravirt.ring.netload import HEADER_BYTES, MOST_BURST
from paravirt.ring.waiting import Wait

Way = Literal["wire", "switch", "guests", "echo", "python", "python-receive"]
"""From a guest to its backend and no further; through the switch, too; to another guest; there and back. By Python: a
guest that sends `Burst`s, or takes them."""
WAYS: Final[tuple[Way, ...]] = get_args(Way)


@dataclass(frozen=True, slots=True)
class VifCase:
    """One measurement's parameters."""

    way: Way = "wire"
    size: int = 64
    """Bytes of a frame; 0: a mix of 64, 570 and 1518, as they were once counted on the Internet."""
    burst: int = 64
    """Frames that are sent together."""
    pages: int = 4
    """Of each ring."""
    wait: Wait = "spin"
    """How both ends wait. Peers spin, or as their kernel has it."""

    def __post_init__(self) -> None:
        """Raises `InvalidRequest` for what cannot be measured."""
        if self.way not in WAYS:
            raise InvalidRequest(f"a way is one of {', '.join(WAYS)}, not {self.way!r}")
        if self.size and not HEADER_BYTES <= self.size <= 65535:
            raise InvalidRequest(f"frames have {HEADER_BYTES} to 65535 bytes, not {self.size}")
        if not 1 <= self.burst <= MOST_BURST:
            raise InvalidRequest(f"1 to {MOST_BURST} frames are sent together, not {self.burst}")
        if self.pages not in (1, 2, 4, 8, 16):
            raise InvalidRequest(f"a ring has 1, 2, 4, 8 or 16 pages, not {self.pages}")
        if self.wait not in ("adaptive", "spin", "sleep"):
            raise InvalidRequest(f"a wait is adaptive, spin or sleep, not {self.wait!r}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the frames of a burst, in turn: at most 8."""
        return (self.size,) if self.size else (64, 64, 64, 64, 570, 570, 1518)

    @property
    def mean_bytes(self) -> float:
        return sum(self.sizes) / len(self.sizes)


@dataclass(frozen=True, slots=True)
class VifSample:
    """One measurement. What was not measured is None."""

    pps: float
    """Packets that arrived, a second; of an echo: that came back."""
    gbit_per_s: float
    """Of frames, without what stands between them on a cable."""
    p50_ns: float | None = None
    """Of the round trip of a burst's frame, as all times."""
    p99_ns: float | None = None
    p999_ns: float | None = None
    front_cpu_ns: float | None = None
    """CPU time of the sender for each packet: seconds for a thousand millions."""
    back_cpu_ns: float | None = None
    """Of the other end; of the thread that moves frames, for ours."""
    dropped: float | None = None
    """Share of what was sent."""
    notified: float | None = None
    """Notifications for each packet."""


def sample_of(told: dict[str, Any], case: VifCase) -> VifSample:
    """What a measuring program prints, as a sample."""
    arrived, seconds = told["arrived"], told["seconds"]
    each = max(1, arrived)

    def per_packet(name: str, unit: float) -> float | None:
        return None if told.get(name) is None else told[name] * unit / each

    return VifSample(
        pps=arrived / seconds if seconds else 0.0,
        gbit_per_s=arrived * case.mean_bytes * 8 / seconds / 1e9 if seconds else 0.0,
        p50_ns=told.get("p50_ns"),
        p99_ns=told.get("p99_ns"),
        p999_ns=told.get("p999_ns"),
        front_cpu_ns=per_packet("front_cpu_s", 1e9),
        back_cpu_ns=per_packet("back_cpu_s", 1e9),
        dropped=1 - arrived / told["sent"] if told.get("sent") else None,
        notified=per_packet("notified", 1.0),
    )
