# SPDX-License-Identifier: MIT
"""Pages that were freed while the peer still uses them: kept aside, tried again, counted by who had them. Pure.

The counterpart of Linux' list of deferred gnttab_end_foreign_access. A page whose pin stays for `LEAK_AFTER_S` is
called leaked: it still comes back when the peer lets go, but somebody should ask why it does not.

A peer lets go by one store that tells nobody, so there is a look whenever a page could be of use: some at every
`allocate` and `free`, all before an `allocate` fails, and from time to time while somebody waits for free pages. A page
that nobody needs wakes nobody.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

LEAK_AFTER_S = 60.0
TRIES_AT_ONCE = 10
"""So many pages are tried by those who only pass by."""


@dataclass(slots=True)
class _Entry:
    page: int
    owner: str
    since_s: float
    leaked: bool = False


class DeferredFrees:
    """Not thread-safe: its user's lock guards it."""

    def __init__(self, what: str, take_back: Callable[[int], bool], clock: Callable[[], float]) -> None:
        """`what`: whose pages, for the log. `take_back(page)`: revoke it; False while the peer uses it."""
        self._what = what
        self._take_back = take_back
        self._clock = clock
        self._entries: deque[_Entry] = deque()
        self.deferrals = 0
        """Pages that ever had to wait."""

    def __len__(self) -> int:
        return len(self._entries)

    def free(self, page: int, owner: str) -> bool:
        """Take a page back now (True), or keep it until the peer lets go."""
        if self._take_back(page):
            return True
        self._entries.append(_Entry(page, owner, self._clock()))
        self.deferrals += 1
        return False

    def retry(self, tries: int = TRIES_AT_ONCE) -> list[int]:
        """Try the pages whose turn it is; those that came back."""
        if not self._entries:
            return []
        back, now, leaked = [], self._clock(), Counter[str]()
        for _ in range(min(tries, len(self._entries))):
            entry = self._entries.popleft()
            if self._take_back(entry.page):
                back.append(entry.page)
                continue
            if not entry.leaked and now - entry.since_s >= LEAK_AFTER_S:
                entry.leaked = True
                leaked[entry.owner] += 1
            self._entries.append(entry)
        for owner, n in leaked.items():
            log.warning(
                "%d pages of %s are still used by %s, %.0f s after their end", n, owner, self._what, LEAK_AFTER_S
            )
        return back

    def retry_all(self) -> list[int]:
        return self.retry(len(self._entries))

    def held_by_owner(self) -> dict[str, int]:
        """Pages that wait."""
        return dict(Counter(entry.owner for entry in self._entries))

    def leaked_by_owner(self) -> dict[str, int]:
        """Those of them that are called leaked."""
        return dict(Counter(entry.owner for entry in self._entries if entry.leaked))
