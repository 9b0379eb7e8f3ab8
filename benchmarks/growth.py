# SPDX-License-Identifier: MIT
"""What one more disk costs a host that has many: from 10 to 1,000, each of a domain of its own.

    python -m benchmarks.growth [--plot FILE.svg] [DISKS ...]

The daemons are processes, the domains of the many are played by this one; 20 more are processes of their own, whose
disks are open all the time and are not counted. Costs are for each of the many disks: nothing may grow by more than 1.5
times.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from paravirt.frontend.domain import Domain
from paravirt.frontend.load import run_load
from paravirt.frontend.vbd import Disk
from paravirt.host import vbd
from paravirt.host.launch import DomainProcess
from paravirt.hypervisor.client import Hypervisor
from paravirt.hypervisor.info import DomainInfo
from paravirt.ring.blkload import LoadJob
from paravirt.testing.bench.machine import machine
from paravirt.testing.temporary import TemporaryHost

SIZES = (10, 30, 100, 300, 1000)
DISK_BYTES = 1 << 20
MOST = 1.5
IDLE_S = 2.0
SETTLE_S = 1.0
BUSY_S = 0.2
DAEMONS = ("hypervisor", "xenstored", "backend")


@dataclass(frozen=True)
class Cost:
    """Of one disk among `disks`; of the busy one: what it gets."""

    disks: int
    attach_ms: float
    connect_ms: float
    detach_ms: float
    daemons_kib: float
    """Memory of the three daemons."""
    frontend_kib: float
    threads: float
    descriptors: float
    """Of all processes together."""
    idle_wakeups: float
    """A second, of all processes and disks together."""
    busy_iops: float
    """Of one disk, 32 in flight, while all others are idle."""
    busy_p50_us: float
    """With 1 in flight."""


NAMES = {
    "attach_ms": "attach, ms",
    "connect_ms": "connect, ms",
    "detach_ms": "close and detach, ms",
    "daemons_kib": "memory of the daemons, KiB",
    "frontend_kib": "memory of the frontend, KiB",
    "threads": "threads",
    "descriptors": "descriptors",
    "idle_wakeups": "wake-ups a second, all together",
    "busy_iops": "one busy disk, thousand I/Os a second",
    "busy_p50_us": "one busy disk, median µs",
}
COSTS = tuple(name for name in NAMES if not name.startswith("idle"))


class Many:
    """Domains of this process, each with a disk."""

    def __init__(self, host: TemporaryHost, n: int) -> None:
        self.host = host
        self.infos: list[DomainInfo] = [host.create_domain(f"many{i}", isolated=True) for i in range(n)]
        self.domains = [Domain(Hypervisor.from_fd(host.hypervisor.domain_socket(each.domid))) for each in self.infos]
        self.disks: list[Disk] = []

    def attach(self) -> None:
        for info in self.infos:
            vbd.attach(self.host.store, info.domid, str(DISK_BYTES), driver="memory")

    def connect(self) -> None:
        self.disks = [domain.open_disk(queues=1) for domain in self.domains]

    def detach(self) -> None:
        for disk, info in zip(self.disks, self.infos, strict=True):
            disk.close()
            vbd.detach(self.host.store, info.domid, "xvda")

    def close(self) -> None:
        for domain in self.domains:
            domain.close()


def run_real(host: TemporaryHost, n: int, stack: ExitStack) -> None:
    """Domains that are processes; their disks are open until the end."""
    program = (
        "import sys, paravirt; d = paravirt.Domain.from_environment().open_disk(); print(flush=True); sys.stdin.read()"
    )
    started: list[DomainProcess] = []
    for i in range(n):
        info = host.create_domain(f"real{i}")
        vbd.attach(host.store, info.domid, str(DISK_BYTES), driver="memory")
        command = [sys.executable, "-c", program]
        process = stack.enter_context(host.run(info, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert process.stdin is not None
        stack.callback(process.stdin.close)
        started.append(process)
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()


def memory_kib(pid: int | str) -> int:
    """What it has for itself and its share of what it shares."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


