# SPDX-License-Identifier: MIT
"""What all questions share: the machine, interleaved samples tagged with core distance, outside load, verdicts."""

import os
import platform
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles
from types import TracebackType
from typing import Literal, Self, TypeVar

HERE = Path(__file__).parent
ROOT = HERE.parent
C_CORE = ROOT / "c_ext"
T = TypeVar("T")

Distance = Literal["same core", "near", "far", "disturbed"]
Verdict = Literal["met", "missed", "inconclusive", "-"]

DISTANCES_NS: tuple[tuple[float, Distance], ...] = ((65, "same core"), (135, "near"), (340, "far"))
FEWEST_PAIRS = 10
MOST_OUTSIDE_LOAD = 0.10
TAG_SECONDS = 0.005


class NotHere(Exception):
    """Something a question needs is not on this machine; the text says what."""


def distance_of(cache_line_ns: float) -> Distance:
    """How far apart two CPUs are that hand a cache line to and fro in that time."""
    return next((name for limit_ns, name in DISTANCES_NS if cache_line_ns < limit_ns), "disturbed")


def most_of_one_distance(tags: Sequence[float]) -> int:
    """How many of the round trips are of the most frequent distance."""
    distances = [distance_of(tag) for tag in tags]
    return max(map(distances.count, distances), default=0)


