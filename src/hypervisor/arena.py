# SPDX-License-Identifier: MIT
"""An arena as the process sees it that owns its pages: an allocator and the granter's half of the grants."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from paravirt.errors import Closed, InvalidRequest, ResourceLimit
from paravirt.hypervisor.deferred import DeferredFrees
from paravirt.hypervisor.link import Link, Reply
from paravirt.hypervisor.messages import Op
from paravirt.ring._core import lib
from paravirt.ring.grant import Granter, entries_bytes
from paravirt.ring.memory import PAGE_BYTES, Mapping, Provider

CData = Any

_ZEROS = bytes(64 * 1024)

FIRST_LOOK_S, LAST_LOOK_S = 0.001, 1.0
"""How often somebody looks whether the peer has let go of pages that a `when_free` waits for."""


def map_and_close(fd: int, n_bytes: int) -> Mapping:
    """Takes the descriptor."""
    try:
        return Mapping(fd, n_bytes)
    finally:
        os.close(fd)


def provider_of(reply: Reply) -> Provider:
    """What the memory of an arena is made of."""
    return "posix" if reply.message.arena.flags & lib.PV_ARENA_POSIX else "memfd"


@dataclass(frozen=True, slots=True)
class ArenaStatistics:
    """Pages of an arena as its owner sees them, now."""

    pages: int
    free_pages: int
    granted_pages: int
    """Granted to the peer now."""
    held_pages: int
    """Freed by us, but still used by the peer: they come back when it lets go."""
    leaked_pages: int = 0
    """Of these: for more than a minute."""
    deferrals: int = 0
    """Pages that were ever held."""
    used_by_owner: dict[str, int] = field(default_factory=dict)
    """Pages that are allocated, by the `owner` of their `allocate`."""
    held_by_owner: dict[str, int] = field(default_factory=dict)
    leaked_by_owner: dict[str, int] = field(default_factory=dict)


class PageRun:
    """Pages of an arena that stand side by side, zeroed. Made by `Arena.allocate`, ended by `Arena.free`."""

    def __init__(self, arena: "Arena", page: int, n_pages: int, owner: str) -> None:
        self.arena = arena
        self.owner = owner
        self.page = page
        """Number of the first page in the arena."""
        self.n_pages = n_pages

    @property
    def gref(self) -> int:
        """Reference of the first page; the others follow."""
        return self.arena.base + self.page

    @property
    def mapping(self) -> Mapping:
        """The memory of the whole arena."""
        return self.arena.memory

    @property
    def offset_bytes(self) -> int:
        """In `mapping`."""
        return self.page * PAGE_BYTES

    @property
    def n_bytes(self) -> int:
        """Of all its pages."""
        return self.n_pages * PAGE_BYTES

    @property
    def address(self) -> int:
        """Where the first page stands in this process."""
        return self.mapping.address + self.offset_bytes

    @property
    def view(self) -> memoryview:
        """Its bytes, writable. One that is kept keeps the memory of the arena mapped."""
        return self.mapping.view[self.offset_bytes : self.offset_bytes + self.n_bytes]

    def pointer(self, c_type: str = "uint8_t *", offset_bytes: int = 0) -> CData:
        """A C pointer into it; it keeps nothing alive."""
        return self.mapping.pointer(c_type, self.offset_bytes + offset_bytes)

    def __repr__(self) -> str:
        return f"<PageRun grefs {self.gref}..{self.gref + self.n_pages - 1}>"


class Arena:
    """Memory this process shares with one other domain. Thread-safe; a context manager.

    Whoever maps it keeps it after `close`, until it lets go; its pages are the broker's then.
    """

    def __init__(self, link: Link, reply: Reply, peer: int, on_close: Callable[["Arena"], None]) -> None:
        """From the broker's reply; made by `Hypervisor`."""
        arena = reply.message.arena
        self.base: int = arena.gref
        self.n_pages: int = arena.n_pages
        self.peer = peer
        self.provider = provider_of(reply)
        self._link = link
        self._on_close = on_close
        self._lock = threading.Lock()
        self._runs: dict[int, PageRun] = {}
        self._free: list[tuple[int, int]] = [(0, self.n_pages)]
        self._used = bytearray(self.n_pages)  # 1: somebody has had the page
        self._held = DeferredFrees(f"domain {peer}", self._take_back, time.monotonic)
        self._callbacks: list[tuple[int, Callable[[], None]]] = []
        self._looking = False  # a thread does, for `when_free`
        self._closing = threading.Event()
        try:
            self._entries = map_and_close(reply.take_fd(), entries_bytes(self.n_pages))
            try:
                self.memory = map_and_close(reply.take_fd(), self.n_pages * PAGE_BYTES)
            except BaseException:
                self._entries.close()
                raise
        except BaseException:
            link.do_quietly(Op.ARENA_DESTROY, self._fill)
            raise
        self.granter = Granter(self._entries, base=self.base, n_pages=self.n_pages, peer=peer)
        self._closed = False

    def allocate(self, n_pages: int = 1, *, owner: str = "unnamed") -> PageRun:
        """Pages that stand side by side, zeroed. Raises `ResourceLimit` when there are none.

        `owner`: for whom, in the statistics of what is used and what the peer does not let go.
        """
        if n_pages < 1:
            raise InvalidRequest(f"{n_pages} pages cannot be allocated")
        with self._lock:
            self._check_open()
            self._came_back(self._held.retry())
            start = self._find(n_pages)
            if start is None:
                self._came_back(self._held.retry_all())
                start = self._find(n_pages)
            if start is None:
                raise ResourceLimit(f"the arena for domain {self.peer} has no {n_pages} free pages in a row")
            run = self._runs[start] = PageRun(self, start, n_pages, owner)
            page, end = self._used.find(1, start, start + n_pages), start + n_pages
            self._used[start:end] = b"\1" * n_pages
        if page >= 0:
            self._wipe(page, end)
        return run

    def _wipe(self, page: int, end: int) -> None:
        """Pages that nobody has had are zeroes, and no memory yet: only what others have had is written.

        A peer that may write can make it otherwise, before and after: what is in a page is never believed.
        """
        with self.memory.view[page * PAGE_BYTES : end * PAGE_BYTES] as view:
            for offset in range(0, len(view), len(_ZEROS)):
                chunk = min(len(_ZEROS), len(view) - offset)
                view[offset : offset + chunk] = _ZEROS[:chunk]

    def _find(self, n_pages: int) -> int | None:
        for i, (start, length) in enumerate(self._free):
            if length >= n_pages:
                self._free[i : i + 1] = [(start + n_pages, length - n_pages)] if length > n_pages else []
                return start
        return None

    def free(self, run: PageRun) -> int:
        """Take the run's grants and pages back; how many of them the peer still uses, which wait until it lets go."""
        with self._lock:
            if self._closed:
                return 0
            if run.arena is not self or self._runs.get(run.page) is not run:
                raise InvalidRequest(f"{run} is not allocated")
            del self._runs[run.page]
            back = [page for page in range(run.page, run.page + run.n_pages) if self._held.free(page, run.owner)]
            self._came_back(back)
            self._came_back(self._held.retry())
            callbacks = self._due_callbacks()
        for callback in callbacks:
            callback()
        return run.n_pages - len(back)

    def when_free(self, n_pages: int, callback: Callable[[], None]) -> None:
        """Call this once when so many pages are free: at once if they are, else from whoever frees or asks for
        statistics, or from a thread that looks after pages the peer still uses, as long as anybody waits for them.

        For a frontend that has stopped its queue: gnttab_request_free_callback.
        """
        with self._lock:
            self._check_open()
            self._callbacks.append((n_pages, callback))
            callbacks = self._due_callbacks()
        for due in callbacks:
            due()

    def _retry_for_callbacks(self) -> None:
        """In a thread of its own: nobody tells when a peer lets go of a page, so look, less and less often."""
        delay_s = FIRST_LOOK_S
        while True:
            self._closing.wait(delay_s)
            delay_s = min(2 * delay_s, LAST_LOOK_S)
            with self._lock:
                self._came_back([] if self._closed else self._held.retry_all())
                callbacks = [] if self._closed else self._due_callbacks()
                done = self._closed or not self._callbacks or not len(self._held)
                if done:
                    self._looking = False
            for callback in callbacks:
                callback()
            if done:
                return

    def grant(self, gref: int, *, read_only: bool = False) -> int:
        """Let the peer use the page with this reference (of a `PageRun`); returns the reference."""
        return self.granter.access(gref - self.base, read_only=read_only)

    def revoke(self, gref: int) -> bool:
        """Take it back; False while the peer still uses it."""
        return self.granter.revoke(gref)

    def statistics(self) -> ArenaStatistics:
        """How the pages are used, after those that the peer has let go were taken back."""
        with self._lock:
            self._check_open()
            self._came_back(self._held.retry_all())
            used: dict[str, int] = {}
            for run in self._runs.values():
                used[run.owner] = used.get(run.owner, 0) + run.n_pages
            leaked = self._held.leaked_by_owner()
            statistics = ArenaStatistics(
                pages=self.n_pages,
                free_pages=self._n_free(),
                granted_pages=self.granter.statistics().granted,
                held_pages=len(self._held),
                leaked_pages=sum(leaked.values()),
                deferrals=self._held.deferrals,
                used_by_owner=used,
                held_by_owner=self._held.held_by_owner(),
                leaked_by_owner=leaked,
            )
            callbacks = self._due_callbacks()
        for callback in callbacks:
            callback()
        return statistics

    def _n_free(self) -> int:
        return sum(length for _, length in self._free)

    def _due_callbacks(self) -> list[Callable[[], None]]:
        """Those that have waited long enough; somebody goes on looking for the others."""
        if not self._callbacks:
            return []
        free = self._n_free()
        due = [callback for n_pages, callback in self._callbacks if n_pages <= free]
        self._callbacks = [(n_pages, callback) for n_pages, callback in self._callbacks if n_pages > free]
        if self._callbacks and len(self._held) and not self._looking:
            self._looking = True
            threading.Thread(target=self._retry_for_callbacks, name="arena-free", daemon=True).start()
        return due

    def _take_back(self, page: int) -> bool:
        gref = self.base + page
        return not self.granter.is_granted(gref) or self.granter.revoke(gref)

    def _came_back(self, pages: list[int]) -> None:
        """Pages whose last pin is gone are free again."""
        for page in pages:
            self._insert_free(page)

    def _insert_free(self, page: int) -> None:
        """Add one page to the sorted list of free ranges, joined with its neighbours."""
        low, high = 0, len(self._free)
        while low < high:
            middle = (low + high) // 2
            if self._free[middle][0] < page:
                low = middle + 1
            else:
                high = middle
        start, end = page, page + 1
        if low < len(self._free) and self._free[low][0] == end:
            end += self._free.pop(low)[1]
        if low and sum(self._free[low - 1]) == start:
            low -= 1
            start = self._free.pop(low)[0]
        self._free.insert(low, (start, end - start))

    def _check_open(self) -> None:
        if self._closed:
            raise Closed("this arena is closed")

    def close(self) -> None:
        """Unmap and give it back. Harmless when repeated."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._closing.set()
        self.granter.close()
        self._entries.close()
        self.memory.close()
        self._link.do_quietly(Op.ARENA_DESTROY, self._fill)
        self._on_close(self)

    def _fill(self, request: CData) -> None:
        request.arena.gref = self.base

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " closed" if self._closed else ""
        return f"<Arena for domain {self.peer}, grefs {self.base}..{self.base + self.n_pages - 1}{state}>"
