# SPDX-License-Identifier: MIT
"""`paravirt ring dump`."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from paravirt.cli.context import Context, emit_json, json_option, pass_context
from paravirt.cli.ring.given import messages_of, messages_option

if TYPE_CHECKING:
    from paravirt.looking.dump import SlotView
    from paravirt.looking.stuck import Verdict
    from paravirt.looking.view import EndView, RingView

STUCK_AFTER_S = 0.5


@click.command()
@click.argument("ring")
@click.option("--all", "every", is_flag=True, help="Also what is left of entries that are through.")
@click.option(
    "--after",
    "after_s",
    type=click.FloatRange(0.01, 60),
    default=STUCK_AFTER_S,
    show_default=True,
    metavar="SECONDS",
    help="Without progress for so long, the ring is called stuck.",
)
@messages_option
@json_option
@pass_context
def dump(context: Context, ring: str, every: bool, after_s: float, driver: str | None, as_json: bool) -> None:
    """One live RING: both ends' indexes beside the shared ones, who sleeps, and what is in flight, decoded.

    The ring goes on meanwhile. What was given away while it was read is marked "torn".
    """
    from paravirt.hypervisor.looking import Looker
    from paravirt.looking.dump import slots_of
    from paravirt.looking.stuck import verdicts
    from paravirt.looking.view import view_of

    messages = messages_of(driver)
    with context.hypervisor() as hypervisor, Looker(hypervisor) as looker:
        before = view_of(looker, hypervisor, looker.find(ring))
        time.sleep(after_s)
        found = looker.find(before.place)
        view = view_of(looker, hypervisor, found)
        slots = slots_of(looker, found, view, every=every, messages=messages)
        kept_by = verdicts(before, view)
        if as_json:
            emit_json(_as_json(view, found.end.protocol, slots, kept_by))
            return
        end = found.end
        click.echo(f"{view.name} ({view.place}): {view.size} entries of {end.entry_bytes} bytes, {end.protocol}")
    for line in (*_indexes(view), *_ends(view), *_entries(slots), *_verdicts(view, kept_by)):
        click.echo(line)


def _as_json(view: "RingView", protocol: str, slots: "list[SlotView]", kept_by: "list[Verdict]") -> dict[str, Any]:
    return {
        **asdict(view),
        "protocol": protocol,
        "in_flight": view.in_flight,
        "requests_waiting": view.requests_waiting,
        "held": view.held,
        "responses_waiting": view.responses_waiting,
        "stuck": [asdict(each) for each in kept_by],
        "entries": [{**asdict(slot), "entry": slot.entry.to_json()} for slot in slots],
    }


def _indexes(view: "RingView") -> list[str]:
    def of(part: object, name: str) -> str:
        return "-" if part is None else str(getattr(part, name))

    rows = [
        ("req_prod", of(view.shared, "req_prod"), of(view.front, "prod"), "-"),
        ("req_cons", "-", "-", of(view.back, "cons")),
        ("rsp_prod", of(view.shared, "rsp_prod"), "-", of(view.back, "prod")),
        ("rsp_cons", "-", of(view.front, "cons"), "-"),
        ("req_event", of(view.shared, "req_event"), "-", "-"),
        ("rsp_event", of(view.shared, "rsp_event"), "-", "-"),
    ]
    return [f"{name:<12}{a:>12}{b:>12}{c:>12}" for name, a, b, c in (("", "shared", "frontend", "backend"), *rows)]


def _ends(view: "RingView") -> list[str]:
    """Who they are, and whether they sleep."""
    return [f"{name}: {_end(end)}" for name, end in (("frontend", view.front), ("backend", view.back))]


def _end(end: "EndView | None") -> str:
    if end is None:
        return "not seen"
    words = [f"domain {end.domid}", f"process {end.pid or 'unknown'} {end.process}"]
    words += ["dead: its peer broke the protocol"] if end.dead else []
    port = end.port
    if port is None:
        return ", ".join([*words, "no event channel"])
    words.append("asleep" if port.asleep else "awake")
    state = ["bound" if port.bound else "unbound"]
    state += ["pending"] if port.pending else []
    state += ["masked"] if port.masked else []
    return ", ".join([*words, f"event channel {end.port_number} {' '.join(state)}"])


def _entries(slots: "list[SlotView]") -> list[str]:
    lines = []
    for slot in slots:
        age = "" if slot.age_s is None else f" {_span(*slot.age_s)} ago"
        lines.append(f"{slot.index:>10} {slot.state}{age}{' torn' if slot.torn else ''}: {slot.entry}")
        for gref, grant in zip(slot.entry.grefs, slot.grants, strict=True):
            lines.append(f"{'':>10}   page {gref} {grant.use if grant else 'not granted'}")
    return lines


def _span(at_least: float, at_most: float | None) -> str:
    if at_most is None:
        return f"more than {at_least:.3f} s"
    return f"{at_least:.3f} s" if at_most - at_least < 0.01 else f"{at_least:.3f} to {at_most:.3f} s"


def _verdicts(view: "RingView", kept_by: "list[Verdict]") -> list[str]:
    if kept_by:
        return [f"stuck: {each.text}" for each in kept_by]
    return ["goes on" if view.in_flight else "idle"]
