# SPDX-License-Identifier: MIT
"""Which rings are stuck, and which side owes what. Pure: a function of two views of one ring, some time apart.

A ring is stuck when there was something to do in both views and nothing of it was done between them. One view is never
enough: its parts are read one after the other while the ring goes on.
"""

from dataclasses import dataclass
from typing import Literal

from paravirt.looking.view import WRAP, EndView, RingView

Side = Literal["front", "back"]
NAMES: dict[Side, str] = {"front": "frontend", "back": "backend"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing that keeps a ring."""

    kind: str
    """lost-notify, not-asked, masked, stopped, gone, not-taken, held, dead, nonsense, no-back, no-front."""
    owes: Side
    """Who has to do something."""
    text: str
    """For a person."""
    kick: bool = False
    """Whether `paravirt ring kick` may help."""


def verdicts(before: RingView, after: RingView) -> list[Verdict]:
    """What keeps the ring, the worst first; nothing when it goes on or is idle. Both views are of one ring."""
    if after.shared is None:
        return [Verdict("gone", "front", "the memory of the ring is gone")]
    if broken := _dead(after) or _nonsense(before, after):
        return broken
    return [
        *_missing(before, after),
        *_requests_not_taken(before, after),
        *_held(before, after),
        *_responses_not_taken(before, after),
    ]


def _seconds(before: RingView, after: RingView, at_least: float = 0.0) -> str:
    return f"for {max(after.at_s - before.at_s, at_least):.1f} s"


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _other(side: Side) -> Side:
    return "back" if side == "front" else "front"


def _dead(after: RingView) -> list[Verdict]:
    found = []
    sides: tuple[tuple[Side, EndView | None], ...] = (("front", after.front), ("back", after.back))
    for side, end in sides:
        if end is not None and end.dead:
            peer = NAMES[_other(side)]
            text = f"{peer}: broke the protocol, says the {NAMES[side]}; the ring is dead, only a new one helps"
            found.append(Verdict("dead", _other(side), text))
    return found


def _wild(view: RingView) -> dict[str, tuple[Side, str]]:
    """Indexes that cannot be, by their name: who wrote them, and what is wrong."""
    shared, front, back, found = view.shared, view.front, view.back, dict[str, tuple[Side, str]]()
    if shared is None:
        return found
    if back is not None and (shared.req_prod - back.prod) % WRAP > view.size:
        found["req_prod"] = ("front", f"req_prod is {shared.req_prod}, with {back.prod} answered")
    if front is not None and (shared.rsp_prod - front.cons) % WRAP > (front.prod - front.cons) % WRAP:
        sent = (front.prod - front.cons) % WRAP
        found["rsp_prod"] = (
            "back",
            f"rsp_prod is {shared.rsp_prod}, {_many(sent, 'response')} after {front.cons} are due",
        )
    return found


def _nonsense(before: RingView, after: RingView) -> list[Verdict]:
    was, now = _wild(before), _wild(after)
    return [
        Verdict("nonsense", side, f"{NAMES[side]}: {what}, in a ring of {after.size}")
        for name, (side, what) in now.items()
        if name in was and was[name] == now[name]
    ]


def _missing(before: RingView, after: RingView) -> list[Verdict]:
    if after.back is None and before.back is None and after.in_flight:
        text = f"backend: none is connected {_seconds(before, after)}, {_many(after.in_flight, 'request')} wait"
        return [Verdict("no-back", "back", text)]
    if after.front is None and before.front is None and after.back is not None:
        text = f"frontend: no end of it is seen {_seconds(before, after)}, while the backend has the ring"
        return [Verdict("no-front", "front", text)]
    return []


def _requests_not_taken(before: RingView, after: RingView) -> list[Verdict]:
    if before.back is None or after.back is None or after.shared is None:
        return []
    n = min(before.requests_waiting, after.requests_waiting)
    if not n or before.back.cons != after.back.cons or before.back.prod != after.back.prod:
        return []
    what = f"{_many(after.requests_waiting, 'request')} not taken {_seconds(before, after, after.waiting_s)}"
    asked = _passed(after.back.cons, after.shared.req_event, after.shared.req_prod)
    return [_why("back", after.back, what, asked=asked, busy=after.held)]


def _responses_not_taken(before: RingView, after: RingView) -> list[Verdict]:
    if before.front is None or after.front is None or after.shared is None:
        return []
    n = min(before.responses_waiting, after.responses_waiting)
    if not n or before.front.cons != after.front.cons:
        return []
    what = f"{_many(after.responses_waiting, 'response')} not taken {_seconds(before, after)}"
    asked = _passed(after.front.cons, after.shared.rsp_event, after.shared.rsp_prod)
    return [_why("front", after.front, what, asked=asked, busy=0)]


def _passed(cons: int, event: int, prod: int) -> bool:
    """Whether a message that the sleeper asked to be told of was published: event is in (cons, prod]."""
    return 0 < (event - cons) % WRAP <= (prod - cons) % WRAP


def _why(side: Side, end: EndView, what: str, *, asked: bool, busy: int) -> Verdict:
    """Why an end does not take what is there."""
    name, peer, port = NAMES[side], NAMES[_other(side)], end.port
    start = f"{name}: {what}"
    if end.process == "stopped":
        return Verdict("stopped", side, f"{start}, its process {end.pid} is stopped")
    if end.process == "gone":
        return Verdict("gone", side, f"{start}, its process {end.pid} is gone")
    if port is None or not port.asleep:
        if busy:
            return Verdict("not-taken", side, f"{start}, it is awake, with {_many(busy, 'request')} at work")
        return Verdict("not-taken", side, f"{start}, and it does not sleep: it is busy with something else")
    if port.masked:
        pending = "is pending and masked" if port.pending else "is masked"
        return Verdict("masked", side, f"{start}, its event channel {pending}")
    if port.pending:
        return Verdict("not-taken", side, f"{start}, although it was notified", kick=True)
    if not asked:
        if busy or side == "front":
            return Verdict("not-asked", side, f"{start}, it asked to be notified later", kick=True)
        return Verdict("not-asked", side, f"{start}, it sleeps and did not ask to be notified of them", kick=True)
    text = f"{start}, it sleeps, and the {peer} passed the index at which it asked to be told: lost notify"
    return Verdict("lost-notify", _other(side), text + "; try ring kick", kick=True)


def _held(before: RingView, after: RingView) -> list[Verdict]:
    if before.back is None or after.back is None:
        return []
    if not (before.held and after.held) or before.back.prod != after.back.prod:
        return []
    end = after.back
    state = f", its process {end.pid} is {end.process}" if end.process in ("stopped", "gone") else ""
    text = f"backend: holds {_many(after.held, 'request')} {_seconds(before, after, after.held_s)}{state}"
    kind = end.process if state else "held"
    return [Verdict(kind, "back", text)]
