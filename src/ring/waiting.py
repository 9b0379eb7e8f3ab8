# SPDX-License-Identifier: MIT
"""How an end of a ring waits, and who pays for the order between publishing and falling asleep: shared by all rings."""

import os
import time
import uuid
from typing import Any, Literal

from paravirt.errors import InvalidRequest
from paravirt.ring._core import ffi, lib

CData = Any

Wait = Literal["adaptive", "spin", "sleep"]
"""What a wait does: "sleep" at once; "spin" and never sleep; or "adaptive": look first, for as long as waits of this
ring usually take, while a CPU is idle, and then sleep."""

Fence = Literal["full", "process", "host"]
"""Who pays for "publish, then look whether the peer sleeps". "full": a barrier in every push, Xen's way, with any peer.
Otherwise pushing costs no barrier and who goes to sleep calls membarrier(2): "process" when both ends are in this
process, "host" when both processes have called `offer_fence("host")`. For ends of equal trust that have agreed."""

LEARNT: int = lib.PV_RING_LEARNT_NS
"""As `spin_ns`: as long as was learnt from recent waits."""
DEFAULT_MAX_SPIN_NS: int = lib.PV_SPIN_DEFAULT_NS

POLLING_NS = 10_000_000
"""Who may spin that long never sleeps."""
_POLL_SLICE_NS = 1_000_000

_FENCES: tuple[Fence, ...] = ("full", "process", "host")
_FOR_EVER_NS = (1 << 63) - 1


class SpinBudget:
    """What all rings of one peer may spin together, as a share of one CPU, so that no rhythm of theirs can burn more.

    A spin that is shorter than to sleep and be woken (5 us) and finds something is free.
    """

    def __init__(self, share: float) -> None:
        """`share`: 0 to 1. Raises `InvalidRequest`."""
        if not 0 <= share <= 1:
            raise InvalidRequest(f"a share of a CPU is 0 to 1, not {share}")
        self.share = share
        self.core: CData = ffi.new("struct pv_spin_budget *")
        lib.pv_spin_budget_init(self.core, round(share * 1000), time.monotonic_ns())

    @property
    def refused(self) -> int:
        """Spins that were not begun because it was spent."""
        return int(self.core.refused)

    @property
    def left_ns(self) -> int:
        """What can be spun now; negative when it is overdrawn."""
        return int(self.core.left_ns)

    def __repr__(self) -> str:
        return f"<SpinBudget {self.share:g} of a CPU, {self.left_ns / 1e6:.1f} ms left>"


def fence_number(fence: Fence) -> int:
    """PV_FENCE_*. Raises `InvalidRequest`."""
    try:
        return _FENCES.index(fence)
    except ValueError:
        raise InvalidRequest(f"a fence is one of {', '.join(_FENCES)}, not {fence!r}") from None


def fence_name(number: int) -> Fence:
    return _FENCES[number]


def offer_fence(fence: Fence) -> bool:
    """Ready this process for a fence, for as long as it runs; False where the kernel refuses."""
    return bool(lib.pv_fence_register(fence_number(fence)) == 0)


_words: dict[int, str] = {}


def fence_word(fence: Fence) -> str:
    """What to tell a peer over the store to offer it a fence: "host", or "process:" and a word of this process alone.

    Empty for the full one, and where the kernel refuses.
    """
    if fence == "full" or not offer_fence(fence):
        return ""
    if fence == "host":
        return "host"
    return "process:" + _words.setdefault(os.getpid(), uuid.uuid4().hex)


def fence_for(word: str) -> Fence:
    """The fence to use with a peer that offered this word: the full one if it is not in this process, or unknown."""
    fences: tuple[Fence, ...] = ("process", "host")
    return next((fence for fence in fences if word and fence_word(fence) == word), "full")


def spin_limit(wait: Wait, max_spin_ns: int) -> int:
    """A way of waiting as one number, the longest spin: 0 for "sleep", `POLLING_NS` for "spin". `InvalidRequest`."""
    if wait not in ("adaptive", "spin", "sleep"):
        raise InvalidRequest(f"a wait is adaptive, spin or sleep, not {wait!r}")
    if max_spin_ns < 0:
        raise InvalidRequest(f"a spin takes 0 or more nanoseconds, not {max_spin_ns}")
    return {"adaptive": max_spin_ns, "spin": POLLING_NS, "sleep": 0}[wait]


def take_spin(limit_ns: int) -> int:
    """For who may spin so long: the `spin_ns` of `Ring.take`, when a `Ring.wait` by `wait_after` follows it."""
    return LEARNT if 0 < limit_ns < POLLING_NS else min(limit_ns, _POLL_SLICE_NS)


def wait_after(limit_ns: int) -> Wait:
    """What is left to do when such a `take` has found nothing."""
    return "sleep" if limit_ns < POLLING_NS else "spin"


def spin_of(wait: Wait, max_spin_ns: int | None) -> tuple[int, int]:
    """(spin_ns for the C core, limit of an adaptive spin in ns). Raises `InvalidRequest`."""
    most_ns = DEFAULT_MAX_SPIN_NS if max_spin_ns is None else max_spin_ns
    if most_ns < 0:
        raise InvalidRequest(f"a spin takes 0 or more nanoseconds, not {most_ns}")
    if wait == "adaptive":
        return LEARNT, most_ns
    if wait == "spin":
        return _FOR_EVER_NS, most_ns
    if wait == "sleep":
        return 0, most_ns
    raise InvalidRequest(f"a wait is adaptive, spin or sleep, not {wait!r}")
