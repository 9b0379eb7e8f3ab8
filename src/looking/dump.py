# SPDX-License-Identifier: MIT
"""The entries of a live ring, decoded, with their ages and the grants they use.

Which index holds what follows from the shared indexes: from `rsp_prod` on stand requests, before it responses. A back
end may answer in any order, and each response takes the place of the oldest request: so what it holds is known in
number, and by place only as far as it answers in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from paravirt.errors import InvalidRequest, NotFound
from paravirt.hypervisor.looking import Header, LiveRing, Looker
from paravirt.looking.grants import Grant, grants_of
from paravirt.looking.view import WRAP, RingView
from paravirt.protocol.decode import Decoder, Entry, decoder_for
from paravirt.protocol.device import RING_HEADER_BYTES
from paravirt.protocol.layout import MessagePair

State = Literal["not taken", "taken", "response not taken", "old"]


@dataclass(frozen=True, slots=True)
class SlotView:
    """One entry."""

    index: int
    """In the ring: runs freely over 32 bits."""
    state: State
    """A request that was not taken, or was; a response that was not taken; what is left of an old one."""
    entry: Entry
    age_s: tuple[float, float | None] | None
    """Since it was sent (not taken) or taken: at least, at most (None: not known)."""
    grants: tuple[Grant | None, ...]
    """Of each of its references; None: not granted."""
    torn: bool
    """The ring went on while it was read: it may be another message, or half of one."""


def decoder_of(ring: LiveRing, messages: MessagePair | None = None) -> Decoder:
    """For one direction of a live ring. `messages`: of its class, where the caller knows better than the ring."""
    return decoder_for(ring.end.protocol, messages or messages_of(ring))


def messages_of(ring: LiveRing) -> MessagePair | None:
    """The layout of the messages, as far as an end says it in a form that can be used."""
    for end in (ring.back, ring.front):
        request, response = (None, None) if end is None else end.layouts
        if request is None or response is None:
            continue
        try:
            return MessagePair(request, response).checked()
        except InvalidRequest:
            continue
    return None


def slots_of(
    looker: Looker, ring: LiveRing, view: RingView, *, every: bool = False, messages: MessagePair | None = None
) -> list[SlotView]:
    """What is in flight, the oldest first; with `every` also what is left of old entries. Nothing of a ring that is
    gone."""
    if view.shared is None:
        return []
    try:
        memory = looker.memory(ring)
        after = looker.header(ring)
        granted = grants_of(looker, ring.domid, {})
    except NotFound:
        return []
    by_gref = {grant.gref: grant for grant in granted}
    decoder, end = decoder_of(ring, messages), ring.end
    slots = []
    for index, state in _places(view, every=every):
        start = RING_HEADER_BYTES + index % view.size * end.entry_bytes
        is_request = state in ("not taken", "taken")
        message = memory[start : start + (end.request_bytes if is_request else end.response_bytes)]
        if state == "old" and not any(memory[start : start + end.entry_bytes]):
            continue
        entry = decoder.request(message) if is_request else decoder.response(message)
        grants = tuple(by_gref.get(gref) for gref in entry.grefs)
        slots.append(
            SlotView(index, state, entry, _age(ring, index, state), grants, _is_torn(view, after, index, state))
        )
    return slots


def _places(view: RingView, *, every: bool) -> Iterator[tuple[int, State]]:
    """Indexes and what stands there."""
    shared = view.shared
    assert shared is not None
    requests = (shared.req_prod - shared.rsp_prod) % WRAP
    if requests > view.size:
        requests = 0  # nonsense: see the verdicts
    answered = view.responses_waiting
    if every:
        for i in range(view.size - requests, answered, -1):
            yield (shared.rsp_prod - i) % WRAP, "old"
    for i in range(min(answered, view.size - requests), 0, -1):
        yield (shared.rsp_prod - i) % WRAP, "response not taken"
    taken = max(0, requests - view.requests_waiting)
    for i in range(requests):
        yield (shared.rsp_prod + i) % WRAP, "taken" if i < taken else "not taken"


def _age(ring: LiveRing, index: int, state: State) -> tuple[float, float | None] | None:
    if state == "not taken" and ring.front is not None:
        return ring.front.age_of(index)
    if state == "taken" and ring.back is not None:
        return ring.back.age_of(index)
    return None


def _is_torn(view: RingView, after: Header, index: int, state: State) -> bool:
    """Whether the slot was given away between the look at the indexes and the end of the copy."""
    before = view.shared
    assert before is not None
    if state in ("not taken", "taken"):  # until a response stands there
        return (after.rsp_prod - before.rsp_prod) % WRAP > (index - before.rsp_prod) % WRAP
    return (after.req_prod - index) % WRAP > view.size
