# SPDX-License-Identifier: MIT
"""`paravirt vif watch`."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from paravirt.cli.context import Context, new_table, pass_context
from paravirt.cli.live import pace_options, page, ticks
from paravirt.cli.vif.stat import COUNTERS, attached, domain_names, look
from paravirt.errors import PeerGone
from paravirt.host.vif_statistics import LiveVif, choose, vifs_of
from paravirt.protocol.bridge_state import BridgeState
from paravirt.testing.report import short

if TYPE_CHECKING:
    from rich.console import RenderableType

COLUMNS = (
    "Device", "Sent packets /s", "Sent Mbit/s", "Received packets /s", "Received Mbit/s", "Waiting", "Wake- ups /s",
    "Drops /s", "Reasons",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """A device over an interval."""

    vif: LiveVif
    interval_s: float
    rates: dict[str, float]
    """A second: of `COUNTERS`, and "wakeups"."""
    drops: dict[str, float]
    """A second, by reason: those that happened."""


@click.command()
@click.argument("devices", nargs=-1, metavar="[DEVICE]...")
@pace_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object a line for each device and interval.")
@pass_context
def watch(context: Context, devices: tuple[str, ...], seconds: float | None, interval: float, as_json: bool) -> None:
    """Watch each DEVICE (guest/0, vif1.0), or all: packets and bits a second both ways, drops by reason, wake-ups.

    Of the guest: what it sent, and what it received. Wake-ups are those of the bridge by this device: none while it is
    looked at anyway. Nothing that is looked at is slowed.
    """
    with ExitStack() as stack:
        hypervisor = stack.enter_context(context.hypervisor())
        known = vifs_of(look(context), domain_names(hypervisor), attached(context))
        chosen = [choose(name, known).name for name in devices]
        show = stack.enter_context(_printer(chosen, as_json))
        watched = VifWatch()
        for _ in ticks(interval, seconds):
            steps = watched.step(_look(context), domain_names(hypervisor))
            if steps is not None:
                show([step for step in steps if not chosen or step.vif.name in chosen])


def _look(context: Context) -> list[BridgeState]:
    """Nothing while no backend runs: it may come back."""
    try:
        return look(context, must=False)
    except PeerGone:
        return []


class VifWatch:
    """Compares each look with the one before."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, int], tuple[int, dict[str, int], dict[str, int]]] = {}
        self._is_first = True

    def step(self, states: list[BridgeState], names: dict[int, str]) -> list[Step] | None:
        """What each did since the look before; None when there was none."""
        times = {state.name: state.time_ns for state in states}
        steps, seen = [], {}
        for vif in vifs_of(states, names):
            now = times[vif.bridge], counters_of(vif), vif.shown.drops
            before = self._before.get((vif.domid, vif.handle))
            seen[vif.domid, vif.handle] = now
            if before is not None and now[0] > before[0]:
                interval_s = (now[0] - before[0]) / 1e9
                rates = rates_of(before[1], now[1], interval_s)
                drops = {name: rate for name, rate in rates_of(before[2], now[2], interval_s).items() if rate}
                steps.append(Step(vif, interval_s, rates, drops))
        self._before = seen
        is_first, self._is_first = self._is_first, False
        return None if is_first else steps


def counters_of(vif: LiveVif) -> dict[str, int]:
    """Those that rates are made of."""
    port = vif.shown
    return {**{name: port.netback(counter) for name, counter in COUNTERS.items()}, "wakeups": port.total("wakeups")}


def rates_of(before: dict[str, int], now: dict[str, int], interval_s: float) -> dict[str, float]:
    """A second. A counter that has begun anew, as the guest has connected again, counts from 0."""
    return {name: (n - before.get(name, 0) if n >= before.get(name, 0) else n) / interval_s for name, n in now.items()}


@contextmanager
def _printer(chosen: list[str], as_json: bool) -> Iterator[Callable[[list[Step]], None]]:
    """What shows a step, of the devices of these names or of all."""
    if as_json:
        yield lambda steps: _print_json(steps, chosen)
    else:
        with page() as draw:
            yield lambda steps: draw(lambda width: _page(steps, chosen))


def _gone(steps: list[Step], chosen: list[str]) -> list[str]:
    there = {step.vif.name for step in steps}
    return [name for name in chosen if name not in there]


def _print_json(steps: list[Step], chosen: list[str]) -> None:
    for step in steps:
        line: dict[str, Any] = {
            "device": step.vif.name,
            "domid": step.vif.domid,
            "handle": step.vif.handle,
            "bridge": step.vif.bridge,
            "state": step.vif.state,
            "interval_s": round(step.interval_s, 6),
            **{f"{name}_per_s": round(rate, 3) for name, rate in step.rates.items()},
            "drops_per_s": {name: round(rate, 3) for name, rate in step.drops.items()},
            "waiting": sum(queue.waiting_frames for queue in step.vif.shown.queues),
        }
        click.echo(json.dumps(line))
    for name in _gone(steps, chosen):
        click.echo(json.dumps({"device": name, "state": "no backend"}))


def _page(steps: list[Step], chosen: list[str]) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    table = new_table((column, column not in ("Device", "Reasons")) for column in COLUMNS)
    table.padding, table.show_edge = (0, 0, 0, 0), False
    for step in steps:
        table.add_row(*(Text(cell) for cell in _cells(step)))
    return Group(table, *(Text(f"{name}: no backend; waiting for it") for name in _gone(steps, chosen)))


def _cells(step: Step) -> tuple[str, ...]:
    rates, state = step.rates, step.vif.state
    return (
        step.vif.name if state == "running" else f"{step.vif.name} ({state})",
        short(rates["sent"]),
        f"{rates['sent_bytes'] * 8 / 1e6:.1f}",
        short(rates["received"]),
        f"{rates['received_bytes'] * 8 / 1e6:.1f}",
        short(sum(queue.waiting_frames for queue in step.vif.shown.queues)),
        short(rates["wakeups"]),
        short(sum(step.drops.values())),
        ", ".join(f"{name} {short(rate)}" for name, rate in sorted(step.drops.items(), key=lambda drop: -drop[1])),
    )