def switches(pid: int | str) -> int:
    """Times that its threads were woken."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            lines = (task / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return total


def count(pid: int | str, folder: str) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/{folder}").iterdir())


def timed_ms(call: Callable[[], None], n: int) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000 / n


def measure(n: int, n_real: int) -> Cost:
    with ExitStack() as stack:
        host = stack.enter_context(TemporaryHost(log_level="error", memory_mib=64 * 1024))
        run_real(host, n_real, stack)
        daemons = [host.pid(name) for name in DAEMONS]
        everybody: list[int | str] = [*daemons, "self"]
        many = Many(host, n)
        stack.callback(many.close)
        attach_ms = timed_ms(many.attach, n)
        before = [memory_kib(pid) for pid in everybody]
        threads, descriptors = ([count(pid, folder) for pid in everybody] for folder in ("task", "fd"))
        connect_ms = timed_ms(many.connect, n)
        more_kib = [memory_kib(pid) - then for pid, then in zip(everybody, before, strict=True)]
        more_threads = sum(count(pid, "task") for pid in everybody) - sum(threads)
        more_descriptors = sum(count(pid, "fd") for pid in everybody) - sum(descriptors)
        time.sleep(SETTLE_S)
        woken, start = sum(map(switches, everybody)), time.monotonic()
        time.sleep(IDLE_S)
        woken_a_second = (sum(map(switches, everybody)) - woken) / (time.monotonic() - start)
        job = LoadJob("randread", 4096, 32, n_bytes=DISK_BYTES, seconds=BUSY_S)
        busy = max((run_load(many.disks[0], job) for _ in range(3)), key=lambda result: result.reads / result.seconds)
        alone = run_load(many.disks[0], LoadJob("randread", 4096, 1, n_bytes=DISK_BYTES, seconds=BUSY_S))
        return Cost(
            disks=n,
            attach_ms=attach_ms,
            connect_ms=connect_ms,
            detach_ms=timed_ms(many.detach, n),
            daemons_kib=sum(more_kib[:-1]) / n,
            frontend_kib=more_kib[-1] / n,
            threads=more_threads / n,
            descriptors=more_descriptors / n,
            idle_wakeups=woken_a_second,
            busy_iops=busy.reads / busy.seconds / 1000,
            busy_p50_us=alone.latency.percentiles_ns[50.0] / 1000,
        )


def median_of(costs: list[Cost]) -> Cost:
    fields = {name: statistics.median(getattr(cost, name) for cost in costs) for name in NAMES}
    return Cost(disks=costs[0].disks, **fields)


def growth(name: str, first: Cost, cost: Cost) -> float:
    """How many times worse than with the fewest disks."""
    then, now = getattr(first, name), getattr(cost, name)
    if name == "busy_iops":
        then, now = now, then
    return float(now / then) if then > 0 else 1.0


def show(console: Console, costs: list[Cost]) -> None:
    table = Table("", *(str(cost.disks) for cost in costs), "growth", "verdict")
    for name, title in NAMES.items():
        values = [f"{getattr(cost, name):.3g}" for cost in costs]
        grown = growth(name, costs[0], costs[-1])
        judged = name in COSTS
        verdict = ("[green]met[/]" if grown <= MOST else "[red]missed[/]") if judged else ""
        table.add_row(title, *values, f"{grown:.2f}" if judged else "", verdict)
    console.print(table)


def plot(path: Path, costs: list[Cost]) -> None:
    """How many times the cost with the fewest disks, by the number of disks."""
    import pygal

    config = pygal.Config(js=[], title="cost of a disk, relative to few disks", x_title="disks", width=900, height=500)
    config.logarithmic, config.range, config.x_labels = False, (0, 2), [str(cost.disks) for cost in costs]
    lines = pygal.Line(config)
    for name in COSTS:
        lines.add(NAMES[name], [growth(name, costs[0], cost) for cost in costs])
    path.write_text(str(lines.render(is_unicode=True)))


@click.command()
@click.argument("sizes", nargs=-1, type=click.IntRange(1, 4000), metavar="[DISKS ...]")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Of up to 100 disks; the median counts.")
@click.option(
    "--real", "n_real", type=click.IntRange(0), default=20, help="Domains that are processes, beside the many."
)
@click.option("--plot", "picture", type=click.Path(path_type=Path), metavar="FILE", help="An SVG of the curve.")
@click.option("--json", "as_json", is_flag=True)
def main(sizes: tuple[int, ...], rounds: int, n_real: int, picture: Path | None, as_json: bool) -> None:
    """What one more disk costs a host that has many."""
    console = Console()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    costs = []
    # Drawn when it changes: a thread that draws would be counted among the wake-ups.
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        for n in progress.track(sizes or SIZES, description="disks"):
            costs.append(median_of([measure(n, n_real) for _ in range(rounds if n <= 100 else 1)]))
    if as_json:
        console.print_json(json.dumps([asdict(cost) for cost in costs]))
    else:
        console.print(f"[dim]{', '.join(f'{key} {value}' for key, value in machine().items())}[/]")
        show(console, costs)
    if picture is not None:
        plot(picture, costs)


if __name__ == "__main__":
    main()
