# SPDX-License-Identifier: MIT
"""What a recording says: its records decoded, chosen, and told as text or values."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from paravirt.protocol.decode import Entry, decoder_for
from paravirt.protocol.recording import Header, Kind, Record


@dataclass(frozen=True, slots=True)
class Shown:
    """One record, decoded."""

    at_s: float
    """Since the recording began."""
    kind: Kind
    index: int
    entry: Entry
    lost: int
    latency_s: float | None = None
    """Of a response: since the request with its id, where that was seen."""

    def to_json(self) -> dict[str, Any]:
        """Of plain values."""
        return {
            "at_s": self.at_s,
            "direction": self.kind.name.lower(),
            "index": self.index,
            **({"lost_before": self.lost} if self.lost else {}),
            **({"latency_us": round(self.latency_s * 1e6, 3)} if self.latency_s is not None else {}),
            "entry": self.entry.to_json(),
        }

    def __str__(self) -> str:
        arrow = ">" if self.kind is Kind.REQUEST else "<"
        latency = "" if self.latency_s is None else f" after {self.latency_s * 1e6:.1f} us"
        return f"{self.at_s:12.6f} {arrow} {self.index:>10} {self.entry}{latency}"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which records to show; None or empty: all."""

    ops: frozenset[str] = frozenset()
    ids: frozenset[int] = frozenset()
    since_s: float | None = None
    until_s: float | None = None
    kind: Kind | None = None

    def takes(self, shown: Shown) -> bool:
        """Whether it is one of them."""
        return (
            (self.kind is None or shown.kind is self.kind)
            and (self.since_s is None or shown.at_s >= self.since_s)
            and (self.until_s is None or shown.at_s <= self.until_s)
            and (not self.ids or shown.entry.id in self.ids)
            and (not self.ops or shown.entry.kind in self.ops)
        )


MAX_UNANSWERED = 1 << 20
"""Ids whose request was seen, for the latency of their responses; more are forgotten."""


def shown(header: Header, records: Iterable[Record]) -> Iterator[Shown]:
    """All of them, decoded."""
    requests, responses = (decoder_for(header.protocol, header.messages) for _ in range(2))
    sent: dict[int, int] = {}
    for record in records:
        decode: Callable[[bytes], Entry]
        decode = requests.request if record.kind is Kind.REQUEST else responses.response
        entry, latency = decode(record.message), None
        if entry.id is not None:
            if record.kind is Kind.REQUEST:
                if len(sent) >= MAX_UNANSWERED:
                    sent.clear()
                sent[entry.id] = record.time_ns
            elif (then := sent.pop(entry.id, None)) is not None:
                latency = max(0, record.time_ns - then) / 1e9
        at_s = (record.time_ns - header.started_ns) / 1e9
        yield Shown(at_s, record.kind, record.index, entry, record.lost, latency)
