# SPDX-License-Identifier: MIT
"""Requests and answers of a recording beside those of its replay. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field

from paravirt.protocol.decode import Entry

MAX_TOLD = 100
"""Differences that are kept in full."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One request whose answer, or which itself, is another one now."""

    number: int
    """Of the request in the recording, from 0."""
    what: str
    recorded: str
    now: str

    def __str__(self) -> str:
        return f"request {self.number}, {self.what}: recorded {self.recorded}; now {self.now}"


@dataclass(slots=True)
class Report:
    """What came of a replay."""

    requests: int = 0
    """Of the recording that were replayed."""
    responses: int = 0
    """That came, or were given."""
    skipped: int = 0
    """Requests that cannot be replayed, such as indirect ones."""
    unknown: int = 0
    """Of the requests: the recording does not have their answer."""
    unanswered: int = 0
    """Of the requests: no answer came in time."""
    reordered: int = 0
    """Answers that were given earlier than recorded, because the front end waited for them."""
    beyond: int = 0
    """Requests of the front end that came after the end of the recording."""
    different: int = 0
    seconds: float = 0.0
    torn: str | None = None
    """Why the recording ends too early, if it does."""
    differences: list[Difference] = field(default_factory=list)
    """The first ones."""

    @property
    def is_same(self) -> bool:
        """Everything that could be compared was the same."""
        return not (self.different or self.unanswered or self.beyond)

    def note(self, number: int, what: str, recorded: object, now: object) -> None:
        """One difference."""
        self.different += 1
        if len(self.differences) < MAX_TOLD:
            self.differences.append(Difference(number, what, str(recorded), str(now)))


class Answers:
    """Pairs recorded answers with those that come now, whichever is known first."""

    def __init__(self, report: Report, decode: Callable[[bytes], Entry]) -> None:
        self._report, self._decode = report, decode
        self._recorded: dict[int, Entry] = {}
        self._now: dict[int, Entry] = {}

    def recorded(self, number: int, message: bytes) -> None:
        """The answer of request `number` in the recording."""
        self._meet(number, self._decode(message), self._recorded, self._now)

    def now(self, number: int, message: bytes) -> None:
        """The one that it gets now."""
        self._meet(number, self._decode(message), self._now, self._recorded)

    def _meet(self, number: int, entry: Entry, mine: dict[int, Entry], others: dict[int, Entry]) -> None:
        other = others.pop(number, None)
        if other is None:
            mine[number] = entry
            return
        recorded, now = (entry, other) if mine is self._recorded else (other, entry)
        if (recorded.status, recorded.kind, recorded.fields) != (now.status, now.kind, now.fields):
            self._report.note(number, "its answer", _without_id(recorded), _without_id(now))

    def finish(self) -> None:
        """No more will come."""
        self._report.unknown = len(self._now)


def _without_id(entry: Entry) -> Entry:
    return Entry(entry.kind, None, entry.status, entry.fields, entry.grefs, entry.wrong)