@dataclass(frozen=True, slots=True)
class Pair:
    """One sample of each side, taken one after the other."""

    ours: float
    theirs: float
    cache_line_ns: float

    @property
    def distance(self) -> Distance:
        return distance_of(self.cache_line_ns)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, _, high = quantiles(values, n=4, method="inclusive")
        return cls(median(values), low, high)

    def show(self, unit: float = 1.0) -> str:
        """The quartiles."""
        return f"{self.low / unit:.3g}-{self.high / unit:.3g}"


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of the result: two sides compared, or ours alone (`theirs` None)."""

    what: str
    ours: Spread
    theirs: Spread | None
    ratio: Spread | None
    """Ours to theirs, pair by pair."""
    peer: str
    mark: str
    verdict: Verdict
    pairs: int
    """Samples that count: of the most frequent distance."""
    distance: Distance
    cache_line_ns: float
    outside_load: float
    """CPU time of others, as a share of one CPU."""
    unit: float = 1e6


@dataclass(frozen=True, slots=True)
class Mark:
    """What is claimed, each where it is not None: a least or a most ratio, value; an empty one claims nothing."""

    ratio: float | None = None
    value: float | None = None
    most_ratio: float | None = None
    most_value: float | None = None
    unit: float = 1e6
    unit_name: str = "M/s"
    """How values are shown."""

    def __str__(self) -> str:
        values = [(">=", self.value), ("<=", self.most_value)]
        ratios = [(">=", self.ratio), ("<=", self.most_ratio)]
        shown = [f"{sign} {value / self.unit:g} {self.unit_name}" for sign, value in values if value is not None]
        return ", ".join(shown + [f"{sign} {ratio:g} x" for sign, ratio in ratios if ratio is not None])

    def judge(self, ours: Spread, ratio: Spread | None) -> Verdict:
        claims = [
            (self.value, 1, ours),
            (self.most_value, -1, ours),
            (self.ratio, 1, ratio),
            (self.most_ratio, -1, ratio),
        ]
        held = [
            seen is not None and sign * seen.median >= sign * claimed
            for claimed, sign, seen in claims
            if claimed is not None
        ]
        return "-" if not held else "met" if all(held) else "missed"


class OutsideLoad:
    """CPU time used by others between start and `share`, from /proc/stat and this run's own CPU time."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy = sum(fields) - fields[3] - fields[4]  # all but idle and iowait; steal is somebody else's
        own = sum(
            usage.ru_utime + usage.ru_stime
            for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        )
        return busy / os.sysconf("SC_CLK_TCK"), own, time.monotonic()

    def share(self, running_cpu_s: float = 0.0) -> float:
        """Of one CPU. `running_cpu_s`: CPU time of own processes that have not ended yet."""
        busy, own, now = (after - before for before, after in zip(self._start, self._now(), strict=True))
        return max(0.0, busy - own - running_cpu_s) / now


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pin(pid: int, cpu: int) -> None:
    """Keep all threads of a process on one CPU, also those it starts later."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpu})


class Bench:
    """The machine to ask, and how long to ask it."""

    def __init__(self, *, pairs: int = 15, seconds: float = 0.2, extra: int = 0) -> None:
        """`extra`: so many more rounds at most, as long as too few are of one distance."""
        self.pairs = pairs
        self.seconds = seconds
        self._extra = extra
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < 2:
            raise NotHere("two CPUs are needed")
        self.cpus = cpus[0], cpus[1]
        self._directory = tempfile.TemporaryDirectory(prefix="paravirt-bench-")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._directory.cleanup()

    @cached_property
    def model_program(self) -> Path:
        """`model.c`, compiled. Raises `NotHere` without a C compiler."""
        return self.compile("model", ["model.c"], ["ring", "ring_wait", "spin", "event", "home", "wait", "wait_late"])

    def compile(self, name: str, sources: Sequence[str], core: Sequence[str] = (), *flags: str) -> Path:
        """A program of the C files here and of parts of the C core. Raises `NotHere` without a C compiler."""
        target = Path(self._directory.name) / name
        files = [HERE / source for source in sources] + [C_CORE / f"pv_{part}.c" for part in core]
        command = ["gcc", "-std=gnu11", "-O2", f"-I{C_CORE}", *flags, *map(str, files), "-o", str(target), "-pthread"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NotHere(f"{name} does not compile: {getattr(error, 'stderr', error)}") from error
        return target

    def model(self, mode: str, seconds: float, *arguments: int) -> float:
        """Run the C model on the two CPUs; its number. Raises `NotHere` for Xen's macros without Xen's header."""
        command = [str(self.model_program), mode, *map(str, self.cpus), str(seconds), *map(str, arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        if done.returncode == 3:
            raise NotHere("Xen's ring.h is not installed (libxen-dev)")
        done.check_returncode()
        return float(done.stdout)

    def cache_line_ns(self) -> float:
        return self.model("cacheline", TAG_SECONDS)

    def interleave(
        self, ours: Callable[[], float], theirs: Callable[[], float], pids: Callable[[], list[int]] = list
    ) -> tuple[list[Pair], float]:
        """Samples of both sides in turn, first one and then the other first; and the outside load meanwhile.

        `pids`: own processes that outlive the samples.
        """
        rounds, load = self.take_turns([ours, theirs], pids)
        return [Pair(first, second, tag) for tag, (first, second) in rounds], load

    def take_turns(
        self, sides: Sequence[Callable[[], T]], pids: Callable[[], list[int]] = list
    ) -> tuple[list[tuple[float, list[T]]], float]:
        """Samples of all sides in turn, each time another one first: for each round the cache line's round trip in ns
        and a sample of each side; and the outside load meanwhile.
        """
        before, load = sum(map(cpu_seconds, pids())), OutsideLoad()
        rounds: list[tuple[float, list[T]]] = []
        for i in range(self.pairs + self._extra):
            if i >= self.pairs and most_of_one_distance([tag for tag, _ in rounds]) >= FEWEST_PAIRS:
                break
            tag, samples = self.cache_line_ns(), {}
            for j in range(len(sides)):
                turn = (i + j) % len(sides)
                samples[turn] = sides[turn]()
            rounds.append((tag, [samples[turn] for turn in range(len(sides))]))
        return rounds, load.share(sum(map(cpu_seconds, pids())) - before)

    @staticmethod
    def compare(
        what: str,
        peer: str,
        pairs: list[Pair],
        load: float,
        mark: Mark,
        *,
        unit: float = 1e6,
        fewest: int = FEWEST_PAIRS,
    ) -> Answer:
        """Judge the samples of the most frequent distance; "inconclusive" when there are not `fewest` of them."""
        distances = [pair.distance for pair in pairs]
        distance = max(distances, key=distances.count)
        counted = [pair for pair in pairs if pair.distance == distance]
        ours, theirs = Spread.of([pair.ours for pair in counted]), Spread.of([pair.theirs for pair in counted])
        ratios = [pair.ours / pair.theirs for pair in counted if pair.theirs > 0]
        ratio = Spread.of(ratios) if ratios else None
        verdict = mark.judge(ours, ratio)
        if verdict != "-" and (len(ratios) < fewest or load > MOST_OUTSIDE_LOAD or distance == "disturbed"):
            verdict = "inconclusive"
        tag = median(pair.cache_line_ns for pair in counted)
        return Answer(what, ours, theirs, ratio, peer, str(mark), verdict, len(counted), distance, tag, load, unit)


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    words = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    model = next((value.strip() for key, _, value in words if key.strip() in ("model name", "Processor")), "unknown")
    return {
        "cpu": model,
        "cpus": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": " ".join(Path("/proc/loadavg").read_text().split()[:3]),
    }
