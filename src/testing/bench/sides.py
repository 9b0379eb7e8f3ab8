# SPDX-License-Identifier: MIT
"""What can be measured: this project's ring, in C and in Python, and its peers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

from paravirt.errors import InvalidRequest
from paravirt.ring.memory import PAGE_BYTES
from paravirt.ring.shared import ring_entries
from paravirt.ring.waiting import Fence, Wait
from paravirt.testing.bench.case import Case, Sample
from paravirt.testing.bench.programs import PEERS, RING_PARTS, NotHere, Programs
from paravirt.testing.bench.registry import TABLE, Peer, measure_peer, run_program
from paravirt.testing.ring_bench import RING_HEADER_BYTES, RingRun

Own = Literal["c", "c-in-place", "python", "python-in-place"]
OWN: Final[tuple[Own, ...]] = ("c", "c-in-place", "python", "python-in-place")
"""This project's ring: batches copied in, or messages written into the slots themselves."""

FenceChoice = Literal["full", "asymmetric"]

MOST_PAGES: Final = 16
_C_FENCES: Final[dict[Fence, str]] = {
    "full": "PV_FENCE_FULL",
    "process": "PV_FENCE_PROCESS",
    "host": "PV_FENCE_HOST",
}
_C_WAITS: Final[dict[Wait, int]] = {"spin": 0, "adaptive": 1, "sleep": 2}


@dataclass(frozen=True, slots=True)
class Options:
    """How this project's own ring is used. Peers do it their own way, in two processes."""

    wait: Wait = "adaptive"
    fence: FenceChoice = "full"
    processes: int = 2
    """2, or 1: two threads of it."""

    def __post_init__(self) -> None:
        """Raises `InvalidRequest`."""
        if self.wait not in get_args(Wait) or self.fence not in get_args(FenceChoice) or self.processes not in (1, 2):
            raise InvalidRequest(f"no ring is used like this: {self!r}")

    @property
    def ring_fence(self) -> Fence:
        if self.fence == "full":
            return "full"
        return "process" if self.processes == 1 else "host"


class Side(Protocol):
    """Something that is measured, again and again."""

    name: str

    def measure(self, case: Case, seconds: float) -> Sample:
        """One sample. Raises `NotHere`."""

    def pids(self) -> list[int]:
        """Its processes that outlive a sample."""


def ring_pages(slots: int, request_bytes: int, response_bytes: int) -> int:
    """Pages of a ring of so many slots, a power of two. Raises `InvalidRequest` when they are more than 16."""
    largest = max(request_bytes, response_bytes)
    pages = -(-(RING_HEADER_BYTES + slots * largest) // PAGE_BYTES)
    if pages > MOST_PAGES:
        raise InvalidRequest(f"{slots} slots of {largest} bytes fit no ring of {MOST_PAGES} pages")
    return pages


def ring_slots(pages: int, request_bytes: int, response_bytes: int) -> int:
    """Slots of a ring of so many pages. Raises `InvalidRequest` when not even one fits."""
    slots = ring_entries(pages * PAGE_BYTES, max(request_bytes, response_bytes))
    if not slots:
        raise InvalidRequest(f"no ring of {request_bytes}/{response_bytes}-byte messages fits {pages} pages (1 to 16)")
    return slots


class CoreSide:
    """This project's ring in C, a program for each case."""

    def __init__(self, name: Own, options: Options, cpus: tuple[int, int], programs: Programs) -> None:
        self.name: str = name
        self._cpus, self._programs = cpus, programs
        self._flags = (
            f"-DFENCE={_C_FENCES[options.ring_fence]}",
            f"-DWAIT={_C_WAITS[options.wait]}",
            f"-DIN_PLACE={int(name == 'c-in-place')}",
            f"-DTHREADS={int(options.processes == 1)}",
        )

    def command(self, case: Case) -> list[str]:
        """The words of its command before MODE, as a peer's. Raises `NotHere`."""
        flags = (*case.flags(), *self._flags)
        return [str(self._programs.compile("core", [PEERS / "core.c"], *flags, core=RING_PARTS))]

    def measure(self, case: Case, seconds: float) -> Sample:
        return run_program([*self.command(case), *case.arguments(self._cpus, seconds)], self.name, seconds)

    def pids(self) -> list[int]:
        return []


class PythonSide:
    """This project's ring in Python: two processes, or one, that stay."""

    def __init__(self, name: Own, run: RingRun) -> None:
        self.name: str = name
        self._run = run

    def measure(self, case: Case, seconds: float) -> Sample:
        return self._run.sample(case, seconds)

    def pids(self) -> list[int]:
        return self._run.pids()


class PeerSide:
    """A peer, a program for each sample."""

    def __init__(self, peer: Peer, cpus: tuple[int, int], programs: Programs) -> None:
        self.name = peer.name
        self._peer, self._cpus, self._programs = peer, cpus, programs

    def measure(self, case: Case, seconds: float) -> Sample:
        return measure_peer(self._peer, case, self._cpus, seconds, self._programs)

    def pids(self) -> list[int]:
        return []


@contextmanager
def open_sides(
    own: Sequence[Own], peers: Sequence[str], sizes: Case, options: Options, cpus: tuple[int, int], programs: Programs
) -> Iterator[list[Side]]:
    """The sides of these names, for cases whose messages and slots are those of `sizes`."""
    with ExitStack() as stack:
        sides: list[Side] = []
        for name in own:
            if name in ("c", "c-in-place"):
                sides.append(CoreSide(name, options, cpus, programs))
                continue
            run = RingRun(
                pages=ring_pages(sizes.slots, sizes.request_bytes, sizes.response_bytes),
                request_bytes=sizes.request_bytes,
                response_bytes=sizes.response_bytes,
                wait=options.wait,
                fence=options.ring_fence,
                in_place=name == "python-in-place",
                processes=options.processes,
                slots=sizes.slots,
            )
            sides.append(PythonSide(name, stack.enter_context(run)))
        sides += [PeerSide(TABLE[name], cpus, programs) for name in peers]
        yield sides


def able(sides: Sequence[Side], case: Case) -> tuple[list[Side], dict[str, str]]:
    """The sides that can measure a case here, tried for a moment; and why the others cannot."""
    there, missing = [], {}
    for side in sides:
        try:
            side.measure(case, 0.01)
        except NotHere as reason:
            missing[side.name] = str(reason)
        else:
            there.append(side)
    return there, missing
